"""Filtered backprojection, SIRT and weighted TV against analytic disks and libraries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from skimage.data import shepp_logan_phantom
from skimage.transform import iradon
from torch import Tensor

from diffusion_core.noise.likelihood import PoissonTransmission
from diffusion_core.operators import Identity
from domains.base import Array, BadInputError, Measurement, Problem
from domains.ct.baselines import BASELINES, FBPSettings, filtered_backprojection, window_of
from domains.ct.geometry import ParallelGeometry
from domains.ct.matrices import matrix_pair, set_cache_dir
from domains.ct.operators import ParallelBeam

NOBODY = cast(Measurement, None)
SCALE = 0.03  # attenuation per mm of one network unit
COUNTS = 1e5


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path) -> Iterator[None]:
    set_cache_dir(tmp_path)
    yield
    set_cache_dir(None)


def beam(
    num_views: int, *, side: int = 65, pixel_mm: float = 0.7, arc: float = 180.0
) -> ParallelBeam:
    geometry = ParallelGeometry.covering(side, side, (pixel_mm, pixel_mm), num_views, arc)
    return ParallelBeam(geometry, scale=SCALE)


def sinogram_problem(operator: ParallelBeam, p: Tensor) -> Problem:
    """The problem whose absolute line integrals are p."""
    h, w = operator.image_shape
    offset = operator.A(torch.ones(1, 1, h, w))
    noise = PoissonTransmission(COUNTS, offset)
    shape = (len(p), 1, h, w)
    return Problem(operator, p - offset, noise, shape, "plane", "ct", lambda x: x)


def disk_sinogram(
    geometry: ParallelGeometry, centre_mm: tuple[float, float], radius_mm: float
) -> Array:
    """Chords of a disk of attenuation SCALE: the operator's matrix has no part in it."""
    x, y = centre_mm
    theta = geometry.angles[:, None]
    s = geometry.bin_centres_mm[None] - (x * np.cos(theta) + y * np.sin(theta))
    chords = 2 * np.sqrt(np.maximum(radius_mm**2 - s**2, 0))
    return (SCALE * chords).astype(np.float32)


@pytest.mark.parametrize("arc", [180.0, 360.0])
def test_backprojection_of_an_analytic_disk_is_the_disk(arc: float) -> None:
    operator = beam(180, arc=arc)
    p = torch.from_numpy(disk_sinogram(operator.geometry, (5.0, -3.0), 12.0))[None, None]
    x = BASELINES["fbp"](NOBODY, sinogram_problem(operator, p), {"window": "hann"})[0, 0].numpy()
    i, j = np.mgrid[:65, :65]
    distance = np.hypot((j - 32) * 0.7 - 5.0, (i - 32) * 0.7 + 3.0)
    inside, outside = x[distance < 10], x[(distance > 14) & (distance < 20)]
    assert inside.mean() == pytest.approx(0.0, abs=5e-3)  # one unit above air, which is -1
    assert outside.mean() == pytest.approx(-1.0, abs=5e-3)
    assert inside.std() < 0.02


def test_backprojection_agrees_with_scikit_image() -> None:
    # An odd number of bins: scikit-image's axis is through bin n // 2.
    operator = ParallelBeam(ParallelGeometry(65, 65, (1.0, 1.0), 90, 180.0, 93, 1.0), scale=SCALE)
    phantom = shepp_logan_phantom()[::6, ::6][:65, :65]
    image = np.zeros((65, 65), np.float32)
    image[: phantom.shape[0], : phantom.shape[1]] = phantom[:65, :65]
    p = operator.A(torch.from_numpy(image)[None, None])
    ours = filtered_backprojection(operator, p, FBPSettings(window="hann"))[0, 0].numpy()
    # scikit-image's angle turns the other way, and its rows are the bins.
    degrees = -np.degrees(operator.geometry.angles)
    theirs = iradon(p[0, 0].numpy().T / SCALE, theta=degrees, filter_name="hann", circle=False)
    margin = (theirs.shape[0] - 65) // 2
    theirs = theirs[margin : margin + 65, margin : margin + 65]
    # They interpolate between bin centres, we over the pixels' footprints: the edges differ a bit.
    assert np.abs(ours - theirs).mean() < 0.01
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.997


def test_windows_keep_the_mean_and_end_at_the_cutoff() -> None:
    for window in ("ramp", "hann", "cosine", "shepp-logan"):
        values = window_of(64, FBPSettings(window=cast(Any, window), cutoff=0.5))
        assert values[0] == 1
        assert (values[17:] == 0).all()
        assert (np.diff(values) <= 0).all()
    with pytest.raises(BadInputError, match="unknown window 'box'"):
        window_of(64, FBPSettings(window=cast(Any, "box")))


def test_sirt_explains_clean_data_and_momentum_gets_there_sooner() -> None:
    operator = beam(30, side=33)
    p = torch.from_numpy(disk_sinogram(operator.geometry, (2.0, 1.0), 7.0))[None, None]
    problem = sinogram_problem(operator, p)

    def misfit(num_iterations: int, **options: bool) -> float:
        x = BASELINES["sirt"](NOBODY, problem, {"num_iterations": num_iterations, **options})
        assert float(x.min()) >= -1 or not options.get("nonnegative", True)
        return float((operator.A(x) - problem.y).norm() / p.norm())

    plain = [misfit(n, momentum=False) for n in (5, 10, 20)]
    assert plain == sorted(plain, reverse=True)
    assert misfit(20) < plain[-1] < 0.1
    assert misfit(20, nonnegative=False) < 0.05


def test_first_step_of_sirt_is_the_weighted_backprojection() -> None:
    operator = beam(9, side=17)
    dense = matrix_pair(operator.geometry, range(9))[0].toarray() * SCALE
    p = np.abs(np.random.default_rng(0).standard_normal((1, 1, *operator.data_shape))).astype("f4")
    x = BASELINES["sirt"](
        NOBODY, sinogram_problem(operator, torch.from_numpy(p)), {"num_iterations": 1}
    )
    rows, columns = dense.sum(axis=1), dense.sum(axis=0)
    inverse = np.divide(1, rows, out=np.zeros_like(rows), where=rows > 0)
    expected = (dense.T @ (inverse * p.ravel())) / columns - 1
    np.testing.assert_allclose(x.numpy().ravel(), expected, atol=1e-4)


def test_weighted_tv_beats_backprojection_and_sirt_on_few_noisy_views() -> None:
    operator = beam(24)
    x0 = torch.full((2, 1, 65, 65), -1.0)
    i, j = torch.meshgrid(torch.arange(65) - 32, torch.arange(65) - 32, indexing="ij")
    x0[:, 0, i**2 + j**2 < 28**2] = -0.3
    x0[:, 0, (i - 6) ** 2 + (j + 4) ** 2 < 81] = 0.4
    p = operator.A(x0 + 1)
    rng = np.random.default_rng(0)
    counts = np.maximum(rng.poisson(COUNTS * np.exp(-p.double().numpy())), 0.5)
    measured = torch.from_numpy(-np.log(counts / COUNTS)).float()
    problem = sinogram_problem(operator, measured)

    def error(method: str, params: dict[str, Any]) -> float:
        x = BASELINES[method](NOBODY, problem, params)
        assert x.shape == x0.shape
        return math.sqrt(float((x - x0).square().mean()))

    tv = error("tv", {"strength": 10.0, "num_iterations": 40})
    assert tv < 0.5 * error("fbp", {"window": "hann", "cutoff": 0.8})
    assert tv < 0.5 * error("sirt", {"num_iterations": 30})


def test_methods_of_sinograms_refuse_images() -> None:
    y = torch.zeros(1, 1, 8, 8)
    problem = Problem(
        Identity(), y, PoissonTransmission(COUNTS), (1, 1, 8, 8), 0, "ct", lambda x: x
    )
    for method in ("fbp", "sirt"):
        with pytest.raises(BadInputError, match="need a sinogram"):
            BASELINES[method](NOBODY, problem, {})
