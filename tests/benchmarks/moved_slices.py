"""How well slices of MRI that moved are found, and what is taken for one in volumes that are clean.

    python tests/benchmarks/moved_slices.py VOLUME ...

A row a volume: slices, false alarms when clean, and, of slices moved by shifts of 1 to 5 mm, those
found by how much of the image was lost (PSNR of the moved slice against the clean one, dB).
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

from domains.mri.motion import moved, moved_ones, moved_slices
from domains.mri.reader import read

LIMITS = (0, 25, 30, 35, 99)
MOST_SLICES = 60
"""Of a volume, from its middle."""


def row_of(path: Path) -> list[str]:
    """The figures of one volume."""
    item = read(path)
    first = max((item.record.shape[1] - MOST_SLICES) // 2, 0)
    item = item.slices(first, min(first + MOST_SLICES, item.record.shape[1]))
    top, num_slices = np.percentile(item.pixels, 99.9), item.record.shape[1]
    found, others, losses = [], 0, []
    for seed, shift_mm in enumerate((1.0, 3.0, 5.0, 1.0, 3.0, 5.0)):
        chosen = moved_ones(item, 5, seed)
        pixels = moved(item, chosen, seed, num_moves=3, shift_mm=shift_mm)
        seen = moved_slices(type(item)(pixels, item.record))
        others += len(set(seen) - set(chosen))
        for z in chosen:
            error = float(np.mean((pixels[0, z] - item.pixels[0, z]) ** 2)) / top**2
            losses.append(-10 * np.log10(error + 1e-12))
            found.append(z in seen)
    parts = []
    for low, high in pairwise(LIMITS):
        within = [f for f, loss in zip(found, losses, strict=True) if low <= loss < high]
        parts.append(f"{sum(within)}/{len(within)}")
    return [str(num_slices), str(len(moved_slices(item))), str(others), *parts]


def main(paths: list[str]) -> None:
    """Print the table."""
    heads = ["slices", "clean", "wrong", *(f"<{high} dB" for high in LIMITS[1:])]
    print(f"{'volume':28s}", *(f"{head:>8s}" for head in heads))  # noqa: T201
    for path in map(Path, paths):
        print(f"{path.name[-28:]:28s}", *(f"{part:>8s}" for part in row_of(path)))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
