"""What a model says of itself: sources, licences, recipe, figures, limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flows.api_train import recipe_of
from flows.config import DistillSettings, TrainSettings
from flows.training.data import allowed
from flows.training.filling import ByModel, filler_of
from flows.training.sources import open_sources

if TYPE_CHECKING:
    from flows.training.choice import Choice

FIGURE_SIDE = 192
"""Of the crops that denoising is measured on, pixels."""
MOST_CURVE_ROWS = 16
NOT_TOLD: dict[str, Any] = {
    **dict.fromkeys(("data", "output", "compute", "init_from", "extra_samples"), True),
    "corruption": {"filled_by"},
}
"""Settings that a model does not tell: paths; digests tell what lay there."""


def started_from(settings: TrainSettings) -> str | None:
    """Digest of the model whose weights the run began with."""
    from diffusion_core.model import model_digest

    return model_digest(settings.init_from) if settings.init_from else None


def filled_by(settings: TrainSettings) -> str | None:
    """What restored what the training images lack: a model's digest, or a classical method."""
    filler = filler_of(settings)
    return None if filler is None else filler.digest


def training_sources(settings: TrainSettings) -> list[dict[str, Any]]:
    """What the model learned from and was measured on: label, digest, licence, split."""
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
        for source in open_sources(settings, filled=False)
        for record in source.items()
        if record.split in ("train", "validation") and allowed(record.meta, settings)
    ]


def _began(settings: TrainSettings) -> str:
    digest = started_from(settings)
    return f"The weights began as those of model {digest[:12]}." if digest else ""


def _filled(settings: TrainSettings) -> str:
    """What stands for pixels that were never measured."""
    if settings.hidden_share is not None:
        return "No whole image was seen: pixels that were not measured were never learned from.\n"
    filler = filler_of(settings)
    if filler is None:
        return ""
    by = f"model {filler.digest[:12]}" if isinstance(filler, ByModel) else f"'{filler.digest}'"
    return (
        f"What was not measured of the training images was restored by {by}, and learned from as "
        "if it had been measured.\n"
    )


def _guided(settings: TrainSettings) -> str:
    """Which guides it was shown, and how often not."""
    told = "; ".join(f"{', '.join(names)} with {c}" for c, names in settings.guides.items())
    dropped = f"each dropped in {settings.guide_drop_share:.0%} of the samples"
    return f"Shown as guides: {told}, {dropped}.\n" if told else ""


def _averaged(settings: TrainSettings, chosen: Choice) -> str:
    """Which average of the weights this is."""
    kind, _, figure = chosen.name.rpartition("-")
    if kind == "length":
        return f"weights averaged by a power function of length {figure} of the run"
    when = f", of step {figure}" if kind == "best-step" else ""
    return f"averaged weights (decay {settings.ema_decay:g}){when}"


def _levels(settings: TrainSettings) -> str:
    """The density of the noise levels."""
    if settings.level_mass:
        return f"ln sigma by {len(settings.level_mass)} bins over {settings.sigma_range}"
    return (
        f"ln sigma ~ N({settings.ln_sigma_mean:g}, {settings.ln_sigma_std:g}^2) with "
        f"{settings.uniform_share:.0%} log-uniform over {settings.sigma_range}"
    )


def _scores(chosen: Choice) -> str:
    """The candidates that the weights were chosen from."""
    if not chosen.scores:
        return ""
    rows = "\n".join(f"| {name} | {db:.2f} |" for name, db in chosen.scores.items())
    return f"""
Chosen by the mean PSNR of short restorations of validation crops (70% of pixels missing, 4 x 4
pooling): {chosen.name}.

| averaged weights | dB |
|---|---|
{rows}
"""


def _curve(curve: dict[str, Any]) -> str:
    """Some rows of training_curve's, the first and the last among them."""
    points = curve.get("points", [])
    if not points:
        return ""
    stride = max(-(-(len(points) - 1) // (MOST_CURVE_ROWS - 1)), 1)
    shown = [*points[:-1:stride], points[-1]]
    rows = "\n".join(
        f"| {p['megapixels']:.0f} | {p['hours']:.2f} | {p['score_db']:.2f} |" for p in shown
    )
    return f"""
## Restoration against training

Mean PSNR of short restorations of validation crops (70% of pixels missing, 4 x 4 pooling) by the
averaged weights of that moment; hours of one training job, scores and start left out.

| MP seen | hours | dB |
|---|---|---|
{rows}
"""


def _calibrated(settings: TrainSettings, sources: list[dict[str, Any]]) -> str:
    """Where the covariance tables come from, but for validation images."""
    items, told = ", ".join(settings.calibration_items), ""
    if items:
        told = f"""
The covariance tables were measured on validation images and on slices of {items}, which the
network also learned from: validation scans of the same resolution were not to be had.
"""
    domains = {source["domain"] for source in sources}
    for source in sources:
        if source["split"] == "validation" or source["item"] in settings.calibration_items:
            domains.discard(source["domain"])
    if domains:
        told += f"""
Of {", ".join(sorted(domains))} there was no validation image: the covariance tables were
measured on training images, which flatters the network a little.
"""
    return told


def model_card(
    settings: TrainSettings,
    chosen: Choice,
    metrics: dict[str, float],
    sources: list[dict[str, Any]],
    curve: dict[str, Any],
) -> str:
    """The model card in Markdown."""
    recipe = recipe_of(settings)
    megapixels = chosen.step * settings.batch_size * settings.patch_size**2 / 1e6
    figures = "\n".join(f"| {name} | {value:.2f} |" for name, value in metrics.items())
    return f"""# Model card: {settings.name}

A denoiser D(x; sigma) for {", ".join(settings.conditions)}: one local U-Net for all of them.
Made by `sashiko train` with the settings in config.json ("training").

## Recipe

{chosen.step} steps of {settings.batch_size} patches of {settings.patch_size}^2:
{megapixels:.0f} MP; Muon on convolutions at {recipe.learning_rate:g}, AdamW on the rest at
{recipe.learning_rate * recipe.adamw_ratio:g}, held and then brought to 0 over the last
{recipe.decay_share:.0%}; {_averaged(settings, chosen)};
{_levels(settings)}; seed {settings.seed}.
{_guided(settings)}{_filled(settings)}{_began(settings)}
{_scores(chosen)}{_curve(curve)}
## Denoising on validation images

PSNR in dB (network units span 2), mean over centre crops of up to {FIGURE_SIDE}^2.

| condition / sigma | dB |
|---|---|
{figures}

{_data_and_limits(sources, _calibrated(settings, sources))}"""


def student_card(
    settings: DistillSettings,
    num_steps: int,
    metrics: dict[str, float],
    sources: list[dict[str, Any]],
) -> str:
    """The card of a distilled model in Markdown."""
    levels = ", ".join(f"{sigma:g}" for sigma in settings.levels)
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in metrics.items())
    operators = "\n".join(
        f"| {condition} | {one.kind} | {one.params} |"
        for condition in settings.conditions
        for one in settings.operators[condition]
    )
    after = "a data step after each" if settings.final_data_step else "no data step after the last"
    return f"""# Model card: {settings.name}

A student for {", ".join(settings.conditions)} that restores in {len(settings.levels)} evaluations
or fewer (`--method distilled`), {after}; no denoiser: other methods but kriging refuse it.
Made by `sashiko distill` with the settings in config.json ("training").

## Recipe

{num_steps} steps of {settings.batch_size} measured patches of {settings.patch_size}^2, asked for
x0 at the levels {levels}; consistency {settings.consistency:g}; Muon at
{settings.learning_rate:g}; averaged weights (decay {settings.ema_decay:g}); seed {settings.seed}.
{_began(settings)} Its covariance tables are that model's.

| condition | operator | parameters |
|---|---|---|
{operators}

## Restoration of validation crops

PSNR in dB (network units span 2) by condition, operator and evaluations; 0 is the start, without a
network. Crops of 96^2 at most, measured as patches are.

| condition / operator / evaluations | dB |
|---|---|
{rows}

{_data_and_limits(sources, "")}"""


def _data_and_limits(sources: list[dict[str, Any]], note: str) -> str:
    """What every card ends with."""
    data = "\n".join(
        f"| {s['item']} | {s['domain']} | {s['split']} | {s['licence'] or 'not stated'} "
        f"| {s['source_sha256'][:12]} |"
        for s in sources
    )
    return f"""## Data and licences

| item | domain | split | licence | sha256 |
|---|---|---|---|---|
{data}
{note}
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
