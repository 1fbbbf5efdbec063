"""One view of a projector as a sparse matrix: how much of each pixel falls on each detector bin.

An entry is the line integral through the pixel, in mm, averaged over the bin: the pixel's area
times the share of its shadow on the bin, over the bin's width.

    parallel   a square pixel casts a trapezoid, the convolution of two boxes as wide as
               |dx cos theta| and |dy sin theta|: exact. Source: De Man and Basu 2004,
               doi:10.1088/0031-9155/49/11/024 (its parallel-beam special case).
    fan        the trapezoid between the shadows of the pixel's corners, its area that of a small
               pixel at the centre: off by the square of pixel over distance. Source: Long, Fessler
               and Balter 2010, doi:10.1109/TMI.2010.2050898 (trapezoid footprint).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.sparse import csc_array

from domains.base import Array
from domains.ct.geometry import FanGeometry, Geometry

_SPECK = 1e-6
"""Rounding leaves specks of weight outside a footprint; of the pixel's side."""


def view_columns(geometry: Geometry, theta: float) -> csc_array:
    """One view as (num_bins, h * w), compressed columns: a pixel's few bins lie side by side."""
    if isinstance(geometry, FanGeometry):
        return _fan_view(geometry, theta)
    return _parallel_view(geometry, theta)


def _parallel_view(geometry: Geometry, theta: float) -> csc_array:
    dy, dx = geometry.pixel_mm
    halves = abs(dx * math.cos(theta)) / 2, abs(dy * math.sin(theta)) / 2
    wide, narrow = max(halves), min(halves)
    s, _ = _along(geometry, theta)
    return _columns(
        geometry,
        s - (wide + narrow),
        2 * (wide + narrow),
        lambda edge: _symmetric_cdf(edge - s, wide, narrow),
        dx * dy / geometry.bin_mm,
    )


def _fan_view(geometry: FanGeometry, theta: float) -> csc_array:
    dy, dx = geometry.pixel_mm
    s, r = _along(geometry, theta)
    depth = geometry.source_mm + r
    cos, sin = math.cos(theta), math.sin(theta)
    corners = np.empty((4, s.size))
    for k, (side_x, side_y) in enumerate(((-1, -1), (-1, 1), (1, -1), (1, 1))):
        x, y = side_x * dx / 2, side_y * dy / 2
        corners[k] = geometry.detector_mm * (s + x * cos + y * sin) / (depth - x * sin + y * cos)
    corners.sort(axis=0)
    # dt d(depth) spans the area dA = (depth^2 / (D sqrt(depth^2 + s^2))) dt dr along a ray.
    area = dx * dy * geometry.detector_mm * np.hypot(depth, s) / depth**2
    return _columns(
        geometry,
        corners[0],
        float((corners[3] - corners[0]).max()),
        lambda edge: _trapezoid_cdf(edge, corners),
        area / geometry.bin_mm,
    )


def _along(geometry: Geometry, theta: float) -> tuple[Array, Array]:
    """Coordinates of every pixel's centre across (s) and along (r) the central ray, (h w)."""
    dy, dx = geometry.pixel_mm
    x = (np.arange(geometry.width) - (geometry.width - 1) / 2) * dx
    y = (np.arange(geometry.height) - (geometry.height - 1) / 2) * dy
    s = y[:, None] * math.sin(theta) + x * math.cos(theta)
    r = y[:, None] * math.cos(theta) - x * math.sin(theta)
    return s.ravel(), r.ravel()


def _columns(
    geometry: Geometry,
    start: Array,
    widest: float,
    share_below: Callable[[Array], Array],
    area: Array | float,
) -> csc_array:
    """The matrix of footprints that begin at `start` and are `widest` wide at most.

    Args:
        geometry: of the detector.
        start: (pixels,) detector coordinate, mm.
        widest: mm.
        share_below: share of each footprint below an edge (pixels,).
        area: of each footprint, over the bin's width.
    """
    left = geometry.left_mm
    first = np.floor((start - left) / geometry.bin_mm).astype(np.int32)
    num_touched = math.floor(widest / geometry.bin_mm) + 2
    weights = np.empty((start.size, num_touched), np.float32)
    edge = left + first * geometry.bin_mm
    below = share_below(edge)
    for j in range(num_touched):
        above = share_below(edge + (j + 1) * geometry.bin_mm)
        weights[:, j] = (above - below) * area
        below = above
    bins = first[:, None] + np.arange(num_touched, dtype=np.int32)
    kept = weights > _SPECK * max(geometry.pixel_mm)
    kept &= (bins >= 0) & (bins < geometry.num_bins)
    indptr = np.zeros(start.size + 1, np.int32)
    np.cumsum(kept.sum(axis=1), out=indptr[1:])
    return csc_array((weights[kept], bins[kept], indptr), shape=(geometry.num_bins, start.size))


def _symmetric_cdf(s: Array, wide: float, narrow: float) -> Array:
    """Share left of s of a trapezoid about 0: boxes of half-width wide >= narrow, convolved."""
    inner, outer = wide - narrow, wide + narrow
    r = np.minimum(np.abs(s), outer)
    share = np.minimum(r, inner) / (2 * wide)
    if narrow > 1e-9 * wide:
        # The flank: density falls linearly from 1 / (2 wide) at inner to 0 at outer.
        depth = np.maximum(r - inner, 0.0)
        share += depth * (1 - depth / (4 * narrow)) / (2 * wide)
    return 0.5 + np.copysign(share, s)


def _trapezoid_cdf(t: Array, corners: Array) -> Array:
    """Share left of t of trapezoids that rise over corners 0 to 1, stay, and fall over 2 to 3."""
    c0, c1, c2, c3 = corners
    height = 2 / ((c3 - c0) + (c2 - c1))
    rise, fall = np.maximum(c1 - c0, 1e-12), np.maximum(c3 - c2, 1e-12)
    up = np.clip(t - c0, 0, c1 - c0)
    level = np.clip(t - c1, 0, c2 - c1)
    down = np.clip(t - c2, 0, c3 - c2)
    return height * (up**2 / (2 * rise) + level + down - down**2 / (2 * fall))
