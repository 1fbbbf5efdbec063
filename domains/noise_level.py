"""How strong an image's noise is where the image is how bright, found in the image alone.

    Var(n | m) = slope m + floor      (photons, and what read-out adds)

Differences along the diagonals of 2 x 2 pixels hold little but noise, and are independent of their
mean. Their spread (by the median of their magnitude, which edges hardly move) is taken in bins of
brightness, and the line laid through.

Source: the affine model of Foi, Trimeche, Katkovnik & Egiazarian 2008
    (doi:10.1109/TIP.2008.2001399); the robust spread of Donoho & Johnstone 1994
    (doi:10.1093/biomet/81.3.425).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from domains.base import Array

NUM_BINS = 16
LEAST_BIN = 64
"""Differences of a bin, at least."""
LEAST_VARIANCE = 1e-8
"""Of values on [0, 1]: a fortieth of a step of 8 bits, for images without any noise."""
_MEDIAN_OF_NORMAL = 0.6744897501960817
"""Of |n|, n standard normal."""


@dataclass(frozen=True)
class NoiseLevel:
    """Variance as a function of brightness, both on [0, 1].

    Attributes:
        slope: of the variance, >= 0.
        floor: variance where it is dark, > 0.
    """

    slope: float
    floor: float

    def variance(self, brightness: Array) -> Array:
        """Where the image is so bright; what is below 0 counts as 0."""
        return self.floor + self.slope * np.maximum(brightness, 0.0)


def noise_level(images: Array) -> NoiseLevel:
    """Fit the affine noise of images (n h w), values on [0, 1]; all are of one sensor."""
    h, w = (side // 2 * 2 for side in images.shape[-2:])
    even = np.asarray(images[..., :h, :w], np.float64)
    a, b = even[..., ::2, ::2], even[..., ::2, 1::2]
    c, d = even[..., 1::2, ::2], even[..., 1::2, 1::2]
    difference, mean = ((a - b - c + d) / 2).ravel(), ((a + b + c + d) / 4).ravel()
    order = np.argsort(mean, kind="stable")
    bins = np.array_split(order, max(1, min(NUM_BINS, len(order) // LEAST_BIN)))
    brightness = np.array([np.median(mean[part]) for part in bins])
    spread = np.array([np.median(np.abs(difference[part])) for part in bins])
    variance = np.maximum((spread / _MEDIAN_OF_NORMAL) ** 2, LEAST_VARIANCE)
    # The error of a variance is a share of it: divided by it, all bins count alike.
    lines = np.stack([np.maximum(brightness, 0.0), np.ones_like(brightness)], axis=1)
    slope, floor = nnls(lines / variance[:, None], np.ones_like(variance))[0]
    return NoiseLevel(float(slope), max(float(floor), LEAST_VARIANCE))
