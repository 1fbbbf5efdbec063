"""RePaint on a Gaussian prior: known pixels kept, and the hole's law nears the posterior's."""

from itertools import pairwise

import pytest
import torch
from dense import GaussianPrior, matrix_of
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


def test_the_hole_follows_the_algorithms_law():
    # Algorithm 1 of Lugmayr et al. on a Gaussian prior, by matrices: r = 2, j = 1, and levels so
    # near that each remembers those before.
    batch, n, levels, sigma_y = 1200, SIZE[0] * SIZE[1], [0.6, 0.45, 0.25, 0.0], 0.2
    prior, mask, y, _, _ = problem(batch)
    known = mask.flatten().double()
    m, C = torch.zeros(n).double(), levels[0] ** 2 * torch.eye(n).double()
    for i, j in pairwise([0, 1, 0, 1, 2, 1, 2, 3, 2, 3]):
        s, after = levels[i], levels[j]
        if after > s:
            C = C + (after**2 - s**2) * torch.eye(n)
            continue
        level = torch.tensor([s], dtype=torch.float64)
        zero = prior.denoise(torch.zeros(1, 1, *SIZE, dtype=torch.float64), level)
        G = matrix_of(lambda e, z=zero, s=level: prior.denoise(e, s.expand(len(e))) - z, (1, *SIZE))
        share = after**2 / s**2
        H = (1 - known)[:, None] * ((1 - share) * G + share * torch.eye(n))
        m = H @ m + (1 - known) * (1 - share) * zero.flatten() + known * y[0].flatten()
        pasted = max(after**2 - sigma_y**2, 0.0)
        C = H @ C @ H.T + torch.diag((1 - known) * after**2 * (1 - share) + known * pasted)
    options = {"num_resamples": 2, "jump_length": 1}
    sigmas, noise = torch.tensor(levels), GaussianNoise(sigma_y)
    got = run("repaint", prior.denoise, Mask(mask), y, noise, sigmas, **options)
    hole = ~mask.flatten()
    values, vectors = torch.linalg.eigh(C[hole][:, hole])
    z = (got.x.flatten(1)[:, hole] - m[hole]) @ vectors
    bound = 4 * (2 / len(values)) ** 0.5
    assert float((z.mean(dim=0) ** 2 * batch / values).mean()) == pytest.approx(1.0, abs=bound)
    ratio = z.square().mean(dim=0) / values
    assert float(ratio.mean()) == pytest.approx(1.0, abs=bound / batch**0.5)


def test_known_pixels_are_as_noisy_as_their_level():
    # y is noisy itself, so that less is added; below its own noise nothing is.
    prior, mask, y, _, _ = problem(60)
    seen = []

    def denoise(x, sigma):
        seen.append((x - y).masked_select(mask).std())
        return prior.denoise(x, sigma)

    sigmas, noise = torch.tensor([1.0, 0.8, 0.3]), GaussianNoise(0.5)
    run("repaint", denoise, Mask(mask), y, noise, sigmas, num_resamples=1)
    assert float(seen[1]) == pytest.approx((0.8**2 - 0.5**2) ** 0.5, rel=0.05)
    assert float(seen[2]) == 0.0


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
