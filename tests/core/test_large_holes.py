"""Large holes: means of squares as data, pooled images, and the posterior from coarse to fine."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from dense import GaussianPrior, dense_gain, flat, level_covariance, matrix_of

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import Mask, MaskWithMeans, MeansNoise
from diffusion_core.posterior import make_solver
from diffusion_core.posterior.linear import Accuracy, data_step
from diffusion_core.posterior.linear.mask import MaskStep
from diffusion_core.posterior.pyramid import CoarseMeans, coarse_means, pooled, scales, wide_holes
from diffusion_core.testing import LinearOperatorContract

DRAWS = KeyedDraws(0, "large holes")
EXACTLY = Accuracy(tolerance=1e-10, max_steps=4000)


def normal(*shape, stream=0):
    return DRAWS.normal(0, torch.empty(shape, dtype=torch.float64), stream)


def holed(size, *boxes, batch=1):
    """A mask with boxes (top, left, height, width) missing."""
    mask = torch.ones(batch, 1, *size, dtype=torch.bool)
    for top, left, height, width in boxes:
        mask[..., top : top + height, left : left + width] = False
    return mask


def mask_with_means(size, factor=2, batch=1):
    """A mask of a hole at odd places, guided in the squares that it covers wholly."""
    mask = holed(size, (3, 3, size[0] - 9, size[1] - 8), batch=batch)
    rows, columns = (side // factor for side in size)
    squares = mask[..., : rows * factor, : columns * factor].float()
    return mask, torch.nn.functional.max_pool2d(squares, factor) == 0


class TestMaskWithMeans(LinearOperatorContract):
    def make(self, dtype):
        mask, cells = mask_with_means((17, 15), 3)
        return MaskWithMeans(mask, cells, 3), (2, 3, 17, 15)


def test_data_of_a_mask_with_means_are_its_pixels_and_the_means_of_its_squares():
    mask, cells = mask_with_means((13, 14))
    operator, x = MaskWithMeans(mask, cells, 2), normal(2, 3, 13, 14)
    pixels, means = operator.split(operator.A(x))
    assert torch.equal(pixels, x * mask)
    wanted = x[..., :12, :14].reshape(2, 3, 6, 2, 7, 2).mean(dim=(3, 5)) * cells
    assert torch.allclose(means, wanted, atol=1e-14)
    assert 0 < int(cells.sum()) < cells.numel()
    dirty = operator.A(x)
    dirty[..., 4, 4] = torch.nan  # missing, and of no square's first pixel
    dirty[:, 3:, 5, 5] = torch.nan
    assert bool(operator.measured(dirty)[:, :3].isfinite().all())
    with pytest.raises(ValueError, match="have 6 x 7 squares of 2"):
        MaskWithMeans(mask, cells[..., :-1], 2)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma_y", [0.0, 0.1])
def test_its_data_step_equals_the_dense_solve(monkeypatch, local, channels, sigma_y):
    monkeypatch.setattr(MaskStep, "padding", 0)
    size = (16, 14)
    mask, cells = mask_with_means(size)
    operator = MaskWithMeans(mask, cells, 2)
    mu = torch.tanh(8 * normal(1, channels, *size, stream=4))
    covariance = level_covariance(size, channels, local=local).on(mu, 1.7, local=local)
    noise = MeansNoise(operator, GaussianNoise(sigma_y), torch.tensor(0.03, dtype=torch.float64))
    r = operator.A(normal(1, channels, *size, stream=5))
    R = noise.variance(r)
    A = matrix_of(operator.A, (channels, *size))
    Sigma = matrix_of(lambda x: torch.cat([covariance.apply(u[None]) for u in x]), mu.shape[1:])
    wanted = dense_gain(A, Sigma, flat(R.expand_as(r))[0], flat(r).T).T.reshape(mu.shape)
    found = data_step(operator)(covariance, R, r, EXACTLY)
    assert found.num_steps > 0
    assert float((found.delta - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("std", [0.01, 1.0])
def test_told_the_coarse_posterior_mean_the_fine_one_is_the_dense_posterior(monkeypatch, std):
    """E[x | y, Px = E[Px | y]] = E[x | y], however sure the means are: two levels are one."""
    monkeypatch.setattr(MaskStep, "padding", 0)
    size = (16, 14)
    mask, cells = mask_with_means(size, 4)
    prior = GaussianPrior(size)
    y = Mask(mask).A(prior.mean + 0.5 * normal(1, 1, *size, stream=1))
    R = torch.full_like(flat(y)[0], 0.1**2)
    mean, _ = prior.posterior(Mask(mask), y, R)
    below = CoarseMeans(4, torch.nn.functional.avg_pool2d(mean, 4), torch.ones_like(cells))
    operator, data, noise = below.applied(mask, y, GaussianNoise(0.1), std)
    sigmas = power_sigmas(4, 1.0, 0.1, 3.0)
    options = {"tolerance": 1e-10, "max_steps": 4000}
    solver = make_solver("kriging", prior.table(sigmas), options)
    found = solver(prior.denoise, operator, data, noise, sigmas, DRAWS).x
    assert float((found - mean).abs().max()) < 1e-6
    # and a mean that is off is heard the more, the surer it is
    off = replace(below, means=below.means + 0.5)
    operator, data, noise = off.applied(mask, y, GaussianNoise(0.1), std)
    moved = solver(prior.denoise, operator, data, noise, sigmas, DRAWS).x - mean
    middle = float(moved[..., 6:8, 6:8].mean())
    assert (middle > 0.35) if std < 0.1 else (0.0 < middle < 0.35)


@pytest.mark.parametrize("channels_of_mask", [1, 2])
def test_pooling_averages_what_was_measured(channels_of_mask):
    size = (11, 13)
    mask = normal(2, channels_of_mask, *size, stream=7) > 0.4
    y = torch.where(mask, normal(2, 2, *size), torch.nan)
    found = pooled(y, mask, 2).coarser(2)
    values, seen = y.numpy(), mask.expand_as(y).numpy()
    for b, c, i, j in np.ndindex(2, 2, 3, 4):
        rows, columns = slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4)
        part = values[b, c, rows, columns][seen[b, c, rows, columns]]
        share = found.share.expand(-1, 2, -1, -1)[b, c, i, j]
        assert float(share) == pytest.approx(part.size / 16)
        if part.size:
            assert float(found.mean[b, c, i, j]) == pytest.approx(part.mean(), rel=1e-12)


def test_the_width_of_a_hole_is_that_of_the_largest_circle_in_it():
    rows, columns = torch.meshgrid(torch.arange(320), torch.arange(400), indexing="ij")
    disk = (rows - 160.0) ** 2 + (columns - 170.0) ** 2 > 70.0**2
    mask = disk[None, None].clone()
    mask[..., 5:315, 380:390] = False  # long, and narrow
    wide, widest = wide_holes(pooled(torch.zeros(1, 1, 320, 400), mask, 4))
    assert widest == pytest.approx(140, abs=8)
    assert bool(wide[..., 40, 42])
    assert not bool(wide[..., 95:].any())
    # beyond the border nothing is known: a missing half counts twice its depth
    half = torch.ones(1, 1, 128, 128, dtype=torch.bool)
    half[..., 64:] = False
    assert wide_holes(pooled(torch.zeros(1, 1, 128, 128), half, 4))[1] == pytest.approx(128, abs=8)
    assert wide_holes(pooled(torch.zeros(1, 1, 64, 64), ~half[..., :64, :64] & False, 4))[1] == 0


def test_scales_begin_where_the_hole_is_narrow():
    assert scales(4, 128.0) == [4]
    assert scales(4, 401.0) == [8, 4]
    assert scales(4, 3000.0) == [32, 16, 8, 4]


def test_without_a_wide_hole_nothing_is_restored():
    mask = holed((256, 256), (40, 40, 80, 200))

    def never(*_):
        raise AssertionError

    assert (
        coarse_means(pooled(torch.zeros(1, 1, 256, 256), mask, 4), GaussianNoise(0.1), never)
        is None
    )


def test_a_guides_window_is_that_of_the_plane():
    means, wide = normal(1, 3, 20, 30), normal(1, 1, 20, 30) > 0
    whole = CoarseMeans(4, means, wide)
    part = whole.window(16, 53, 24, 99)
    assert torch.equal(part.means, means[..., 4:14, 6:25])
    mask = holed((80, 120), (10, 20, 60, 80))
    y = normal(1, 3, 80, 120)
    operator, data, _ = whole.applied(mask, y, GaussianNoise(0.1))
    cut, cut_data, _ = part.applied(mask[..., 16:53, 24:99], y[..., 16:53, 24:99], None)
    assert torch.equal(cut.cells, operator.cells[..., 4:13, 6:24])
    assert int(cut.cells.sum()) > 0
    assert torch.equal(cut_data[..., :36, :72], data[..., 16:52, 24:96])
    with pytest.raises(ValueError, match="cannot start at 18"):
        whole.window(18, 53, 24, 99)


@pytest.mark.parametrize("ramp", [0.0, 1.0])
def test_a_constant_and_a_ramp_go_on_through_a_hole(ramp):
    """The shipped prior, whose mean is half a unit away from them."""
    from diffusion_core.model import Model
    from flows.config import config_path

    prior = Model.load(config_path("models", "starter")).prior("city-grey").far_sighted()
    size = (256, 256)
    columns = torch.linspace(-0.4, 0.4, size[1]).expand(1, 1, *size)
    x = 0.5 + ramp * columns
    mask = holed(size, (64, 64, 128, 128))
    solver = make_solver("kriging", prior, {"tolerance": 1e-4, "max_steps": 400})

    def restore(operator, y, noise, factor):
        del factor
        return solver(None, operator, y, noise, torch.tensor([0.5]), DRAWS).x

    noise = GaussianNoise(0.0)
    found = coarse_means(pooled(x, mask, 4), noise, restore)
    fine = restore(*found.applied(mask, x, noise), 1)
    assert float((fine - x).abs().max()) < 0.03
