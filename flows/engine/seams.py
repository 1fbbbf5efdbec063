"""Seams: is the picture as smooth across the borders of blocks as it is beside them?

            border            For every stretch of a border: the mean gradient across it, a, and
      |  .  |  .  |  .  |     that across lines 8, 16 and 24 px away on either side, b. The metric
     -24   -8     0  8  24    is the sum of all a over the sum of all b: 1 if no seam is there.

The lines beside a border are those of the same place on the grid of 8 px: what repeats with that
period for other reasons (the blocks of a JPEG, the strides of the network, the samples of a coarser
sensor) is in both and cancels. Stretches are the units of the noise: the standard error is that
of a ratio of sums (Cochran, Sampling Techniques, 1977, equation 6.13), and stretches at the same
place of several slices count as one, since slices look alike.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from domains.base import Array
from flows.engine.grid import STRIDE, Grid

STRETCH_PX = 64
"""Length of border that counts as one observation."""

OFFSETS_PX = (STRIDE, 2 * STRIDE, 3 * STRIDE)
"""How far from a border the lines lie that it is compared with."""

ReadChunk = Callable[[tuple[int, int, int, int]], Array]
"""Chunk index (c, z, y, x) of the full resolution -> its pixels, padded at the far edges."""

_Sums = dict[tuple[int, int, int], Array]
"""(axis, border, start of the stretch) -> [gradient across, gradient beside]."""


@dataclass(frozen=True)
class Seams:
    """How the gradient across block borders compares with that beside them.

    Attributes:
        ratio: of the two; 1 without seams.
        standard_error: of the ratio.
        z: (ratio - 1) / standard_error; noise stays within 3 or so.
        num_stretches: observations.
    """

    ratio: float
    standard_error: float
    z: float
    num_stretches: int


@dataclass(frozen=True)
class _Edge:
    """One side of a border: its last line (c n), and gradients beside it (c n), summed."""

    line: Array
    beside: Array
    num_beside: int


def measure_seams(grid: Grid, read: ReadChunk) -> Seams | None:
    """Measure the seams of an item, one chunk at a time; each is read once.

    Args:
        grid: how it was cut.
        read: gives its chunks.

    Returns:
        None where planes are whole, or too small to tell.
    """
    if not grid.tiled:
        return None
    sums: _Sums = defaultdict(lambda: np.zeros(2))
    for z in range(grid.shape[1]):
        _add_plane(sums, grid, z, read)
    return _ratio(np.array(list(sums.values()))) if len(sums) > 1 else None


def _add_plane(sums: _Sums, grid: Grid, z: int, read: ReadChunk) -> None:
    """Add the borders of one slice; what is kept meanwhile are the edges of one row of chunks."""
    _, _, height, width = grid.shape
    _, _, tall, wide = grid.chunk
    above: dict[int, _Edge] = {}
    for y in range(0, height, tall):
        left: _Edge | None = None
        for x in range(0, width, wide):
            top, bottom = _border(y, grid.tile_h, height), _border(y + tall, grid.tile_h, height)
            start, end = _border(x, grid.tile_w, width), _border(x + wide, grid.tile_w, width)
            if not (top or bottom or start or end):
                continue
            values = read((0, z, y // tall, x // wide))[:, 0, : height - y, : width - x]
            if top:
                _add(sums, (0, y, x), above[x], _edge(values.swapaxes(1, 2), "first"))
            if start and left is not None:
                _add(sums, (1, x, y), left, _edge(values, "first"))
            if bottom:
                above[x] = _edge(values.swapaxes(1, 2), "last")
            left = _edge(values, "last") if end else None


def _border(position: int, tile: int, length: int) -> bool:
    """Whether two blocks meet there."""
    return 0 < position < length and position % tile == 0


def _edge(values: Array, end: Literal["first", "last"]) -> _Edge:
    """The edge of values (c n across) where they begin, or end, across."""
    inward = values if end == "first" else values[..., ::-1]
    offsets = [k for k in OFFSETS_PX if k < inward.shape[-1]]
    steps = (np.abs(inward[..., k] - inward[..., k - 1]) for k in offsets)
    beside = sum(steps, np.zeros(inward.shape[:-1]))
    return _Edge(inward[..., 0].copy(), beside, len(offsets))


def _add(sums: _Sums, place: tuple[int, int, int], one: _Edge, other: _Edge) -> None:
    """Add the stretches of the border between two edges, which begins at a place."""
    count = one.num_beside + other.num_beside
    if not count:
        return
    across = np.abs(one.line - other.line).sum(axis=0, dtype=np.float64)
    beside = (one.beside + other.beside).sum(axis=0) / count
    axis, border, start = place
    for begin in range(0, len(across), STRETCH_PX):
        part = slice(begin, begin + STRETCH_PX)
        sums[axis, border, start + begin] += (across[part].sum(), beside[part].sum())


def _ratio(stretches: Array) -> Seams:
    """The ratio of two sums over stretches (n 2), and its standard error."""
    across, beside = stretches.T
    count = len(stretches)
    if not across.any() and not beside.any():
        return Seams(1.0, 0.0, 0.0, count)
    # Flat blocks with a step between them: as large a ratio as JSON can hold.
    total = float(max(beside.sum(), 1e-6 * across.sum()))
    ratio = float(across.sum()) / total
    spread = float(np.square(across - ratio * beside).sum()) * count / (count - 1)
    error = max(math.sqrt(spread) / total, 1e-9)
    return Seams(ratio, error, (ratio - 1) / error, count)
