"""Simulated CT scans of clean slices, by another projector than the one that reconstructs.

Reconstructing with the very matrix that made the data is the "inverse crime": its model error is
zero, as no scanner's is. Here the scene is a finer one, of at least 2 x 2 subpixels a pixel with a
spline through them, whose average over each pixel is the clean image; it is projected view by
view, without storing a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse import csc_array

from domains.base import Array
from domains.ct.fold import fold_of
from domains.ct.footprints import view_columns
from domains.ct.geometry import FanGeometry, Geometry

MU_WATER_PER_MM = 0.02
SLICES_AT_ONCE = 8
"""Finer scenes held in memory at a time: 32 MiB, and with their turned copies 128 MiB more, for
slices of 512 x 512."""


def attenuation(hu: Array) -> Array:
    """Linear attenuation per mm: .02 (1 + HU / 1000), float32; HU below -1000 go below 0."""
    mu: Array = MU_WATER_PER_MM * (1 + hu.astype(np.float32) / 1000)
    return mu


def finer_scene(image: Array, factors: tuple[int, int]) -> Array:
    """A smooth scene (z, fh, gw) whose means over f x g squares are the image (z, h, w).

    A cubic spline through the pixels' centres, plus on each pixel the constant that its mean lacks.
    """
    f, g = factors
    z, h, w = image.shape
    scene = ndimage.zoom(image, (1, f, g), order=3, mode="nearest", grid_mode=True)
    means = scene.reshape(z, h, f, w, g).mean(axis=(2, 4))
    scene += np.repeat(np.repeat(image - means, f, axis=1), g, axis=2)
    return scene


def scan(mu: Array, geometry: Geometry) -> Array:
    """Line integrals averaged over each bin, as a finer scene has them: (z, views, bins) float32.

    Args:
        mu: (z, h, w) per mm.
        geometry: of the image and the detector.
    """
    at_centre_mm = geometry.bin_mm
    if isinstance(geometry, FanGeometry):
        at_centre_mm *= geometry.source_mm / geometry.detector_mm
    factors = (
        math.ceil(2 * geometry.pixel_mm[0] / at_centre_mm - 1e-9),
        math.ceil(2 * geometry.pixel_mm[1] / at_centre_mm - 1e-9),
    )
    fold = fold_of(geometry)
    line_integrals = np.empty((len(mu), geometry.num_views, geometry.num_bins), np.float32)
    for start in range(0, len(mu), SLICES_AT_ONCE):
        scene = finer_scene(mu[start : start + SLICES_AT_ONCE], factors)
        copies = fold.copies(torch.from_numpy(scene)).flatten(2).numpy()
        for place, number in enumerate(fold.stored):
            look = _fine_view(geometry, factors, geometry.angle(number))
            for view in [v for v in range(geometry.num_views) if fold.place[v] == place]:
                for j, pixels in enumerate(copies[:, fold.copy[view]]):
                    line_integrals[start + j, view] = look(pixels)
    return line_integrals


def _fine_view(
    geometry: Geometry, factors: tuple[int, int], theta: float
) -> Callable[[Array], Array]:
    """One view of a finer scene: its pixels (n,) to bins."""
    if isinstance(geometry, FanGeometry):
        matrix = view_columns(_finer(geometry, factors), theta)
        return lambda pixels: matrix @ pixels
    wider = _narrow_view(geometry, factors, theta)
    # A bin more on either side takes the zero weights of pixels at the very edge.
    return lambda pixels: (wider @ pixels)[1:-1]


def _finer(geometry: FanGeometry, factors: tuple[int, int]) -> FanGeometry:
    """The same scan of subpixels."""
    (f, g), (dy, dx) = factors, geometry.pixel_mm
    height, width = geometry.height * f, geometry.width * g
    return replace(geometry, height=height, width=width, pixel_mm=(dy / f, dx / g))


def _narrow_view(geometry: Geometry, factors: tuple[int, int], theta: float) -> csc_array:
    """One view of subpixels so small that each meets two bins at most: (bins + 2, subpixels)."""
    dy, dx = geometry.pixel_mm[0] / factors[0], geometry.pixel_mm[1] / factors[1]
    h, w = geometry.height * factors[0], geometry.width * factors[1]
    a, b = abs(dx * math.cos(theta)) / 2, abs(dy * math.sin(theta)) / 2
    x = (np.arange(w) - (w - 1) / 2) * (dx * math.cos(theta))
    y = (np.arange(h) - (h - 1) / 2) * (dy * math.sin(theta))
    left = geometry.left_mm
    start = (((y - left - (a + b)) / geometry.bin_mm)[:, None] + x / geometry.bin_mm).ravel()
    first = np.floor(start)
    # How far the footprint reaches beyond the upper edge of its first bin.
    beyond = ((start - first - 1) * geometry.bin_mm + 2 * (a + b)).astype(np.float32)
    share = _tail(np.maximum(beyond, 0), max(a, b), min(a, b))
    weights = np.stack([1 - share, share], axis=1) * np.float32(dx * dy / geometry.bin_mm)
    rows = (first.astype(np.int32) + 1)[:, None] + np.arange(2, dtype=np.int32)
    indptr = np.arange(0, weights.size + 1, 2, dtype=np.int32)
    return csc_array(
        (weights.ravel(), rows.ravel(), indptr), shape=(geometry.num_bins + 2, len(first))
    )


def _tail(depth: Array, wide: float, narrow: float) -> Array:
    """Share of a trapezoidal footprint within `depth` of its end (half-widths wide >= narrow).

    Its density rises over 2 narrow to 1 / (2 wide), stays, and falls again: in the first flank the
    share is depth^2 / (8 wide narrow), on the plateau (depth - narrow) / (2 wide).
    """
    flank = np.minimum(depth, 2 * narrow)
    plateau = np.clip(depth - 2 * narrow, 0, 2 * (wide - narrow))
    end = np.clip(depth - 2 * wide, 0, 2 * narrow)
    share = plateau / (2 * wide)
    if narrow > 1e-6 * wide:
        share += (flank**2 + end * (4 * narrow - end)) / (8 * wide * narrow)
    return share


def photon_counts(
    line_integrals: Array,
    counts_per_ray: float,
    rngs: Sequence[np.random.Generator],
    electronic_counts: float = 0.0,
) -> Array:
    """Counts n ~ Poisson(I0 exp(-p)), one generator a slice; shape of line_integrals.

    With read-out noise a Gaussian of `electronic_counts` standard deviation is added: such counts
    are no whole numbers, and may be negative.
    """
    expected = counts_per_ray * np.exp(-line_integrals.astype(np.float64))
    counts = [rng.poisson(rates) for rng, rates in zip(rngs, expected, strict=True)]
    if electronic_counts > 0:
        shape = expected.shape[1:]
        read_out = [electronic_counts * rng.standard_normal(shape) for rng in rngs]
        counts = [n + e for n, e in zip(counts, read_out, strict=True)]
    return np.stack(counts)


def log_transform(counts: Array, counts_per_ray: float) -> Array:
    """Measured line integrals -log(max(n, 1/2) / I0), float32: no ray is without a count."""
    measured: Array = -np.log(np.maximum(counts, 0.5) / counts_per_ray)
    return measured.astype(np.float32)
