"""What looks damaged in an item, found in its pixels alone: for a first look, not for a verdict.

A finding says what, where and how much, and marks the pixels. What the file itself says (a no-data
value, slices that its positions skip) is told as such; the rest are signs:

    blank slice      all of its pixels are equal, and others' are not
    repeated slice   every pixel is that of the slice before
    dead lines       rows or columns of one value each, between lines that are not
    saturated        many pixels at the very top of the scale, few just below
    moved slices     what the domain says of them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from domains.base import Array, Item
from domains.validity import invalid_pixels

MOST_LINES = 8
"""Lines of one value each, side by side: more of them are a background."""

LEAST_SATURATED = 5e-4
"""Share of the pixels that must be at the top."""

PILE = 4.0
"""Times more pixels at the top than in the 1% of the scale below it."""


@dataclass(frozen=True)
class Finding:
    """One kind of damage of an item.

    Attributes:
        kind: "no data", "missing slices", "blank slices", "repeated slices", "dead lines",
            "saturated", "moved slices", or "note" for a remark of the reader.
        words: what was found, for people.
        share: of the item's pixels, 0 to 1.
        slices: where, from 0.
    """

    kind: str
    words: str
    share: float
    slices: tuple[int, ...] = ()


def find_damage(item: Item, moved: Sequence[int] = ()) -> list[tuple[Finding, Array]]:
    """What looks damaged, and where: booleans (z h w), True where damaged in any band.

    Args:
        item: pixels (c z h w), finite.
        moved: slices that look as if they moved, as the domain found (Domain.moved_slices).
    """
    found: list[tuple[Finding, Array]] = []
    for kind, noun, marked in _marks(item, moved):
        if marked.any():
            slices = tuple(int(z) for z in np.flatnonzero(marked.any(axis=(1, 2))))
            words = f"{noun(marked)}{_where(slices, item)}"
            found.append((Finding(kind, words, float(marked.mean()), slices), marked))
    nothing = np.zeros(item.pixels.shape[1:], bool)
    notes = [str(note) for note in item.record.meta.get("found", ())]
    return found + [(Finding("note", note, 0.0), nothing) for note in notes]


def _marks(item: Item, moved: Sequence[int]) -> Iterator[tuple[str, Callable[[Array], str], Array]]:
    """(kind, marks in words, marks (z h w)); a pixel is told of once, by its gravest."""
    pixels = item.pixels
    without = no_data(item)
    lacking = _slices(item, item.record.meta.get("missing_slices", ()))
    flat = blank_slices(pixels) & ~lacking & ~without
    same = repeated_slices(pixels) & ~lacking & ~flat
    lines = dead_lines(pixels) & ~flat & ~without
    top = saturated(pixels) & ~flat & ~lines & ~without & ~lacking
    yield "no data", lambda m: f"{_percent(m)} of the pixels hold no data", without
    yield "missing slices", lambda m: f"{_slice_count(m)} missing", lacking
    yield "blank slices", lambda m: f"{_slice_count(m)} of one value", flat
    yield "repeated slices", lambda m: f"{_slice_count(m)} the same as the one before", same
    yield "dead lines", lambda m: f"{_num_lines(m)} dead rows or columns", lines
    yield "saturated", lambda m: f"{_percent(m)} of the pixels at the top of the scale", top
    still = _slices(item, list(moved)) & ~flat & ~same & ~lacking
    yield "moved slices", lambda m: f"{_slice_count(m)} that seem to have moved", still


def no_data(item: Item) -> Array:
    """Pixels (z h w) that the file says to hold no data: as it marks them, or by its value."""
    told = invalid_pixels(item.record.meta, item.pixels)
    if told is not None:
        return np.asarray(told.any(axis=0, keepdims=True))
    value = item.record.meta.get("nodata")
    if value is None:
        return np.zeros(item.pixels.shape[1:], bool)
    return np.asarray((item.pixels == value).all(axis=0))


def blank_slices(pixels: Array) -> Array:
    """Slices of one value, while others are not; (z h w)."""
    flat = pixels.max(axis=(2, 3)) == pixels.min(axis=(2, 3))
    blank = flat.all(axis=0)
    return _whole(blank & ~blank.all(), pixels)


def repeated_slices(pixels: Array) -> Array:
    """Slices that equal the one before in every pixel, and are not blank; (z h w)."""
    z = pixels.shape[1]
    same = [n > 0 and np.array_equal(pixels[:, n], pixels[:, n - 1]) for n in range(z)]
    blank = pixels.max(axis=(0, 2, 3)) == pixels.min(axis=(0, 2, 3))
    return _whole(np.array(same, bool) & ~blank, pixels)


def dead_lines(pixels: Array) -> Array:
    """Rows and columns of one value each, a few side by side, inside the picture; (z h w)."""
    marked = np.zeros(pixels.shape[1:], bool)
    for axis in (3, 2):  # constant along x: a row; along y: a column
        flat = (pixels.max(axis=axis) == pixels.min(axis=axis)).all(axis=0)
        for z, lines in enumerate(flat):
            dead = _inner_runs(lines)
            marked[z] |= dead[:, None] if axis == 3 else dead[None, :]
    return marked


def _inner_runs(flat: Array) -> Array:
    """Of lines (n) those in runs of at most MOST_LINES that do not touch the border."""
    dead = np.zeros_like(flat)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]]).astype(np.int8)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if start > 0 and stop < len(flat) and stop - start <= MOST_LINES:
            dead[start:stop] = True
    return dead


def saturated(pixels: Array) -> Array:
    """Pixels at the top of their band, if they pile up there; (z h w)."""
    marked = np.zeros(pixels.shape[1:], bool)
    for band in pixels:
        low, top = float(band.min()), float(band.max())
        at_top = band == band.max()
        below = (band > top - 0.01 * (top - low)) & ~at_top
        num_top = int(at_top.sum())
        if low < top and num_top > max(LEAST_SATURATED * band.size, PILE * int(below.sum())):
            marked |= at_top
    return marked


def _slices(item: Item, numbers: object) -> Array:
    chosen = np.zeros(item.pixels.shape[1], bool)
    inside = [n for n in numbers if 0 <= n < len(chosen)] if isinstance(numbers, list) else []
    chosen[inside] = True
    return _whole(chosen, item.pixels)


def _whole(slices: Array, pixels: Array) -> Array:
    """Booleans (z) as (z h w)."""
    return np.broadcast_to(slices[:, None, None], pixels.shape[1:]).copy()


def _percent(marked: Array) -> str:
    return f"{100 * marked.mean():.3g}%"


def _slice_count(marked: Array) -> str:
    count = int(marked.any(axis=(1, 2)).sum())
    return "1 slice" if count == 1 else f"{count} slices"


def _num_lines(marked: Array) -> int:
    return int(marked.all(axis=2).sum() + marked.all(axis=1).sum())


def _where(slices: tuple[int, ...], item: Item) -> str:
    """The slices in words; nothing for a still."""
    if item.pixels.shape[1] == 1:
        return ""
    if len(slices) == item.pixels.shape[1]:
        return ", in all slices"
    named = ", ".join(str(n) for n in slices[:8]) + (" ..." if len(slices) > 8 else "")
    return f", in slice{'s' * (len(slices) > 1)} {named} (from 0)"
