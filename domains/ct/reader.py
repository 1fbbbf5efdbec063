"""Reads CT volumes: NIfTI and NRRD, in Hounsfield units."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from domains import medical
from domains.base import Array, BadInputError, Item

SUFFIXES = medical.SUFFIXES
INT16 = np.iinfo(np.int16)


def read(path: Path) -> Item:
    """Read one CT volume; pixels (1 z h w) in HU, int16 wherever all values are whole numbers.

    Raises:
        BadInputError: if the file cannot be used, or holds values that no HU have.
    """
    item = medical.read_volume(path, "ct", "HU")
    low, high = item.pixels.min(), item.pixels.max()
    if item.record.source_format != "dicom" and (low < INT16.min or high > INT16.max):
        raise BadInputError(
            f"{path}: its values span {low:g} to {high:g}, which are no Hounsfield units; rescale "
            "it to HU"
        )
    pixels = whole_hu(item.pixels)
    return Item(pixels, replace(item.record, dtype=pixels.dtype.name))


def whole_hu(pixels: Array) -> Array:
    """The values as int16 if that changes none of them, else in float32."""
    if pixels.dtype == np.int16:
        return pixels
    if pixels.min() >= INT16.min and pixels.max() <= INT16.max:
        rounded = pixels.astype(np.int16)
        if np.array_equal(rounded, pixels):
            return rounded
    return pixels.astype(np.float32)
