"""DPS, diffusion posterior sampling: an ancestral step, then one down the misfit of D(x; sigma).

It needs hundreds of levels (the step is a length, whatever the level): a yardstick, not a tool.

Source: Chung et al. 2023, "Diffusion posterior sampling for general noisy inverse problems"
(arXiv:2209.14687), Algorithms 1 and 2; their zeta_i = zeta / |y - A D|. Seen from s = 1 a step of
their x_t is longer by (1 + sigma^2)^(1/2) where it starts, and by as much where it ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.linear import Accuracy
from diffusion_core.posterior.run import (
    RENOISE,
    Counted,
    Start,
    initial_estimate,
    positive_levels,
    relative_precision,
)
from diffusion_core.protocols import (
    Data,
    Denoiser,
    LinearOperator,
    NoiseModel,
    NonlinearOperator,
    NormalDraws,
    Restoration,
)


@dataclass(frozen=True, eq=False)
class DPS:
    """A posterior solver (protocols.Solver), for nonlinear operators too; NFE 3 a level.

    Attributes:
        prior: of the kriging start; None: from scaled A'y.
        zeta: length of the step down |y - A D|, network units (noise enters by its relative
            weights only).
        start: "kriging", "scaled-adjoint", "adjoint" or "noise".
    """

    prior: CovarianceTable | None = None
    zeta: float = 1.0
    start: Start = "kriging"

    def __call__(
        self,
        denoise: Denoiser,
        operator: LinearOperator | NonlinearOperator,
        y: Data,
        noise: NoiseModel,
        sigmas: Float[Tensor, " levels"],
        draws: NormalDraws,
    ) -> Restoration:
        """Sample along the levels to 0. See protocols.Solver."""
        levels = positive_levels(sigmas)
        calls = Counted(denoise, operator)
        y = calls.checked(y)
        step = calls.data_step() if calls.is_linear else None
        x = initial_estimate(self.start, self.prior, calls, step, y, noise, Accuracy(1e-2, 40))
        x = x + levels[0] * draws.normal(0, x, RENOISE)
        for i, sigma in enumerate(levels):
            sigma_next = levels[i + 1] if i + 1 < len(levels) else 0.0
            mu, pull = calls.denoise_pullback(x, sigma)
            gradient = pull(_direction(calls, mu, y, noise))
            ratio = (sigma_next / sigma) ** 2
            fresh = sigma_next * math.sqrt(1.0 - ratio) * draws.normal(i + 1, x, RENOISE)
            scale = math.sqrt((1.0 + sigma**2) * (1.0 + sigma_next**2))
            # Algorithm 1 has |.|^2 over |.|: twice the gradient of the norm.
            x = mu + ratio * (x - mu) + fresh - 2.0 * self.zeta * scale * gradient
        return calls.restoration(x)


def _direction(calls: Counted, mu: Tensor, y: Data, noise: NoiseModel) -> Tensor:
    """Gradient of |R^(-1/2) (y - A mu)| by mu, R relative to its mean."""
    A_mu, pull = calls.pullback(mu)
    W = relative_precision(noise.variance(A_mu))
    r = A_mu - y
    squared = (W * r.abs() ** 2).flatten(1).sum(dim=1)
    norm = squared.sqrt().clamp_min(torch.finfo(squared.dtype).tiny)
    return pull(W * r / norm.reshape(-1, *(1,) * (r.ndim - 1)))
