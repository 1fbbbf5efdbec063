"""Parts of a sinogram that say nothing: traces of metal, and detector elements that lie.

Metal takes every photon of the rays through it: they count as not measured. An element of wrong
gain adds a constant to its bin in all views, which backprojection turns into a ring; elements that
stand out from their neighbours in the mean of all views count as not measured as a whole. What is
restored from the rest needs no other correction: operator and data are masked alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.interpolate import CubicSpline

from domains.base import Array, BadInputError, Item
from domains.ct.geometry import FanGeometry, Geometry
from domains.keyed import slice_rngs

BODY_ABOVE_HU = -200.0
"""Metal is put into what is denser."""

ALIKE_VIEWS = 4
"""Neighbouring views that show nearly the same count as one."""

RING_ROUNDS = 20
RING_LEAST = 1e-3
"""Line integral that no bin's mean is held to more closely than."""
_FORETELL = np.array([-1.0, 4.0, 0.0, 4.0, -1.0]) / 6
RING_THRESHOLD = 4.5
"""Robust standard deviations by which a bin stands out."""

_MAD = 1.4826


def spoil(
    line_integrals: Array, item: Item, geometry: Geometry, params: Mapping[str, Any], seed: int
) -> tuple[Array, Array | None]:
    """Put metal into a scan, or lying elements, as the task's parameters say.

    Args:
        line_integrals: (z views bins), as measured.
        item: the clean volume.
        geometry: of the scan.
        params: {pattern: metal, num_implants, radius_mm} or {pattern: rings, bad_share, gain_std}.
        seed: keys the places by source and slice.

    Returns:
        The data (z views bins), 0 where nothing is known, and the mask (z 1 views bins), True where
        measured; as it was and None without a pattern. The mask of rings is found in the data.

    Raises:
        BadInputError: for an unknown pattern.
    """
    pattern = params.get("pattern")
    if pattern is None:
        return line_integrals, None
    rngs = slice_rngs(seed, item.record, str(pattern))
    if pattern == "metal":
        traces = [
            metal_trace(plane, geometry, rng, int(params["num_implants"]), params["radius_mm"])
            for plane, rng in zip(item.pixels[0], rngs, strict=True)
        ]
        known = ~np.stack(traces)
    elif pattern == "rings":
        shares = float(params["bad_share"]), float(params["gain_std"])
        errors = np.stack([gain_errors(geometry.num_bins, rng, *shares) for rng in rngs])
        line_integrals = (line_integrals + errors[:, None]).astype(line_integrals.dtype)
        known = ~np.repeat(lying_bins(line_integrals)[:, None], geometry.num_views, axis=1)
    else:
        raise BadInputError(f"a scan has no pattern '{pattern}'; choose metal or rings")
    return np.where(known, line_integrals, 0).astype(line_integrals.dtype), known[:, None]


def metal_trace(
    plane: Array, geometry: Geometry, rng: np.random.Generator, num: int, radius_mm: float
) -> Array:
    """Rays (views bins) that meet one of `num` discs of metal at places within the body."""
    places = np.argwhere(plane > BODY_ABOVE_HU)
    if not len(places):
        places = np.argwhere(np.ones_like(plane, dtype=bool))
    trace = np.zeros((geometry.num_views, geometry.num_bins), dtype=bool)
    for row, column in places[rng.integers(0, len(places), num)]:
        y = (row - (geometry.height - 1) / 2) * geometry.pixel_mm[0]
        x = (column - (geometry.width - 1) / 2) * geometry.pixel_mm[1]
        trace |= np.abs(ray_distance(geometry, x, y)) <= radius_mm + geometry.bin_mm / 2
    return trace


def ray_distance(geometry: Geometry, x: float, y: float) -> Array:
    """Distance (views bins) of each bin's central ray from a point, mm, signed."""
    theta = geometry.angles[:, None]
    s = x * np.cos(theta) + y * np.sin(theta)
    t = geometry.bin_centres_mm
    if not isinstance(geometry, FanGeometry):
        return s - t
    r = y * np.cos(theta) - x * np.sin(theta)
    distance = s * geometry.detector_mm - t * (geometry.source_mm + r)
    return distance / np.hypot(geometry.detector_mm, t)


def gain_errors(
    num_bins: int, rng: np.random.Generator, bad_share: float, gain_std: float
) -> Array:
    """What each bin adds to its line integrals: 0 but for a share of bins."""
    bad = rng.random(num_bins) < bad_share
    return bad * gain_std * rng.standard_normal(num_bins)


def lying_bins(line_integrals: Array, known: Array | None = None) -> Array:
    """Bins (z bins) that stand out from their neighbours by about as much in every view.

    A cubic through two neighbours on either side foretells each value. What is in the body misses
    that by something else in each view; what lies misses it by the same. Of the bins whose median
    over the views is far from 0, for how much it varies, the farthest are taken out and bridged,
    and the rest judged again: a bin beside a lying one looks odd too until then. A body that is
    round about the centre of rotation looks like rings itself.

    Args:
        line_integrals: (z views bins).
        known: True where measured; None: everywhere.
    """
    values = line_integrals.astype(np.float64)
    if known is not None:
        values = interpolated(values[:, None], known[:, None])[:, 0]
    return np.stack([_lying_in_slice(plane) for plane in values])


def _lying_in_slice(plane: Array) -> Array:
    """See lying_bins: (views bins) -> (bins,)."""
    views, num_bins = plane.shape
    bins, lying = np.arange(num_bins), np.zeros(num_bins, dtype=bool)
    for _ in range(RING_ROUNDS):
        bridged = CubicSpline(bins[~lying], plane[:, ~lying], axis=1)(bins)
        odd = bridged - ndimage.convolve1d(bridged, _FORETELL, axis=1, mode="nearest")
        middle = np.median(odd, axis=0)
        spread = _MAD * np.median(np.abs(odd - middle), axis=0) / math.sqrt(views / ALIKE_VIEWS)
        score = np.abs(middle) / np.maximum(spread, RING_LEAST)
        score[lying] = 0
        found = (score == ndimage.maximum_filter1d(score, 5)) & (score > RING_THRESHOLD)
        if not found.any():
            break
        lying |= found
    return lying


def interpolated(p: Array, known: Array) -> Array:
    """Line integrals (b 1 views bins) with straight lines over what is unknown, view by view.

    Source: Kalender et al. 1987, doi:10.1148/radiology.164.2.3602406.
    """
    known = np.broadcast_to(known, p.shape)
    filled = p.copy()
    bins = np.arange(p.shape[-1])
    for place in np.argwhere(~known.all(axis=-1)):
        there = known[tuple(place)]
        if there.any():
            row = filled[tuple(place)]
            row[~there] = np.interp(bins[~there], bins[there], row[there])
    return filled
