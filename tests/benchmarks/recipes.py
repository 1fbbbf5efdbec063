"""Variants of the training recipe, each trained for the same CPU time, by denoising on validation.

    python -m tests.benchmarks.recipes run --data DATASET [--variant NAME ...] [--steps 800]
    python -m tests.benchmarks.recipes report

recipes.yaml holds the variants: changes to the settings of configs/train-starter.yaml, at a quarter
of its operations a pixel. The product's loop trains each from nothing on one thread, for the steps
that take as long as those of the reference: steps of both are timed in turn before, so that what
else the machine does falls on both. The product's validation function measures PSNR of the averaged
weights at four levels. Rows go to tests/benchmarks/results/recipes.json, a variant at a
time; beside them stand operations a pixel (a multiply and an add are two), inference speed, and
the pixels that a variant saw. Two seeds of the reference say how much is chance.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
import yaml

from diffusion_core.networks.precond import Preconditioned
from diffusion_core.noise.streams import seeded_initialisation
from diffusion_core.training import loop
from diffusion_core.training.loop import Callbacks, Recipe, train
from diffusion_core.training.patches import PatchSource
from diffusion_core.training.throughput import flop_per_pixel
from flows.api_train import new_network, recipe_of
from flows.config import TrainSettings, config_path, read_settings
from flows.training.data import patch_source
from flows.training.validation import denoising_psnr, validation_images
from tests.benchmarks.recipe_networks import NETWORKS
from tests.benchmarks.unet_vs_monai import megapixels_per_s, optimisers_of

HERE = Path(__file__).parent
VARIANTS = HERE / "recipes.yaml"
RESULTS = HERE / "results" / "recipes.json"
SIGMAS = (0.05, 0.1, 0.2, 0.5)
NUM_IMAGES, SIDE_PX = 12, 192
NUM_STEPS = 800
NUM_TIMED_STEPS, NUM_TIMINGS = 8, 2
OWN_KEYS = {"optimiser": "muon", "time_share": 1.0, "kind": "local-unet"}
"""What a variant may set beside TrainSettings."""

Row = dict[str, Any]


def settings_of(variant: Mapping[str, Any], base: Mapping[str, Any], data: Path) -> TrainSettings:
    """The starter's settings, changed by `base` and then by the variant."""
    changes = {k: v for k, v in {**base, **variant}.items() if k not in OWN_KEYS}
    starter = read_settings(TrainSettings, config_path("train-starter.yaml"), [])
    return TrainSettings(**{**starter.model_dump(), **changes, "data": [data]})


def network_of(settings: TrainSettings, kind: str) -> Preconditioned:
    """The seeded network of the settings, or one of another kind with the same widths."""
    if kind == "local-unet":
        return new_network(settings)
    with seeded_initialisation(settings.seed):
        return Preconditioned(NETWORKS[kind](len(settings.conditions), **settings.network))


def trained(settings: TrainSettings, num_steps: int, optimiser: str, kind: str) -> Preconditioned:
    """The averaged network after so many steps of the product's loop, from nothing."""
    recipe = replace(_bare(settings), num_steps=num_steps)
    with tempfile.TemporaryDirectory() as folder, _optimisers(optimiser):
        network = network_of(settings, kind)
        state = train(network, patch_source(settings), recipe, Path(folder))
    return state.ema.module.eval()


def step_seconds(settings: TrainSettings, patches: PatchSource, optimiser: str, kind: str) -> float:
    """CPU time of a training step, the least of some."""
    clock: list[float] = []
    recipe = replace(_bare(settings), num_steps=NUM_TIMED_STEPS, log_every_steps=1)
    told = Callbacks(on_log=lambda *_: clock.append(time.process_time()))
    with tempfile.TemporaryDirectory() as folder, _optimisers(optimiser):
        train(network_of(settings, kind), patches, recipe, Path(folder), told)
    return min(after - before for before, after in pairwise(clock))


def _bare(settings: TrainSettings) -> Recipe:
    """The settings' recipe without snapshots, scores and checkpoints on the way."""
    return replace(
        recipe_of(settings), num_snapshots=0, score_every_steps=0, checkpoint_every_s=1e9
    )


def _optimisers(kind: str) -> AbstractContextManager[Any]:
    """Muon as in the product, or AdamW alone."""
    return (
        nullcontext() if kind == "muon" else patch.object(loop, "_optimisers", optimisers_of(kind))
    )


def steps_of(
    settings: TrainSettings, reference: TrainSettings, own: Mapping[str, Any], steps: int
) -> int:
    """Steps that take as long as so many of the reference: timed in turn, for the load varies."""
    costs = {"network", "patch_size", "batch_size"}
    optimiser, kind = str(own["optimiser"]), str(own["kind"])
    same_costs = settings.model_dump(include=costs) == reference.model_dump(include=costs)
    if same_costs and (optimiser, kind) == ("muon", "local-unet"):
        return steps
    sources = patch_source(settings), patch_source(reference)
    ours, theirs = [], []
    for _ in range(NUM_TIMINGS):
        ours.append(step_seconds(settings, sources[0], optimiser, kind))
        theirs.append(step_seconds(reference, sources[1], "muon", "local-unet"))
    return round(steps * min(theirs) / min(ours))


def measured(name: str, table: Mapping[str, Any], data: Path, reference_steps: int) -> Row:
    """Train a variant and measure it."""
    variant = table["variants"][name]
    own = {key: variant.get(key, value) for key, value in OWN_KEYS.items()}
    settings = settings_of(variant, table["base"], data)
    reference = settings_of({}, table["base"], data)
    steps = round(own["time_share"] * steps_of(settings, reference, own, reference_steps))
    start = time.process_time()
    model = trained(settings, steps, str(own["optimiser"]), str(own["kind"]))
    seconds = time.process_time() - start
    images = validation_images(reference, NUM_IMAGES, SIDE_PX)
    psnr = denoising_psnr(model, {c: images[c] for c in settings.conditions}, SIGMAS)
    return {
        "variant": name,
        "changes": dict(variant),
        "cpu_seconds": round(seconds),
        "steps": steps,
        "megapixels_seen": round(steps * settings.batch_size * settings.patch_size**2 / 1e6, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "kflop_per_pixel": round(flop_per_pixel(model) / 1e3, 1),
        "inference_megapixels_per_s": round(megapixels_per_s(model.network, torch.bfloat16), 2),
        "psnr": {key: round(value, 3) for key, value in psnr.items()},
    }


def table_of(rows: Sequence[Row]) -> str:
    """Markdown: for each variant the mean over levels by condition, less the reference's."""
    by_name = {row["variant"]: row for row in rows}
    conditions = list(dict.fromkeys(key.split("/")[0] for row in rows for key in row["psnr"]))
    heads = ["variant", "kFLOP/px", "MP/s", "steps", "MP seen", *conditions, "all", "city .2"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    reference = by_name.get("reference")
    for row in rows:
        cells = [_cell(row, reference, prefix) for prefix in (*(f"{c}/" for c in conditions), "")]
        cells.append(_cell(row, reference, "city/sigma-0.2"))
        facts = [row["kflop_per_pixel"], row["inference_megapixels_per_s"]]
        facts += [row["steps"], row["megapixels_seen"]]
        lines.append(f"| {row['variant']} | {' | '.join(map(str, facts))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row, reference: Row | None, prefix: str) -> str:
    keys = [key for key in row["psnr"] if key.startswith(prefix)]
    if not keys or (not prefix and reference and keys != list(reference["psnr"])):
        return ""
    mean = sum(row["psnr"][key] for key in keys) / len(keys)
    if reference is None or row is reference:
        return f"{mean:.2f}"
    return f"{mean - sum(reference['psnr'][key] for key in keys) / len(keys):+.2f}"


def rows_of(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file."""
    return list(json.loads(path.read_text())) if path.is_file() else []


def keep(row: Row, path: Path) -> None:
    """Add a row, or replace that of the same variant."""
    rows = [known for known in rows_of(path) if known["variant"] != row["variant"]] + [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


@click.group(help=__doc__)
def main() -> None:
    """See the module."""


@main.command()
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--variant", "names", multiple=True, help="Only these; default all without a row.")
@click.option("--steps", default=NUM_STEPS, show_default=True, help="Of the reference.")
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def run(data: Path, names: Sequence[str], steps: int, output: Path) -> None:
    """Train variants one after the other on one thread."""
    torch.set_num_threads(1)
    table = yaml.safe_load(VARIANTS.read_text())
    done = {row["variant"] for row in rows_of(output)}
    for name in names or [name for name in table["variants"] if name not in done]:
        keep(measured(name, table, data, steps), output)
        click.echo(table_of(rows_of(output)))


@main.command()
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def report(output: Path) -> None:
    """The table of what was measured."""
    click.echo(table_of(rows_of(output)))


if __name__ == "__main__":
    main()
