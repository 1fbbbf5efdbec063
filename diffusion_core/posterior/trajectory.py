"""The way of a restoration along the noise levels: what the denoiser said at each of them.

Every solver asks a denoiser, so a denoiser that looks on shows the way of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from diffusion_core.protocols import Denoiser, Sigma, Signal

T = TypeVar("T")
_SAME_LEVEL = 1e-4
"""Relative difference up to which two levels are one: solvers pass them on in single precision."""


class Recorder(Generic[T]):
    """A denoiser that gives its answers at some levels to `look`, and changes none of them.

    Where a solver asks several times at a level (RePaint repeats them) the last answer counts.

    Attributes:
        seen: level -> what `look` made of D(x; level).
    """

    def __init__(
        self, denoise: Denoiser, levels: Sequence[float], look: Callable[[float, Signal], T]
    ) -> None:
        self._denoise = denoise
        self._levels = tuple(levels)
        self._look = look
        self.seen: dict[float, T] = {}

    def __call__(self, x: Signal, sigma: Sigma) -> Signal:
        """D(x; sigma), as protocols.Denoiser has it."""
        D_x = self._denoise(x, sigma)
        level = self._level(float(sigma.max()))
        if level is not None:
            with torch.no_grad():
                self.seen[level] = self._look(level, D_x.detach())
        return D_x

    def _level(self, sigma: float) -> float | None:
        """Which of the levels it is, if any."""
        same = (s for s in self._levels if math.isclose(s, sigma, rel_tol=_SAME_LEVEL))
        return next(same, None)


def spread_levels(levels: Sequence[float], most: int) -> list[float]:
    """At most so many of the levels, evenly over their number: the first and the last among them.

    Raises:
        ValueError: if fewer than two are asked for.
    """
    if most < 2:
        raise ValueError(f"the first and the last level are two, not {most}")
    if len(levels) <= most:
        return list(levels)
    step = (len(levels) - 1) / (most - 1)
    return [levels[round(i * step)] for i in range(most)]
