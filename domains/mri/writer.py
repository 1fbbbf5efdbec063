"""Writes MRI magnitude volumes: NIfTI in the item's dtype, float32 when it was computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from domains import medical
from domains.base import Array, Item, ItemRecord, ReadBox


def write(item: Item, stem: Path) -> Path:
    """Write an MRI item in its source's orientation; returns the path written.

    Integer pixels keep their dtype. Floating pixels, which restored images are, are written as
    float32: rounding a restored image to the source's 8 bits would add noise of our own making.
    An image of magnitude and phase (radians) becomes a folder of one file each.
    """
    channels = item.record.meta.get("channels")
    if channels:
        return _write_channels(item, channels, stem)
    dtype = item.pixels.dtype if item.pixels.dtype.kind in "iu" else np.dtype(np.float32)
    return medical.write_volume(item, stem, dtype)


def _write_channels(item: Item, channels: Sequence[str], stem: Path) -> Path:
    """stem/CHANNEL.nii.gz of every channel; returns the folder."""
    stem.mkdir()
    for name, pixels in zip(channels, item.pixels, strict=True):
        record = replace(item.record, shape=(1, *pixels.shape), meta=_of_one(item.record))
        medical.write_volume(Item(pixels[None], record), stem / name, np.dtype(np.float32))
    return stem


def _of_one(record: ItemRecord) -> dict[str, Any]:
    return {name: value for name, value in record.meta.items() if name != "channels"}


def write_large(record: ItemRecord, read: ReadBox, stem: Path) -> Path | None:
    """Write a computed MRI item that cannot be held, slice by slice; None if it must be turned."""
    if record.meta.get("channels"):
        return None
    whole = slice(None)

    def slice_of(index: int) -> Array:
        return read(slice(index, index + 1), whole, whole)[0, 0]

    return medical.write_slices(record, slice_of, stem, np.dtype(np.float32))
