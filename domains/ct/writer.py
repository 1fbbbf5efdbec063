"""Writes CT volumes: NIfTI in whole Hounsfield units."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from domains import medical
from domains.base import Item

INT16 = np.iinfo(np.int16)


def write(item: Item, stem: Path) -> Path:
    """Write a CT item as int16 NIfTI in its source's orientation; returns the path written.

    Values are rounded to whole HU, the resolution of the scanners, and bounded by int16.
    """
    hu = np.clip(np.rint(item.pixels.astype(np.float64)), INT16.min, INT16.max)
    return medical.write_volume(Item(hu, item.record), stem, np.dtype(np.int16))
