"""CT as training material."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from domains.base import Item
from domains.views import orientations

Array = np.ndarray[Any, Any]


def training_windows(item: Item) -> Mapping[str, Sequence[Array]]:
    """{"ct": views (1 z h w)}: HU -1000..2000 to [-1, 1], not clipped above, air padding at -1024.

    Scanners pad outside the field of view with -2000 or so: that is no anatomy.
    """
    hu = np.maximum(item.pixels.astype(np.float32), -1024)
    return {"ct": orientations((hu + 1000) / 1500 - 1, item.record.spacing_mm)}
