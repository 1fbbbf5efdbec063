"""Writes MRI magnitude volumes: NIfTI in the item's dtype, float32 when it was computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from domains import medical
from domains.base import Item


def write(item: Item, stem: Path) -> Path:
    """Write an MRI item in its source's orientation; returns the path written.

    Integer pixels keep their dtype. Floating pixels, which restored images are, are written as
    float32: rounding a restored image to the source's 8 bits would add noise of our own making.
    """
    dtype = item.pixels.dtype if item.pixels.dtype.kind in "iu" else np.dtype(np.float32)
    return medical.write_volume(item, stem, dtype)
