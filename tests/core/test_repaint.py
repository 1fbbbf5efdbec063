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


class Silent:
    """No noise: the chain is linear in it, so this run is the mean of all runs."""

    def normal(self, level, like, stream=0):
        return torch.zeros_like(like)


def bias_of_the_hole(num_resamples, jump_length):
    """Deviation of the chain's mean from the posterior mean, in posterior standard deviations."""
    prior, mask, y, mean, covariance = problem(1)
    options = {"num_resamples": num_resamples, "jump_length": jump_length}
    noise = GaussianNoise(0.0)
    got = run("repaint", prior.denoise, Mask(mask), y, noise, SIGMAS, Silent(), **options)
    hole = ~mask.flatten()
    variance = covariance.diagonal()[hole].mean()
    return float(((got.x - mean).flatten()[hole].square().mean() / variance).sqrt())


def test_known_pixels_are_kept():
    prior, mask, y, _, _ = problem(2)
    for sigma_y in (0.0, 0.2):
        got = run("repaint", prior.denoise, Mask(mask), y, GaussianNoise(sigma_y), SIGMAS)
        kept = mask.expand_as(y)
        torch.testing.assert_close(got.x[kept], y[kept], rtol=0, atol=1e-12)
        assert float(got.x[~kept].std()) > 0.05
    whole = run("repaint", prior.denoise, Identity(), y, GaussianNoise(0.0), SIGMAS)
    torch.testing.assert_close(whole.x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("jump_length", [1, 2])
def test_resampling_brings_the_hole_to_its_posterior_mean(jump_length):
    bias = [bias_of_the_hole(times, jump_length) for times in (1, 2, 5, 40)]
    assert sorted(bias, reverse=True) == bias
    assert bias[0] > 0.09
    assert bias[-1] < 0.3 * bias[0]


def test_the_hole_is_filled_by_draws_not_by_its_mean():
    prior, mask, y, _, covariance = problem(150)
    got = run("repaint", prior.denoise, Mask(mask), y, GaussianNoise(0.0), SIGMAS)
    hole = ~mask.flatten()
    spread = got.x.flatten(1)[:, hole].var(dim=0).mean() / covariance.diagonal()[hole].mean()
    # Twelve ancestral steps fall short of the posterior's variance, as they do without data.
    assert 0.4 < float(spread) < 1.0


@pytest.mark.parametrize(
    ("last", "jump", "times", "expected"),
    [
        (3, 1, 1, [0, 1, 2, 3]),
        (2, 1, 2, [0, 1, 0, 1, 2, 1, 2]),
        (3, 2, 2, [0, 1, 2, 0, 1, 2, 3, 2, 3]),
    ],
)
def test_the_path_goes_down_each_stretch_as_often_as_asked(last, jump, times, expected):
    assert RePaint(num_resamples=times, jump_length=jump)._path(last) == expected


def test_only_masks_are_taken():
    y = Dense().A(normal(1, 1, *SIZE))
    with pytest.raises(UnsuitedError, match="repaint fills in masks, and Dense is none"):
        run("repaint", GaussianPrior(SIZE).denoise, Dense(), y, GaussianNoise(0.1), SIGMAS)
