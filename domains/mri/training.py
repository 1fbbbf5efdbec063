"""MRI as training material: magnitudes, and complex images with simulated smooth phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from domains.base import Item
from domains.views import orientations

Array = np.ndarray[Any, Any]

_PERCENTILE = 99.9


def training_windows(item: Item) -> Mapping[str, Sequence[Array]]:
    """{"mri": views (1 z h w)}: 0 .. the volume's 99.9th percentile to [-1, 1].

    Of an image of two channels the magnitude: the second is its phase.
    """
    magnitude = np.maximum(item.pixels[:1].astype(np.float32), 0)
    top = float(np.percentile(magnitude, _PERCENTILE))
    return {"mri": orientations(2 * magnitude / top - 1, item.record.spacing_mm)}


def augment(condition: str, patch: Array, rng: np.random.Generator) -> Array:
    """Vary the gain, which in use is estimated from the measurement; give complex patches phase.

    Args:
        condition: "mri" or "mri-complex".
        patch: (1 h w) in network units.
        rng: of this sample.

    Returns:
        (1 h w), or (2 h w) real and imaginary part for "mri-complex".
    """
    gain = rng.uniform(0.6, 1.2)
    magnitude = (patch + 1) / 2 * gain
    if condition == "mri":
        varied: Array = 2 * magnitude - 1
        return varied
    phase = patch_phase(patch.shape[1], patch.shape[2], rng)
    return np.concatenate([magnitude * np.cos(phase), magnitude * np.sin(phase)])


def patch_phase(height: int, width: int, rng: np.random.Generator) -> Array:
    """A smooth phase in radians (1 h w), as coils, field and echo centre leave it.

    Any offset, a slope of up to a turn in 128 pixels along each axis, a gentle curvature.
    """
    y, x = np.meshgrid(
        (np.arange(height) - height / 2) / 64, (np.arange(width) - width / 2) / 64, indexing="ij"
    )
    offset, slope_y, slope_x = rng.uniform(-np.pi, np.pi, 3)
    yy, xx, xy = rng.normal(0, 0.8, 3)
    phase = offset + slope_y * y + slope_x * x + yy * y**2 + xx * x**2 + xy * x * y
    return phase[None].astype(np.float32)
