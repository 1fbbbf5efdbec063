"""RePaint on a Gaussian prior: known pixels kept, and the hole's law nears the posterior's."""

import pytest
import torch
from dense import GaussianPrior
from solver_kit import SIZE, Dense, normal, run

from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import Identity, Mask
from diffusion_core.posterior.repaint import RePaint
from diffusion_core.protocols import UnsuitedError

SIGMAS = power_sigmas(12, 5.0, 0.05, 4.0)


def problem(batch):
    prior = GaussianPrior(SIZE)
    mask = torch.ones(1, 1, *SIZE, dtype=torch.bool)
    mask[..., 3:9, 2:8] = False
    noise = normal(1, 1, *SIZE, stream=1).flatten()
    root = torch.linalg.cholesky(prior.matrix())
    truth = prior.mean + (root @ noise).reshape(1, 1, *SIZE)
    y = Mask(mask).A(truth)
    mean, covariance = prior.posterior(Mask(mask), y, torch.zeros(mask.numel()).double())
    return prior, mask, y.expand(batch, 1, *SIZE), mean, covariance


def hole_law(batch=150, **options):
    """Deviation of the mean, and ratio of variances, in the hole, in posterior units."""
    prior, mask, y, mean, covariance = problem(batch)
    got = run("repaint", prior.denoise, Mask(mask), y, GaussianNoise(0.0), SIGMAS, **options)
    hole = ~mask.flatten()
    x, exact = got.x.flatten(1)[:, hole], mean.flatten()[hole]
    variance = covariance.diagonal()[hole]
    bias = float(((x.mean(dim=0) - exact).square().mean() / variance.mean()).sqrt())
    return bias, float(x.var(dim=0).mean() / variance.mean())


def test_known_pixels_are_kept():
    prior, mask, y, _, _ = problem(2)
    for sigma_y in (0.0, 0.2):
        got = run("repaint", prior.denoise, Mask(mask), y, GaussianNoise(sigma_y), SIGMAS)
        kept = mask.expand_as(y)
        torch.testing.assert_close(got.x[kept], y[kept], rtol=0, atol=1e-12)
        assert float(got.x[~kept].std()) > 0.05
    whole = run("repaint", prior.denoise, Identity(), y, GaussianNoise(0.0), SIGMAS)
    torch.testing.assert_close(whole.x, y, rtol=0, atol=1e-12)


def test_resampling_brings_the_hole_to_its_posterior_mean():
    few, _ = hole_law(num_resamples=1)
    many, ratio = hole_law(num_resamples=10)
    print(few, many, ratio)
    assert few > 0.3
    assert many < 0.5 * few
