"""PiGDM, pseudoinverse guidance: the gradient of a Gaussian likelihood of x, through the network.

Source: Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems" (ICLR),
Equations 7 and 8 and Algorithm 1, seen from s = 1 (their x_0 | x_t ~ N(D, r_t^2 I)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.gaussian import white_covariance
from diffusion_core.posterior.linear import Accuracy
from diffusion_core.posterior.run import (
    RENOISE,
    Counted,
    Start,
    initial_estimate,
    positive_levels,
    posterior_std,
)
from diffusion_core.protocols import (
    Data,
    Denoiser,
    LinearOperator,
    NoiseModel,
    NormalDraws,
    Restoration,
)


@dataclass(frozen=True, eq=False)
class PiGDM:
    """A posterior solver (protocols.Solver); a level costs three evaluations (one and a product).

    Attributes:
        prior: of the kriging start; None: from scaled A'y.
        sigma_data: standard deviation of images, of r = sigma sigma_data / (sigma^2 +
            sigma_data^2)^(1/2).
        adaptive: guide by r^2 grad log p(y | x) as the paper does; else by sigma^2 grad, which is
            Tweedie's formula and exact where images are white N(0, sigma_data^2).
        eta: stochasticity of DDIM.
        start: "kriging", "scaled-adjoint", "adjoint" or "noise".
        tolerance: relative residual of iterative solves.
        max_steps: CG steps a level at most.
    """

    prior: CovarianceTable | None = None
    sigma_data: float = 0.5
    adaptive: bool = True
    eta: float = 1.0
    start: Start = "kriging"
    tolerance: float = 1e-2
    max_steps: int = 40

    def __post_init__(self) -> None:
        if not self.sigma_data > 0 or not 0 <= self.eta <= 1:
            raise ValueError(
                "pigdm needs sigma_data > 0 and 0 <= eta <= 1, not "
                f"{self.sigma_data} and {self.eta}"
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
        """Restore a batch; the last guided estimate of x0 is returned. See protocols.Solver."""
        levels = positive_levels(sigmas)
        calls = Counted(denoise, operator)
        y = calls.checked(y)
        step = calls.data_step()
        accuracy = Accuracy(self.tolerance, self.max_steps)
        x0 = initial_estimate(self.start, self.prior, calls, step, y, noise, accuracy)
        x = x0 + levels[0] * draws.normal(0, x0, RENOISE)
        for i, sigma in enumerate(levels):
            mu, pull = calls.denoise_pullback(x, sigma)
            r = posterior_std(sigma, self.sigma_data)
            A_mu = calls.A(mu)
            # r^2 A' (r^2 A A' + R)^-1 (y - A mu): J' of it is r^2 grad log p(y | x).
            delta = step(white_covariance(r**2, mu), noise.variance(A_mu), y - A_mu, accuracy).delta
            guidance = pull(delta) * (1.0 if self.adaptive else (sigma / r) ** 2)
            x0 = mu + guidance
            if i + 1 < len(levels):
                sigma_next = levels[i + 1]
                fresh = self.eta * sigma_next * math.sqrt(1.0 - (sigma_next / sigma) ** 2)
                kept = math.sqrt(sigma_next**2 - fresh**2)
                eps = (x - mu) / sigma
                x = x0 + kept * eps + fresh * draws.normal(i + 1, x0, RENOISE)
        return calls.restoration(x0)
