"""Speckled city images: intensities times gamma noise, restored as logarithms.

    Y = I S,  S ~ Gamma(L, 1/L)     so     log Y - E log S = log I + noise of variance trigamma(L)

The unknown is log I: network units map FLOOR..1 of the range of values to [-1, 1] evenly in the
logarithm, and the network's condition is "city-log", a prior on log intensities. Every band is an
image of its own. `y` of the measurement is Y itself, relative to the range of values, (z c h w).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from domains.base import Array, BadInputError, Item, ItemRecord, Measurement, Problem, Task
from domains.imaging import Units, slices_first
from domains.keyed import pixel_digest, slice_rngs

if TYPE_CHECKING:
    from torch import Tensor

CONDITION = "city-log"
FLOOR = 1 / 255
"""Darkest intensity, a grey level of 8 bits: below it a logarithm would be all quantisation."""
NATS_PER_UNIT = -math.log(FLOOR) / 2


@dataclass(frozen=True)
class LogUnits:
    """The map of log intensities FLOOR..1 of low..high to [-1, 1].

    Attributes:
        low: source value of no light.
        high: source value of intensity 1.
    """

    low: float
    high: float

    def intensity(self, values: Array) -> Array:
        """Source units -> positive intensities, float64: what is darker than FLOOR is lifted."""
        relative = (np.asarray(values, np.float64) - self.low) / (self.high - self.low)
        return np.maximum(relative, FLOOR)

    def to_network(self, values: Array) -> Array:
        """Source units -> network units, float32."""
        return log_to_network(np.log(self.intensity(values))).astype(np.float32)

    def to_source(self, x: Tensor) -> Tensor:
        """Network units -> source units, in the precision of x."""
        return ((x - 1) * NATS_PER_UNIT).exp() * (self.high - self.low) + self.low


def log_to_network(log_intensity: Array) -> Array:
    """Log intensities in nats -> network units: 0 to 1, log FLOOR to -1."""
    return 1 + log_intensity / NATS_PER_UNIT


def log_units(record: ItemRecord, units: Units) -> LogUnits:
    """The log scale of an image.

    Raises:
        BadInputError: if its values can be negative: a logarithm needs intensities.
    """
    if units.low < 0:
        raise BadInputError(
            f"{record.item_id}: its values go below 0 and speckle multiplies intensities; "
            "give images of intensities"
        )
    return LogUnits(units.low, units.high)


def is_speckled(measurement: Measurement) -> bool:
    """Whether a measurement is of this kind."""
    return bool(measurement.noise["kind"] == "speckle")


def simulate(item: Item, units: Units, task: Task, seed: int) -> Measurement:
    """Multiply a clean image by speckle keyed by source, seed and slice.

    Raises:
        BadInputError: if the task asks for another operator or no looks, or the image is negative.
    """
    num_looks = float(task.noise["num_looks"])
    if task.operator != "identity" or not num_looks > 0:
        raise BadInputError(
            f"task '{task.name}': speckle goes with the operator identity and num_looks above 0, "
            f"not with {task.operator} and {num_looks:g}"
        )
    clean = slices_first(log_units(item.record, units).intensity(item.pixels))
    rngs = slice_rngs(seed, item.record, "speckle")
    speckle = np.stack([rng.gamma(num_looks, 1 / num_looks, clean.shape[1:]) for rng in rngs])
    return Measurement(
        record=item.record,
        task=task.name,
        operator="identity",
        params=dict(task.operator_params),
        noise={"kind": "speckle", "num_looks": num_looks},
        y=(clean * speckle).astype(np.float32),
        truth_digest=pixel_digest(item.pixels),
        seed=seed,
    )


def problem_of(measurement: Measurement, units: Units) -> Problem:
    """Denoising of bias-corrected log intensities; bands are folded into the batch."""
    import torch

    from diffusion_core.noise.multiplicative import LogSpeckle, to_log
    from diffusion_core.operators import Identity

    c, z, h, w = measurement.record.shape
    scale = log_units(measurement.record, units)
    num_looks = float(measurement.noise["num_looks"])
    positive = np.maximum(np.array(measurement.y, np.float64), np.finfo(np.float32).tiny)
    logs = to_log(torch.from_numpy(positive), num_looks)
    y = log_to_network(logs.numpy()).astype(np.float32).reshape(z * c, 1, h, w)

    def to_source(x: Tensor) -> Tensor:
        return scale.to_source(x).reshape(-1, c, h, w)

    return Problem(
        operator=Identity(),
        y=torch.from_numpy(y),
        noise=LogSpeckle(num_looks, NATS_PER_UNIT),
        shape=(z * c, 1, h, w),
        reach=0,
        condition=CONDITION,
        to_source=to_source,
        facts={"num_bands": c},
    )
