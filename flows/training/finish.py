"""After the last step: covariance tables, figures, the model card, the model directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.api_train import TrainResult, allowed, condition_channels, new_network, recipe_of
from flows.config import TrainSettings
from flows.engine.events import Event
from flows.training.validation import calibration_images, denoising_psnr, validation_images

if TYPE_CHECKING:
    from diffusion_core.networks.precond import Preconditioned
    from diffusion_core.posterior.covariance import CovarianceTable

_FIGURE_SIGMAS = (0.05, 0.1, 0.2, 0.5)
_NUM_FIGURE_IMAGES, _FIGURE_SIDE = 6, 192
_NUM_TABLE_IMAGES, _TABLE_SIDE = 10, 256


def finish(settings: TrainSettings, run: Path, report: Callable[[Event], None]) -> TrainResult:
    """Turn the newest checkpoint into a model directory, registered if the settings ask for it.

    A model that was made of it before is left as it is, with what `calibrate` gave it since.
    """
    from diffusion_core.model import save_model

    step, module = averaged_model(settings, run)
    path = run / "model"
    recipe = settings.model_dump(
        mode="json", exclude={"data", "output", "compute", "init_from", "extra_samples"}
    )
    made = _made_before(path, recipe, step)
    if made is not None:
        return _registered(settings, path, *made)
    module.eval()
    report(Event("finish", 0, 3, "measuring covariance on validation images", {}))
    tables = covariance_tables(settings, module)
    report(Event("finish", 1, 3, "measuring denoising on validation images", {}))
    images = validation_images(settings, _NUM_FIGURE_IMAGES, _FIGURE_SIDE)
    metrics = denoising_psnr(module, images, _FIGURE_SIGMAS)
    sources = training_sources(settings)
    digest = save_model(
        path,
        module,
        condition_channels(settings),
        tables,
        model_card(settings, step, metrics, sources),
        {
            "training": recipe,
            "started_from": started_from(settings),
            "num_steps": step,
            "sources": sources,
            "validation_psnr": metrics,
        },
    )
    report(Event("finish", 2, 3, f"model {digest[:12]} written", {}))
    result = _registered(settings, path, digest, step, metrics)
    report(Event("finish", 3, 3, f"model ready in {path}", {}))
    return result


def _made_before(
    path: Path, recipe: dict[str, Any], step: int
) -> tuple[str, int, dict[str, float]] | None:
    """(digest, steps, figures) of a whole model of this recipe and step; None if there is none."""
    from diffusion_core.model import BadModelError, model_digest

    try:
        digest = model_digest(path)
    except (BadModelError, OSError):
        return None
    config = json.loads((path / "config.json").read_text())
    if (config.get("training"), config.get("num_steps")) != (recipe, step):
        return None
    return digest, step, config["validation_psnr"]


def _registered(
    settings: TrainSettings, path: Path, digest: str, step: int, metrics: dict[str, float]
) -> TrainResult:
    from flows.registry import register_model

    versions: dict[str, str] = {}
    if settings.register_as:
        versions = register_model(path, settings.register_as, metrics=metrics)
    return TrainResult(path, digest, step, metrics, versions)


def averaged_model(settings: TrainSettings, run: Path) -> tuple[int, Preconditioned]:
    """(steps done, averaged weights) of the newest checkpoint.

    Raises:
        FileNotFoundError: if there is none.
    """
    from safetensors.torch import load_file

    from diffusion_core.training.checkpoint import latest_checkpoint

    found = latest_checkpoint(run / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet: train first")
    module = new_network(settings)
    module.load_state_dict(load_file(found / "ema.safetensors"))
    step = json.loads((found / "state.json").read_text())["step"]
    return step, module.requires_grad_(requires_grad=False)


def covariance_tables(
    settings: TrainSettings, module: Preconditioned
) -> dict[str, CovarianceTable]:
    """The covariance table of each condition, from validation images, at the network's best."""
    from diffusion_core.networks.precond import ConditionedDenoiser
    from diffusion_core.noise.draws import KeyedDraws
    from diffusion_core.posterior.covariance import fit_covariance

    tables = {}
    images = validation_images(settings, _NUM_TABLE_IMAGES, _TABLE_SIDE)
    for condition, more in calibration_images(settings).items():
        images[condition] = images[condition] + more
    for index, (condition, chosen) in enumerate(images.items()):
        if not chosen:
            continue
        denoise = ConditionedDenoiser(module, index, chosen[0].shape[1])
        tables[condition] = fit_covariance(
            denoise, chosen, lambda number: KeyedDraws(settings.seed, f"covariance-{number}")
        )
    return tables


def started_from(settings: TrainSettings) -> str | None:
    """Digest of the model whose weights the run began with."""
    from diffusion_core.model import model_digest

    return model_digest(settings.init_from) if settings.init_from else None


def training_sources(settings: TrainSettings) -> list[dict[str, Any]]:
    """What the model learned from and was measured on: label, digest, licence, split."""
    from flows.store import Dataset

    return [
        {
            "item": record.item_id,
            "domain": record.domain,
            "split": record.split,
            "group": record.group,
            "licence": record.licence,
            "source_sha256": record.source_digest,
            "shape_czhw": list(record.shape),
        }
        for path in settings.data
        for record in Dataset(path).items()
        if record.split in ("train", "validation") and allowed(record.meta, settings)
    ]


def _began(settings: TrainSettings) -> str:
    digest = started_from(settings)
    return f"The weights began as those of model {digest[:12]}." if digest else ""


def _calibrated(settings: TrainSettings) -> str:
    items = ", ".join(settings.calibration_items)
    return (
        f"""
The covariance tables were measured on validation images and on slices of {items}, which the
network also learned from: validation scans of the same resolution were not to be had.
"""
        if items
        else ""
    )


def model_card(
    settings: TrainSettings,
    step: int,
    metrics: dict[str, float],
    sources: list[dict[str, Any]],
) -> str:
    """The model card in Markdown."""
    recipe = recipe_of(settings)
    megapixels = step * settings.batch_size * settings.patch_size**2 / 1e6
    figures = "\n".join(f"| {name} | {value:.2f} |" for name, value in metrics.items())
    data = "\n".join(
        f"| {s['item']} | {s['domain']} | {s['split']} | {s['licence'] or 'not stated'} "
        f"| {s['source_sha256'][:12]} |"
        for s in sources
    )
    return f"""# Model card: {settings.name}

A denoiser D(x; sigma) for {", ".join(settings.conditions)}: one local U-Net for all of them.
Made by `sashiko train` with the settings in config.json ("training").

## Recipe

{step} steps of {settings.batch_size} patches of {settings.patch_size}^2: {megapixels:.0f} MP;
Muon on convolutions at {recipe.learning_rate:g}, AdamW on the rest at
{recipe.learning_rate * recipe.adamw_ratio:g}, held and then brought to 0 over the last
{recipe.decay_share:.0%}; averaged weights (decay {recipe.ema_decay:g}); ln sigma ~
N({settings.ln_sigma_mean:g}, {settings.ln_sigma_std:g}^2) with {settings.uniform_share:.0%}
log-uniform over {settings.sigma_range}; seed {settings.seed}.
{_began(settings)}

## Denoising on validation images

PSNR in dB (network units span 2), mean over centre crops of up to {_FIGURE_SIDE}^2.

| condition / sigma | dB |
|---|---|
{figures}

## Data and licences

| item | domain | split | licence | sha256 |
|---|---|---|---|---|
{data}
{_calibrated(settings)}
## Intended use

Restoring under-measured or damaged images of the kinds above, with a person who looks at the
result. Restored pixels are estimates, not measurements: outputs carry this model's digest and
the residual against what was measured.

## Limits

Few sources: with one or two people a modality, no figure here speaks of differences between
patients. Contrasts, scanners, resolutions and scenes unlike those above are untested. Holes
wider than about 100 pixels are beyond the network's reach.

## Not for

Diagnosis or treatment decisions from restored images alone; identifying people; evidence.
"""
