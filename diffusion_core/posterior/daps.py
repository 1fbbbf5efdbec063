"""DAPS, decoupled annealing: an ODE to x0, a draw by the data about it, and fresh noise.

Levels do not lean on each other: each starts from noise as large as its own, so that a chain can
leave a mistake behind. x0 | x is taken as N(x0_hat, r^2 I), x0_hat the end of the probability-flow
ODE, which is what it errs by.

Source: Zhang et al. 2024, "Improving diffusion inverse problem solving with decoupled noise
annealing" (arXiv:2407.01521), Algorithm 1; Langevin dynamics of Equation 8 in conditional.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.posterior.conditional import DataDraws
from diffusion_core.posterior.run import RENOISE, Counted, positive_levels, posterior_std
from diffusion_core.protocols import (
    Data,
    Denoiser,
    LinearOperator,
    NoiseModel,
    NonlinearOperator,
    NormalDraws,
    Restoration,
)
from diffusion_core.samplers.euler import euler

_ODE_RHO = 7.0


@dataclass(frozen=True, eq=False, kw_only=True)
class DAPS(DataDraws):
    """A posterior solver (protocols.Solver) for any operator; see DataDraws for more attributes.

    Attributes:
        num_ode_steps: Euler steps, hence evaluations, a level; 1 is x0_hat = D(x; sigma), whose law
            is nearer the posterior's on Gaussians and their mixtures.
        ode_sigma_min: level of the ODE's last evaluation.
        spread: r: "sigma", as the paper has it, or "posterior", sigma sigma_data / (sigma^2 +
            sigma_data^2)^(1/2): with one ODE step that is exact where images are white.
        sigma_data: standard deviation of images.
    """

    num_ode_steps: int = 5
    ode_sigma_min: float = 0.02
    spread: Literal["sigma", "posterior"] = "sigma"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spread not in {"sigma", "posterior"}:
            raise ValueError(f"daps takes the spread sigma or posterior, not {self.spread!r}")
        if self.num_ode_steps < 1 or not self.ode_sigma_min > 0 or not self.sigma_data > 0:
            raise ValueError(
                "daps needs num_ode_steps >= 1, ode_sigma_min > 0 and sigma_data > 0, not "
                f"{self.num_ode_steps}, {self.ode_sigma_min} and {self.sigma_data}"
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
        """Restore a batch; the last draw by the data is returned. See protocols.Solver."""
        levels = positive_levels(sigmas)
        calls = Counted(denoise, operator)
        y = calls.checked(y)
        x0, step = self.begin(calls, y, noise)
        for i, sigma in enumerate(levels):
            x = x0 + sigma * draws.normal(i, x0, RENOISE)
            x0_hat = euler(calls.denoiser, x, self._ode_levels(sigma))
            r = sigma if self.spread == "sigma" else posterior_std(sigma, self.sigma_data)
            x0 = self.draw(calls, step, x0_hat, r, y, noise, draws, i)
        return calls.restoration(x0)

    def _ode_levels(self, sigma: float) -> Float[Tensor, " levels"]:
        """From sigma to ode_sigma_min and 0."""
        zero = torch.zeros(1, dtype=torch.float64)
        if self.num_ode_steps == 1 or sigma <= self.ode_sigma_min:
            return torch.cat([torch.full_like(zero, sigma), zero])
        steps = power_sigmas(self.num_ode_steps, sigma, self.ode_sigma_min, _ODE_RHO)
        return torch.cat([steps, zero])
