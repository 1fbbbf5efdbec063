"""Hazy pictures: what the air adds and takes away, and what is left of the scene behind it.

    I = J t + A (1 - t) + n        J the scene, t = exp(-beta d) the transmission at depth d,
                                   A the airlight
    (I - A (1 - t)) / t = J + n / t

With t and A known or estimated that is denoising, of noise that is strongest where the haze is. t
and A are estimated from the hazy picture alone: in most places of a clear daylight picture some
colour of some pixel nearby is nearly black, so that what is brightest there is air. `y` of the
measurement is I in network units, (z c h w); `arrays` holds transmission (z 1 h w), airlight (z c).

Source: He, Sun & Tang 2009/2011, "Single image haze removal using dark channel prior"
    (doi:10.1109/TPAMI.2010.168); refined by the guided filter of He, Sun & Tang 2013
    (doi:10.1109/TPAMI.2012.213).
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from scipy import ndimage

from domains.base import Array, BadInputError, Item, Measurement, Problem, Task
from domains.city.low_light import level_of, relative
from domains.city.varying_noise import denoising_problem
from domains.imaging import Units
from domains.keyed import pixel_digest, slice_rngs
from domains.noise_level import NoiseLevel, noise_level

KIND = "haze"
PATCH_PX = 15
"""Side of the square that the darkest colour is looked for in."""
KEPT_HAZE = 0.95
"""omega: of the haze so much is taken off; without any, distance is not seen."""
LEAST_TRANSMISSION = 0.1
BRIGHTEST = 1e-3
"""Share of the pixels, those of the brightest dark channel, that the airlight is read off."""
GUIDE_PX, GUIDE_SMOOTHNESS = 40, 1e-3
"""Radius of the guided filter, and the variance of the guide below which it averages."""
SMOOTHING_PX = 2.0
"""Of the picture that the noise's variance is read off."""


def simulate(item: Item, units: Units, task: Task, seed: int) -> Measurement:
    """Put a clean image into haze that thickens from its lower border to the upper.

    Operator parameters:
        far, near: transmission at the upper and the lower border; in between depth is linear, and
            bent by a smooth field that is keyed by source, seed and slice.
        airlight: of all colours, 0 to 1.
        estimate: "dark-channel", what a user has; or "known", t and A as they are.
    The noise's sigma_y is that of the hazy picture, on [-1, 1].

    Raises:
        BadInputError: for another operator, or transmissions that are none.
    """
    params = dict(task.operator_params)
    far, near, air = (float(params[name]) for name in ("far", "near", "airlight"))
    if task.operator != "identity" or not 0 < far <= near <= 1:
        raise BadInputError(
            f"task '{task.name}': haze goes with the operator identity and 0 < far <= near <= 1, "
            f"not with {task.operator}, {far:g} and {near:g}"
        )
    clean = relative(item.pixels, units)
    h, w = clean.shape[2:]
    rngs = slice_rngs(seed, item.record, "haze")
    t = np.stack([ramp(h, w, far, near, rng)[None] for rng in rngs])
    sigma = float(task.noise["sigma_y"]) / 2
    rngs = slice_rngs(seed, item.record, "noise")
    noise = np.stack([rng.standard_normal(clean.shape[1:]) for rng in rngs])
    hazy = clean * t + air * (1 - t) + sigma * noise
    if params["estimate"] == "known":
        airlight = np.full(clean.shape[:2], air)
        measurement = taken(item, hazy, t, airlight, NoiseLevel(0.0, sigma**2))
    elif params["estimate"] == "dark-channel":
        measurement = estimated(item, hazy)
    else:
        raise BadInputError(
            f"task '{task.name}': haze is estimated by dark-channel, or known, not "
            f"'{params['estimate']}'"
        )
    return Measurement(
        record=item.record,
        task=task.name,
        operator="identity",
        params=params,
        noise=measurement.noise,
        y=measurement.y,
        arrays=measurement.arrays,
        truth_digest=pixel_digest(item.pixels),
        seed=seed,
    )


def ramp(height: int, width: int, far: float, near: float, rng: np.random.Generator) -> Array:
    """Transmission (h w) of a scene that recedes from the lower border to the upper."""
    scale = min(height, width) / 8
    bend = ndimage.gaussian_filter(rng.standard_normal((height, width)), scale, mode="wrap")
    bend *= 0.1 / max(float(bend.std()), 1e-12)
    depth = np.clip(1 - (np.arange(height)[:, None] + 0.5) / height + bend, 0, 1)
    return np.asarray(np.exp((1 - depth) * math.log(near) + depth * math.log(far)))


def given(item: Item, units: Units) -> Measurement:
    """A user's hazy picture."""
    return estimated(item, relative(item.pixels, units))


def estimated(item: Item, hazy: Array) -> Measurement:
    """A hazy picture (z c h w) on [0, 1] as a measurement, haze and noise read off itself."""
    airs = [airlight_of(image) for image in hazy]
    t = np.stack([transmission_of(image, air)[None] for image, air in zip(hazy, airs, strict=True)])
    level = noise_level(hazy.reshape(-1, *hazy.shape[-2:]))
    return taken(item, hazy, t, np.stack(airs), level)


def taken(item: Item, hazy: Array, t: Array, airlight: Array, level: NoiseLevel) -> Measurement:
    """The measurement of a hazy picture, its haze and noise known."""
    sigma_y = 2 * math.sqrt(float(level.variance(np.median(hazy))))
    return Measurement(
        record=item.record,
        task="given",
        operator="identity",
        params={},
        noise={"kind": KIND, "slope": level.slope, "floor": level.floor, "sigma_y": sigma_y},
        y=np.ascontiguousarray(2 * hazy - 1, np.float32),
        arrays={
            "transmission": np.ascontiguousarray(t, np.float32),
            "airlight": np.ascontiguousarray(airlight, np.float32),
        },
    )


def dark_channel(image: Array) -> Array:
    """The least value (h w) of any colour (c h w) within PATCH_PX."""
    darkest = np.ascontiguousarray(image.min(axis=0), np.float32)
    return np.asarray(cv2.erode(darkest, np.ones((PATCH_PX, PATCH_PX), np.uint8)))


def airlight_of(image: Array) -> Array:
    """A (c) of a hazy image (c h w): the brightest pixel where the dark channel is brightest."""
    dark = dark_channel(image).ravel()
    count = max(1, round(BRIGHTEST * dark.size))
    chosen = np.argpartition(dark, -count)[-count:]
    candidates = image.reshape(len(image), -1)[:, chosen]
    # One noisy pixel says nothing: the mean of the brighter half.
    brightness = candidates.mean(axis=0)
    brighter = candidates[:, brightness >= np.median(brightness)]
    return np.asarray(np.clip(brighter.mean(axis=1), 0.05, None), np.float64)


def transmission_of(image: Array, airlight: Array) -> Array:
    """t (h w) of a hazy image (c h w), its edges those of the image."""
    rough = 1 - KEPT_HAZE * dark_channel(image / airlight[:, None, None])
    fine = guided_filter(image.mean(axis=0), rough, GUIDE_PX, GUIDE_SMOOTHNESS)
    return np.asarray(np.clip(fine, LEAST_TRANSMISSION, 1.0))


def guided_filter(guide: Array, values: Array, radius_px: int, smoothness: float) -> Array:
    """Values (h w), smoothed so that they step where the guide (h w) does.

    In every square of side 2 radius + 1 they are fitted by a line of the guide; each pixel takes
    the mean of the lines that it lies in. Squares are mirrored at the border.

    Args:
        guide: on [0, 1].
        values: to be smoothed.
        radius_px: of the squares.
        smoothness: epsilon, the variance of the guide below which the values are averaged.
    """

    def mean(x: Array) -> Array:
        return np.asarray(ndimage.uniform_filter(x, 2 * radius_px + 1, mode="reflect"))

    guide, values = np.asarray(guide, np.float64), np.asarray(values, np.float64)
    mean_guide, mean_values = mean(guide), mean(values)
    slope = (mean(guide * values) - mean_guide * mean_values) / (
        mean(guide * guide) - mean_guide**2 + smoothness
    )
    return np.asarray(mean(slope) * guide + mean(mean_values - slope * mean_guide))


def problem_of(measurement: Measurement, units: Units) -> Problem:
    """Denoising of the picture without its haze, under noise that is strongest where haze was."""
    hazy = (np.asarray(measurement.y, np.float64) + 1) / 2
    t = np.asarray(measurement.arrays["transmission"], np.float64)
    air = np.asarray(measurement.arrays["airlight"], np.float64)[..., None, None]
    smooth = ndimage.gaussian_filter(hazy, (0, 0, SMOOTHING_PX, SMOOTHING_PX))
    variance = level_of(measurement.noise).variance(smooth) / t**2
    clear = (hazy - air * (1 - t)) / t
    return denoising_problem(measurement, units, hazy, clear, variance)
