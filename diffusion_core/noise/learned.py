"""A learned noise process: endpoints that make the bound least, levels that make it least noisy.

In continuous time the bound on -log p(x0) depends on the process through its two endpoints alone
(Kingma et al. 2021, section 5.1); the monotone path of ln sigma between them is free, and sets the
variance of the Monte-Carlo estimate. Both are learned from one table of a denoiser's errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.noise.densities import Histogram
from diffusion_core.noise.processes import LinearProcess


@dataclass(frozen=True, eq=False)
class LearnedProcess(LinearProcess):
    """Variance exploding, ln sigma(t) the quantile function of a density: monotone log-SNR.

    Time drawn evenly draws levels from the density. As for VE, X_0 = x0, so that sigma(0) = 0
    and X_t has the variance that level(t) has gained since t = 0.

    Attributes:
        density: of ln sigma, between the endpoints.
    """

    density: Histogram

    def drift(self, t: float) -> float:  # noqa: ARG002 - none at any time
        """No drift."""
        return 0.0

    def diffusion(self, t: float) -> float:
        """b^2 = d(sigma^2)/dt = 2 level^2 / q(ln level)."""
        ln_level = self._ln_level(t)
        return float(torch.exp(ln_level) * (2.0 / self.density.log_density(ln_level).exp()).sqrt())

    def scale(self, t: float) -> float:  # noqa: ARG002
        """The signal is never scaled."""
        return 1.0

    def sigma(self, t: float) -> float:
        """Zero at t = 0, as VE."""
        return math.sqrt(max(self.level(t) ** 2 - self.level(0.0) ** 2, 0.0))

    def level(self, t: float) -> float:
        """Noise level at time t: from the least to the greatest of the endpoints."""
        return float(self._ln_level(t).exp())

    def _ln_level(self, t: float) -> Tensor:
        return self.density.quantile(torch.tensor(t, dtype=torch.float64))
