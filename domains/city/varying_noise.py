"""Pictures whose noise is known pixel by pixel, as denoising problems."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from domains.base import Array, Measurement, Problem
from domains.imaging import Units

if TYPE_CHECKING:
    from torch import Tensor


def denoising_problem(
    measurement: Measurement, units: Units, measured: Array, image: Array, variance: Array
) -> Problem:
    """y = x + n of a picture on [0, 1], in network units; bands that are no colours are folded.

    Args:
        measurement: whose record tells the shape.
        units: of its network scale.
        measured: (z c h w), the picture as it came, black 0 and white 1; for the eye.
        image: (z c h w), what its haze or darkness is undone to.
        variance: of its noise, same shape.
    """
    import torch

    from diffusion_core.noise.likelihood import GaussianNoise
    from diffusion_core.operators import Identity
    from domains.city.domain import condition_of

    c, z, h, w = measurement.record.shape
    condition, fold = condition_of(measurement.record)
    shape = (z * c, 1, h, w) if fold else (z, c, h, w)

    def tensor(values: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(shape)

    def to_source(x: Tensor) -> Tensor:
        return units.to_source(x).reshape(-1, c, h, w)

    return Problem(
        operator=Identity(),
        y=tensor(2 * image - 1),
        noise=GaussianNoise(tensor(2 * np.sqrt(variance))),
        shape=shape,
        reach=0,
        condition=condition,
        to_source=to_source,
        facts={"num_bands": c if fold else 1, "measured": tensor(2 * measured - 1)},
    )
