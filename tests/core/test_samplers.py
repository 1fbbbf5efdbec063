"""Samplers of the prior on N(0, P): exact flow, orders of convergence, the ancestral law."""

import math

import numpy as np
import pytest
import torch

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.samplers.ancestral import ancestral
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


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_the_error_falls_with_the_order_of_the_method(sampler, order):
    counts = np.array([33, 65, 129, 257])
    errors = [flow_error(sampler, int(n)) for n in counts]
    fitted = -np.polyfit(np.log(counts - 1.0), np.log(errors), 1)[0]
    assert fitted == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("sampler", [euler, heun])
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
    for run in (euler, heun, lambda d, x, s: ancestral(d, x, s, KeyedDraws(0, ""))):
        with pytest.raises(ValueError, match="strictly decrease"):
            run(gaussian, x, torch.tensor(bad))
