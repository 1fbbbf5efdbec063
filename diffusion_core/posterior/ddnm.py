"""DDNM+: the range of A from the data, its null space from the denoiser, at any noise.

Source: Wang et al. 2023, "Zero-shot image restoration using denoising diffusion null-space model"
(arXiv:2212.00490), Section 3.3 and Appendix A (Equations 17 to 19), seen from s = 1, where their
a_t is 1 - (sigma' / sigma)^2; no time travel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.linear import Accuracy
from diffusion_core.posterior.run import RENOISE, Counted, Start, initial_estimate, positive_levels
from diffusion_core.posterior.spectral import SpectralData, spectral_data
from diffusion_core.protocols import (
    Data,
    Denoiser,
    LinearOperator,
    NoiseModel,
    NormalDraws,
    Restoration,
)


@dataclass(frozen=True, eq=False)
class DDNM:
    """A posterior solver (protocols.Solver) for operators with a spectral form.

    Attributes:
        prior: of the kriging start; None: from scaled A'y.
        start: "kriging", "scaled-adjoint", "adjoint" or "noise".
    """

    prior: CovarianceTable | None = None
    start: Start = "kriging"

    def __call__(
        self,
        denoise: Denoiser,
        operator: LinearOperator,
        y: Data,
        noise: NoiseModel,
        sigmas: Float[Tensor, " levels"],
        draws: NormalDraws,
    ) -> Restoration:
        """Restore a batch; the chain ends at level 0. See protocols.Solver.

        Raises:
            UnsuitedError: if the operator has no spectral form, or R is not sigma_y^2 I.
        """
        levels = positive_levels(sigmas)
        calls = Counted(denoise, operator)
        y = calls.checked(y)
        x = initial_estimate(
            self.start, self.prior, calls, calls.data_step(), y, noise, Accuracy(1e-2, 40)
        )
        data = spectral_data("ddnm", operator, x, y, noise)
        form = data.form
        z = form.coefficients(x + levels[0] * draws.normal(0, x, RENOISE))
        for i, sigma in enumerate(levels):
            x = form.image(z)
            D_z = form.coefficients(calls.denoise(x, sigma))
            sigma_next = levels[i + 1] if i + 1 < len(levels) else 0.0
            eps = form.coefficients(draws.normal(i + 1, x, RENOISE))
            z = _step(z, D_z, data, sigma, sigma_next, eps)
        return calls.restoration(form.image(z))


def _step(
    z: Tensor, D_z: Tensor, data: SpectralData, sigma: float, sigma_next: float, eps: Tensor
) -> Tensor:
    """x' ~ q(x' | x, x0_hat), its noise less what the data have brought in already.

    lam is 1 where q's noise can hide the data's, and else as much as it can hide.
    """
    a = 1.0 - (sigma_next / sigma) ** 2
    std = sigma_next * math.sqrt(a)
    brought = a * data.noise_std
    floor = torch.finfo(brought.dtype).tiny
    lam = torch.where(std >= brought, 1.0, std / brought.clamp_min(floor))
    x0_hat = torch.where(data.measured, D_z + lam * (data.y_bar - D_z), D_z)
    left = torch.where(data.measured, (std**2 - (lam * brought) ** 2).clamp_min(0.0), std**2)
    return x0_hat + (sigma_next / sigma) ** 2 * (z - x0_hat) + left.sqrt() * eps
