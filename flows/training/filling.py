"""Measurements made images by a model that learned from them: the E-step of EM.

    first part    learns from the measured pixels alone (`corruption`); of k-space, sinograms and
                  whatever else is no picture, from a classical method's images (filled_by: tv)
    filling       its posterior mean, given what was measured, stands for what was not
    second part   learns from the whole images (`corruption.filled_by`), and may fill for a third

Only in the second part the network meets images of which nothing is missing, as it will be asked
to restore. Source: expectation maximisation with a diffusion prior is that of Rozet et al. 2024
(arXiv:2405.13712), which draws samples; a mean makes no grain that is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from domains.base import Array, BadInputError, Domain, Item, Measurement, Problem
from domains.registry import domain_names, load_domain

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_core.model import Model
    from flows.config import TrainSettings
    from flows.store import MeasurementEntry

_LEVELS = 6, 0.5, 0.02, 3.0
"""How many, the highest and the lowest, rho."""
_SOLVER: dict[str, Any] = {"tolerance": 5e-3, "max_steps": 40}


class ByModel:
    """Restores what images lack, and images of which something else was measured.

    Args:
        model: with covariance tables.
        calibrated: its solver settings.
    """

    def __init__(self, model: Model, calibrated: dict[str, Any]) -> None:
        self._model, self._calibrated = model, calibrated
        self.digest = model.digest

    def fill(self, view: Array, condition: str, source_digest: str) -> Array:
        """A view (c z h w) in network units with its NaN restored, slice by slice.

        Args:
            view: NaN where nothing was measured.
            condition: of the model.
            source_digest: of the image, which keys the noise.

        Raises:
            BadInputError: if the model does not know the condition.
        """
        import torch

        from diffusion_core.model import BadModelError
        from diffusion_core.noise.draws import KeyedDraws
        from diffusion_core.noise.likelihood import GaussianNoise
        from diffusion_core.noise.schedules import power_sigmas
        from diffusion_core.operators import Mask
        from diffusion_core.posterior import make_solver

        if not np.isnan(view).any():
            return view
        try:
            solver = make_solver("covprox", self._model.prior(condition), _SOLVER)
        except BadModelError as error:
            raise BadInputError(f"the setting 'corruption.filled_by': {error}") from error
        denoise, whole = self._model.denoiser(condition), np.array(view, np.float32)
        for z in range(view.shape[1]):
            y = torch.from_numpy(np.ascontiguousarray(view[:, z], np.float32))[None]
            known = y.isfinite()
            if known.all():
                continue
            if torch.equal(known, known[:, :1].expand_as(known)):
                known = known[:, :1]  # channels that lack the same pixels are solved apart
            draws = KeyedDraws(0, source_digest, (z, 0, 0))
            with torch.no_grad():
                found = solver(
                    denoise, Mask(known), y.nan_to_num(0.0), GaussianNoise(0.0),
                    power_sigmas(*_LEVELS), draws,
                )  # fmt: skip
            whole[:, z] = torch.where(known, y, found.x)[0].numpy()
        return whole

    def restored(self, measurement: Measurement, entry: MeasurementEntry) -> Item:
        """The image of a measurement, slice by slice, by the settings of the task it is most like.

        Raises:
            BadInputError: if the model does not know the condition.
        """
        import torch

        from diffusion_core.model import BadModelError
        from diffusion_core.noise.draws import KeyedDraws
        from diffusion_core.noise.schedules import power_sigmas
        from diffusion_core.posterior import make_solver
        from diffusion_core.protocols import UnsuitedError
        from flows.config import MethodSettings
        from flows.engine.methods import resolve_method, solver_options

        asked = MethodSettings(name="covprox")
        method = resolve_method(asked, entry, self._calibrated, along_z=False)
        sigmas = power_sigmas(method.num_levels, method.sigma_max, method.sigma_min, method.rho)

        def solve(z: int, one: Measurement, problem: Problem) -> Tensor:
            del one
            try:
                prior = self._model.prior(problem.condition)
                denoise = self._model.denoiser(problem.condition)
            except BadModelError as error:
                raise BadInputError(f"the setting 'corruption.filled_by': {error}") from error
            solver = make_solver(method.name, prior, solver_options(method.options))
            draws = KeyedDraws(0, measurement.record.source_digest, (z, 0, 0))
            data = problem.operator, problem.y, problem.noise
            try:
                with torch.no_grad():
                    return solver(denoise, *data, sigmas, draws).x
            except UnsuitedError as error:
                raise BadInputError(f"{entry.item_id}, its '{entry.task}': {error}") from error

        return _restored(measurement, solve)


class ByClassic:
    """A classical method with its frozen parameters, for a first part that nothing was learned for.

    Args:
        name: of the method.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.digest = name

    def restored(self, measurement: Measurement, entry: MeasurementEntry) -> Item:
        """The image of a measurement, by the parameters of the task it is most like.

        Raises:
            BadInputError: if the method has none for such a measurement.
        """
        from flows.engine.methods import baseline_params, frozen_methods, reference_task

        like = reference_task(entry.task, entry.operator, entry.noise)
        known = frozen_methods(like) if like else []
        if like is None or self._name not in known:
            others = f"one of {', '.join(known)}, or " if known else ""
            raise BadInputError(
                f"the setting 'corruption.filled_by': '{self._name}' restores no "
                f"{measurement.operator} of {measurement.record.domain}: name {others}a model"
            )
        method = load_domain(measurement.record.domain).baselines()[self._name]
        params = baseline_params(like, self._name)
        return _restored(measurement, lambda _, one, problem: method(one, problem, params))


Filler: TypeAlias = ByModel | ByClassic


def _restored(
    measurement: Measurement, solve: Callable[[int, Measurement, Problem], Tensor]
) -> Item:
    """(z, measurement of that slice, its problem) -> network units, put together as an item."""
    domain, slices = load_domain(measurement.record.domain), []
    for z in range(measurement.y.shape[0]):
        one = measurement.slices(z, z + 1)
        problem = domain.problem(one)
        slices.append(problem.to_source(solve(z, one, problem)).numpy())
    pixels = np.concatenate(slices).swapaxes(0, 1).astype(np.float32)
    return Item(pixels, replace(measurement.record, dtype="float32"))


def classics() -> list[str]:
    """Names of the classical methods of all domains."""
    domains: list[Domain] = [load_domain(name) for name in domain_names()]
    return sorted({name for domain in domains for name in domain.baselines()})


def filler_of(settings: TrainSettings) -> Filler | None:
    """What fills a training's images; None if nothing does.

    Raises:
        BadInputError: if neither a model nor a classical method is named.
    """
    by = settings.corruption and settings.corruption.filled_by
    return _open(by) if by else None


@lru_cache(maxsize=2)
def _open(path: Path) -> Filler:
    """The filler of a model directory, or of a classical method's name.

    Raises:
        BadInputError: if it is neither.
    """
    from diffusion_core.model import BadModelError, Model, solver_settings

    if str(path) in classics():
        return ByClassic(str(path))
    try:
        model, calibrated = Model.load(path), solver_settings(path)
    except BadModelError as error:
        raise BadInputError(
            f"the setting 'corruption.filled_by' names no model: {error} (nor a classical method: "
            f"{', '.join(classics())})"
        ) from error
    if model.is_distilled:
        raise BadInputError(
            "the setting 'corruption.filled_by' names a distilled model, which is no denoiser: "
            "name the one that it was distilled from"
        )
    return ByModel(model, calibrated)
