"""Views of an item for training: the same pixels seen along other axes, or at coarser scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_ISOTROPY = 1.3  # largest ratio of spacings at which a volume may be cut along any axis


def orientations(volume: Array, spacing_mm: Sequence[float] | None) -> list[Array]:
    """A volume (c z h w) sliced along z, and along h and w too where its voxels are near cubes.

    Args:
        volume: (c z h w).
        spacing_mm: (z, y, x), or None for no physical size.
    """
    if spacing_mm is None or max(spacing_mm) / min(spacing_mm) > _ISOTROPY:
        return [volume]
    return [volume, volume.transpose(0, 2, 1, 3), volume.transpose(0, 3, 1, 2)]


def scales(images: Array, least_side: int = 128) -> list[Array]:
    """Images (c z h w) at full, two thirds, half, third and quarter resolution, area-averaged.

    A photograph made smaller is sharper for its size: pictures come from many cameras and were
    resized by many hands.

    Args:
        images: (c z h w), float32.
        least_side: views with a shorter side are left out.
    """
    import cv2

    views = [images]
    h, w = images.shape[-2:]
    for share in (2 / 3, 1 / 2, 1 / 3, 1 / 4):
        size = (round(w * share), round(h * share))
        if min(size) >= least_side:
            planes = images.reshape(-1, h, w)
            small = [cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in planes]
            views.append(np.stack(small).reshape(*images.shape[:2], size[1], size[0]))
    return views
