"""DDRM: the exact spectral update, each singular direction by what is noisier, the data or x.

Source: Kawar et al. 2022, "Denoising diffusion restoration models" (arXiv:2201.11793),
Equations 7 and 8, which are written for s = 1 as ours are.
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
class DDRM:
    """A posterior solver (protocols.Solver) for operators with a spectral form.

    Attributes:
        prior: of the kriging start; None: from scaled A'y. The paper starts unmeasured directions
            from 0: "noise".
        eta: share of fresh noise where the data say nothing, or less than x does.
        eta_b: weight of the data where they are less noisy than x.
        start: "kriging", "scaled-adjoint", "adjoint" or "noise".
    """

    prior: CovarianceTable | None = None
    eta: float = 0.85
    eta_b: float = 1.0
    start: Start = "kriging"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1 or not 0 <= self.eta_b <= 1:
            raise ValueError(
                f"ddrm needs eta and eta_b between 0 and 1, not {self.eta} and {self.eta_b}"
            )

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
        data = spectral_data("ddrm", operator, x, y, noise)
        form = data.form
        z = _first(form.coefficients(x), data, levels[0], form.coefficients(draws.normal(0, x)))
        for i, sigma in enumerate(levels):
            x = form.image(z)
            D_z = form.coefficients(calls.denoise(x, sigma))
            sigma_next = levels[i + 1] if i + 1 < len(levels) else 0.0
            eps = form.coefficients(draws.normal(i + 1, x, RENOISE))
            z = self._step(z, D_z, data, sigma, sigma_next, eps)
        return calls.restoration(form.image(z))

    def _step(
        self,
        z: Tensor,
        D_z: Tensor,
        data: SpectralData,
        sigma: float,
        sigma_next: float,
        eps: Tensor,
    ) -> Tensor:
        """Equation 8: z at sigma_next from z at sigma, all in coefficients."""
        kept = math.sqrt(1.0 - self.eta**2) * sigma_next
        fresh = self.eta * sigma_next
        unmeasured = D_z + kept * (z - D_z) / sigma + fresh * eps
        floor = torch.finfo(data.noise_std.dtype).tiny
        noisier = D_z + kept * (data.y_bar - D_z) / data.noise_std.clamp_min(floor) + fresh * eps
        left = sigma_next**2 - (self.eta_b * data.noise_std) ** 2
        cleaner = D_z + self.eta_b * (data.y_bar - D_z) + left.clamp_min(0.0).sqrt() * eps
        measured = torch.where(sigma_next < data.noise_std, noisier, cleaner)
        return torch.where(data.measured, measured, unmeasured)


def _first(start: Tensor, data: SpectralData, sigma: float, eps: Tensor) -> Tensor:
    """Equation 7; a direction measured with more noise than sigma starts as if it were not."""
    left = sigma**2 - data.noise_std**2
    return torch.where(
        left >= 0, data.y_bar + left.clamp_min(0.0).sqrt() * eps, start + sigma * eps
    )
