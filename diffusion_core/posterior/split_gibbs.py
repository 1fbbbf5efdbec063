"""Split Gibbs, or PnP-DM: in turn a draw by the data and a draw by the prior, coupled by sigma.

    z  ~ p(y | z) N(z; x0, sigma^2 I)        conditional.py
    x0 ~ p(x0 | z = x0 + sigma eps)          the reverse process from noise level sigma

Both conditionals are those of p(x0) N(z; x0, sigma^2 I) p(y | z), so at a fixed level x0 tends to
the posterior under the noise R + sigma^2 A A', and with sigma to the posterior itself. The only
error is the reverse process's discretisation: the reference for calibration.

Source: Wu et al. 2024, "Principled probabilistic imaging using diffusion models as plug-and-play
priors" (arXiv:2405.18782), Algorithm 1; Vono et al. 2019 (arXiv:1804.05809) for the splitting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.posterior.conditional import DataDraws
from diffusion_core.posterior.run import PRIOR, Counted, positive_levels
from diffusion_core.protocols import (
    Data,
    Denoiser,
    LinearOperator,
    NoiseModel,
    NonlinearOperator,
    NormalDraws,
    Restoration,
)
from diffusion_core.samplers.ancestral import ancestral

_LEAST_SHARE = 0.02
"""Last level of the reverse process, of the level that it starts from; then D(x) ends it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitGibbs(DataDraws):
    """A posterior solver (protocols.Solver) for any operator; see DataDraws for more attributes.

    Attributes:
        num_prior_steps: evaluations of each draw by the prior.
        prior_rho: spacing of its levels (noise.schedules.power_sigmas).
    """

    num_prior_steps: int = 10
    prior_rho: float = 3.0

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
        x0, step = self.begin(calls, y, noise)
        for i, sigma in enumerate(levels):
            z = self.draw(calls, step, x0, sigma, y, noise, draws, i)
            fresh = _Shifted(draws, i * self.num_prior_steps)
            x0 = ancestral(calls.denoiser, z, self._prior_levels(sigma), fresh)
        return calls.restoration(x0)

    def _prior_levels(self, sigma: float) -> Float[Tensor, " levels"]:
        """From sigma to 0."""
        steps = power_sigmas(self.num_prior_steps, sigma, _LEAST_SHARE * sigma, self.prior_rho)
        return torch.cat([steps, torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True, eq=False)
class _Shifted:
    """Draws in a stream of their own, from a level on."""

    draws: NormalDraws
    first: int

    def normal(self, level: int, like: Tensor, stream: int = PRIOR) -> Tensor:
        """See protocols.NormalDraws."""
        return self.draws.normal(self.first + level, like, stream)
