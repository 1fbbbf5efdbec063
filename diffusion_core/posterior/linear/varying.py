"""Data step of a blur that changes over the image: CG in image space, locally preconditioned.

Near node j, where S is s, the matrix C^-1 + S A' R^-1 A S is C^-1 + s^2 |K_j|^2 / R in Fourier. Its
approximate inverse mixes those of all nodes, at a low and a high s^2 / R each, by the square roots
of their shares at every pixel: sum_i phi_i^(1/2) (C^-1 + a_i |K_i|^2)^-1 phi_i^(1/2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_core.operators import VaryingBlur
from diffusion_core.posterior.cg import Map
from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.posterior.linear.base import (
    LEAST_BLUR_VARIANCE,
    Accuracy,
    PrimalStep,
    Update,
    mean_weight,
    two_levels,
)
from diffusion_core.protocols import Data, LinearOperator


class VaryingBlurStep(PrimalStep):
    """Image-space CG; exact data are given half a step of an 8-bit image as noise."""

    def __init__(self, operator: LinearOperator, blur: VaryingBlur) -> None:
        super().__init__(operator)
        self.weights = blur.weights
        self.powers = blur.transfers.abs().square()

    def __call__(
        self, covariance: Covariance, variance: Tensor, residual: Data, accuracy: Accuracy
    ) -> Update:
        """See DataStep."""
        weight = 1.0 / variance.clamp_min(LEAST_BLUR_VARIANCE)
        std = torch.ones_like(residual[:, :1]) if covariance.std is None else covariance.std
        precondition = self._preconditioner(covariance, std**2 * mean_weight(weight))
        return self.solve_primal(covariance, weight, residual, accuracy, precondition)

    def _preconditioner(self, covariance: Covariance, gain: Tensor) -> Map:
        spectrum = covariance.spectrum
        parts = [
            (
                (share * weight.to(spectrum)).sqrt(),
                spectrum / (1.0 + level * power.to(spectrum) * spectrum),
            )
            for share, level in two_levels(gain)
            for weight, power in zip(self.weights, self.powers, strict=True)
        ]

        def precondition(u: Tensor) -> Tensor:
            # Shares are the same for all channels: they commute with the opponent basis.
            opponent, size = covariance.to_opponent(u), u.shape[-2:]
            mixed = torch.zeros_like(u)
            for root, circulant in parts:
                modes = torch.fft.rfft2(root * opponent) * circulant
                mixed += root * torch.fft.irfft2(modes, s=size)
            return covariance.from_opponent(mixed)

        return precondition
