"""DiffPIR: denoise, proximal data step with an isotropic weight, partial re-noising.

Source: Zhu et al. 2023, "Denoising diffusion models for plug-and-play image restoration"
(arXiv:2305.08995), Algorithm 1, seen from s = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.gaussian import white_covariance
from diffusion_core.posterior.linear import Accuracy
from diffusion_core.posterior.run import RENOISE, Counted, Start, initial_estimate, positive_levels
from diffusion_core.protocols import (
    Data,
    Denoiser,
    LinearOperator,
    NoiseModel,
    NormalDraws,
    Restoration,
)


@dataclass(frozen=True, eq=False)
class DiffPIR:
    """A posterior solver (protocols.Solver).

    Attributes:
        prior: of the kriging start; None: from scaled A'y.
        lam: lambda; the data step is argmin |y - A x|_R^2 + (lambda / sigma^2) |x - mu|^2, their
            rho = lambda sigma_y^2 / sigma^2.
        zeta: share of fresh noise in the variance of the re-noising.
        start: "kriging", "scaled-adjoint", "adjoint" or "noise".
        tolerance: relative residual of iterative data steps.
        max_steps: CG steps a level at most.
    """

    prior: CovarianceTable | None = None
    lam: float = 1.0
    zeta: float = 0.5
    start: Start = "kriging"
    tolerance: float = 1e-2
    max_steps: int = 40

    def __post_init__(self) -> None:
        if not self.lam > 0 or not 0 <= self.zeta <= 1:
            raise ValueError(
                f"diffpir needs lam > 0 and 0 <= zeta <= 1, not {self.lam} and {self.zeta}"
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
        """Restore a batch; the last data step's x0 is returned. See protocols.Solver."""
        levels = positive_levels(sigmas)
        calls = Counted(denoise, operator)
        y = calls.checked(y)
        step = calls.data_step()
        accuracy = Accuracy(self.tolerance, self.max_steps)
        x0 = initial_estimate(self.start, self.prior, calls, step, y, noise, accuracy)
        x = x0 + levels[0] * draws.normal(0, x0, RENOISE)
        for i, sigma in enumerate(levels):
            mu = calls.denoise(x, sigma)
            A_mu = calls.A(mu)
            covariance = white_covariance(sigma**2 / self.lam, mu)
            x0 = mu + step(covariance, noise.variance(A_mu), y - A_mu, accuracy).delta
            if i + 1 < len(levels):
                eps = math.sqrt(1.0 - self.zeta) * (x - x0) / sigma
                eps = eps + math.sqrt(self.zeta) * draws.normal(i + 1, x0, RENOISE)
                x = x0 + levels[i + 1] * eps
        return calls.restoration(x0)
