"""Data step of multi-coil MRI: CG on the normal equations in image space.

    (C^-1 + S A' R^-1 A S) u = S A' R^-1 r,   K r = S u

The image has half as many unknowns as eight coils have data, and no more than one unknown a pixel.
A' A mixes each pixel with its aliases; the circulant nearest to it (T. Chan 1988) has at mode k the
share of coil-weighted k-space that was measured round k, g(k) = sum_j (|F s_j|^2 * M)(k) / n. With
S the preconditioner interpolates pixel by pixel between circulants at a low and a high local gain,
as that of the projector does.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.operators import MultiCoil
from diffusion_core.operators.fourier import from_complex, to_complex
from diffusion_core.posterior.cg import Map
from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.posterior.linear.base import (
    Accuracy,
    PrimalStep,
    Update,
    mean_weight,
    two_levels,
)
from diffusion_core.posterior.spectra import full_spectrum
from diffusion_core.protocols import Data, LinearOperator, Signal

_LEAST_SYMBOL = 1e-3
"""Smallest share of a mode taken as measured, of the largest."""


class MultiCoilStep(PrimalStep):
    """Image-space CG; exact data, and a prior that differs between re and im, take the dual form.

    The circulants come from the mean of 1 / R over the data of an element.
    """

    def __init__(self, operator: LinearOperator, coils: MultiCoil) -> None:
        super().__init__(operator)
        self.coils = coils

    def __call__(
        self, covariance: Covariance, variance: Tensor, residual: Data, accuracy: Accuracy
    ) -> Update:
        """See DataStep."""
        spectrum = covariance.spectrum
        if bool((variance <= 0).any()) or bool((spectrum != spectrum[:1]).any()):
            return self.solve(covariance, variance, residual, accuracy, None)
        weight = 1.0 / variance
        precondition = self._preconditioner(covariance, mean_weight(weight))
        return self.solve_primal(covariance, weight, residual, accuracy, precondition)

    def _preconditioner(self, covariance: Covariance, weight: Tensor) -> Map:
        """sum_i phi_i^(1/2) (C^-1 + a_i g)^-1 phi_i^(1/2), phi_low + phi_high = 1 everywhere."""
        energy = self.coils.sensitivities.abs().square().sum(dim=1, keepdim=True).to(weight)
        mean_energy = energy.mean(dim=(2, 3), keepdim=True)
        symbol = coil_symbol(self.coils).to(weight) / mean_energy
        largest = symbol.amax(dim=(1, 2, 3), keepdim=True)
        symbol = symbol.maximum((_LEAST_SYMBOL * largest.double()).to(symbol))
        gain = energy.maximum(1e-4 * mean_energy) * weight
        gain = gain if covariance.std is None else covariance.std**2 * gain
        spectrum = full_spectrum(covariance.spectrum[:1], covariance.canvas[1])
        parts = [
            (share.sqrt(), spectrum / (1.0 + symbol * level * spectrum))
            for share, level in two_levels(gain)
        ]

        def precondition(u: Signal) -> Signal:
            filtered = [root * _filter(root * u, circulant) for root, circulant in parts]
            return filtered[0] + filtered[1]

        return precondition


def coil_symbol(coils: MultiCoil) -> Float[Tensor, "b 1 h w"]:
    """Eigenvalues of the circulant nearest to A' A: its diagonal in Fourier, at every mode.

    e(k)' A' A e(k) = sum_j mean over k' of M(k') |F s_j (k' - k)|^2, a circular correlation.
    """
    h, w = coils.sensitivities.shape[-2:]
    power = torch.fft.fft2(coils.sensitivities, norm="ortho").abs().square().sum(1, keepdim=True)
    mask = coils.mask.to(power.dtype).expand(-1, -1, h, w)
    correlation = torch.fft.fft2(mask) * torch.fft.fft2(power).conj()
    return torch.fft.ifft2(correlation).real.clamp_min(0.0) / (h * w)


def _filter(image: Signal, gain: Tensor) -> Signal:
    """Multiply a complex image by a gain at all modes."""
    return from_complex(torch.fft.ifft2(torch.fft.fft2(to_complex(image)) * gain))
