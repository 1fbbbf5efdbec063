"""Data steps of tomographic projectors: CG in image space with a locally circulant preconditioner.

For parallel rays A' A is a convolution, |f|^-1 in Fourier. With ray weights and S the matrix
C^-1 + S A' R^-1 A S is locally C^-1 + a(x) g(f), a = S^2 w, with w(x) the mean weight of the rays
through x. Its approximate inverse interpolates between two circulants, at a low and a high a, pixel
by pixel.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.operators import Projector
from diffusion_core.posterior.cg import Map
from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.posterior.linear.base import Accuracy, PrimalStep, Update, two_levels
from diffusion_core.posterior.spectra import radial_mean
from diffusion_core.protocols import Data, LinearOperator


class ProjectorStep(PrimalStep):
    """CG on (C^-1 + S A' R^-1 A S) u = S A' R^-1 r, K r = S u; exact data go to the dual form."""

    def __init__(self, operator: LinearOperator, projector: Projector) -> None:
        super().__init__(operator)
        self.size = projector.image_shape
        self._measured: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, covariance: Covariance, variance: Tensor, residual: Data, accuracy: Accuracy
    ) -> Update:
        """See DataStep."""
        if bool((variance <= 0).any()):
            return self.solve(covariance, variance, residual, accuracy, None)
        if self._measured is None:
            self._measured = self._symbol(residual), self._coverage(residual)
        symbol, coverage = self._measured
        weight = (1.0 / variance).expand(residual.shape)
        std = torch.ones_like(coverage) if covariance.std is None else covariance.std
        local = self.operator.A_adjoint(weight).mean(dim=1, keepdim=True) / coverage
        local = local.maximum(1e-4 * local.amax(dim=(1, 2, 3), keepdim=True))
        precondition = _preconditioner(covariance, symbol, std**2 * local)
        return self.solve_primal(covariance, weight, residual, accuracy, precondition)

    def _symbol(self, like: Data) -> Float[Tensor, "h w_half"]:
        """Radial mean of the spectrum of A' A's response to the central pixel."""
        h, w = self.size
        point = like.new_zeros(1, 1, h, w)
        point[..., h // 2, w // 2] = 1.0
        response = self.operator.A_adjoint(self.operator.A(point)).double()
        modes = torch.fft.rfft2(response.roll((-(h // 2), -(w // 2)), (-2, -1)))[0, 0].real
        return radial_mean(modes, w).clamp_min(1e-9 * float(modes.max())).to(like)

    def _coverage(self, like: Data) -> Float[Tensor, "1 1 h w"]:
        """A'1: how much of the rays passes through each pixel."""
        coverage = self.operator.A_adjoint(torch.ones_like(like[:1, :1]))
        return coverage.maximum(1e-6 * coverage.max())


def _preconditioner(
    covariance: Covariance, symbol: Float[Tensor, "h w_half"], gain: Float[Tensor, "b 1 h w"]
) -> Map:
    """sum_j phi_j^(1/2) (C^-1 + a_j g)^-1 phi_j^(1/2), phi_low + phi_high = 1 everywhere."""
    spectrum = covariance.spectrum
    parts = [
        (share.sqrt(), spectrum / (1.0 + symbol * level * spectrum))
        for share, level in two_levels(gain)
    ]

    def precondition(u: Tensor) -> Tensor:
        filtered = [share * covariance.filter(share * u, circulant) for share, circulant in parts]
        return filtered[0] + filtered[1]

    return precondition
