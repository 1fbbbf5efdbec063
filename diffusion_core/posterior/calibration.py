"""CovProx's inflation, fitted level by level on roll-outs whose truth is known.

A chain's error at a level is not the residual of fresh noise that the covariance table holds, but
larger or smaller by a factor that depends on the operator, the level and the number of levels. With
the truth at hand that factor needs no search over whole chains: the denoiser is called once a
level, and the data step alone is repeated until c is right, before the chain goes on from there.

    mean mode     c minimises the squared error of m, its logarithm averaged over the images
    sample mode   c brings V/B of M samples (uncertainty.py) to 1: at every level of an exact
                  sampler m is a draw of p(x0 | y)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffusion_core.posterior.covprox import Chain
from diffusion_core.protocols import Signal
from diffusion_core.uncertainty import Spread, block_logs, spread

_LN_LEAST, _LN_MOST = math.log(0.1), math.log(100.0)
"""Bounds of ln c."""
_OCTAVE = math.log(2.0)
_CLOSE, _NUM_TRIALS = 0.02, 5
"""Of ln V/B: near enough to 0, and data steps a level at most."""


class NothingOpenError(ValueError):
    """There is no V/B: no pixel is open, or all samples are exact.

    Attributes:
        number: of the roll-out, from 0; None where V/B is of several together.
    """

    def __init__(self, number: int | None = None) -> None:
        which = "" if number is None else f" of image {number + 1}"
        super().__init__(
            f"the data leave nothing{which} open that could be calibrated: no pixel counts as "
            "unknown, or every estimate is exact"
        )
        self.number = number


def _as_it_is(x: Signal) -> Signal:
    return x


@dataclass(frozen=True, eq=False)
class RollOut:
    """Chains of one image, and what they should find.

    Attributes:
        chains: before their first level; one in mean mode, M in sample mode, by other draws.
        truth: x0 as `view` shows it, (b c h w).
        view: of an estimate: the units that errors count in; default network units.
        unknown: True where the data leave a pixel open; None: everywhere.
    """

    chains: Sequence[Chain]
    truth: Signal
    view: Callable[[Signal], Signal] = _as_it_is
    unknown: Bool[Tensor, "b c h w"] | None = None

    @property
    def is_open(self) -> bool:
        """Whether any pixel counts."""
        return self.unknown is None or bool(self.unknown.any())

    def log_error(self, estimates: Sequence[Signal]) -> float:
        """Logarithm of the mean squared error over the pixels that count, mean over the chains."""
        return sum(math.log(max(self._error(m), 1e-30)) for m in estimates) / len(estimates)

    def spread(self, estimates: Sequence[Signal]) -> Spread:
        """V and B of the chains' estimates."""
        samples = torch.stack([self.view(m) for m in estimates])
        return spread(samples, self.truth, self.unknown)

    def block_logs(self, estimates: Sequence[Signal]) -> Float[Tensor, "2 blocks"]:
        """Log variance of the chains and log error, block by block (uncertainty.py)."""
        samples = torch.stack([self.view(m) for m in estimates])
        return block_logs(samples, self.truth, self.unknown)

    def _error(self, m: Signal) -> float:
        error = (self.view(m).double() - self.truth.double()).square()
        if self.unknown is None:
            return float(error.mean())
        unknown = self.unknown.expand_as(error)
        return float((error * unknown).sum() / unknown.sum())


def fit_inflation(rollouts: Sequence[RollOut]) -> list[float]:
    """c of every level, along the levels; the chains end at their last.

    Args:
        rollouts: chains of the same solver settings and number of levels.

    Returns:
        One c a level; the estimates are left in the chains' `m`.

    Raises:
        ValueError: if there is nothing to fit on.
        NothingOpenError: if the data leave no pixel of a roll-out open, or no spread.
    """
    if not rollouts:
        raise ValueError("calibration needs at least one image")
    for number, rollout in enumerate(rollouts):
        if not rollout.is_open:
            raise NothingOpenError(number)
    first = rollouts[0].chains[0]
    choose = _calibrated if first.solver.mode == "sample" else _least_error
    found: list[float] = []
    for level in range(len(first.levels)):
        trial = _Trial(rollouts, level)
        start = found[-1] if found else first.solver.inflation_at(0.0)
        c, estimates = choose(trial, start)
        found.append(c)
        trial.take(estimates)
    return found


Estimates = list[list[Signal]]
"""Of each roll-out, the m of each chain."""


class _Trial:
    """One level of all chains: the denoiser is called once, the data step as often as asked."""

    def __init__(self, rollouts: Sequence[RollOut], level: int) -> None:
        self.rollouts, self._level = rollouts, level
        self._mus = [[chain.denoise(level) for chain in r.chains] for r in rollouts]

    def estimates(self, c: float) -> Estimates:
        pairs = zip(self.rollouts, self._mus, strict=True)
        return [
            [chain.condition(self._level, mu, c) for chain, mu in zip(r.chains, mus, strict=True)]
            for r, mus in pairs
        ]

    def take(self, estimates: Estimates) -> None:
        for rollout, ms in zip(self.rollouts, estimates, strict=True):
            for chain, m in zip(rollout.chains, ms, strict=True):
                chain.advance(self._level, m)


def _least_error(trial: _Trial, start: float) -> tuple[float, Estimates]:
    """The c of least mean log error: octaves downhill, then the vertex of a parabola."""
    known: dict[float, tuple[float, Estimates]] = {}
    origin = math.log(start)

    def loss(octaves: float) -> float:
        if octaves not in known:
            found = trial.estimates(math.exp(origin + octaves * _OCTAVE))
            pairs = zip(trial.rollouts, found, strict=True)
            known[octaves] = sum(r.log_error(ms) for r, ms in pairs) / len(found), found
        return known[octaves][0]

    def allowed(octaves: float) -> bool:
        return _LN_LEAST <= origin + octaves * _OCTAVE <= _LN_MOST

    best: float = 0
    for step in (1, -1):
        while allowed(best + step) and loss(best + step) < loss(best):
            best += step
        if best:
            break
    around = [best - 1, best, best + 1]
    if all(octaves in known for octaves in around):
        best = min(best, best + _vertex([loss(octaves) for octaves in around]), key=loss)
    return math.exp(origin + best * _OCTAVE), known[best][1]


def _vertex(losses: Sequence[float]) -> float:
    """Where the parabola through three losses is least, in steps from the middle one."""
    low, middle, high = losses
    curvature = low - 2 * middle + high
    return 0.5 * (low - high) / curvature if curvature > 0 else 0.0


def _calibrated(trial: _Trial, start: float) -> tuple[float, Estimates]:
    """The c of V/B = 1 over all images."""

    def spread_at(c: float) -> tuple[Spread, Estimates]:
        found = trial.estimates(c)
        parts = [r.spread(ms) for r, ms in zip(trial.rollouts, found, strict=True)]
        for number, part in enumerate(parts):
            if math.isnan(part.ratio):
                raise NothingOpenError(number)
        return sum(parts, Spread()), found

    return match_spread(spread_at, start)


Found = TypeVar("Found")


def match_spread(
    spread_at: Callable[[float], tuple[Spread, Found]], start: float
) -> tuple[float, Found]:
    """The c of V/B = 1, by the secant of ln V/B against ln c, five trials at most.

    Args:
        spread_at: spread at a c, and what else was found there.
        start: the first c to try.

    Returns:
        The best c tried, and what was found there.

    Raises:
        NothingOpenError: if V/B is not a number.
    """
    points: list[tuple[float, float]] = []
    best: tuple[float, float, Found] | None = None
    ln_c = math.log(start)
    while True:
        spread_there, found = spread_at(math.exp(ln_c))
        if math.isnan(spread_there.ratio):
            raise NothingOpenError
        excess = math.log(max(spread_there.ratio, 1e-6))
        points.append((ln_c, excess))
        if best is None or abs(excess) < best[0]:
            best = abs(excess), math.exp(ln_c), found
        following = min(max(ln_c - _secant(points), _LN_LEAST), _LN_MOST)
        if abs(excess) < _CLOSE or len(points) == _NUM_TRIALS or following == ln_c:
            return best[1:]
        ln_c = following


def _secant(points: Sequence[tuple[float, float]]) -> float:
    """How far to go back: by the slope of the last two points, 1 if there is but one."""
    slope = 1.0  # the variance grows as c where the data say nothing
    if len(points) > 1:
        (x0, y0), (x1, y1) = points[-2:]
        slope = min(max((y1 - y0) / (x1 - x0), 0.2), 3.0)
    return min(max(points[-1][1] / slope, -2.0), 2.0)
