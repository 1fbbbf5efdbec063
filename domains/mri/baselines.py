"""Classical MRI: zero-filled transform, sparse wavelets, total variation.

A complex image is restored as one complex image: its coefficients and gradients are shrunk in
magnitude, so that a smooth phase costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion_core.protocols import Signal
from domains.base import Baseline, Measurement, Problem
from domains.classical import TVSettings, inverse_variance, restore_tv, settings_from
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
    return restore_tv(problem, zero_filled_image(problem), settings)


BASELINES: Mapping[str, Baseline] = {"zero-filled": zero_filled, "wavelet": wavelet, "tv": tv}


def zero_filled_image(problem: Problem) -> Signal:
    """A' applied to what was measured, about a black image: -1 if real, 0 if complex."""
    black = 0.0 if problem.condition == "mri-complex" else -1.0
    background = torch.full(problem.shape, black)
    operator = problem.operator
    return background + operator.A_adjoint(problem.y - operator.A(background))
