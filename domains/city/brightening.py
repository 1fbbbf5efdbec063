"""What is done by hand against haze and little light: curves, equalising, a stabilised denoiser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from skimage.exposure import equalize_adapthist
from skimage.restoration import denoise_nl_means
from torch import Tensor

from domains.base import Array, BadInputError, Measurement, Problem
from domains.city import haze, low_light
from domains.classical import settings_from
from domains.nlm import NLMSettings
from domains.noise_level import NoiseLevel

_LEAST = 1e-4
"""Brightness, of 1, below which colours are not scaled."""


@dataclass(frozen=True)
class GammaSettings:
    """A curve.

    Attributes:
        gamma: values on [0, 1] are raised to it.
    """

    gamma: float = 0.4


@dataclass(frozen=True)
class ClaheSettings:
    """Contrast-limited adaptive equalisation.

    Attributes:
        clip_limit: 0 to 1, scikit-image's: higher ones give more contrast.
        num_tiles: a side.
    """

    clip_limit: float = 0.01
    num_tiles: int = 8


def inversion(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Haze taken off, or light put in, noise and all. No parameters."""
    del measurement, params
    return problem.y.clone()


def gamma(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """A curve on the picture as it was measured: {gamma}."""
    settings = settings_from(GammaSettings, params, "gamma")
    return _network(np.clip(_as_measured(measurement, "gamma"), 0, 1) ** settings.gamma, problem)


def clahe(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """CLAHE (Zuiderveld 1994) of the brightness, colours scaled with it: ClaheSettings."""
    settings = settings_from(ClaheSettings, params, "clahe")
    made = []
    for image in np.clip(_as_measured(measurement, "clahe"), 0, 1):
        # Bands that are no colours are equalised each by itself.
        brightness = image.mean(axis=0, keepdims=True) if len(image) == 3 else image
        tile = [max(side // settings.num_tiles, 1) for side in image.shape[1:]]
        equal = np.stack(
            [equalize_adapthist(band, tile, clip_limit=settings.clip_limit) for band in brightness]
        )
        made.append(image * (equal / np.maximum(brightness, _LEAST)))
    return _network(np.stack(made), problem)


def anscombe_nlm(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Non-local means of the stabilised picture, made bright afterwards: NLMSettings."""
    settings = settings_from(NLMSettings, params, "anscombe-nlm")
    dark = _as_measured(measurement, "anscombe-nlm", low_light.KIND)
    level = low_light.level_of(measurement.noise)
    made = [
        denoise_nl_means(
            np.moveaxis(stabilise(image, level), 0, -1),
            patch_size=settings.patch_size,
            patch_distance=settings.patch_distance,
            h=settings.strength,
            sigma=1.0,
            fast_mode=True,
            channel_axis=-1,
        ).reshape(*image.shape[1:], len(image))
        for image in dark
    ]
    clean = unbiased(np.moveaxis(np.stack(made), -1, 1), level)
    return _network(clean / float(measurement.params["exposure"]), problem)


def stabilise(z: Array, level: NoiseLevel) -> Array:
    """The generalised Anscombe transform of values whose noise is affine: of variance 1 then.

    Source: Starck, Murtagh & Bijaoui 1998; without a slope it is a division.
    """
    a = level.slope
    if a <= 0:
        return np.asarray(z / math.sqrt(level.floor))
    inside = np.maximum(a * z + 0.375 * a**2 + level.floor, 0.0)
    return np.asarray(2 / a * np.sqrt(inside))


def unbiased(value: Array, level: NoiseLevel) -> Array:
    """The mean of which `value` is the expected transform.

    Source: the closed form of Makitalo & Foi 2013 (doi:10.1109/TIP.2012.2202675).
    """
    a = level.slope
    if a <= 0:
        return np.asarray(value * math.sqrt(level.floor))
    # Below the transform of no light the form has poles: there it is no light.
    least = 2 * math.sqrt(0.375 + level.floor / a**2)
    d = np.maximum(value, least)
    root = math.sqrt(1.5)
    counts = d**2 / 4 + root / (4 * d) - 11 / (8 * d**2) + 5 * root / (8 * d**3) - 1 / 8
    return np.asarray(a * (counts - level.floor / a**2))


def _as_measured(measurement: Measurement, method: str, *kinds: str) -> Array:
    """The hazy or dark picture (z c h w), black 0 and white 1.

    Raises:
        BadInputError: of another measurement.
    """
    kind = measurement.noise["kind"]
    if kind not in (kinds or (haze.KIND, low_light.KIND)):
        what = "in low light" if kinds else "in haze or low light"
        raise BadInputError(f"{method} is for pictures {what}; choose another method")
    values = np.asarray(measurement.y, np.float64)
    return (values + 1) / 2 if kind == haze.KIND else values


def _network(image: Array, problem: Problem) -> Tensor:
    """A picture (z c h w) on [0, 1] as the problem has its unknown."""
    return torch.from_numpy((2 * image - 1).astype(np.float32)).reshape(problem.shape)
