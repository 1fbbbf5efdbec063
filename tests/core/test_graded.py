"""Noise that varies: each pixel denoised at its own level, against the posterior mean itself."""

import pytest
import torch
from dense import GaussianPrior
from solver_kit import WhitePrior, normal

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.operators import Identity, Pool
from diffusion_core.posterior import make_solver
from diffusion_core.protocols import UnsuitedError

SIZE = (24, 20)
WHITE = WhitePrior()
PRIOR = GaussianPrior(SIZE)


def of_white(y, std):
    """The posterior mean of white pixels, whatever R."""
    return WHITE.mean + (y - WHITE.mean) * (WHITE.std**2 / (WHITE.std**2 + std**2))


def restore(y, std, levels, denoise=WHITE.denoise, operator=None):
    solver = make_solver("covprox", PRIOR.table([0.1]), {"mode": "graded"})
    sigmas = torch.tensor(levels, dtype=torch.float64)
    draws = KeyedDraws(0, "graded")
    return solver(denoise, operator or Identity(), y, GaussianNoise(std), sigmas, draws)


def test_pixels_at_a_level_get_the_posterior_mean_and_those_between_nearly():
    y = normal(2, 3, *SIZE)
    levels = [0.4, 0.2, 0.1]
    column = torch.tensor([0.1, 0.4, 0.2, 0.1, 0.2]).double().repeat(4)
    std = column.expand(2, 3, *SIZE)
    exact = of_white(y, std)
    found = restore(y, std, levels)
    assert torch.allclose(found.x, exact, rtol=1e-6)
    assert found.num_denoiser_calls == 3
    between = torch.linspace(0.1, 0.4, 20).double().expand(2, 3, *SIZE)
    exact = of_white(y, between)
    many = restore(y, between, [0.1 * 4 ** (k / 12) for k in range(12, -1, -1)]).x
    errors = [float((restore(y, between, levels).x - exact).abs().max())]
    errors.append(float((many - exact).abs().max()))
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 20  # linear between levels: of second order, 6^2 = 36


def test_noise_beyond_the_levels_counts_as_their_ends():
    y = normal(1, 3, *SIZE)
    for std, level in ((0.01, 0.1), (3.0, 0.4)):
        found = restore(y, torch.full((1, 3, *SIZE), std), [0.4, 0.2, 0.1])
        assert torch.allclose(found.x, of_white(y, level))


def test_levels_that_no_pixel_needs_are_not_evaluated():
    y = normal(1, 1, *SIZE)
    assert restore(y, 0.1, [0.4, 0.2, 0.1]).num_denoiser_calls == 1
    assert restore(y, 0.15, [0.4, 0.2, 0.1]).num_denoiser_calls == 2


def test_noise_that_varies_slowly_under_a_prior_that_sees_neighbours():
    """Error at most 2% above the exact posterior mean's, by a dense solve."""
    rows = torch.linspace(0, 1, SIZE[0], dtype=torch.float64)[:, None].expand(SIZE)
    std = 0.1 * 4**rows
    C = PRIOR.matrix()
    root = torch.linalg.cholesky(C)
    x0 = PRIOR.mean + (root @ normal(len(C), 60)).T.reshape(60, 1, *SIZE)
    y = x0 + std * normal(60, 1, *SIZE, stream=1)
    gain = torch.linalg.solve(C + torch.diag(std.flatten() ** 2), C)
    exact = PRIOR.mean + ((y - PRIOR.mean).flatten(1) @ gain).reshape(y.shape)
    found = restore(y, std.expand(y.shape), [0.4, 0.25, 0.16, 0.1], PRIOR.denoise).x
    one = restore(y, std.expand(y.shape), [0.2], PRIOR.denoise).x
    error, least, plain = (float((x - x0).square().mean()) for x in (found, exact, one))
    assert error < 1.02 * least
    assert plain > 1.1 * least


def test_it_takes_noise_off_and_nothing_else():
    with pytest.raises(UnsuitedError, match="nothing else"):
        restore(normal(1, 1, 8, 8), 0.1, [0.1], operator=Pool(2))
