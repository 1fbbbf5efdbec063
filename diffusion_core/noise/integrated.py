"""A linear process given by its a(t) and b(t) alone: s and sigma by numerical integration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.integrate import solve_ivp

from diffusion_core.noise.processes import LinearProcess

_RELATIVE, _ABSOLUTE = 1e-11, 1e-14  # of sigma^2: a jump of b from 0 needs some tolerance
_LEAST_STEPS = 1000  # a burst of b shorter than a step may be stepped over


@dataclass(frozen=True)
class Integrated(LinearProcess):
    """dX = a(t) X dt + b(t) dW for any a and b that are finite on [0, t_last].

    (ln s)' = a and (sigma^2)' = (b / s)^2 are solved once, on first use, by an explicit method of
    order 8 with its dense output: sigma is good to 1e-7, absolute or relative, where a and b are
    smooth, and steps shorten by themselves where they are not. What lasts less than 1/1000 of
    t_last may be missed.

    Attributes:
        drift_of: a(t).
        diffusion_of: b(t); only its square matters.
        t_last: last time, in (0, 1]; below 1 where a or b is infinite at 1.

    Source: Hairer, Norsett & Wanner 1993, "Solving Ordinary Differential Equations I", II.5
        (DOP853, as scipy has it).
    """

    drift_of: Callable[[float], float]
    diffusion_of: Callable[[float], float]
    t_last: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.t_last <= 1.0:
            raise ValueError(f"t_last lies in (0, 1], not at {self.t_last}")

    def drift(self, t: float) -> float:
        """a(t)."""
        return self.drift_of(t)

    def diffusion(self, t: float) -> float:
        """b(t)."""
        return self.diffusion_of(t)

    def scale(self, t: float) -> float:
        """s = exp(int a)."""
        return math.exp(self._log_scale_and_variance(t)[0])

    def sigma(self, t: float) -> float:
        """sigma^2 = int b^2 / s^2."""
        return math.sqrt(max(self._log_scale_and_variance(t)[1], 0.0))

    @property
    def t_end(self) -> float:
        """As given."""
        return self.t_last

    def _log_scale_and_variance(self, t: float) -> tuple[float, float]:
        if not 0.0 <= t <= self.t_last:
            raise ValueError(f"the process is given for times from 0 to {self.t_last}, not {t}")
        log_s, variance = self._solution(t)
        return float(log_s), float(variance)

    @cached_property
    def _solution(self) -> Callable[[float], Any]:
        def rates(t: float, state: Any) -> tuple[float, float]:
            return self.drift_of(t), self.diffusion_of(t) ** 2 * math.exp(-2.0 * state[0])

        if not 0.0 < self.t_last <= 1.0 or not np.isfinite(rates(self.t_last, (0.0, 0.0))).all():
            raise ValueError(
                f"a(t) and b(t) must be finite up to t_last = {self.t_last}, in (0, 1]"
            )
        solved = solve_ivp(
            rates,
            (0.0, self.t_last),
            (0.0, 0.0),
            method="DOP853",
            rtol=_RELATIVE,
            atol=_ABSOLUTE,
            max_step=self.t_last / _LEAST_STEPS,
            dense_output=True,
        )
        if not solved.success:
            raise ValueError(f"a(t) and b(t) cannot be integrated: {solved.message}")
        solution: Callable[[float], Any] = solved.sol
        return solution
