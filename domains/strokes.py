"""Strokes, scratches, stripes and dead lines, found in the picture alone (`--mask auto`).

What covers a picture has one colour and a hard edge, and is thin: a pen or a caption, a scratch
down to the base of a film, the wedges that Landsat-7 misses since 2003 (SLC-off), lines that a
sensor dropped. So one looks for

    parts of one colour (within TOLERANCE), the extremes of the scale or, in pictures of several
    bands, a colour that is frequent, that are thin and long, and on most of whose border the
    picture steps by CONTRAST

and for whole rows and columns of one value. Highlights, skies and shadows end softly or vary; wires
and window bars vary along their length, unless they are clipped to black (a camera's tripod).
JPEG's noise blurs the one colour: of strokes of 5 px most are missed (infra/decisions/0021).
Nothing here is learnt; false alarms on clean photographs are measured in infra/decisions/0021.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from domains.base import Array, Item
from domains.findings import dead_lines

TOLERANCE = 1.5 / 255
"""Of a part's colour, as a share of the range of values."""

CONTRAST = 0.12
"""Step from a part's colour to the picture beside it, in its clearest band, as a share of the span
of the scene (its middle 99%)."""

LEAST_SPAN = 0.05
"""Span of a scene that is taken for one, as a share of the range of values."""

STEPPED = 0.7
"""Least share of a part's border where the picture steps."""

WIDEST = 0.045
"""Most half-width of a part, as a share of the picture's shorter side."""

LEAST_PX = 40
"""Least area of a part, pixels."""

SLENDER = 12.0
"""Least area over squared half-width: a square has 4, a disc 3.1, a stroke thrice its width 12."""

NUM_COLOURS = 8
FREQUENT = 5e-4
"""How many colours are looked for beside the extremes, and their least share of the picture."""


def find_strokes(item: Item) -> Array:
    """Pixels (z h w) that strokes, scratches, stripes or dead lines cover in all bands.

    Args:
        item: pixels (c z h w), finite; black and white in its record's value_range.
    """
    low, high = item.record.meta.get("value_range", (item.pixels.min(), item.pixels.max()))
    found = dead_lines(item.pixels)
    scale = max(float(high) - float(low), np.finfo(np.float32).tiny)
    for z in range(item.pixels.shape[1]):
        picture = ((item.pixels[:, z].astype(np.float32) - low) / scale).transpose(1, 2, 0)
        # Sensors of a wide range record scenes far below its top: steps are as large as the scene.
        dark, bright = np.quantile(picture[::2, ::2], (0.005, 0.995))
        contrast = CONTRAST * min(max(float(bright - dark), LEAST_SPAN), 1.0)
        for colour in _colours(picture):
            found[z] |= _thin_parts(np.abs(picture - colour).max(axis=2), contrast)
    return found


def _colours(picture: Array) -> Iterator[Array]:
    """Black, white and the picture's own extremes, then colours (c) that are frequent exactly.

    A grey that is frequent tells nothing: there are only 256 of them.
    """
    flat = picture.reshape(-1, picture.shape[2])
    levels = np.rint(flat / TOLERANCE).astype(np.int64)
    code = np.zeros(len(flat), np.int64)
    for band in levels.T:
        code = code * 4096 + np.clip(band + 1024, 0, 4095)
    _, first, counts = np.unique(code, return_index=True, return_counts=True)
    extremes = (flat.min(axis=0), flat.max(axis=0))
    told = [np.zeros(flat.shape[1]), np.ones(flat.shape[1]), *extremes]
    several = picture.shape[2] > 1
    ranked = np.argsort(-counts, kind="stable")[: NUM_COLOURS * several]
    told += [flat[first[i]] for i in ranked if counts[i] >= max(FREQUENT * len(flat), LEAST_PX)]
    seen: list[Array] = []
    for colour in told:
        if all(np.abs(colour - other).max() > TOLERANCE for other in seen):
            seen.append(colour)
            yield colour.astype(np.float32)


def _thin_parts(difference: Array, contrast: float) -> Array:
    """Thin connected parts of one colour, with hard borders; (h w).

    Args:
        difference: of each pixel from the colour, range 1.
        contrast: least step at their borders.
    """
    import cv2

    alike = (difference <= min(TOLERANCE, contrast / 8)).astype(np.uint8)
    widest = WIDEST * min(alike.shape)
    # What is wider is a region of the scene, or a margin: parts may hang on it.
    inner = _half_width(alike) > widest
    if inner.any():
        size = 2 * int(np.ceil(widest)) + 1
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
        alike[cv2.dilate(inner.astype(np.uint8), disc) > 0] = 0
    half_width = _half_width(alike)
    num_parts, labels, stats, _ = cv2.connectedComponentsWithStats(alike, connectivity=8)
    marked = np.zeros(alike.shape, bool)
    for part in range(1, num_parts):
        left, top, width, height, area = stats[part]
        if area < LEAST_PX:
            continue
        rows = slice(max(top - 3, 0), top + height + 3)
        columns = slice(max(left - 3, 0), left + width + 3)
        own = labels[rows, columns] == part
        if area >= SLENDER * half_width[rows, columns][own].max() ** 2:
            marked[rows, columns] |= _with_border(own, difference[rows, columns], contrast)
    return marked


def _half_width(alike: Array) -> Array:
    """Distance (h w) of pixels to the nearest of another colour; the picture's border is none."""
    import cv2

    return np.asarray(cv2.distanceTransform(alike, cv2.DIST_L2, 5))


def _with_border(own: Array, difference: Array, contrast: float) -> Array:
    """The part and the mixed pixels around it, if the picture steps there; else nothing."""
    import cv2

    square = np.ones((3, 3), np.uint8)
    one = cv2.dilate(own.astype(np.uint8), square) > 0
    two = cv2.dilate(one.astype(np.uint8), square) > 0
    ring = two & ~one
    if not ring.any() or (difference[ring] > contrast).mean() < STEPPED:
        return np.zeros(own.shape, bool)
    mixed = one & ~own & (difference <= contrast)
    # Pixels half covered lie between two colours: they are a border's, and not the picture's.
    return np.asarray(one if mixed.mean() > 0.02 * own.mean() else own)
