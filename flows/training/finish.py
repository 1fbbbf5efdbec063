"""After the last step: covariance tables, figures, the model card, the model directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.api_train import TrainResult
from flows.config import TrainSettings
from flows.engine.events import Event
from flows.training.card import (
    FIGURE_SIDE,
    NOT_TOLD,
    filled_by,
    model_card,
    started_from,
    training_sources,
)
from flows.training.choice import chosen_average
from flows.training.curve import training_curve
from flows.training.data import condition_channels
from flows.training.run_folder import steps_done
from flows.training.validation import (
    calibration_images,
    denoising_psnr,
    validation_guides,
    validation_images,
    without_holes,
)

if TYPE_CHECKING:
    from diffusion_core.networks.precond import Preconditioned
    from diffusion_core.posterior.covariance import CovarianceTable

_FIGURE_SIGMAS = (0.05, 0.1, 0.2, 0.5)
_NUM_FIGURE_IMAGES = 6
_NUM_TABLE_IMAGES, _TABLE_SIDE = 10, 256


def finish(settings: TrainSettings, run: Path, report: Callable[[Event], None]) -> TrainResult:
    """Turn the run's averaged weights into a model directory, registered if the settings say so.

    A model that was made of it before is left as it is, with what `calibrate` gave it since.
    """
    from diffusion_core.model import save_model

    step, path = steps_done(run), run / "model"
    recipe = settings.model_dump(mode="json", exclude=NOT_TOLD)
    made = made_before(path, recipe, step)
    if made is not None:
        return registered(settings, path, *made)
    chosen = chosen_average(settings, run, lambda line: report(Event("finish", 0, 3, line, {})))
    module = chosen.module
    report(Event("finish", 0, 3, "measuring covariance on validation images", {}))

    def warn(line: str) -> None:
        report(Event("warning", 0, 3, line, {}))

    tables = covariance_tables(settings, module, chosen.trained, warn)
    report(Event("finish", 1, 3, "measuring denoising on validation images", {}))
    images = validation_images(settings, _NUM_FIGURE_IMAGES, FIGURE_SIDE)
    images = without_holes(chosen.trained, images)
    metrics = denoising_psnr(module, images, _FIGURE_SIGMAS)
    sources = training_sources(settings)
    curve = training_curve(settings, run, chosen)
    filled = filled_by(settings)
    digest = save_model(
        path,
        module,
        condition_channels(settings),
        tables,
        model_card(settings, chosen, metrics, sources, curve),
        {
            "training": recipe,
            **({"guides": settings.guides} if settings.guides else {}),
            "started_from": started_from(settings),
            **({} if filled is None else {"filled_by": filled}),
            "num_steps": step,
            "average": chosen.name,
            "restoration_scores_db": chosen.scores,
            "curve": curve,
            "sources": sources,
            "validation_psnr": metrics,
        },
    )
    report(Event("finish", 2, 3, f"model {digest[:12]} written", {}))
    result = registered(settings, path, digest, step, metrics)
    report(Event("finish", 3, 3, f"model ready in {path}", {}))
    return result


def made_before(
    path: Path, recipe: dict[str, Any], step: int
) -> tuple[str, int, dict[str, float]] | None:
    """(digest, steps, figures) of a whole model of this recipe and step; None if there is none."""
    from diffusion_core.model import BadModelError, model_digest

    try:
        digest = model_digest(path)
    except (BadModelError, OSError):
        return None
    config = json.loads((path / "config.json").read_text())
    defaults = TrainSettings.model_construct()  # type: ignore[call-arg]  # fields with defaults
    known = {**defaults.model_dump(mode="json", include=set(recipe)), **config.get("training", {})}
    if (known, config.get("num_steps")) != (recipe, step):
        return None
    return digest, step, config["validation_psnr"]


def registered(
    settings: TrainSettings, path: Path, digest: str, step: int, metrics: dict[str, float]
) -> TrainResult:
    """The result of a run whose model is written, registered if the settings say so."""
    from flows.registry import register_model

    versions: dict[str, str] = {}
    if settings.register_as:
        versions = register_model(path, settings.register_as, metrics=metrics)
    return TrainResult(path, digest, step, metrics, versions)


def covariance_tables(
    settings: TrainSettings,
    module: Preconditioned,
    trained: Preconditioned,
    warn: Callable[[str], None],
) -> dict[str, CovarianceTable]:
    """The covariance table of each condition, from validation images, at the network's best.

    Where there are none, training images stand in: their residuals flatter the network a little,
    and without a table no solver but diffpir and dds could use the model. Of a condition with
    guides a second one, of the validation images that have some, shown them.

    Args:
        settings: name the images.
        module: that is shipped.
        trained: what fills images that lack pixels.
        warn: told of conditions without a validation image.
    """
    from diffusion_core.model import GUIDED
    from diffusion_core.networks.precond import CarryingDenoiser, ConditionedDenoiser, guided
    from diffusion_core.noise.draws import KeyedDraws
    from diffusion_core.posterior.covariance import fit_covariance

    tables = {}
    images = validation_images(settings, _NUM_TABLE_IMAGES, _TABLE_SIDE)
    if settings.guides:
        guides = validation_guides(settings, _NUM_TABLE_IMAGES, _TABLE_SIDE)
        for index, (condition, chosen) in enumerate(images.items()):
            seen = [i for i, shown in enumerate(guides[condition]) if shown.isfinite().any()]
            if seen and condition in settings.guides:
                carrying = CarryingDenoiser(module, index, chosen[0].shape[1])
                tables[f"{condition}{GUIDED}"] = fit_covariance(
                    [guided(carrying, guides[condition][i]) for i in seen],
                    [chosen[i] for i in seen],
                    lambda number: KeyedDraws(settings.seed, f"covariance-{number}"),
                )
    for condition, more in calibration_images(settings).items():
        images[condition] = images[condition] + more
    if bare := [condition for condition, found in images.items() if not found]:
        warn(f"no validation image for {', '.join(bare)}: covariance measured on training images")
        learned = validation_images(settings, _NUM_TABLE_IMAGES, _TABLE_SIDE, learned=True)
        images = {condition: found or learned[condition] for condition, found in images.items()}
    images = without_holes(trained, images)
    for index, (condition, chosen) in enumerate(images.items()):
        if not chosen:
            continue
        denoise = ConditionedDenoiser(module, index, chosen[0].shape[1])
        tables[condition] = fit_covariance(
            denoise, chosen, lambda number: KeyedDraws(settings.seed, f"covariance-{number}")
        )
    return tables
