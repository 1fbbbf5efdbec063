"""City images as training material: colour photographs, grey ones and single bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from domains.base import Item
from domains.views import scales

Array = np.ndarray[Any, Any]

_COLOUR = 3
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def training_windows(item: Item) -> Mapping[str, Sequence[Array]]:
    """{"city": views (3 z h w)} for colour, {"city-grey": views (1 z h w)} for anything else.

    The item's range of values (0 to the type's or sensor's maximum) to [-1, 1]. Bands of a
    multispectral image are grey images of their own.
    """
    low, high = item.record.meta["value_range"]
    images = (item.pixels.astype(np.float32) - low) / (high - low) * 2 - 1
    c, z, h, w = images.shape
    if c == _COLOUR:
        return {"city": scales(images)}
    return {"city-grey": scales(images.reshape(1, c * z, h, w))}


def augment(condition: str, patch: Array, rng: np.random.Generator) -> Array:
    """Vary exposure; make grey patches from colour ones.

    Args:
        condition: "city" or "city-grey".
        patch: (3 h w) or (1 h w) in network units.
        rng: of this sample.

    Returns:
        (3 h w) for "city", (1 h w) for "city-grey".
    """
    if condition == "city-grey" and len(patch) == _COLOUR:
        # The luma, or one of the colours: single-band sensors see either.
        mix = _LUMA if rng.integers(2) else np.eye(_COLOUR, dtype=np.float32)[rng.integers(3)]
        patch = np.tensordot(mix, patch, axes=1)[None]
    # Sensors with a wide range record scenes far below their maximum.
    gain = np.exp(rng.uniform(np.log(0.25), np.log(1.1))) if rng.uniform() < 0.5 else 1.0
    varied: Array = ((patch + 1) * gain - 1).astype(np.float32)
    return varied
