"""Split Gibbs, or PnP-DM: in turn a draw by the data and a draw by the prior, coupled by sigma.

    z  ~ p(y | z) N(z; x0, sigma^2 I)        conditional.py
    x0 ~ p(x0 | z = x0 + sigma eps)          the reverse process from noise level sigma

Both conditionals are those of p(x0) N(z; x0, sigma^2 I) p(y | z), so at a fixed level x0 tends to
the posterior under the noise R + sigma^2 A A', and with sigma to the posterior itself. The only
error is the reverse process's discretisation. A step from s to s' draws x0_hat ~ N(D, Sigma) with
Sigma from the covariance table, then x' ~ q(x' | x, x0_hat): on Gaussians exact in a single step.
Without a table x0_hat is D, the ancestral step of DDPM, whose variance falls short.

Source: Wu et al. 2024, "Principled probabilistic imaging using diffusion models as plug-and-play
priors" (arXiv:2405.18782), Algorithm 1; Vono et al. 2019 (arXiv:1804.05809) for the splitting.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.posterior.conditional import DataDraws
from diffusion_core.posterior.run import PRIOR, PRIOR_STATE, Counted, positive_levels
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

_LEAST_SHARE = 0.05
"""Last level of the reverse process, of the level that it starts from; then x0_hat ends it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitGibbs(DataDraws):
    """A posterior solver (protocols.Solver) for any operator; see DataDraws for more attributes.

    Attributes:
        prior: covariance table, of the kriging start and of the reverse steps.
        num_prior_steps: evaluations of each draw by the prior.
        prior_rho: spacing of its levels (noise.schedules.power_sigmas).
    """

    num_prior_steps: int = 10
    prior_rho: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_prior_steps < 1 or not self.prior_rho > 0:
            raise ValueError(
                "split-gibbs needs num_prior_steps >= 1 and prior_rho > 0, not "
                f"{self.num_prior_steps} and {self.prior_rho}"
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
        """Alternate once a level; the last draw by the prior is returned. See protocols.Solver."""
        levels = positive_levels(sigmas)
        calls = Counted(denoise, operator)
        y = calls.checked(y)
        x0, step = self.begin(calls, y, noise)
        for i, sigma in enumerate(levels):
            z = self.draw(calls, step, x0, sigma, y, noise, draws, i)
            x0 = self._draw_by_prior(calls, z, sigma, draws, i * self.num_prior_steps)
        return calls.restoration(x0)

    def _draw_by_prior(
        self, calls: Counted, x: Signal, sigma: float, draws: NormalDraws, first: int
    ) -> Signal:
        """x0 ~ p(x0 | x) for x at noise level sigma; its noise is addressed from `first` on."""
        last = _LEAST_SHARE * sigma if self.num_prior_steps > 1 else sigma
        steps = power_sigmas(self.num_prior_steps, sigma, last, self.prior_rho).tolist()
        for k, (s, s_next) in enumerate(itertools.pairwise([*steps, 0.0]), start=first):
            x0_hat = calls.denoise(x, s)
            if self.prior is not None:
                Sigma = self.prior.at(s).on(x0_hat)
                xi = draws.normal(k, x0_hat, PRIOR_STATE)
                x0_hat = x0_hat + Sigma.apply_root(xi, (x.shape[-2], x.shape[-1]))
            ratio = (s_next / s) ** 2
            fresh = s_next * math.sqrt(1.0 - ratio) * draws.normal(k, x, PRIOR)
            x = x0_hat + ratio * (x - x0_hat) + fresh
        return x
