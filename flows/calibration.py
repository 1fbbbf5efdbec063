"""Search CovProx's settings on images whose truth is known: what `sashiko calibrate` does.

    mean mode     inflation level by level (diffusion_core.posterior.calibration), reduced to a few
                  knots; from there knob by knob, keeping what raises the mean PSNR of whole chains
    sample mode   inflation to V/B = 1, level by level, or one for the chain; levels as they are

The keyed noise is the same in every trial, so that settings differ by what they do, not by luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.posterior import make_solver
from diffusion_core.posterior.calibration import RollOut, fit_inflation, match_spread
from diffusion_core.posterior.covprox import Chain, CovProx
from diffusion_core.uncertainty import Spread, correlation
from flows.config import MethodSettings
from flows.engine.methods import solver_options
from flows.knobs import LEAST_INFLATION, MOST_INFLATION, NUM_KNOTS, Knobs, climb, knots_of, short

if TYPE_CHECKING:
    from diffusion_core.model import Model
    from flows.tune import Case

Report = Callable[[str], None]

NUM_SAMPLES = 6
"""Chains an image in sample mode."""
MOST_SAMPLE_INFLATION = 10.0
"""A greater c at a level tells that widening the samples there did not make V/B 1."""
ONE_INFLATION = 3.0
"""Where the search for one c for the whole chain begins."""
SAMPLE_ACCURACY: Mapping[str, Any] = {"tolerance": 1e-3, "max_steps": 200}
"""Of the linear solves: a draw begins far from the data, and has that much further to go."""
SAMPLE_SIGMA_MIN = 0.05
"""A sample's last level lies no higher, though a mean need not go so far (denoising)."""
PROTOTYPE: Mapping[str, Any] = {"sigma_max": 0.5, "sigma_min": 0.05, "rho": 3.0}
"""Fixed levels of the prototype, with these options; what a fit is held against."""
PROTOTYPE_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "mean": {"inflation": 4.0, "zeta": 1.0},
    "sample": {"inflation": 1.5, "zeta": 1.0},
}


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        settings: of the method.
        figures: what it reached on the calibration images.
    """

    settings: MethodSettings
    figures: Mapping[str, float]


class Bench:
    """Chains of a task's calibration images, begun anew for every trial."""

    def __init__(self, model: Model, cases: Sequence[Case], region: str) -> None:
        self._model, self._cases, self._region = model, list(cases), region
        self._parts: dict[str, tuple[Any, Any]] = {}

    def roll_outs(self, settings: MethodSettings, num_samples: int = 1) -> list[RollOut]:
        """Chains before their first level; `num_samples` an image, by other seeds."""
        sigmas = power_sigmas(
            settings.num_levels, settings.sigma_max, settings.sigma_min, settings.rho
        )
        return [self._roll_out(case, settings, sigmas, num_samples) for case in self._cases]

    def run(self, settings: MethodSettings, num_samples: int = 1) -> list[RollOut]:
        """Whole chains: the estimates are in their `m`."""
        rollouts = self.roll_outs(settings, num_samples)
        for rollout in rollouts:
            for chain in rollout.chains:
                _run(chain)
        return rollouts

    def psnr(self, settings: MethodSettings) -> float:
        """Mean PSNR over the images, in dB, of one chain an image."""
        return float(np.mean([psnr_of(rollout) for rollout in self.run(settings)]))

    def _roll_out(
        self, case: Case, settings: MethodSettings, sigmas: Tensor, num_samples: int
    ) -> RollOut:
        problem = case.problem
        denoise, prior = self._of(problem.condition)
        solver = make_solver(settings.name, prior, solver_options(settings.options))
        if not isinstance(solver, CovProx):
            raise TypeError("only covprox is calibrated")
        chains = [
            Chain(
                solver,
                denoise,
                problem.operator,
                problem.y,
                problem.noise,
                sigmas,
                KeyedDraws(seed, case.truth.record.source_digest, (0, 0, 0)),
            )
            for seed in range(num_samples)
        ]
        offset, gain = case.domain.unit_scale(case.truth.pixels, case.truth.record)
        truth = (_image(case.truth.pixels) - offset) * gain
        counted = case.hole is not None and (self._region == "hole" or num_samples > 1)
        unknown = _image(case.hole).bool().expand_as(truth) if counted else None
        return RollOut(chains, truth, lambda m: (problem.to_source(m) - offset) * gain, unknown)

    def _of(self, condition: str) -> tuple[Any, Any]:
        if condition not in self._parts:
            parts = self._model.denoiser(condition), self._model.prior(condition)
            self._parts[condition] = parts
        return self._parts[condition]


def fit_mean(
    bench: Bench,
    own: MethodSettings,
    num_levels: int,
    start: Knobs | None = None,
    report: Report | None = None,
) -> tuple[Knobs, Fit]:
    """Settings of best mean PSNR.

    Args:
        bench: the images.
        own: the task's settings: where the search begins, and what is no knob.
        num_levels: evaluations of the network.
        start: knobs found for another number of levels: then one fine round is enough.
        report: told of each trial.
    """
    known: dict[Knobs, float] = {}

    def figure(knobs: Knobs) -> float:
        if knobs not in known:
            known[knobs] = bench.psnr(knobs.settings(own, num_levels))
            if report is not None:
                report(f"{num_levels} levels {asdict(knobs)}: {known[knobs]:.3f} dB")
        return known[knobs]

    found = start or max(_first(bench, own, num_levels), Knobs.of(own), key=figure)
    for step in (0.5,) if start else (1.0, 0.5):
        found = climb(found, figure, step)
    settings = found.settings(own, num_levels)
    figures = {
        "psnr_db": round(figure(found), 3),
        "psnr_task_file_db": round(
            bench.psnr(own.model_copy(update={"num_levels": num_levels})), 3
        ),
        "psnr_prototype_db": round(bench.psnr(prototype(own, num_levels, "mean")), 3),
    }
    return found, Fit(settings, figures)


def fit_sample(
    bench: Bench, own: MethodSettings, num_levels: int, num_samples: int = NUM_SAMPLES
) -> Fit:
    """Settings whose samples have V/B = 1, pooled over the images: at every level if that can be.

    Sigma is local (S), and its size follows each image's own misfit (CovProx.adapt). Where the
    start is far off (a complex image of unknown phase) its bias is in all samples of the first
    levels, and to widen them there ruins the chain: then one c makes V/B = 1 at the end.
    """
    options = {**SAMPLE_ACCURACY, "mode": "sample", "zeta": 1.0, "momentum": 0.0}
    options |= {"local": True, "adapt": True}
    sigma_min = min(own.sigma_min, SAMPLE_SIGMA_MIN)
    levels = {"num_levels": num_levels, "sigma_min": sigma_min}
    base = own.model_copy(update={**levels, "options": options})
    rollouts = bench.roll_outs(base, num_samples)
    inflation = fit_inflation(rollouts)
    if max(inflation) > MOST_SAMPLE_INFLATION:
        one, rollouts = match_spread(
            lambda c: _spread_of_chains(bench, _inflated(base, [c]), num_samples), ONE_INFLATION
        )
        inflation = [one]
    spreads = [spread_of(rollout) for rollout in rollouts]
    each = [part.ratio for part in spreads]
    figures = {
        "v_over_b": sum(spreads, Spread()).ratio,
        "least_v_over_b": min(each),
        "greatest_v_over_b": max(each),
        "log_correlation": log_correlation_of(rollouts),
    }
    rounded = {name: round(value, 3) for name, value in figures.items()}
    return Fit(_inflated(base, inflation), rounded)


def _inflated(settings: MethodSettings, inflation: Sequence[float]) -> MethodSettings:
    options = {**settings.options, "inflation": [short(c) for c in inflation]}
    return settings.model_copy(update={"options": options})


def _spread_of_chains(
    bench: Bench, settings: MethodSettings, num_samples: int
) -> tuple[Spread, list[RollOut]]:
    rollouts = bench.run(settings, num_samples)
    return sum((spread_of(rollout) for rollout in rollouts), Spread()), rollouts


def prototype(own: MethodSettings, num_levels: int, mode: str) -> MethodSettings:
    """The fixed settings that a fit is held against; the accuracy of the solves is the task's."""
    accuracy = {k: v for k, v in own.options.items() if k in _ACCURACY}
    options = {**accuracy, "mode": mode, **PROTOTYPE_OPTIONS[mode]}
    return own.model_copy(update={**PROTOTYPE, "num_levels": num_levels, "options": options})


_FULL_AT_FIRST = (1.0, 0.5, 0.0)
"""Zeta while the inflation is fitted level by level."""
_ACCURACY = frozenset({"tolerance", "max_steps"})


def _first(bench: Bench, own: MethodSettings, num_levels: int) -> Knobs:
    """The task's own settings with the inflation fitted level by level."""
    begun = replace(Knobs.of(own), inflation=(1.0,) * NUM_KNOTS, zeta=_FULL_AT_FIRST)
    inflation = fit_inflation(bench.roll_outs(begun.settings(own, num_levels)))
    bounded = np.clip(inflation, LEAST_INFLATION, MOST_INFLATION)
    return replace(begun, inflation=tuple(np.exp(knots_of(np.log(bounded))).tolist()))


def psnr_of(rollout: RollOut) -> float:
    """PSNR of an image's chains, mean over them, in dB; before clipping."""
    return -10.0 / math.log(10.0) * rollout.log_error([chain.m for chain in rollout.chains])


def spread_of(rollout: RollOut) -> Spread:
    """V and B of an image's chains."""
    return rollout.spread([chain.m for chain in rollout.chains])


def log_correlation_of(rollouts: Sequence[RollOut]) -> float:
    """Log-correlation of block variance with block error, over the blocks of all images."""
    logs = [r.block_logs([chain.m for chain in r.chains]) for r in rollouts]
    value = correlation(torch.cat(logs, dim=1))
    return value if math.isfinite(value) else 0.0


def _run(chain: Chain) -> None:
    for level in range(len(chain.levels)):
        chain.advance(level, chain.condition(level, chain.denoise(level)))


def _image(pixels: Any) -> Tensor:
    """(c z h w) -> (z c h w) float64."""
    return torch.from_numpy(np.array(pixels, dtype=np.float64).swapaxes(0, 1).copy())
