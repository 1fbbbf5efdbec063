"""The knobs of CovProx's mean mode, and a search that turns one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flows.config import MethodSettings

NUM_KNOTS = 3
MIN_GAIN_DB = 0.02
"""A change of one knob must gain so much to be kept: fewer steps away from what is usual."""

LEAST_INFLATION, MOST_INFLATION = 0.2, 10.0
"""With more the data step is nearly a pseudo-inverse, and its CG comes to the end of its steps
(infra/decisions/0006)."""
LEAST_SIGMA_MAX = 0.5
"""A chain that starts lower gains a little on images like those of the fit, and loses decibels on
one whose start is worse than theirs (infra/decisions/0006)."""


@dataclass(frozen=True)
class Knobs:
    """What is searched in mean mode: see CovProx for inflation, zeta, momentum and local."""

    sigma_max: float
    sigma_min: float
    inflation: tuple[float, ...] = (4.0, 4.0, 4.0)
    zeta: tuple[float, ...] = (0.7, 0.35, 0.0)
    momentum: float = 0.0
    local: bool = True

    @classmethod
    def of(cls, settings: MethodSettings) -> Knobs:
        """The knobs of settings; CovProx's defaults (mean mode) where they say nothing."""
        options = settings.options
        given: dict[str, Any] = {}
        if "inflation" in options:
            given["inflation"] = tuple(map(_bounded, knots_of(options["inflation"])))
        if "zeta" in options:
            given["zeta"] = knots_of(options["zeta"])
        return cls(
            settings.sigma_max,
            settings.sigma_min,
            momentum=float(np.ravel(options.get("momentum", 0.0))[-1]),
            local=bool(options.get("local", True)),
            **given,
        )

    def settings(self, own: MethodSettings, num_levels: int) -> MethodSettings:
        """As settings of a method; what is no knob is the task's own."""
        options = {
            "inflation": [short(c) for c in self.inflation],
            "zeta": [short(z) for z in self.zeta],
            "momentum": [0.0, short(self.momentum)],
            "local": self.local,
        }
        changes = {
            "num_levels": num_levels,
            "sigma_max": short(self.sigma_max),
            "sigma_min": short(self.sigma_min),
            "options": {**own.options, **options},
        }
        return own.model_copy(update=changes)


def climb(start: Knobs, figure: Callable[[Knobs], float], step: float) -> Knobs:
    """One round: move each knob up, else down, and keep the move if it gains."""
    found = start
    for moves in _moves(step):
        for move in moves:
            onward = move(found)
            if onward != found and figure(onward) >= figure(found) + MIN_GAIN_DB:
                found = onward
                break
    return found


Move = Callable[[Knobs], Knobs]


def _moves(step: float) -> Iterator[tuple[Move, Move]]:
    """Pairs of moves, one a knob: the change of inflation as a whole first."""
    last = NUM_KNOTS - 1
    yield _scaled(range(NUM_KNOTS), 2**step), _scaled(range(NUM_KNOTS), 2**-step)
    yield _times("sigma_max", 1.5**step, 3.0), _times("sigma_max", 1.5**-step, LEAST_SIGMA_MAX)
    yield _zeta([last], 0.3 * step), _zeta(range(1, last), -0.3 * step)
    yield _zeta(range(1, last), 0.3 * step), _zeta([last], -0.3 * step)
    yield _scaled([last], 2**-step), _scaled([last], 2**step)
    yield _momentum(0.25 * step), _momentum(-0.25 * step)
    yield _times("sigma_min", 2**-step, 0.004), _times("sigma_min", 2**step, 0.15)
    yield _scaled([0], 2**step), _scaled([0], 2**-step)
    if step >= 1:
        yield _toggled_local, _as_it_is


def _scaled(places: Sequence[int], factor: float) -> Move:
    def move(knobs: Knobs) -> Knobs:
        values = [c * factor if k in places else c for k, c in enumerate(knobs.inflation)]
        return replace(knobs, inflation=tuple(map(_bounded, values)))

    return move


def _bounded(inflation: float) -> float:
    return min(max(inflation, LEAST_INFLATION), MOST_INFLATION)


def _times(name: str, factor: float, bound: float) -> Move:
    limit = min if factor > 1 else max

    def move(knobs: Knobs) -> Knobs:
        value = getattr(knobs, name)
        if limit(value, bound) == bound:  # there, or beyond it as a task's own value may be
            return knobs
        return replace(knobs, **{name: limit(value * factor, bound)})

    return move


def _zeta(places: Sequence[int], change: float) -> Move:
    def move(knobs: Knobs) -> Knobs:
        values = [z + change if k in places else z for k, z in enumerate(knobs.zeta)]
        return replace(knobs, zeta=tuple(min(max(z, 0.0), 1.3) for z in values))

    return move


def _momentum(change: float) -> Move:
    return lambda knobs: replace(knobs, momentum=min(max(knobs.momentum + change, 0.0), 0.9))


def _toggled_local(knobs: Knobs) -> Knobs:
    return replace(knobs, local=not knobs.local)


def _as_it_is(knobs: Knobs) -> Knobs:
    return knobs


def knots_of(values: Any) -> tuple[float, ...]:
    """Values along the chain at NUM_KNOTS places of it."""
    known = np.ravel(values)
    places = np.linspace(0, 1, len(known)), np.linspace(0, 1, NUM_KNOTS)
    return tuple(np.interp(places[1], places[0], known).tolist())


def short(value: float) -> float:
    """Three significant digits: what is stored is what was tried."""
    return float(f"{value:.3g}")
