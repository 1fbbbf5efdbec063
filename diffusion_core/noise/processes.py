"""Noise processes in closed form: linear forward SDEs as pairs (s, sigma) over one denoiser.

dX = a(t) X dt + b(t) dW has X_t = s(t) (x0 + sigma(t) eps) with s = exp(int a) and
sigma^2 = int b^2 / s^2 (Karras et al. 2022, arXiv:2206.00364, Appendix B). A denoiser D(x; sigma)
trained at s = 1 therefore serves every such process: give it X_t / s(t). Processes given by their
a(t) and b(t) alone are in integrated.py, learned ones in learned.py, multiplicative noise in
multiplicative.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from torch import Tensor

from diffusion_core.protocols import Denoiser, Signal


class LinearProcess(ABC):
    """dX = a(t) X dt + b(t) dW on t in [0, 1], X_0 = x0."""

    @abstractmethod
    def drift(self, t: float) -> float:
        """a(t)."""

    @abstractmethod
    def diffusion(self, t: float) -> float:
        """b(t)."""

    @abstractmethod
    def scale(self, t: float) -> float:
        """s(t)."""

    @abstractmethod
    def sigma(self, t: float) -> float:
        """Noise level of X_t / s(t); never falls with t."""

    @property
    def t_end(self) -> float:
        """Last time at which a, b, s and sigma are finite."""
        return 1.0

    def time(self, sigma: float) -> float:
        """The time at which the noise level is sigma: the inverse of `sigma`, by bracketing.

        Raises:
            ValueError: if the process does not reach that level.
        """
        if not self.sigma(0.0) <= sigma <= self.sigma(self.t_end):
            raise ValueError(
                f"the noise level goes from {self.sigma(0.0):g} to {self.sigma(self.t_end):g}, "
                f"so never through {sigma:g}"
            )
        root: float = brentq(lambda t: self.sigma(t) - sigma, 0.0, self.t_end, xtol=1e-18)
        return root


@dataclass(frozen=True)
class EDM(LinearProcess):
    """s = 1, sigma = sigma_max t. Source: Karras et al. 2022, Table 1 ("Ours")."""

    sigma_max: float = 80.0

    def drift(self, t: float) -> float:  # noqa: ARG002 - none at any time
        """No drift."""
        return 0.0

    def diffusion(self, t: float) -> float:
        """b^2 = d(sigma^2)/dt."""
        return self.sigma_max * math.sqrt(2.0 * t)

    def scale(self, t: float) -> float:  # noqa: ARG002
        """The signal is never scaled."""
        return 1.0

    def sigma(self, t: float) -> float:
        """Linear in time."""
        return self.sigma_max * t


@dataclass(frozen=True)
class VE(LinearProcess):
    """Variance exploding: geometric levels. Source: Song et al. 2021 (2011.13456), Equation 30."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def drift(self, t: float) -> float:  # noqa: ARG002
        """No drift."""
        return 0.0

    def diffusion(self, t: float) -> float:
        """b = sigma(t) sqrt(2 ln(sigma_max / sigma_min))."""
        return self._level(t) * math.sqrt(2.0 * math.log(self.sigma_max / self.sigma_min))

    def scale(self, t: float) -> float:  # noqa: ARG002
        """The signal is never scaled."""
        return 1.0

    def sigma(self, t: float) -> float:
        """Zero at t = 0: the transition from X_0, not the marginal of data with sigma_min on it."""
        return math.sqrt(self._level(t) ** 2 - self.sigma_min**2)

    def _level(self, t: float) -> float:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t


@dataclass(frozen=True)
class VP(LinearProcess):
    """Variance preserving, linear beta. Source: Song et al. 2021 (2011.13456), Equation 32."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def drift(self, t: float) -> float:
        """a = -beta / 2."""
        return -0.5 * self._beta(t)

    def diffusion(self, t: float) -> float:
        """b^2 = beta."""
        return math.sqrt(self._beta(t))

    def scale(self, t: float) -> float:
        """s = exp(-1/2 int beta)."""
        return math.exp(-0.5 * self._integral(t))

    def sigma(self, t: float) -> float:
        """sigma^2 = exp(int beta) - 1, so that s^2 (1 + sigma^2) = 1."""
        return math.sqrt(math.expm1(self._integral(t)))

    def _beta(self, t: float) -> float:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: float) -> float:
        return self.beta_min * t + 0.5 * t**2 * (self.beta_max - self.beta_min)


@dataclass(frozen=True)
class SubVP(LinearProcess):
    """VP's drift, less noise than VP at any time. Source: Song et al. 2021, Equation 29.

    Var(X_t | x0) = (1 - e^{-B})^2 with B = int beta, against VP's 1 - e^{-B}.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def drift(self, t: float) -> float:
        """a = -beta / 2."""
        return self._vp.drift(t)

    def diffusion(self, t: float) -> float:
        """b^2 = beta (1 - e^{-2 B})."""
        s = self.scale(t)
        return self._vp.diffusion(t) * math.sqrt(1.0 - s**4)

    def scale(self, t: float) -> float:
        """s = e^{-B / 2}."""
        return self._vp.scale(t)

    def sigma(self, t: float) -> float:
        """sigma = (1 - e^{-B}) / e^{-B / 2} = 2 sinh(B / 2)."""
        return -2.0 * math.sinh(math.log(self.scale(t)))

    @property
    def _vp(self) -> VP:
        return VP(self.beta_min, self.beta_max)


@dataclass(frozen=True)
class CosineVP(LinearProcess):
    """Variance preserving, s = cos(pi t / 2), which has a closed form at every t.

    Source: Nichol and Dhariwal 2021 (arXiv:2102.09672), without their offset of .008 at t = 0,
    which keeps beta from being small for steps of finite length.
    """

    def drift(self, t: float) -> float:
        """a = s' / s."""
        return -0.5 * math.pi * math.tan(0.5 * math.pi * t)

    def diffusion(self, t: float) -> float:
        """b^2 = -2 a, as for every variance-preserving process."""
        return math.sqrt(math.pi * math.tan(0.5 * math.pi * t))

    def scale(self, t: float) -> float:
        """s = cos(pi t / 2)."""
        return math.cos(0.5 * math.pi * t)

    def sigma(self, t: float) -> float:
        """sigma = tan(pi t / 2)."""
        return math.tan(0.5 * math.pi * t)

    @property
    def t_end(self) -> float:
        """Just before all signal is gone."""
        return math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class RectifiedFlow(LinearProcess):
    """X_t = (1 - t) x0 + t eps in law. Source: Liu et al. 2023 (2209.03003)."""

    def drift(self, t: float) -> float:
        """a = s' / s."""
        return -1.0 / (1.0 - t)

    def diffusion(self, t: float) -> float:
        """b^2 = s^2 d(sigma^2)/dt = 2 t / (1 - t)."""
        return math.sqrt(2.0 * t / (1.0 - t))

    def scale(self, t: float) -> float:
        """s = 1 - t."""
        return 1.0 - t

    def sigma(self, t: float) -> float:
        """sigma = t / (1 - t)."""
        return t / (1.0 - t)

    @property
    def t_end(self) -> float:
        """Just before all signal is gone."""
        return math.nextafter(1.0, 0.0)


def predict_x0(denoise: Denoiser, process: LinearProcess, X_t: Signal, t: float) -> Signal:
    """E[x0 | X_t] for any linear process, by the one denoiser: D(X_t / s(t); sigma(t)).

    Args:
        denoise: D(x; sigma) at s = 1.
        process: what made X_t.
        X_t: the noisy image at time t, in the process's own scale.
        t: time from 0 to process.t_end, at which there is signal left.

    Returns:
        The estimate of x0, shaped like X_t.

    Raises:
        ValueError: at other times.
    """
    if not 0.0 <= t <= process.t_end:
        raise ValueError(f"no signal is left to predict at time {t}: take 0 to {process.t_end}")
    sigma = torch.full((X_t.shape[0],), process.sigma(t), dtype=X_t.dtype, device=X_t.device)
    return denoise(X_t / process.scale(t), sigma)


def euler_maruyama(process: LinearProcess, x0: Tensor, noise: Tensor, t_end: float) -> Tensor:
    """A path of the SDE by Euler-Maruyama steps, midpoint in time: what the closed forms predict.

    Args:
        process: a(t) and b(t); s and sigma are not used.
        x0: start.
        noise: (steps, *x0.shape) standard normal increments.
        t_end: in (0, 1].

    Returns:
        X at t_end.
    """
    num_steps = noise.shape[0]
    dt = t_end / num_steps
    X = x0.clone()
    for i, eps in enumerate(noise):
        t = (i + 0.5) * dt
        X = X + process.drift(t) * X * dt + process.diffusion(t) * math.sqrt(dt) * eps
    return X
