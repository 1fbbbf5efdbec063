"""Samplers of the prior on N(0, P): exact flow, orders of convergence, the ancestral law."""

import math

import numpy as np
import pytest
import torch

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.samplers import SAMPLERS, make_sampler
from diffusion_core.samplers.ancestral import ancestral
from diffusion_core.samplers.churn import Churn, churned_heun
from diffusion_core.samplers.ddim import ddim
from diffusion_core.samplers.dpm_solver import dpm_solver_2m
from diffusion_core.samplers.euler import euler
from diffusion_core.samplers.heun import heun

P = 0.49


def gaussian(x, sigma):
    """E[x0 | x] for x0 ~ N(0, P)."""
    return P / (P + sigma.view(-1, 1, 1, 1) ** 2) * x


def flow_error(sampler, num_levels):
    """Against the exact flow x' = x sqrt((P + sigma'^2) / (P + sigma^2))."""
    x = torch.full((1, 1, 3, 5), 1.3, dtype=torch.float64)
    sigmas = power_sigmas(num_levels, 2.0, 0.1, 3.0)
    exact = 1.3 * math.sqrt((P + 0.1**2) / (P + 2.0**2))
    return abs(sampler(gaussian, x, sigmas)[0, 0, 0, 0].item() - exact)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2), (dpm_solver_2m, 2)])
def test_the_error_falls_with_the_order_of_the_method(sampler, order):
    counts = np.array([33, 65, 129, 257])
    errors = [flow_error(sampler, int(n)) for n in counts]
    fitted = -np.polyfit(np.log(counts - 1.0), np.log(errors), 1)[0]
    assert fitted == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("sampler", [euler, heun, dpm_solver_2m])
def test_the_last_level_may_be_zero_and_lands_on_the_denoiser(sampler):
    x = torch.full((2, 1, 3, 5), 0.4, dtype=torch.float64)
    out = sampler(gaussian, x, torch.tensor([0.3, 0.0]))
    torch.testing.assert_close(out, gaussian(x, torch.full((2,), 0.3, dtype=torch.float64)))


def test_ancestral_sampling_follows_its_variance_law():
    sigmas = power_sigmas(7, 2.0, 0.1, 3.0)
    like = torch.empty(1, 1, 300, 300, dtype=torch.float64)
    draws = KeyedDraws(0, "ancestral")
    x = math.sqrt(P + 4.0) * draws.normal(0, like)
    variance = P + 4.0
    for s, t in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
        g, ratio = P / (P + s * s), (t / s) ** 2
        variance = (g + (1 - g) * ratio) ** 2 * variance + t * t * (1 - ratio)
    out = ancestral(gaussian, x, sigmas, draws)
    assert out.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / out.numel()))


def test_ancestral_sampling_reaches_the_prior_with_many_levels():
    like = torch.empty(1, 1, 100, 100, dtype=torch.float64)
    draws = KeyedDraws(1, "ancestral")
    sigmas = torch.cat([power_sigmas(200, 10.0, 0.01, 5.0), torch.zeros(1, dtype=torch.float64)])
    out = ancestral(gaussian, 10.0 * draws.normal(0, like), sigmas, draws)
    assert out.var().item() == pytest.approx(P, rel=0.08)


@pytest.mark.parametrize("bad", [[1.0], [1.0, 1.0], [0.5, 1.0], [1.0, -0.1]])
def test_levels_that_do_not_decrease_are_refused(bad):
    x = torch.zeros(1, 1, 2, 2)
    for name in SAMPLERS:
        with pytest.raises(ValueError, match="strictly decrease"):
            make_sampler(name)(gaussian, x, torch.tensor(bad), KeyedDraws(0, ""))


def test_dpm_solver_is_exact_where_the_denoised_image_does_not_change():
    # D = const: the flow is linear in sigma, and the linear part is solved exactly in one step.
    x = torch.full((1, 1, 2, 3), 1.7, dtype=torch.float64)
    out = dpm_solver_2m(lambda x, s: torch.full_like(x, 0.2), x, torch.tensor([2.0, 0.5, 0.1]))
    torch.testing.assert_close(out, torch.full_like(x, 0.2 + (1.7 - 0.2) * 0.1 / 2.0))


def test_dpm_solver_extrapolates_in_log_sigma_over_uneven_levels():
    # D = -ln sigma rises by h a step: half-way it is -ln sigma + h / 2, however long the last step.
    x, sigmas = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64), [2.0, 1.5, 0.5]
    expected = 1.5 / 2.0 * 0.7 - (1 - 1.5 / 2.0) * math.log(2.0)
    expected = 0.5 / 1.5 * expected + (1 - 0.5 / 1.5) * (-math.log(1.5) + 0.5 * math.log(3.0))
    out = dpm_solver_2m(lambda x, s: -s.log().view(-1, 1, 1, 1), x, torch.tensor(sigmas).double())
    assert out.item() == pytest.approx(expected, rel=1e-12)


def test_dpm_solver_calls_the_denoiser_once_an_interval():
    calls = []

    def counted(x, sigma):
        calls.append(float(sigma[0]))
        return gaussian(x, sigma)

    dpm_solver_2m(counted, torch.zeros(1, 1, 2, 2), torch.tensor([2.0, 1.0, 0.5, 0.0]))
    assert calls == [2.0, 1.0, 0.5]


def test_ddim_without_noise_is_euler_and_with_all_of_it_ancestral():
    sigmas, draws = power_sigmas(9, 2.0, 0.1, 3.0), KeyedDraws(3, "ddim")
    x = 2.0 * draws.normal(0, torch.empty(2, 1, 5, 7, dtype=torch.float64))
    torch.testing.assert_close(ddim(gaussian, x, sigmas, draws), euler(gaussian, x, sigmas))
    everything = ddim(gaussian, x, sigmas, draws, eta=1.0)
    torch.testing.assert_close(everything, ancestral(gaussian, x, sigmas, draws))
    with pytest.raises(ValueError, match="eta"):
        ddim(gaussian, x, sigmas, draws, eta=1.5)


def test_ddim_agrees_with_its_paper_in_the_variance_preserving_frame():
    # Equation 12 as printed, in z = sqrt(alpha) x with alpha = 1 / (1 + sigma^2), eta of Eq. 16.
    sigmas, draws, eta = torch.tensor([2.0, 0.7], dtype=torch.float64), KeyedDraws(4, "ddim"), 0.6
    x = draws.normal(0, torch.empty(1, 1, 3, 4, dtype=torch.float64))
    alpha, alpha_next = (1 / (1 + sigmas**2)).tolist()
    z, x0 = math.sqrt(alpha) * x, gaussian(x, sigmas[:1])
    eps_hat = (z - math.sqrt(alpha) * x0) / math.sqrt(1 - alpha)
    std = eta * math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
    z_next = (
        math.sqrt(alpha_next) * x0
        + math.sqrt(1 - alpha_next - std**2) * eps_hat
        + std * draws.normal(1, x)
    )
    out = ddim(gaussian, x, sigmas, draws, eta=eta)
    torch.testing.assert_close(out, z_next / math.sqrt(alpha_next))


def heun_gain(s, t):
    """The factor of one Heun step from level s to t on N(0, P), by hand."""
    slope = s / (P + s * s)
    ahead = 1 + (t - s) * slope
    return 1 + (t - s) * 0.5 * (slope + ahead * t / (P + t * t))


def test_churned_heun_follows_its_variance_law():
    sigmas = power_sigmas(9, 2.0, 0.1, 3.0)
    churn = Churn(amount=2.0, sigma_low=0.3, sigma_high=1.5, noise_scale=1.2)
    draws = KeyedDraws(0, "churn")
    x = math.sqrt(P + 4.0) * draws.normal(0, torch.empty(1, 1, 300, 300, dtype=torch.float64))
    variance = P + 4.0
    for s, t in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
        raised = s * (1 + (2.0 / 8 if 0.3 <= s <= 1.5 else 0.0))
        variance += 1.2**2 * (raised**2 - s**2)
        variance *= heun_gain(raised, t) ** 2
    out = churned_heun(gaussian, x, sigmas, draws, churn)
    assert out.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / out.numel()))


def test_churn_keeps_the_marginals_and_forgets_the_start():
    # With fine steps every level has the variance P + sigma^2, and much churn unties the end
    # from the start; without churn the map is deterministic and they stay tied.
    sigmas = power_sigmas(80, 3.0, 0.05, 5.0)
    draws = KeyedDraws(1, "churn")
    x = math.sqrt(P + 9.0) * draws.normal(0, torch.empty(1, 1, 150, 150, dtype=torch.float64))
    out = churned_heun(gaussian, x, sigmas, draws, Churn(60.0, 0.0, 9.0))
    assert out.var().item() == pytest.approx(P + 0.05**2, rel=0.04)
    together = torch.stack([x.flatten(), out.flatten()])
    assert abs(torch.corrcoef(together)[0, 1].item()) < 0.05
    still = churned_heun(gaussian, x, sigmas, draws, Churn(amount=0.0))
    torch.testing.assert_close(still, heun(gaussian, x, sigmas))


def test_churn_is_spread_over_the_intervals():
    calls = []

    def counted(x, sigma):
        calls.append(float(sigma[0]))
        return gaussian(x, sigma)

    levels = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    churned_heun(counted, torch.zeros(1, 1, 2, 2).double(), levels, KeyedDraws(0, ""), Churn(0.3))
    np.testing.assert_allclose(calls, [1.15, 0.5, 0.575, 0.2])


def test_churn_never_raises_a_level_by_more_than_a_factor_of_root_two():
    assert Churn(1e6).growth(1.0, 10) == pytest.approx(math.sqrt(2) - 1)


def test_samplers_are_made_by_name():
    sigmas, draws = power_sigmas(5, 2.0, 0.1), KeyedDraws(0, "names")
    x = draws.normal(0, torch.empty(1, 1, 3, 4, dtype=torch.float64))
    results = {name: make_sampler(name)(gaussian, x, sigmas, draws) for name in SAMPLERS}
    torch.testing.assert_close(results["heun"], heun(gaussian, x, sigmas))
    # Deterministic DDIM is Euler's method; the other names are other algorithms.
    torch.testing.assert_close(results["ddim"], results.pop("euler"), rtol=1e-12, atol=0)
    assert len({round(float(r[0, 0, 0, 0]), 9) for r in results.values()}) == len(SAMPLERS) - 1
    half = make_sampler("ddim", {"eta": 0.5})(gaussian, x, sigmas, draws)
    torch.testing.assert_close(half, ddim(gaussian, x, sigmas, draws, eta=0.5))
    with pytest.raises(ValueError, match="heun has no option eta"):
        make_sampler("heun", {"eta": 1.0})
    with pytest.raises(ValueError, match="heun"):
        make_sampler("runge")
