"""The metrics against hand values, scikit-image and the chi-squared law."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from diffusion_core.noise.likelihood import GaussianNoise, PoissonTransmission
from diffusion_core.operators import Fourier, Identity, Mask
from domains.base import Array, Domain, Item, ItemRecord, Problem
from domains.metrics import (
    edge_error,
    hole_of,
    mean_score,
    psnr,
    residual,
    score,
    ssim,
    z_gradient_error,
)


@pytest.fixture
def images() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    truth = rng.random((3, 33, 40))
    return truth, np.clip(truth + 0.1 * rng.standard_normal(truth.shape), 0, 1)


def test_psnr_of_a_constant_error_is_its_decibels() -> None:
    truth = np.full((1, 4, 5), 0.5)
    assert psnr(truth, truth + 0.1) == pytest.approx(20.0)
    assert psnr(truth, truth) == math.inf
    assert math.isnan(psnr(truth, truth * math.nan)), "a broken image is not a perfect one"


def test_psnr_counts_the_chosen_pixels_only() -> None:
    truth = np.zeros((2, 4, 4))
    image = truth.copy()
    image[:, 0, 0] = 0.1
    where = np.zeros((1, 4, 4), bool)
    where[0, 0, 0] = True
    assert psnr(truth, image, where) == pytest.approx(20.0)
    with pytest.raises(ValueError, match="empty"):
        psnr(truth, image, np.zeros((1, 4, 4), bool))


def test_psnr_and_ssim_agree_with_scikit_image(images: tuple[Array, Array]) -> None:
    truth, image = images
    expected = structural_similarity(truth, image, data_range=1.0, channel_axis=0)
    assert ssim(truth, image) == pytest.approx(expected, rel=1e-12)
    assert psnr(truth, image) == pytest.approx(
        peak_signal_noise_ratio(truth, image, data_range=1.0), rel=1e-12
    )


def test_ssim_of_a_region_is_1_where_nothing_changed(images: tuple[Array, Array]) -> None:
    truth, image = images
    image = image.copy()
    image[..., :20] = truth[..., :20]
    where = np.zeros(truth.shape[-2:], bool)
    where[:, :15] = True  # half a window away from what changed
    assert ssim(truth, image, where) == pytest.approx(1.0)
    assert ssim(truth, image, ~where) < 0.99


def test_ssim_of_small_images_uses_a_smaller_window() -> None:
    truth = np.random.default_rng(0).random((1, 4, 9))
    assert ssim(truth, truth) == pytest.approx(1.0)
    assert math.isnan(ssim(truth[:, :2], truth[:, :2]))


def test_edge_error_of_ramps_is_the_difference_of_their_slopes() -> None:
    columns = np.arange(12) * np.ones((12, 1))
    inside = np.zeros((12, 12), bool)
    inside[1:-1, 1:-1] = True
    assert edge_error(0.05 * columns, 0.02 * columns.T, inside) == pytest.approx(0.03)
    # Signs of gradients do not matter, nor does brightness.
    assert edge_error(0.05 * columns, 0.4 - 0.05 * columns, inside) == pytest.approx(0.0, abs=1e-12)


def test_residual_of_the_truth_is_1_for_real_and_complex_data() -> None:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((2, 1, 64, 64)))
    mask = torch.from_numpy(rng.random((2, 1, 64, 64)) < 0.4)
    noise = GaussianNoise(0.1)

    def drawn(shape: Any) -> torch.Tensor:
        return 0.1 * torch.from_numpy(rng.standard_normal(shape))

    pixels = Mask(mask)
    y = pixels.A(x + drawn(x.shape))
    # Half the number of data is the variance of chi^2 / n over 2: 5 standard deviations.
    bound = 5 * math.sqrt(2 / float(mask[0].sum()))
    assert residual(pixels, y, x, noise) == pytest.approx([1, 1], abs=bound)
    kspace = Fourier(mask, channels=1)
    y = kspace.A(x) + mask * torch.complex(drawn(x.shape), drawn(x.shape))
    assert residual(kspace, y, x, noise) == pytest.approx([1, 1], abs=bound)


def test_residual_of_exact_data_is_the_largest_misfit() -> None:
    x = torch.zeros(2, 1, 8, 8)
    y = x.clone()
    y[1, 0, 3, 3] = -0.25
    assert residual(Identity(), y, x, GaussianNoise(0.0)) == [0.0, 0.25]


def test_residual_weighs_each_ray_by_its_own_counts() -> None:
    x = torch.tensor([0.0, 2.0]).reshape(1, 1, 1, 2)
    noise = PoissonTransmission(1e4)
    y = x + torch.tensor([1.0, math.e]).reshape(x.shape) * 1e-2  # one standard deviation each
    assert residual(Identity(), y, x, noise) == pytest.approx([1.0], rel=1e-5)


class Counts:
    """A domain of counts 0..200 whose body is all that is not zero."""

    def unit_scale(self, truth: Array, record: ItemRecord) -> tuple[float, float]:
        assert truth.shape[1] == 1, "the scale is asked for slice by slice"
        return 0.0, 1 / float(truth.max())

    def body_mask(self, truth: Array, record: ItemRecord) -> Array:
        return cast(Array, truth[0] > 0)


def _item(pixels: Array) -> Item:
    shape = cast(tuple[int, int, int, int], pixels.shape)
    return Item(pixels, ItemRecord("a", "counts", shape, "float32", "counts", "0", "none"))


def test_score_scales_each_slice_clips_and_knows_body_and_hole() -> None:
    truth = np.zeros((1, 2, 8, 8), np.float32)
    truth[:, 0, :4], truth[:, 1] = 100, 200
    restored = truth + 10
    hole = np.zeros((2, 8, 8), bool)
    hole[1, :2, :2] = True
    restored[:, 1, :2, :2] = 180
    first, second = score(cast(Domain, Counts()), _item(truth), restored, region=hole)
    # Body: 110 clips to 100; outside it 10 of 100 is 20 dB; over all half of that, 3 dB more.
    assert first["psnr_body"] == math.inf
    assert first["psnr"] == pytest.approx(20 + 10 * math.log10(2))
    assert "psnr_hole" not in first
    assert second["psnr_hole"] == pytest.approx(20.0)
    assert second["psnr"] == pytest.approx(20 + 10 * math.log10(16))
    assert "z_gradient_error" not in first
    # On the scale of the second slice (200): its own error, -20 or +10 clipped to 0, less the +10
    # that the first has.
    above, below = 10 / 200, 10 / 200
    expected = (4 * (20 / 200 + above) + 28 * above + 32 * below) / 64
    assert second["z_gradient_error"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="of the truth"):
        score(cast(Domain, Counts()), _item(truth), restored[:, :1])


def test_a_constant_error_is_no_error_along_z_and_flicker_is() -> None:
    truth = np.linspace(0.2, 0.8, 2 * 5 * 4 * 3).reshape(2, 5, 4, 3)
    assert z_gradient_error(truth, truth + 0.1) == pytest.approx(0.0, abs=1e-12)
    flicker = truth + 0.1 * (-1.0) ** np.arange(5)[None, :, None, None]
    assert z_gradient_error(truth, flicker) == pytest.approx(0.2)
    assert z_gradient_error(truth, truth[:, ::-1]) > 0.1
    with pytest.raises(ValueError, match="one slice"):
        z_gradient_error(truth[:, :1], truth[:, :1])


def test_mean_score_averages_what_rows_have() -> None:
    rows: list[Mapping[str, float]] = [{"psnr": 20.0}, {"psnr": 30.0, "psnr_hole": 10.0}]
    assert mean_score(rows) == {"psnr": 25.0, "psnr_hole": 10.0}


def test_hole_is_what_is_not_known() -> None:
    known = torch.ones(3, 1, 2, 2, dtype=torch.bool)
    known[2, 0, 1, 1] = False
    operator, noise = Mask(known), GaussianNoise(0.0)
    y = torch.zeros(3, 1, 2, 2)

    def problem(pixels: torch.Tensor | None) -> Problem:
        return Problem(operator, y, noise, (3, 1, 2, 2), 0, "city-grey", lambda x: x, pixels)

    hole = hole_of(problem(known))
    assert hole is not None
    assert hole.shape == (1, 3, 2, 2)
    assert hole.sum() == 1
    assert hole[0, 2, 1, 1]
    assert hole_of(problem(None)) is None


# --- the border of a hole ------------------------------------------------------------------------


def test_a_smooth_image_crosses_the_border_of_a_hole_without_a_step():
    from domains.metrics import boundary_ratio

    rows, columns = np.mgrid[:40, :50] / 50.0
    hole = np.zeros((40, 50), bool)
    hole[10:30, 15:35] = True
    ramp = np.stack([rows + 2 * columns, columns])
    assert boundary_ratio(ramp, hole) == pytest.approx(1.0)
    assert boundary_ratio(ramp[0], ~hole) == pytest.approx(1.0)
    # A step of height s at the border of a ramp of slope g along both axes: |s +- g| / g, and where
    # the slope is less than the step both signs average to s / g.
    slope, step = 1 / 50.0, 0.3
    plane = rows + columns
    assert boundary_ratio(plane + step * hole, hole) == pytest.approx(step / slope)
    assert np.isnan(boundary_ratio(plane, np.zeros_like(hole)))


def test_a_flat_fill_in_a_textured_image_shows_no_step_that_is_not_there():
    from domains.metrics import boundary_ratio

    noise = np.random.default_rng(0).normal(size=(1, 200, 200))
    hole = np.zeros((200, 200), bool)
    hole[50:150, 50:150] = True
    assert boundary_ratio(noise, hole) == pytest.approx(1.0, abs=0.1)
    # Outside differences have std 2^(1/2) s, across the border s, within the fill none.
    assert boundary_ratio(np.where(hole, 0.0, noise), hole) == pytest.approx(np.sqrt(2), abs=0.15)
