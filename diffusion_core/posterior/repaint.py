"""RePaint: unconditional sampling with the known pixels pasted in, and back up to harmonise.

Source: Lugmayr et al. 2022, "RePaint: inpainting using denoising diffusion probabilistic models"
(arXiv:2201.09865), Algorithm 1 and its appendix for jumps of several levels, seen from s = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.operators import Identity, Mask
from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.linear import Accuracy
from diffusion_core.posterior.run import (
    DATA_RE,
    RENOISE,
    Counted,
    Start,
    initial_estimate,
    positive_levels,
)
from diffusion_core.protocols import (
    Data,
    Denoiser,
    LinearOperator,
    NoiseModel,
    NormalDraws,
    Restoration,
    UnsuitedError,
)


@dataclass(frozen=True, eq=False)
class RePaint:
    """A solver for masks (protocols.Solver). It takes the known pixels as they are, noise and all.

    Attributes:
        prior: of the kriging start; None: from scaled A'y.
        num_resamples: times that each stretch of levels is gone down, r of the paper.
        jump_length: levels of a stretch, j of the paper.
        start: "kriging", "scaled-adjoint", "adjoint" or "noise".
    """

    prior: CovarianceTable | None = None
    num_resamples: int = 5
    jump_length: int = 1
    start: Start = "kriging"

    def __post_init__(self) -> None:
        if self.num_resamples < 1 or self.jump_length < 1:
            raise ValueError(
                "repaint goes down at least once, by at least a level, not "
                f"{self.num_resamples=}, {self.jump_length=}"
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
        """Restore a batch. See protocols.Solver.

        Raises:
            UnsuitedError: if the operator is not a mask.
        """
        if not isinstance(operator, Mask | Identity):
            raise UnsuitedError(
                f"repaint fills in masks, and {type(operator).__name__} is none: choose pigdm, "
                "diffpir or covprox"
            )
        levels = [*positive_levels(sigmas), 0.0]
        calls = Counted(denoise, operator)
        y = calls.checked(y)
        x = initial_estimate(
            self.start, self.prior, calls, calls.data_step(), y, noise, Accuracy(1e-2, 40)
        )
        known = calls.A(torch.ones_like(x))
        sigma_y = noise.variance(y).sqrt()
        x = x + levels[0] * draws.normal(0, x, RENOISE)
        for k, (i, j) in enumerate(pairwise(self._path(len(levels) - 1)), start=1):
            sigma, sigma_next = levels[i], levels[j]
            eps = draws.normal(k, x, RENOISE)
            if j < i:
                x = x + math.sqrt(sigma_next**2 - sigma**2) * eps
                continue
            ratio = (sigma_next / sigma) ** 2
            mu = calls.denoise(x, sigma)
            unknown = mu + ratio * (x - mu) + sigma_next * math.sqrt(1.0 - ratio) * eps
            # y is as noisy as level sigma_y already.
            added = (sigma_next**2 - sigma_y**2).clamp_min(0.0).sqrt()
            pasted = y + added * draws.normal(k, x, DATA_RE)
            x = torch.where(known > 0, pasted, unknown)
        return calls.restoration(x)

    def _path(self, last: int) -> list[int]:
        """Indices of the levels in the order they are visited, from 0 down to `last`."""
        path = [0]
        while path[-1] < last:
            top = path[-1]
            bottom = min(top + self.jump_length, last)
            stretch = list(range(top + 1, bottom + 1))
            path += stretch
            for _ in range(self.num_resamples - 1):
                path += [top, *stretch]
        return path
