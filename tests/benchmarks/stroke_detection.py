"""How well `--mask auto` finds strokes and wedges, and what it takes for one on clean pictures.

    python tests/benchmarks/stroke_detection.py FOLDER ...

Percentages of pixels, a row a picture: false alarms when clean; then share found and false alarms
with white, black and red strokes over 10%, and with black wedges as of Landsat-7.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from domains.base import Array, Item
from domains.city.degradations import strokes
from domains.city.reader import SUFFIXES, read
from domains.strokes import find_strokes

COLOURS = {"white": (1, 1, 1, 1), "black": (0, 0, 0, 0), "red": (0.9, 0.1, 0.1, 0.2)}


def wedges(height: int, width: int) -> Array:
    """Gaps that widen from the middle to the sides, 33 rows apart."""
    y, x = np.mgrid[:height, :width]
    return np.asarray((y + 0.15 * x) % 33 < 14 * np.abs(x / width - 0.5))


def row_of(item: Item, rng: np.random.Generator) -> list[float]:
    """The figures of one picture."""
    h, w = item.record.shape[2:]
    white = item.record.meta["value_range"][1]
    cases = [(strokes(h, w, 0.1, rng), COLOURS[name]) for name in COLOURS]
    figures = [find_strokes(item)[0].mean()]
    for drawn, colour in [*cases, (wedges(h, w), COLOURS["black"])]:
        pixels = item.pixels.copy()
        for band, level in zip(pixels, colour, strict=False):
            band[:, drawn] = pixels.dtype.type(level * white)
        found = find_strokes(Item(pixels, item.record))[0]
        figures += [found[drawn].mean(), found[~drawn].mean()]
    return [100 * float(f) for f in figures]


def main(folders: list[str]) -> None:
    """Print the table."""
    rng = np.random.default_rng(5)
    paths = [p for f in folders for p in sorted(Path(f).rglob("*")) if p.suffix in SUFFIXES]
    rows = []
    for path in paths:
        rows.append(row_of(read(path), rng))
        print(f"{path.name:32s}", *(f"{f:8.3f}" for f in rows[-1]), flush=True)  # noqa: T201
    for name, figure in (("mean", np.mean), ("least", np.min), ("most", np.max)):
        print(f"{name:32s}", *(f"{f:8.3f}" for f in figure(rows, axis=0)))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
