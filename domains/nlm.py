"""Non-local means of noisy images, for every domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from skimage.restoration import denoise_nl_means
from torch import Tensor

from domains.base import Measurement, Problem
from domains.classical import settings_from


@dataclass(frozen=True)
class NLMSettings:
    """Non-local means.

    Attributes:
        patch_size: pixels.
        patch_distance: how far patches are looked for, pixels.
        strength: cut-off of the patch distance, in standard deviations of the noise.
    """

    patch_size: int = 5
    patch_distance: int = 6
    strength: float = 0.8


def nlm(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Non-local means (Buades et al. 2005) of a noisy image: NLMSettings."""
    del measurement
    settings = settings_from(NLMSettings, params, "nlm")
    sigma = float(problem.noise.variance(problem.y).max()) ** 0.5
    images = [
        denoise_nl_means(
            # Channels last: scikit-image 0.26 transposes a single channel that comes first.
            np.moveaxis(image, 0, -1),
            patch_size=settings.patch_size,
            patch_distance=settings.patch_distance,
            h=max(settings.strength * sigma, 1e-6),
            sigma=sigma,
            fast_mode=True,
            channel_axis=-1,
        ).reshape(*image.shape[1:], len(image))
        for image in problem.y.numpy()
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(problem.y.dtype)
