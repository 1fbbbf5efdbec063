"""Writes CT volumes: NIfTI in whole Hounsfield units."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from domains import medical
from domains.base import Array, Item, ItemRecord, ReadBox

INT16 = np.iinfo(np.int16)


def write(item: Item, stem: Path) -> Path:
    """Write a CT item as int16 NIfTI in its source's orientation; returns the path written.

    Values are rounded to whole HU, the resolution of the scanners, and bounded by int16.
    """
    return medical.write_volume(Item(_hu(item.pixels), item.record), stem, np.dtype(np.int16))


def write_large(record: ItemRecord, read: ReadBox, stem: Path) -> Path | None:
    """Write a CT item that cannot be held, slice by slice; None if it must be turned for it."""
    whole = slice(None)

    def slice_of(index: int) -> Array:
        return _hu(read(slice(index, index + 1), whole, whole)[0, 0])

    return medical.write_slices(record, slice_of, stem, np.dtype(np.int16))


def _hu(values: Array) -> Array:
    return np.clip(np.rint(values.astype(np.float64)), INT16.min, INT16.max)
