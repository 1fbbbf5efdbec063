"""DDS, decomposed diffusion sampling: a few CG steps from the denoised image, then DDIM.

Source: Chung et al. 2024, "Decomposed diffusion sampler for accelerating large-scale inverse
problems" (arXiv:2303.05754), Algorithm 3 (noisy data, proximal weight gamma), seen from s = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diffusion_core.posterior.cg import conjugate_gradient
from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.linear import Accuracy
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
        prior: of the kriging start; None starts from A'y.
        gamma: variance given to mu in the data step (I / gamma + A' R^-1 A) x = mu / gamma +
            A' R^-1 y, in squared network units; exact data drop mu: A'A x = A'y.
        eta: stochasticity of DDIM.
        num_cg_steps: CG steps a level, from mu; their number is the regulariser.
        start: "kriging", "adjoint" or "noise".
    """

    prior: CovarianceTable | None = None
    gamma: float = 0.01
    eta: float = 0.85
    num_cg_steps: int = 5
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
        """Restore a batch; the last data step's x0 is returned. See protocols.Solver."""
        levels = positive_levels(sigmas)
        calls = Counted(denoise, operator)
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
        exact = bool((R == 0).all())
        weight = R.new_ones(()) if exact else 1.0 / R
        ridge = 0.0 if exact else 1.0 / self.gamma

        def normal(z: Signal) -> Signal:
            return ridge * z + calls.A_adjoint(weight * calls.A(z))

        b = calls.A_adjoint(weight * (y - A_mu))
        solved = conjugate_gradient(normal, b, tolerance=1e-6, max_steps=self.num_cg_steps)
        return mu + solved.x
