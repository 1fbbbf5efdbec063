"""Multiplicative noise: geometric Brownian motion, and the speckle that it is the right model of.

    dX = a(t) X dt + b(t) X dW    =>    log X_t = log x0 + int (a - b^2/2) + (int b^2)^(1/2) eps

so on log intensities it is a variance-exploding process, and its denoiser must be a prior on *log*
intensities. Speckle of L looks multiplies an intensity by S ~ Gamma(L, 1/L): E S = 1, but
E log S = digamma(L) - log L < 0, the bias that the way to the log domain takes off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffusion_core.noise.integrated import Integrated
from diffusion_core.protocols import Data, Signal


@dataclass(frozen=True)
class Multiplicative:
    """dX = a(t) X dt + b(t) X dW (Ito) on positive images.

    Attributes:
        drift: a(t).
        diffusion: b(t).

    Source: the geometric Brownian motion of Oksendal 2003, "Stochastic Differential Equations",
        Example 5.1.1.
    """

    drift: Callable[[float], float]
    diffusion: Callable[[float], float]

    def log_shift(self, t: float) -> float:
        """E[log X_t - log x0] = int (a - b^2 / 2)."""
        return math.log(self._signal.scale(t)) - 0.5 * self.sigma(t) ** 2

    def sigma(self, t: float) -> float:
        """Standard deviation of log X_t given x0: sigma^2 = int b^2."""
        return self._noise.sigma(t)

    def mean(self, x0: Tensor, t: float) -> Tensor:
        """E[X_t] = x0 exp(int a)."""
        return x0 * self._signal.scale(t)

    def variance(self, x0: Tensor, t: float) -> Tensor:
        """Var[X_t] = E[X_t]^2 (exp(sigma^2) - 1)."""
        return self.mean(x0, t) ** 2 * math.expm1(self.sigma(t) ** 2)

    def time(self, sigma: float) -> float:
        """When log X_t has standard deviation sigma."""
        return self._noise.time(sigma)

    @cached_property
    def _signal(self) -> Integrated:
        return Integrated(self.drift, lambda _: 0.0)

    @cached_property
    def _noise(self) -> Integrated:
        return Integrated(lambda _: 0.0, self.diffusion)


def log_speckle_mean(num_looks: float) -> float:
    """E log S = digamma(L) - log L, in nats, for S ~ Gamma(L, 1/L).

    Raises:
        ValueError: if num_looks is not above 0.

    Source: Goodman 2007, "Speckle Phenomena in Optics", section 4; Xie et al. 2002, IEEE TGRS
        40(3), "Statistical properties of logarithmically transformed speckle", Equation 24.
    """
    looks = _checked(num_looks)
    return float(torch.digamma(looks) - looks.log())


def log_speckle_variance(num_looks: float) -> float:
    """Var log S = trigamma(L), in nats squared. Errors and source as log_speckle_mean."""
    return float(torch.polygamma(1, _checked(num_looks)))


def to_log(intensity: Signal, num_looks: float) -> Signal:
    """Speckled intensities (> 0) to an unbiased measurement of log intensities, in nats."""
    return intensity.log() - log_speckle_mean(num_looks)


def from_log(log_intensity: Signal, variance: Tensor | float = 0.0) -> Signal:
    """Log intensities, in nats, back to intensities.

    Args:
        log_intensity: an estimate of log x0.
        variance: of log x0 about the estimate, where known: E[x0] = exp(mean + variance / 2) for a
            normal log x0. With 0 the result is the median.
    """
    return (log_intensity + 0.5 * variance).exp()


@dataclass(frozen=True)
class LogSpeckle:
    """The likelihood of bias-corrected log intensities (protocols.NoiseModel): log-gamma.

    Attributes:
        num_looks: L, > 0.
        nats_per_unit: of the scale that y and A x are given in: network units seldom are nats.
    """

    num_looks: float
    nats_per_unit: float = 1.0

    def __post_init__(self) -> None:
        _checked(self.num_looks)

    def variance(self, Ax: Data) -> Tensor:
        """R's diagonal, the same everywhere: trigamma(L) in the units of y; a scalar tensor."""
        std = math.sqrt(log_speckle_variance(self.num_looks)) / self.nats_per_unit
        return torch.as_tensor(std**2, dtype=Ax.dtype, device=Ax.device)

    def log_likelihood(self, y: Data, Ax: Data) -> Tensor:
        """log p(y | A x), exact, in nats per unit of y; shape of y.

        With d = log S = y - A x in nats plus the bias that was taken off:
        log p(d) = L log L - log Gamma(L) + L (d - e^d).
        """
        looks = torch.as_tensor(self.num_looks, dtype=y.dtype, device=y.device)
        d = (y - Ax) * self.nats_per_unit + log_speckle_mean(self.num_looks)
        constant = looks * looks.log() - torch.lgamma(looks) + math.log(self.nats_per_unit)
        return constant + looks * (d - d.exp())


def _checked(num_looks: float) -> Tensor:
    if not num_looks > 0:
        raise ValueError(f"speckle has more than 0 looks, not {num_looks}")
    return torch.tensor(float(num_looks), dtype=torch.float64)
