"""Pictures taken in too little light: dark, and noisy once they are made as bright as they should.

    z = e J + n,  Var n = slope (e J) + floor      so     z / e = J + noise that varies over it

e is the exposure, the share of the light that a well exposed picture has: known, or estimated. The
noise is estimated from the picture itself (domains/noise_level.py); its variance at a pixel is read
off a smoothed z. `y` of the measurement is z, relative to the range of values, (z c h w).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from domains.base import Array, BadInputError, Item, Measurement, Problem, Task
from domains.city.varying_noise import denoising_problem
from domains.imaging import Units, slices_first
from domains.keyed import pixel_digest, slice_rngs
from domains.noise_level import NoiseLevel, noise_level

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

KIND = "low-light"
SMOOTHING_PX = 2.0
"""Of the picture that the variance is read off."""
BRIGHT = 0.9
PERCENTILE = 99.5
"""An exposure is such that this percentile of the smoothed picture becomes BRIGHT."""
DARKEST = 1e-3
"""Least exposure: of such a picture nothing is left."""


def simulate(item: Item, units: Units, task: Task, seed: int) -> Measurement:
    """Expose a clean image too short, keyed by source, seed and slice.

    The task's noise: exposure; photons at white, were the exposure right; read_electrons, the
    standard deviation of the read-out. The noise is then found in the picture, as a user's is.

    Raises:
        BadInputError: for another operator, or an exposure that is none.
    """
    exposure, photons = float(task.noise["exposure"]), float(task.noise["photons"])
    if task.operator != "identity" or not photons > 0:
        raise BadInputError(
            f"task '{task.name}': low light goes with the operator identity and photons above 0, "
            f"not with {task.operator} and {photons:g}"
        )
    clean = np.maximum(relative(item.pixels, units), 0.0)
    rngs = slice_rngs(seed, item.record, "low-light")
    counts = np.stack(
        [rng.poisson(exposure * photons * c) for rng, c in zip(rngs, clean, strict=True)]
    ).astype(np.float64)
    spread = float(task.noise["read_electrons"])
    counts += spread * np.stack([rng.standard_normal(clean.shape[1:]) for rng in rngs])
    measurement = taken(item, counts / photons, exposure)
    return Measurement(
        record=item.record,
        task=task.name,
        operator="identity",
        params={**task.operator_params, **measurement.params},
        noise=measurement.noise,
        y=measurement.y,
        truth_digest=pixel_digest(item.pixels),
        seed=seed,
    )


def given(item: Item, exposure: float | None) -> Measurement:
    """A user's dark picture; its exposure is estimated where none is said.

    White is that of the file's type: a reader's guess, the bits in use, is that of a dark picture.
    """
    from domains.city.domain import units_of

    record = item.record
    if np.dtype(record.dtype).kind == "u":
        white = [0.0, float(np.iinfo(record.dtype).max)]
        record = replace(record, meta={**record.meta, "value_range": white})
    return taken(Item(item.pixels, record), relative(item.pixels, units_of(record)), exposure)


def taken(item: Item, dark: Array, exposure: float | None) -> Measurement:
    """A dark picture (z c h w), relative to the range of values, as a measurement.

    Raises:
        BadInputError: if it is black all over, or the exposure is not above 0 and at most 1.
    """
    if exposure is None:
        exposure = estimated_exposure(dark)
    if not DARKEST <= exposure <= 1:
        raise BadInputError(
            f"{item.record.item_id}: an exposure of {exposure:g} is none of {DARKEST:g} to 1; a "
            "picture that is black all over holds nothing to be restored"
        )
    found = noise_level(dark.reshape(-1, *dark.shape[-2:]))
    typical = float(np.sqrt(found.variance(np.median(dark)))) / exposure
    return Measurement(
        record=item.record,
        task="given",
        operator="identity",
        params={"exposure": exposure},
        noise={
            "kind": KIND,
            "slope": found.slope,
            "floor": found.floor,
            "sigma_y": 2 * typical,
        },
        y=np.ascontiguousarray(dark, np.float32),
    )


def estimated_exposure(dark: Array) -> float:
    """The exposure of a dark picture (z c h w) whose brightest parts should be nearly white."""
    smooth = ndimage.gaussian_filter(dark, (0, 0, SMOOTHING_PX, SMOOTHING_PX))
    return float(min(np.percentile(smooth.max(axis=1), PERCENTILE) / BRIGHT, 1.0))


def relative(pixels: Array, units: Units) -> Array:
    """Source units (c z h w) -> 0 (black) to 1 (white), (z c h w) float64."""
    return (slices_first(pixels).astype(np.float64) - units.low) / (units.high - units.low)


def problem_of(measurement: Measurement, units: Units) -> Problem:
    """Denoising of the picture made bright, under noise that varies over it."""
    exposure = float(measurement.params["exposure"])
    dark = np.asarray(measurement.y, np.float64)
    smooth = ndimage.gaussian_filter(dark, (0, 0, SMOOTHING_PX, SMOOTHING_PX))
    variance = level_of(measurement.noise).variance(smooth) / exposure**2
    return denoising_problem(measurement, units, dark, dark / exposure, variance)


def level_of(noise: Mapping[str, Any]) -> NoiseLevel:
    """The noise that a measurement was found to have."""
    return NoiseLevel(float(noise["slope"]), float(noise["floor"]))
