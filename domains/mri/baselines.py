"""Classical MRI: zero-filled transform, sparse wavelets, total variation; non-local means, bicubic.

A complex image is restored as one complex image: its coefficients and gradients are shrunk in
magnitude, so that a smooth phase costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_core.operators import Pool
from diffusion_core.protocols import Signal
from domains.base import BadInputError, Baseline, Measurement, Problem
from domains.between_slices import cubic_z, linear_z
from domains.classical import TVSettings, inverse_variance, restore_tv, settings_from
from domains.mri.motion import SEEN
from domains.nlm import nlm
from domains.wavelets import WaveletSettings, minimise_wavelet


def zero_filled(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """The adjoint transform: zeros where k-space was not measured. No parameters."""
    del measurement, params
    return zero_filled_image(problem)


def wavelet(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Sparse wavelet coefficients: WaveletSettings."""
    del measurement
    return minimise_wavelet(
        problem.operator,
        problem.y,
        zero_filled_image(problem),
        inverse_variance(problem.noise, problem.y),
        settings_from(WaveletSettings, params, "wavelet"),
        complex_pair=problem.condition == "mri-complex",
    )


def tv(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Total variation: TVSettings."""
    del measurement
    settings = settings_from(TVSettings, params, "tv")
    if isinstance(problem.operator, Pool):
        start = enlarged(problem, problem.operator.factor)
    else:
        start = zero_filled_image(problem)
    return restore_tv(problem, start, settings)


def bicubic(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Bicubic interpolation of a coarser image. No parameters."""
    del measurement, params
    if not isinstance(problem.operator, Pool):
        raise BadInputError("bicubic needs a measurement of kind 'pool'; choose another method")
    return enlarged(problem, problem.operator.factor)


def as_it_is(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """The slices as they were measured, moved or not. No parameters."""
    del params
    if SEEN not in measurement.arrays:
        raise BadInputError(
            "as-it-is keeps moved slices, and there are none; choose another method"
        )
    slices = problem.y.clone()
    slices[:, :, list(measurement.params["moved_slices"])] = torch.from_numpy(
        np.array(measurement.arrays[SEEN])
    )
    return slices


BASELINES: Mapping[str, Baseline] = {
    "as-it-is": as_it_is,
    "linear-z": linear_z,
    "cubic-z": cubic_z,
    "zero-filled": zero_filled,
    "wavelet": wavelet,
    "tv": tv,
    "nlm": nlm,
    "bicubic": bicubic,
}


def enlarged(problem: Problem, factor: int) -> Signal:
    """A coarse image made larger; `antialias` makes the kernel Keys's (a = -1/2)."""
    return torch.nn.functional.interpolate(
        problem.y, scale_factor=factor, mode="bicubic", align_corners=False, antialias=True
    )


def zero_filled_image(problem: Problem) -> Signal:
    """A' applied to what was measured, about a black image: -1 if real, 0 if complex."""
    black = 0.0 if problem.condition == "mri-complex" else -1.0
    background = torch.full(problem.shape, black)
    operator = problem.operator
    return background + operator.A_adjoint(problem.y - operator.A(background))
