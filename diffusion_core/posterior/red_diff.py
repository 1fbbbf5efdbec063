"""RED-diff: one image v, descended by Adam on the misfit and on what the denoiser would change.

Source: Mardani et al. 2024, "A variational perspective on solving inverse problems with diffusion
models" (arXiv:2305.04391), Equation 11 and Algorithm 1. Their weight lambda_t = lambda sigma_t /
alpha_t on (eps_hat - eps) . v is, at s = 1, lambda on (v - D(v + sigma eps)) . v.
"""

from __future__ import annotations

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
    Signal,
)

_EPSILON = 1e-8


@dataclass(frozen=True, eq=False)
class REDDiff:
    """A posterior solver (protocols.Solver), for nonlinear operators too; an Adam step a level.

    Attributes:
        prior: of the kriging start; None: from scaled A'y.
        lam: weight of the denoiser's pull against the misfit's, 1/2 |y - A v|^2 (data that are
            noisier than their mean weigh less).
        learning_rate: of Adam, network units.
        beta1: decay of Adam's mean gradient.
        beta2: decay of Adam's mean squared gradient.
        start: "kriging", "scaled-adjoint", "adjoint" or "noise" (here 0: v carries no noise).
    """

    prior: CovarianceTable | None = None
    lam: float = 0.25
    learning_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    start: Start = "kriging"

    def __post_init__(self) -> None:
        if not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1:
            raise ValueError(
                f"red-diff needs beta1 and beta2 in [0, 1), not {self.beta1} and {self.beta2}"
            )
        if not self.lam >= 0 or not self.learning_rate > 0:
            raise ValueError(
                "red-diff needs lam >= 0 and learning_rate > 0, not "
                f"{self.lam} and {self.learning_rate}"
            )

    def __call__(
        self,
        denoise: Denoiser,
        operator: LinearOperator | NonlinearOperator,
        y: Data,
        noise: NoiseModel,
        sigmas: Float[Tensor, " levels"],
        draws: NormalDraws,
    ) -> Restoration:
        """Descend along the levels; v is returned. See protocols.Solver."""
        levels = positive_levels(sigmas)
        calls = Counted(denoise, operator)
        y = calls.checked(y)
        step = calls.data_step() if calls.is_linear else None
        v = initial_estimate(self.start, self.prior, calls, step, y, noise, Accuracy(1e-2, 40))
        mean, square = torch.zeros_like(v), torch.zeros_like(v)
        for i, sigma in enumerate(levels):
            x = v + sigma * draws.normal(i, v, RENOISE)
            gradient = _misfit_slope(calls, v, y, noise) + self.lam * (v - calls.denoise(x, sigma))
            # Adam: Kingma and Ba 2015 (arXiv:1412.6980), Algorithm 1.
            mean = self.beta1 * mean + (1.0 - self.beta1) * gradient
            square = self.beta2 * square + (1.0 - self.beta2) * gradient**2
            unbiased = mean / (1.0 - self.beta1 ** (i + 1))
            scale = (square / (1.0 - self.beta2 ** (i + 1))).sqrt() + _EPSILON
            v = v - self.learning_rate * unbiased / scale
        return calls.restoration(v)


def _misfit_slope(calls: Counted, v: Signal, y: Data, noise: NoiseModel) -> Signal:
    """Gradient of 1/2 |R^(-1/2) (y - A v)|^2, R relative to its mean."""
    Av, pull = calls.pullback(v)
    return pull(relative_precision(noise.variance(Av)) * (Av - y))
