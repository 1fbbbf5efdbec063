"""Slices that were measured while the patient moved: made, found, taken away.

A slice is measured line after line of k-space. Where the head lies otherwise for some of them, the
image holds a sum of heads, each of a part of k-space: ghosts along the phase-encode axis, over
the body and outside it. A slice has its own time, so that its neighbours may be whole; what
moved is then best taken as missing (see between_slices.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage

from domains import between_slices
from domains.base import Array, BadInputError, Item, Measurement, Task
from domains.body import largest_piece
from domains.imaging import Units, slices_first
from domains.keyed import pixel_digest, slice_rngs
from domains.mri.degradations import SCALE_PERCENTILE, positive_scale

PATTERN = "moved-slices"
"""What operator_params of a task call its mask."""

SEEN = "seen"
"""The array of a measurement that holds the slices that moved, as they were measured."""

_BODY_SHARE = 0.1
_FEWEST_PIXELS = 50
_REACH = 3
"""Slices on either side that a slice is held against."""

_FLOOR = 0.01
"""Of the body's signal: background below it is a scanner's zeros, or nothing to speak of."""

_EPS = 1e-12
_MOST_GHOSTS, _LEAST_SCORE = 0.5, 0.3
"""Set on five clean volumes and on the same with slices moved (infra/decisions/0027)."""


def simulate(item: Item, task: Task, seed: int) -> Measurement:
    """Move the patient in some slices of a clean volume, and take those as missing.

    Args:
        item: magnitudes, of three slices or more.
        task: "mask" with {pattern: moved-slices, every: n, num_moves, shift_mm}: of every n slices
            one has moved, the first and last of the volume and neighbours never.
        seed: which slices, when and how far.

    Returns:
        The measurement of the turned volume, as between_slices.py has it; arrays["seen"] (h 1 n w)
        are the n slices of params["moved_slices"] as they were measured, in network units.

    Raises:
        BadInputError: if the task takes other pixels, or the item has too few slices.
    """
    params = dict(task.operator_params)
    if params.get("pattern") != PATTERN or not {"every", "num_moves", "shift_mm"} <= set(params):
        raise BadInputError(
            f"task '{task.name}': the domain 'mri' has no operator 'mask' but with "
            f"{{pattern: {PATTERN}, every: 4, num_moves: 3, shift_mm: 3.0}}; choose another task"
        )
    num_slices, every = item.record.shape[1], int(params["every"])
    if num_slices < 3 or every < 2:
        raise BadInputError(
            f"{item.record.item_id}: {num_slices} slices are too few to take one from; give more"
        )
    chosen = moved_ones(item, every, seed)
    pixels = moved(
        item,
        chosen,
        seed,
        num_moves=int(params["num_moves"]),
        shift_mm=float(params["shift_mm"]),
    )
    spoilt = between_slices.turned(Item(pixels, replace(item.record, dtype=pixels.dtype.name)))
    known = np.ones(num_slices, bool)
    known[chosen] = False
    h, _, w = spoilt.pixels.shape[1:]
    mask = np.broadcast_to(known[None, None, :, None], (h, 1, num_slices, w)).copy()
    q = positive_scale(float(np.percentile(item.pixels[:, known], SCALE_PERCENTILE)))
    seen = slices_first(Units(0.0, q).to_network(spoilt.pixels))
    return Measurement(
        record=between_slices.turned_record(item.record),
        task=task.name,
        operator="mask",
        params={**params, "scale_q": q, "moved_slices": chosen},
        noise={"kind": "gaussian", "sigma_y": 0.0},
        y=seen * mask,
        arrays={"mask": mask, SEEN: seen[:, :, chosen]},
        truth_digest=pixel_digest(item.pixels),
        seed=seed,
    )


def moved_ones(item: Item, every: int, seed: int) -> list[int]:
    """One slice of every so many, keyed by source and seed; no two side by side, no end."""
    rng = slice_rngs(seed, item.record, "moved")[0]
    starts = range(1, item.record.shape[1] - 1, every)
    last = item.record.shape[1] - 2
    chosen = [int(rng.integers(s, min(s + every - 1, last + 1))) for s in starts if s <= last]
    return sorted(set(chosen))


def moved(
    item: Item,
    slices: Sequence[int],
    seed: int,
    *,
    num_moves: int,
    shift_mm: float,
) -> Array:
    """The magnitudes (1 z h w) float32 of a volume whose patient moved while slices were measured.

    Between its moves, at lines drawn at random, the patient lies still: each group of lines, in
    their order from one end of k-space to the other, is that of the slice shifted. The group of
    the zero frequency says where the patient is, and stays.

    Args:
        item: clean magnitudes.
        slices: those in which it moves.
        seed: keys the draws, with source and slice.
        num_moves: in a slice.
        shift_mm: standard deviation of each shift along either axis; pixels where there is no size.
    """
    pixels = item.pixels.astype(np.float32).copy()
    rngs = slice_rngs(seed, item.record, "motion")
    _, dy, dx = item.record.spacing_mm or (1.0, 1.0, 1.0)
    for z in slices:
        rng = rngs[z]
        k = np.fft.fft2(pixels[0, z].astype(np.float64))
        v, u = (np.fft.fftfreq(n) for n in k.shape)
        order = np.fft.fftshift(np.arange(len(u)))  # lines along w, in time
        ends = np.sort(rng.permutation(np.arange(1, len(order)))[:num_moves])
        for group in np.split(order, ends):
            if 0 in group:
                continue
            down, across = rng.standard_normal(2) * shift_mm / (dy, dx)
            k[:, group] *= np.exp(-2j * np.pi * (down * v[:, None] + across * u[group]))
        pixels[0, z] = np.abs(np.fft.ifft2(k))
    return pixels


def moved_slices(item: Item) -> list[int]:
    """The slices, from 0, that look as if the patient moved; the volume's ends are never judged.

    Two signs, each against the slices before and behind, which had a time of their own:

    blur    fine structure in the body is weaker than on either side (a part of k-space that is out
            of step with its mirror image keeps half of its energy in the magnitude)
    ghosts  beside the body, along one axis, there is more than beyond it along the other, or less,
            unlike on either side (Giannelli et al. 2010, J Appl Clin Med Phys 11:237: ghosts as
            the background along the phase-encode axis against that along the other)

    Ghosts alone are not enough: much else lies in the background. Of thick slices it finds the
    worst, for neighbours there differ by themselves.
    """
    signs = _signs(item.pixels[0].astype(np.float64))
    blur = _beyond_neighbours(-signs[:, 0])
    ghosts = np.max([_beyond_neighbours(s * signs[:, a]) for a in (1, 2) for s in (1, -1)], axis=0)
    score = blur + np.clip(ghosts, 0, _MOST_GHOSTS) / 2
    return [int(z) for z in np.flatnonzero(score > _LEAST_SCORE)]


def _signs(volume: Array) -> Array:
    """Of each slice of (z h w) log fine energy in the body, and log background along w and h.

    NaN where a slice has too little body or background to tell.
    """
    top = float(np.percentile(volume, SCALE_PERCENTILE))
    signs = np.full((len(volume), 3), np.nan)
    if top <= 0:
        return signs
    body = largest_piece(volume > _BODY_SHARE * top)
    for z, plane in enumerate(volume):
        inner = ndimage.binary_erosion(body[z], iterations=2)[1:-1, 1:-1]
        if inner.sum() < _FEWEST_PIXELS:
            continue
        signal = float(np.median(plane[body[z]]))
        fine = np.diff(plane, 2, axis=0)[:, 1:-1] ** 2 + np.diff(plane, 2, axis=1)[1:-1] ** 2
        signs[z, 0] = np.log(fine[inner].mean() / signal**2 + _EPS)
        near = ndimage.binary_dilation(body[max(z - 1, 0) : z + 2].any(axis=0), iterations=3)
        rows, columns = near.any(axis=1)[:, None], near.any(axis=0)
        for axis, beside in enumerate((rows & ~columns, columns & ~rows), start=1):
            beyond = ~near & ~beside & ~(rows & columns)
            if min(beside.sum(), beyond.sum()) >= _FEWEST_PIXELS:
                along, noise = (np.sqrt((plane[p] ** 2).mean()) / signal for p in (beside, beyond))
                signs[z, axis] = np.log((along + _FLOOR) / (noise + _FLOOR))
    return signs


def _beyond_neighbours(values: Array) -> Array:
    """How far each value stands above the medians of those on either side; -inf at the ends."""
    above = np.full(len(values), -np.inf)
    for z in range(1, len(values) - 1):
        sides = [values[max(z - _REACH, 0) : z], values[z + 1 : z + 1 + _REACH]]
        levels = [np.median(side[np.isfinite(side)]) for side in sides if np.isfinite(side).any()]
        if len(levels) == 2 and np.isfinite(values[z]):
            above[z] = values[z] - max(levels)
    return above
