"""Draws of q(x) ~ p(y | x) N(x; centre, r^2 I): the data's half of DAPS and of split Gibbs.

Linear operators are drawn exactly, by perturbing and solving: s = centre + r xi, then
x = s + K (y - A s - n') with n' ~ N(0, R). Any differentiable operator is drawn by Langevin
dynamics, in the scheme of Leimkuhler and Matthews, whose stationary law is exact for Gaussians
whatever the step:

    x <- x - h grad U(x) + sqrt(2 h) (xi_k + xi_(k+1)) / 2,  h = step / (1 / r^2 + L)

L is the steepest curvature of the misfit, measured at every draw about its start, and on the way:
an operator may bend more where the chain goes, and a step too long for that would not end. The
chain starts from a draw of N(centre, r^2 I), so that what the data do not see has its law from the
first step on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.gaussian import white_covariance
from diffusion_core.posterior.linear import Accuracy, DataStep
from diffusion_core.posterior.run import (
    LANGEVIN,
    PROBE,
    STATE,
    Counted,
    Start,
    initial_estimate,
    measurement_noise,
)
from diffusion_core.protocols import Data, NoiseModel, NormalDraws, Signal

_POWER_STEPS = 6


@dataclass(frozen=True, eq=False, kw_only=True)
class DataDraws:
    """What DAPS and split Gibbs share: their data's half and its options.

    Attributes:
        prior: of the kriging start; None: from scaled A'y.
        start: "kriging", "scaled-adjoint", "adjoint" or "noise".
        data_draw: "exact" (linear operators), "langevin", or "auto": exact where that can be.
        langevin_steps: of a draw.
        langevin_step: h in units of 1 / (1 / r^2 + L), in (0, 2).
        noise_floor: Langevin raises R to this standard deviation, units of y; > 0.
        tolerance: relative residual of the iterative solves of exact draws.
        max_steps: their CG steps at most.
    """

    prior: CovarianceTable | None = None
    start: Start = "kriging"
    data_draw: Literal["auto", "exact", "langevin"] = "auto"
    langevin_steps: int = 100
    langevin_step: float = 0.5
    noise_floor: float = 0.01
    tolerance: float = 1e-3
    max_steps: int = 100

    def __post_init__(self) -> None:
        if self.data_draw not in {"auto", "exact", "langevin"}:
            raise ValueError(f"data are drawn auto, exact or langevin, not {self.data_draw!r}")
        if self.langevin_steps < 1 or not 0 < self.langevin_step < 2 or self.noise_floor <= 0:
            raise ValueError(
                "Langevin dynamics need langevin_steps >= 1, 0 < langevin_step < 2 and "
                f"noise_floor > 0, not {self.langevin_steps}, {self.langevin_step} and "
                f"{self.noise_floor}"
            )

    def begin(self, calls: Counted, y: Data, noise: NoiseModel) -> tuple[Signal, DataStep | None]:
        """The estimate that the chain starts from, and the data step of exact draws (else None).

        Raises:
            UnsuitedError: if draws shall be exact and the operator is nonlinear.
        """
        step = calls.data_step() if calls.is_linear or self.data_draw == "exact" else None
        accuracy = Accuracy(self.tolerance, self.max_steps)
        x0 = initial_estimate(self.start, self.prior, calls, step, y, noise, accuracy)
        return x0, None if self.data_draw == "langevin" else step

    def draw(
        self,
        calls: Counted,
        step: DataStep | None,
        centre: Signal,
        spread: float,
        y: Data,
        noise: NoiseModel,
        draws: NormalDraws,
        level: int,
    ) -> Signal:
        """A draw of q with r = spread, exact with a data step, by Langevin without.

        Poisson data: R is taken at the centre, or follows the Langevin chain without its gradient.

        Args:
            calls: the operator.
            step: as `begin` gives it.
            centre: of the Gaussian.
            spread: r, its standard deviation.
            y: measurement.
            noise: R.
            draws: keyed noise.
            level: address of the noise; a draw of its own for each.
        """
        s = centre + spread * draws.normal(level, centre, STATE)
        if step is None:
            return self._langevin(calls, s, centre, spread, y, noise, draws, level)
        R = noise.variance(calls.A(centre))
        residual = y - calls.A(s) - measurement_noise(R, draws, level, y)
        accuracy = Accuracy(self.tolerance, self.max_steps)
        return s + step(white_covariance(spread**2, s), R, residual, accuracy).delta

    def _langevin(
        self,
        calls: Counted,
        x: Signal,
        centre: Signal,
        spread: float,
        y: Data,
        noise: NoiseModel,
        draws: NormalDraws,
        level: int,
    ) -> Signal:
        """Langevin dynamics from x."""

        def slope(at: Signal) -> Signal:
            return misfit_gradient(calls, at, y, noise, self.noise_floor)

        probe = draws.normal(0, centre, PROBE)
        L = curvature(slope, centre, spread, probe)
        first = level * (self.langevin_steps + 1)
        before = draws.normal(first, x, LANGEVIN)
        gradient, way = slope(x), torch.zeros_like(x)
        for k in range(self.langevin_steps):
            if k:
                behind, gradient = gradient, slope(x)
                L = torch.maximum(L, _secant(way, gradient - behind))
            after = draws.normal(first + k + 1, x, LANGEVIN)
            h = self.langevin_step / (1.0 / spread**2 + L)
            down = gradient + (x - centre) / spread**2
            way = (0.5 * h).sqrt() * (before + after) - h * down
            x, before = x + way, after
        return x


def _secant(way: Signal, turned: Signal) -> Tensor:
    """Curvature along a way, from how the gradient turned on it; 0 where there was none."""
    squared = (way * way).sum(dim=(1, 2, 3), keepdim=True)
    along = (way * turned).sum(dim=(1, 2, 3), keepdim=True)
    return torch.where(squared > 0, along / squared, 0.0)


def misfit_gradient(
    calls: Counted, x: Signal, y: Data, noise: NoiseModel, noise_floor: float = 0.0
) -> Signal:
    """Gradient of 1/2 |R^(-1/2) (y - A x)|^2, R held at its value for x."""
    return data_and_gradient(calls, x, y, noise, noise_floor)[1]


def data_and_gradient(
    calls: Counted, x: Signal, y: Data, noise: NoiseModel, noise_floor: float = 0.0
) -> tuple[Data, Signal]:
    """A x beside the gradient of the misfit at x."""
    Ax, pull = calls.pullback(x)
    R = noise.variance(Ax).clamp_min(noise_floor**2)
    return Ax, pull((Ax - y) / R)


def curvature(
    gradient: Callable[[Signal], Signal], x: Signal, width: float | Tensor, probe: Signal
) -> Tensor:
    """Largest eigenvalue of a Hessian at x, by power iteration on differences of gradients.

    The differences are `width` wide (root mean square, of all or of each element (b 1 1 1)), which
    is as far as the draw goes: quantisation, flat at a point, shows its slope. One value >= 0 a
    batch element, (b 1 1 1).
    """
    origin, v = gradient(x), probe
    largest = torch.zeros_like(x[:, :1, :1, :1])
    reach = width * math.sqrt(x[0].numel())
    for _ in range(_POWER_STEPS):
        unit = v / _norm(v).clamp_min(1e-30)
        v = (gradient(x + reach * unit) - origin) / reach
        largest = torch.maximum(largest, _norm(v))
    return largest


def _norm(v: Tensor) -> Tensor:
    """Euclidean norm of each batch element, (b 1 1 1)."""
    return v.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
