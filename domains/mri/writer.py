"""Writes MRI magnitude volumes: NIfTI in the item's dtype, float32 when it was computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from domains import medical
from domains.base import Array, Item, ItemRecord, ReadBox


def write(item: Item, stem: Path) -> Path:
    """Write an MRI item in its source's orientation; returns the path written.

    Integer pixels keep their dtype. Floating pixels, which restored images are, are written as
    float32: rounding a restored image to the source's 8 bits would add noise of our own making.
    """
    dtype = item.pixels.dtype if item.pixels.dtype.kind in "iu" else np.dtype(np.float32)
    return medical.write_volume(item, stem, dtype)


def write_large(record: ItemRecord, read: ReadBox, stem: Path) -> Path | None:
    """Write a computed MRI item that cannot be held, slice by slice; None if it must be turned."""
    whole = slice(None)

    def slice_of(index: int) -> Array:
        return read(slice(index, index + 1), whole, whole)[0, 0]

    return medical.write_slices(record, slice_of, stem, np.dtype(np.float32))
