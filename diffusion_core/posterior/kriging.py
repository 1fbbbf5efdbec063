"""Kriging: the posterior mean under the Gaussian prior of images. No network, no evaluation.

An honest baseline of every linear task: without it the gain of the diffusion prior is overstated.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.linear import Accuracy
from diffusion_core.posterior.run import Counted, kriging_estimate
from diffusion_core.protocols import (
    Data,
    Denoiser,
    LinearOperator,
    NoiseModel,
    NormalDraws,
    Restoration,
)


@dataclass(frozen=True, eq=False)
class Kriging:
    """A posterior solver (protocols.Solver) that ignores the denoiser, the levels and the draws.

    Attributes:
        prior: mean level and spectrum of images.
        tolerance: relative residual of the linear solve.
        max_steps: CG steps at most.
    """

    prior: CovarianceTable
    tolerance: float = 1e-3
    max_steps: int = 100

    def __call__(
        self,
        denoise: Denoiser,
        operator: LinearOperator,
        y: Data,
        noise: NoiseModel,
        sigmas: Float[Tensor, " levels"],  # noqa: ARG002 - a solver's signature
        draws: NormalDraws,  # noqa: ARG002
    ) -> Restoration:
        """E[x0 | y]. See protocols.Solver."""
        calls = Counted(denoise, operator)
        y = calls.checked(y)
        accuracy = Accuracy(self.tolerance, self.max_steps)
        x, steps = kriging_estimate(self.prior, calls, calls.data_step(), y, noise, accuracy)
        return calls.restoration(x, steps=steps)
