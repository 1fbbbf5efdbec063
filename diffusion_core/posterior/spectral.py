"""The measurement seen along the singular directions of A: what DDRM and DDNM+ work on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.posterior.linear.base import uniform_level
from diffusion_core.protocols import (
    Data,
    HasSpectralForm,
    LinearOperator,
    NoiseModel,
    Signal,
    SpectralForm,
    UnsuitedError,
)

_LEAST_SINGULAR_VALUE = 1e-6
"""Relative to the largest; directions below it count as unmeasured."""


@dataclass(frozen=True, eq=False)
class SpectralData:
    """y_bar = S^-1 U' y = V' x0 + noise, direction by direction.

    Attributes:
        form: A = U S V'.
        measured: whether a direction was measured, broadcastable to coefficients.
        y_bar: the measured coefficient; 0 where there is none.
        noise_std: of y_bar: sigma_y / s; infinite where nothing was measured.
    """

    form: SpectralForm
    measured: Tensor
    y_bar: Tensor
    noise_std: Tensor


def spectral_data(
    solver: str, operator: LinearOperator, like: Signal, y: Data, noise: NoiseModel
) -> SpectralData:
    """The measurement in the spectral form of its operator.

    Args:
        solver: who asks, for the error.
        operator: of the measurement.
        like: an image of the unknown's shape and dtype.
        y: measurement.
        noise: R must be sigma_y^2 I, of each batch element.

    Raises:
        UnsuitedError: if the operator has no spectral form, or R is not a multiple of the identity.
    """
    if not isinstance(operator, HasSpectralForm):
        raise UnsuitedError(
            f"{solver} needs the singular values of the operator, and {type(operator).__name__} "
            "does not know them: choose pigdm, diffpir or covprox"
        )
    level = uniform_level(noise.variance(y))
    if level is None:
        raise UnsuitedError(
            f"{solver} needs the same noise on every datum: choose pigdm, diffpir or covprox"
        )
    form = operator.spectral_form(like)
    s = form.singular_values
    measured = s > _LEAST_SINGULAR_VALUE * s.max()
    inverse = torch.where(measured, 1.0 / s.clamp_min(torch.finfo(s.dtype).tiny), 0.0)
    data = form.data(y)
    sigma_y = level.sqrt().reshape(-1, *(1,) * (data.ndim - 1)).to(s)
    noise_std = torch.where(measured, sigma_y * inverse, torch.inf)
    return SpectralData(form, measured, data * inverse, noise_std)
