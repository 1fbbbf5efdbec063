"""The variational bound: exact on Gaussian data, its errors of the order they claim, its learning.

On N(0, P) the exact denoiser makes the bound an equality for every image and every pair of
endpoints: KL, integral and reconstruction add up to -log p(x0). On a mixture the integrand is
known by quadrature.
"""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from diffusion_core.likelihood import (
    Ends,
    bound_by_sampling,
    bound_on_levels,
    level_table,
    prior_nats,
    reconstruction_nats,
)
from diffusion_core.noise.densities import Histogram, LogNormal, LogUniform
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.learned import LearnedProcess
from diffusion_core.noise.processes import euler_maruyama
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.training.loss import levels_of

P = 0.36
DRAWS = KeyedDraws(0, "bound")
ENDS = Ends(mean=0.0, variance=P)
WEIGHTS, MEANS, STDS = np.array([0.7, 0.3]), np.array([-0.5, 0.6]), np.array([0.05, 0.3])


def gaussian(x, sigma):
    return P / (P + sigma.view(-1, 1, 1, 1) ** 2) * x


def images(count=2, side=90):
    return math.sqrt(P) * DRAWS.normal(99, torch.empty(count, 1, side, side, dtype=torch.float64))


def log_levels(num, high=20.0, low=0.01):
    return torch.logspace(math.log10(high), math.log10(low), num, dtype=torch.float64)


def mixture(x, sigma):
    """E[x0 | x] for values drawn alone from two normals."""
    s = sigma.view(-1, 1, 1, 1, 1)
    w, m, v = (torch.from_numpy(a).to(x) for a in (WEIGHTS, MEANS, STDS**2))
    total = v + s**2
    x = x[..., None]
    log_r = w.log() - 0.5 * total.log() - 0.5 * (x - m) ** 2 / total
    return (torch.softmax(log_r, dim=-1) * (m + v / total * (x - m))).sum(dim=-1)


def mixture_images(count, side):
    rng = np.random.Generator(np.random.Philox(key=11))
    which = rng.choice(2, size=(count, 1, side, side), p=WEIGHTS)
    return torch.from_numpy(MEANS[which] + STDS[which] * rng.standard_normal(which.shape))


def mixture_integrand(sigma):
    """Mmse / sigma^2 a value, by quadrature over x."""
    x = np.linspace(-6 - 6 * sigma, 6 + 6 * sigma, 8001)
    total = STDS**2 + sigma**2
    each = WEIGHTS * stats.norm.pdf(x[:, None], MEANS, np.sqrt(total))
    D = mixture(torch.from_numpy(x).reshape(1, 1, 1, -1), torch.tensor([float(sigma)]))
    power = WEIGHTS @ (MEANS**2 + STDS**2)
    mmse = power - integrate.trapezoid(each.sum(1) * D.numpy().ravel() ** 2, x)
    return mmse / sigma**2


class Antithetic:
    """Draws of +1 and -1 in turn along a row: where pixels come in equal pairs, as in `pairs`,
    every mean over noise up to the second moment is exact."""

    def normal(self, level, like, stream=0):
        return torch.ones_like(like) * (1 - 2 * (torch.arange(like.shape[-1]) % 2))


def pairs(count, side):
    return images(count, side).repeat_interleave(2, dim=-1)


@pytest.mark.parametrize(("high", "low"), [(20.0, 0.01), (3.0, 0.2)])
def test_on_gaussian_data_the_bound_is_an_equality_whatever_the_endpoints(high, low):
    x0 = pairs(3, 5)
    bound = bound_on_levels(gaussian, x0, log_levels(161, high, low), ENDS, Antithetic())
    exact = 0.5 * (x0**2 / P + math.log(2 * math.pi * P)).flatten(1).sum(dim=1)
    torch.testing.assert_close(bound.nats, exact, rtol=0, atol=50 * 2e-4)


def test_on_gaussian_data_the_mean_bound_is_the_entropy():
    bound = bound_on_levels(gaussian, images(), log_levels(81), ENDS, DRAWS)
    entropy_bits = 0.5 * math.log2(2 * math.pi * math.e * P)
    assert bound.bits_per_dim.mean().item() == pytest.approx(entropy_bits, abs=0.04)
    assert bound.num_values == 8100


def test_the_bound_on_whole_numbers_is_their_entropy():
    # Values rounded to bins of 0.05: a discrete distribution whose entropy is a plain sum.
    width = 0.05
    x0 = (images() / width).round() * width
    k = np.arange(-200, 201) * width
    edges = stats.norm(0, math.sqrt(P))
    p = edges.cdf(k + width / 2) - edges.cdf(k - width / 2)
    entropy_bits = -(p[p > 0] * np.log2(p[p > 0])).sum()
    ends = Ends(variance=P, bin_width=width)
    bits = bound_on_levels(gaussian, x0, log_levels(61, 20.0, 0.05), ends, DRAWS).bits_per_dim
    assert bits.mean().item() == pytest.approx(entropy_bits, abs=0.03)


def test_a_denoiser_that_is_wrong_has_a_larger_bound():
    x0, levels = images(), log_levels(41)
    good = bound_on_levels(gaussian, x0, levels, ENDS, DRAWS).nats
    worse = bound_on_levels(lambda x, s: 0.9 * gaussian(x, s), x0, levels, ENDS, DRAWS).nats
    assert (worse > good + 100).all()


class NoNoise:
    """Draws of one: |x0 - D| is then a smooth function of sigma, free of Monte-Carlo noise."""

    def normal(self, level, like, stream=0):
        return torch.ones_like(like)


def test_the_quadrature_has_order_two_and_says_its_error():
    x0 = torch.full((1, 1, 3, 3), 0.4, dtype=torch.float64)
    # x = x0 + sigma: e = (x0 - P (x0 + sigma) / (P + sigma^2))^2.
    exact, _ = integrate.quad(
        lambda s: 9 * (0.4 - P * (0.4 + s) / (P + s * s)) ** 2 / s**3, 0.1, 10.0, epsabs=1e-12
    )
    found, claimed = [], []
    for num in (17, 33, 65, 129):
        bound = bound_on_levels(gaussian, x0, log_levels(num, 10.0, 0.1), ENDS, NoNoise())
        found.append(abs(bound.diffusion.item() - exact))
        claimed.append(bound.error.item())
    order = -np.polyfit(np.log([16, 32, 64, 128]), np.log(found), 1)[0]
    assert order == pytest.approx(2, abs=0.15)
    np.testing.assert_allclose(claimed[1:], found[1:], rtol=0.15)


def test_a_model_in_steps_costs_more_and_the_cost_falls_with_their_number():
    x0 = images()
    costs = []
    for num in (21, 41, 81):
        bound = bound_on_levels(gaussian, x0, log_levels(num), ENDS, DRAWS)
        costs.append((bound.diffusion_in_steps - bound.diffusion).mean().item())
    assert costs[0] > costs[1] > costs[2] > 0
    assert costs[0] / costs[2] == pytest.approx(4, rel=0.25)


def test_sampled_levels_are_unbiased_and_know_their_error():
    x0 = images(count=12, side=12)
    exact = 0.5 * (x0**2 / P + math.log(2 * math.pi * P)).flatten(1).sum(dim=1)
    for density in (LogUniform(0.05, 10.0), LogNormal(-1.2, 1.2, 0.05, 10.0)):
        bound = bound_by_sampling(gaussian, x0, density, 300, ENDS, DRAWS)
        z = (bound.nats - exact) / bound.error
        assert z.abs().max() < 4.5
        assert 0.4 < z.std() < 1.8


def test_the_prior_is_a_kl_between_normals():
    x0 = torch.tensor([0.1, -0.7, 1.2], dtype=torch.float64).reshape(1, 1, 1, 3)
    p = torch.distributions.Normal(0.3, math.sqrt(0.5 + 4.0))
    q = torch.distributions.Normal(x0, 2.0)
    expected = torch.distributions.kl_divergence(q, p).sum().reshape(1)
    torch.testing.assert_close(
        prior_nats(x0, 2.0, Ends(0.3, 0.5)), expected, check_dtype=False, rtol=1e-6, atol=1e-9
    )


def test_the_probabilities_of_all_bins_sum_to_one_even_far_away():
    k = torch.arange(-400, 401, dtype=torch.float64)[:, None, None, None] * 0.1
    ends = Ends(decoder_std=0.25, bin_width=0.1)
    nats = reconstruction_nats(k, torch.full_like(k, 0.03), 0.1, ends)
    assert torch.isfinite(nats).all()
    assert (-nats).exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    # 160 standard deviations away: the tail's leading term, -log p = z^2 / 2 + log(z sqrt(2 pi)).
    z = (40.0 - 0.03 - 0.05) / 0.25
    expected = 0.5 * z**2 + math.log(z * math.sqrt(2 * math.pi))
    assert nats[-1].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bad", [[1.0, 0.5], [0.1, 0.5, 1.0], [1.0, 0.5, 0.0]])
def test_levels_that_make_no_bound_are_refused(bad):
    with pytest.raises(ValueError, match="3 levels"):
        bound_on_levels(gaussian, images(1, 4), torch.tensor(bad), ENDS, DRAWS)
    with pytest.raises(ValueError, match="2 draws"):
        bound_by_sampling(gaussian, images(1, 4), LogUniform(0.1, 1.0), 1, ENDS, DRAWS)


def densities():
    edges = torch.tensor([-3.0, -2.5, -1.0, 0.5], dtype=torch.float64)
    return [
        LogUniform(0.02, 5.0),
        LogNormal(-1.5, 1.3, 0.02, 5.0),
        Histogram(edges, torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)),
    ]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_density_is_the_slope_of_its_quantiles(number):
    density = densities()[number]
    u = torch.linspace(0.005, 0.995, 100, dtype=torch.float64)
    slope = (density.quantile(u + 1e-6) - density.quantile(u - 1e-6)) / 2e-6
    torch.testing.assert_close(
        1 / slope, density.log_density(density.quantile(u)).exp(), rtol=1e-4, atol=0
    )
    ends = density.quantile(torch.tensor([0.0, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(ends.numpy(), density.ln_range, rtol=1e-6)


def test_the_learned_density_is_the_root_mean_square_of_the_integrand():
    x0 = mixture_images(6, 48)
    sigmas = log_levels(97, 4.0, 0.01).flip(0)
    table = level_table(mixture, list(x0.split(1)), sigmas, Ends(variance=0.3), DRAWS)
    known = np.array([mixture_integrand(s) for s in sigmas.tolist()])
    np.testing.assert_allclose(table.integrand.mean(0).numpy(), known, rtol=0.06)
    density = table.learned_density((math.log(0.01), math.log(4.0)), num_bins=16)
    q = density.log_density(table.ln_sigmas).exp().numpy()
    expected = known / integrate.trapezoid(known, table.ln_sigmas.numpy())
    smooth = abs(q - expected) < 0.15 * expected.max()
    assert smooth.all()


def test_the_learned_process_lowers_the_variance_of_the_bound_by_a_fifth_at_least():
    train, test = mixture_images(8, 16).split(4)
    low, high = 0.01, 4.0
    sigmas = log_levels(97, high, low).flip(0)
    ends = Ends(variance=0.3)
    table = level_table(mixture, list(train.split(1)), sigmas, ends, DRAWS)
    learned = table.learned_density((math.log(low), math.log(high)))
    known = integrate.trapezoid([mixture_integrand(s) for s in sigmas.tolist()], sigmas.log())
    found = {}
    for name, density in {
        "learned": learned,
        "uniform": LogUniform(low, high),
        "normal": LogNormal(-1.5, 1.3, low, high),
    }.items():
        bound = bound_by_sampling(mixture, test, density, 200, ends, KeyedDraws(1, name))
        found[name] = ((bound.error**2).mean().item(), table.variance(density))
        z = (bound.diffusion / 256 - known) / (bound.error / 256)
        assert z.abs().max() < 6  # unbiased; images differ a little from their mean
        # The table foretells the variance of a draw, a dimension, that sampling then has.
        assert found[name][1] == pytest.approx(found[name][0] * 200 / 256**2, rel=0.5)
    for name in ("uniform", "normal"):
        assert found["learned"][0] < 0.8 * found[name][0]
        assert found["learned"][1] < 0.8 * found[name][1]


def test_endpoints_are_where_the_bound_is_least():
    # A denoiser that is bad below sigma 0.05 and above 3: those levels are better left out.
    def limited(x, sigma):
        s = sigma.view(-1, 1, 1, 1)
        return gaussian(x, sigma) + 0.4 * (s < 0.05) + 4.0 * (s > 3.0)

    sigmas = log_levels(61, 20.0, 0.01).flip(0)
    pictures = list(pairs(3, 8).split(1))
    table = level_table(limited, pictures, sigmas, Ends(variance=P), Antithetic())
    lowest, highest = table.endpoints()
    assert 0.05 <= sigmas[lowest] < 0.1
    assert 2.0 < sigmas[highest] <= 3.0
    process = table.learned_process()
    assert process.level(0.0) == pytest.approx(sigmas[lowest].item())
    assert process.level(1.0) == pytest.approx(sigmas[highest].item())

    def nats(chosen):
        sub = sigmas[chosen].flip(0)
        std = float(table.decoder_std[chosen.start])
        ends = Ends(0.0, P, std)
        return bound_on_levels(limited, torch.cat(pictures), sub, ends, Antithetic()).nats.mean()

    assert nats(slice(lowest, highest + 1)) < nats(slice(0, 61)) - 10


def test_a_learned_process_is_a_process():
    process = LearnedProcess(densities()[2])
    h = 1e-6
    for t in (0.1, 0.5, 0.93):
        dv = (process.sigma(t + h) ** 2 - process.sigma(t - h) ** 2) / (2 * h)
        assert process.diffusion(t) ** 2 == pytest.approx(dv, rel=1e-5)
        assert process.time(process.sigma(t)) == pytest.approx(t, rel=1e-6)
    levels = [process.level(t) for t in np.linspace(0, 1, 50)]
    assert (np.diff(levels) > 0).all()
    noise = DRAWS.normal(0, torch.empty(200, 8000, dtype=torch.float64))
    X = euler_maruyama(process, torch.full((8000,), 0.7, dtype=torch.float64), noise, 1.0)
    assert X.mean().item() == pytest.approx(0.7, abs=4 * process.sigma(1.0) / math.sqrt(8000))
    assert X.std().item() == pytest.approx(process.sigma(1.0), rel=0.04)


def test_a_density_needs_values_and_fills_bins_it_has_not_seen():
    with pytest.raises(ValueError, match="learned from"):
        Histogram.of_integrand(torch.zeros(3), torch.zeros(3), (-1.0, 1.0))
    where, h = torch.tensor([-0.9, 0.9]), torch.tensor([1.0, 3.0])
    mass = Histogram.of_integrand(where, h, (-1.0, 1.0), num_bins=4).mass
    assert mass.sum().item() == pytest.approx(1.0)
    assert mass[0] < mass[1] == mass[2] < mass[3]
    # How often a level was seen says nothing of how large the integrand is there.
    often = torch.tensor([-0.9, -0.8, -0.7, -0.6, 0.9])
    mass = Histogram.of_integrand(often, torch.ones(5), (-1.0, 1.0), num_bins=2).mass
    assert mass[0] == pytest.approx(mass[1])


def test_training_draws_its_levels_from_a_learned_density():
    density = densities()[2]
    sigma = levels_of(0, 4000, density)
    share = ((sigma.log() > -2.5) & (sigma.log() < -1.0)).float().mean().item()
    assert share == pytest.approx(0.7, abs=0.01)
    assert sigma.dtype == torch.float32


def test_the_schedule_of_levels_is_accepted_as_it_is():
    bound = bound_on_levels(gaussian, images(1, 8), power_sigmas(9, 4.0, 0.05), ENDS, DRAWS)
    assert torch.isfinite(bound.bits_per_dim).all()
