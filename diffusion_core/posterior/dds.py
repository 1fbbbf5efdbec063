"""DDS, decomposed diffusion sampling: a few CG steps from the denoised image, then DDIM.

Source: Chung et al. 2024, "Decomposed diffusion sampler for accelerating large-scale inverse
problems" (arXiv:2303.05754), Algorithm 3 (noisy data, proximal weight gamma), seen from s = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.posterior.cg import conjugate_gradient
from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.linear import Accuracy
from diffusion_core.posterior.linear.base import is_exact, positive
from diffusion_core.posterior.run import RENOISE, Counted, Start, initial_estimate, positive_levels
from diffusion_core.protocols import (
    Data,
    Denoiser,
    LinearOperator,
    NoiseModel,
    NormalDraws,
    Restoration,
    Signal,
)


@dataclass(frozen=True, eq=False)
class DDS:
    """A posterior solver (protocols.Solver).

    Attributes:
        prior: of the kriging start; None: from scaled A'y.
        gamma: variance given to mu in the data step (I / gamma + A' R^-1 A) x = mu / gamma +
            A' R^-1 y, in squared network units; exact data drop mu: A'A x = A'y (beside noisy ones
            of the same image they have a small variance).
        eta: stochasticity of DDIM, 0 to 1.
        num_cg_steps: CG steps a level, from mu; their number is the regulariser.
        start: "kriging", "scaled-adjoint", "adjoint" or "noise".
    """

    prior: CovarianceTable | None = None
    gamma: float = 0.01
    eta: float = 0.85
    num_cg_steps: int = 5
    start: Start = "kriging"

    def __post_init__(self) -> None:
        if not self.gamma > 0 or not 0 <= self.eta <= 1 or self.num_cg_steps < 1:
            raise ValueError(
                "dds needs gamma > 0, 0 <= eta <= 1 and num_cg_steps >= 1, not "
                f"{self.gamma}, {self.eta} and {self.num_cg_steps}"
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
        x0 = initial_estimate(
            self.start, self.prior, calls, calls.data_step(), y, noise, Accuracy(1e-2, 40)
        )
        x = x0 + levels[0] * draws.normal(0, x0, RENOISE)
        for i, sigma in enumerate(levels):
            mu = calls.denoise(x, sigma)
            x0 = self._data_step(mu, calls, y, noise)
            if i + 1 < len(levels):
                sigma_next = levels[i + 1]
                fresh = self.eta * sigma_next * math.sqrt(1.0 - (sigma_next / sigma) ** 2)
                kept = math.sqrt(sigma_next**2 - fresh**2)
                eps = (x - mu) / sigma  # the network's own estimate of the noise
                x = x0 + kept * eps + fresh * draws.normal(i + 1, x0, RENOISE)
        return calls.restoration(x0)

    def _data_step(self, mu: Signal, calls: Counted, y: Data, noise: NoiseModel) -> Signal:
        """CG on the normal equations from mu: in the correction z = x - mu it starts from 0."""
        A_mu = calls.A(mu)
        R = noise.variance(A_mu)
        exact = is_exact(R)
        ridge = torch.where(exact, 0.0, 1.0 / self.gamma).to(mu)
        on_data = exact.reshape(-1, *(1,) * (A_mu.ndim - 1)) if R.ndim else exact.squeeze()
        weight = torch.where(on_data, 1.0, 1.0 / positive(R))

        def normal(z: Signal) -> Signal:
            return ridge * z + calls.A_adjoint(weight * calls.A(z))

        b = calls.A_adjoint(weight * (y - A_mu))
        solved = conjugate_gradient(normal, b, tolerance=1e-6, max_steps=self.num_cg_steps)
        return mu + solved.x
