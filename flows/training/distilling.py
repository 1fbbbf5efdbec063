"""What a distillation is made of: measured patches, the objective, the student's directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import Domain
from flows.api_train import TrainResult
from flows.config import DistillSettings, OperatorSettings, TrainSettings
from flows.engine.events import Event

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_core.networks.precond import Preconditioned
    from diffusion_core.posterior.distilled import Distilled
    from diffusion_core.training.distil import Measure
    from diffusion_core.training.loss import Objective
    from diffusion_core.training.patches import PatchSource

_TRAINING_ACCURACY: Mapping[str, Any] = {"tolerance": 1e-2, "start_tolerance": 1e-3}
"""Of the linear solves on patches, which are small: a data step takes 10 steps of CG and less."""
_NUM_FIGURE_IMAGES, _FIGURE_SIDE = 4, 96
_SEED = 11
"""Of the figures' measurements: the same for all students."""


def settings_of(values: Mapping[str, Any]) -> TrainSettings:
    """The settings of a worker's payload, of a training or a distillation."""
    kind = DistillSettings if "operators" in values else TrainSettings
    return kind(**values)


def measured(settings: TrainSettings, patches: PatchSource) -> PatchSource:
    """The patches as they are; for a distillation, measured."""
    if not isinstance(settings, DistillSettings):
        return patches
    from diffusion_core.training.distil import MeasuredPatches

    solvers = list(_solvers(settings, _TRAINING_ACCURACY).values())
    return MeasuredPatches(patches, _measure(settings), solvers, settings.seed)


def objective_of(settings: TrainSettings) -> Objective:
    """What is to fall."""
    from diffusion_core.training.distil import DistillationLoss
    from diffusion_core.training.loss import denoising_loss

    if not isinstance(settings, DistillSettings):
        return denoising_loss
    return DistillationLoss(settings.levels, settings.consistency)


def check_operators(settings: DistillSettings) -> None:
    """Measure an empty patch by every operator: a wrong parameter is told before Ray starts.

    Raises:
        BadInputError: if one cannot be used.
    """
    import torch

    from flows.training.data import condition_channels, condition_domains

    channels, domains = condition_channels(settings), condition_domains()
    for condition, count in channels.items():
        x0 = torch.zeros(1, count, settings.patch_size, settings.patch_size)
        for operator in settings.operators[condition]:
            rng = np.random.default_rng(0)
            domains[condition].measure_patch(x0, operator.kind, operator.params, rng)


def student_options(settings: DistillSettings) -> dict[str, Any]:
    """Options of the solver `distilled` that a student is trained for, JSON-able."""
    inflation = settings.inflation
    return {
        "levels": list(settings.levels),
        "inflation": inflation[0] if len(inflation) == 1 else list(inflation),
        "final_data_step": settings.final_data_step,
    }


def finish_student(
    settings: DistillSettings, run: Path, report: Callable[[Event], None]
) -> TrainResult:
    """Turn the run's averaged weights into a distilled model's directory."""
    from diffusion_core.model import DISTILLED, save_model
    from flows.training.card import NOT_TOLD, started_from, student_card, training_sources
    from flows.training.choice import chosen_average
    from flows.training.data import condition_channels
    from flows.training.finish import made_before, registered
    from flows.training.run_folder import steps_done

    step, path = steps_done(run), run / "model"
    recipe = settings.model_dump(mode="json", exclude=NOT_TOLD)
    made = made_before(path, recipe, step)
    if made is not None:
        return registered(settings, path, *made)
    chosen = chosen_average(settings, run)
    report(Event("finish", 0, 2, "measuring on validation crops", {}))
    metrics = restoration_figures(settings, chosen.module)
    solvers = _solvers(settings, {})
    sources = training_sources(settings)
    digest = save_model(
        path,
        chosen.module,
        condition_channels(settings),
        {condition: solver.prior for condition, solver in solvers.items()},
        student_card(settings, step, metrics, sources),
        {
            DISTILLED: student_options(settings),
            "training": recipe,
            "started_from": started_from(settings),
            "num_steps": step,
            "sources": sources,
            "validation_psnr": metrics,
        },
    )
    report(Event("finish", 2, 2, f"model ready in {path}, digest {digest[:12]}", {}))
    return registered(settings, path, digest, step, metrics)


def restoration_figures(settings: DistillSettings, module: Preconditioned) -> dict[str, float]:
    """PSNR in dB on validation crops: {"mri/fourier/0": 21.0, "mri/fourier/1": ...}.

    By condition, kind of operator and evaluations; 0 is the start, which needs no network. Network
    units span 2, nothing is clipped.
    """
    import torch

    from diffusion_core.networks.student import StudentDenoiser
    from flows.training.validation import validation_images

    figures: dict[str, float] = {}
    images = validation_images(settings, _NUM_FIGURE_IMAGES, _FIGURE_SIDE)
    solvers = _solvers(settings, {})
    for index, (condition, found) in enumerate(images.items()):
        for operator in settings.operators[condition] if found else ():
            denoise = StudentDenoiser(module, index, found[0].shape[1])
            totals = np.zeros(len(settings.levels) + 1)
            for number, x0 in enumerate(found):
                one = settings.model_copy(update={"operators": {condition: [operator]}})
                with torch.no_grad():
                    totals += _figures_of(one, condition, solvers[condition], denoise, x0, number)
            for count, total in enumerate(totals / len(found)):
                figures[f"{condition}/{operator.kind}/{count}"] = round(float(total), 3)
    return figures


def _figures_of(
    settings: DistillSettings,
    condition: str,
    solver: Distilled,
    denoise: Any,
    x0: Tensor,
    number: int,
) -> np.ndarray[Any, Any]:
    """PSNR of an image's start, and after each number of evaluations."""
    import torch

    from diffusion_core.noise.draws import KeyedDraws
    from diffusion_core.posterior.distilled import DataTerm
    from diffusion_core.posterior.run import Counted

    rng = np.random.Generator(np.random.Philox(key=[_SEED, number]))
    operator, y, noise = _measure(settings)(condition, x0, rng)
    draws = KeyedDraws(_SEED, f"figure-{number}")
    found = [DataTerm(solver, Counted(denoise, operator), y, noise, draws).start]
    for count in range(1, len(settings.levels) + 1):
        sigmas = torch.tensor(settings.levels[:count])
        found.append(solver(denoise, operator, y, noise, sigmas, draws).x)
    return np.array([10 * np.log10(4 / float((x - x0).square().mean())) for x in found])


def _measure(settings: DistillSettings) -> Measure:
    """Draws one of a condition's operators by weight, and lets its domain measure by it."""
    from flows.training.data import condition_domains

    domains: Mapping[str, Domain] = condition_domains()

    def measure(condition: str, x0: Tensor, rng: np.random.Generator) -> Any:
        operators: list[OperatorSettings] = settings.operators[condition]
        weights = np.array([operator.weight for operator in operators])
        chosen = operators[int(rng.choice(len(operators), p=weights / weights.sum()))]
        return domains[condition].measure_patch(x0, chosen.kind, chosen.params, rng)

    return measure


def _solvers(settings: DistillSettings, accuracy: Mapping[str, Any]) -> dict[str, Distilled]:
    """Condition -> the chain that its student learns, with the teacher's table."""
    from diffusion_core.model import Model
    from diffusion_core.posterior.distilled import Distilled
    from flows.api_train import resolved

    teacher = resolved(settings).init_from
    if teacher is None:
        raise TypeError("a distillation has a teacher")
    model = Model.load(teacher)
    options = student_options(settings)
    return {c: Distilled(prior=model.prior(c), **options, **accuracy) for c in settings.conditions}
