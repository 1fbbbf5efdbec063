"""City images as training material: colour photographs, grey ones, single bands, their logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from domains.base import Item
from domains.city.speckle import CONDITION, FLOOR, NATS_PER_UNIT, log_to_network
from domains.views import scales

Array = np.ndarray[Any, Any]

_COLOUR = 3
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def training_windows(item: Item) -> Mapping[str, Sequence[Array]]:
    """{"city": views (3 z h w)} for colour, {"city-grey": .., "city-log": ..} for anything else.

    The item's range of values (0 to the type's or sensor's maximum) to [-1, 1]. Bands of a
    multispectral image are grey images of their own. Logarithms are taken of each view: coarser
    ones are means of intensities.
    """
    low, high = item.record.meta["value_range"]
    images = (item.pixels.astype(np.float32) - low) / (high - low) * 2 - 1
    c, z, h, w = images.shape
    if c == _COLOUR:
        return {"city": scales(images)}
    views = scales(images.reshape(1, c * z, h, w))
    return {"city-grey": views, CONDITION: [_logs(view) for view in views]}


def guide_views(guide: Array, num_bands: int) -> Sequence[Array]:
    """A guide (1 z h w) as `training_windows` lays out its image's bands."""
    repeats = 1 if num_bands == _COLOUR else num_bands
    return scales(np.tile(guide, (1, repeats, 1, 1)))


def augment(condition: str, patch: Array, rng: np.random.Generator) -> Array:
    """Vary exposure; make grey patches from colour ones, and logarithms from those.

    Args:
        condition: "city", "city-grey" or "city-log".
        patch: (3 h w) in network units, or (1 h w) in those of the condition.
        rng: of this sample.

    Returns:
        (3 h w) for "city", (1 h w) for the others.
    """
    is_log = condition == CONDITION and len(patch) != _COLOUR
    if condition != "city" and len(patch) == _COLOUR:
        # The luma, or one of the colours: single-band sensors see either.
        mix = _LUMA if rng.integers(2) else np.eye(_COLOUR, dtype=np.float32)[rng.integers(3)]
        patch = np.tensordot(mix, patch, axes=1)[None]
    # Sensors with a wide range record scenes far below their maximum.
    log_gain = rng.uniform(np.log(0.25), np.log(1.1)) if rng.uniform() < 0.5 else 0.0
    if is_log:
        darkened: Array = np.maximum(patch + log_gain / NATS_PER_UNIT, -1).astype(np.float32)
        return darkened
    varied: Array = ((patch + 1) * np.exp(log_gain) - 1).astype(np.float32)
    return _logs(varied) if condition == CONDITION else varied


def _logs(images: Array) -> Array:
    """Intensities on [-1, 1] to log intensities in network units, any shape."""
    logs: Array = log_to_network(np.log(np.maximum((images + 1) / 2, FLOOR))).astype(np.float32)
    return logs
