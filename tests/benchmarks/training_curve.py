"""Denoising and restoration of validation images against what a model was trained on so far.

    python -m tests.benchmarks.training_curve --data DATASET --model MODEL --run RUN ... [--card]

RUN is a folder that `sashiko train` made (log.jsonl, model/, perhaps snapshots/);
those of a model that was trained in parts in their order, the first from nothing. The weights of
every point are the run's averages: of its end (model/), and before it those that its snapshots give
for --length. All points are measured alike, by CovProx in 12 evaluations with the covariance tables
and the fitted settings of MODEL, which suit the last of them best.

Rows go to tests/benchmarks/results/training_curve.json: megapixels and hours of training since the
first run began; PSNR in dB, `denoising_db` over sigma .05, .1, .2, .5 and all conditions, and of a
task over its images (configs/calibrate-starter-samples.yaml). `--card` writes them into MODEL's
card.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_core.model import Model, solver_settings, store_card_section, weights_digest
from diffusion_core.training.files import folders_by_step
from diffusion_core.training.power import reconstruct
from flows.api_calibrate import read_parts
from flows.calibration import Bench
from flows.config import MethodSettings, TrainSettings, config_path, load_method, load_task
from flows.engine.methods import calibrated_method
from flows.store import Dataset
from flows.training.curve import hours_by_step, hours_until, megapixels
from flows.training.run_folder import SNAPSHOTS
from flows.training.validation import denoising_psnr, validation_images
from flows.tune import case_of, cut
from tests.benchmarks.rows import Row, Rows

RESULTS = Path(__file__).parent / "results" / "training_curve.json"
HEADING = "Restoration against training"
TASKS = ("ct-sparse60", "kspace-x4-real", "inpaint-random70", "sr-x4", "deblur-gauss")
PARTS = "calibrate-starter-samples.yaml"
NUM_LEVELS = 12
SIGMAS = (0.05, 0.1, 0.2, 0.5)
NUM_IMAGES, SIDE_PX = 6, 192
LENGTH = 0.05


@dataclass(frozen=True)
class Point:
    """Weights on the way.

    Attributes:
        name: run and step.
        megapixels: seen since the first run began.
        hours: of training since then; scores and starts left out.
        weights: of the denoiser.
    """

    name: str
    megapixels: float
    hours: float
    weights: dict[str, Tensor]


def points_of(runs: Sequence[Path], length: float) -> Iterator[Point]:
    """The points of runs that go on from each other, in their order."""
    seen = spent = 0.0
    for run in runs:
        recipe = json.loads((run / "model" / "config.json").read_text())["training"]
        settings = TrainSettings.model_validate(recipe)
        hours = hours_by_step(settings, run)
        last = max(hours)
        for step, _ in folders_by_step(run / SNAPSHOTS):
            if step < last:
                done = megapixels(settings, step), hours_until(hours, step)
                weights = reconstruct(run / SNAPSHOTS, length, step)
                yield Point(f"{run.name}/{step}", seen + done[0], spent + done[1], weights)
        seen, spent = seen + megapixels(settings, last), spent + hours[last]
        weights = load_file(run / "model" / "weights.safetensors")
        yield Point(f"{run.name}/{last}", seen, spent, weights)


def methods_of(model: Path) -> dict[str, MethodSettings]:
    """What a model restores each task with."""
    fits = solver_settings(model).get("tasks", {})
    return {
        name: calibrated_method(
            load_method(name).model_copy(update={"num_levels": NUM_LEVELS}),
            fits.get(name, {}),
            "mean",
            NUM_LEVELS,
        )
        for name in TASKS
    }


def how_of(model: Path) -> str:
    """A digest of what the rows of a model depend on: its weights, and what it restores with."""
    methods = {name: method.model_dump(mode="json") for name, method in methods_of(model).items()}
    text = json.dumps([weights_digest(model), methods], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Measure:
    """The images, measured once."""

    def __init__(self, model: Model, dataset: Dataset) -> None:
        self._module, self._benches = model.module, {}
        parts = read_parts(config_path(PARTS))
        for name, method in methods_of(model.path).items():
            task = load_task(name)
            items = [cut(dataset, part) for part in parts[task.domain]]
            cases = [case_of(task, i.slices(z, z + 1)) for i in items for z in range(_depth(i))]
            self._benches[name] = Bench(model, cases, task.region), method
        recipe = {**model.config["training"], "data": [dataset.path]}
        settings = TrainSettings.model_validate(recipe)
        self._images = validation_images(settings, NUM_IMAGES, SIDE_PX)

    def row(self, point: Point) -> Row:
        """PSNR of a point's weights."""
        self._module.load_state_dict(point.weights)
        denoised = denoising_psnr(self._module, self._images, SIGMAS)
        restored = {
            name: round(bench.psnr(method), 3) for name, (bench, method) in self._benches.items()
        }
        return {
            "point": point.name,
            "megapixels": round(point.megapixels, 1),
            "hours": round(point.hours, 3),
            "denoising_db": round(float(np.mean(list(denoised.values()))), 3),
            **restored,
        }


def _depth(item: Any) -> int:
    return int(item.pixels.shape[1])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The curve in Markdown."""
    head = ["MP seen", "hours", "denoising", *TASKS]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda r: r["megapixels"]):
        figures = [f"{row[name]:.2f}" for name in ("hours", "denoising_db", *TASKS)]
        lines.append(f"| {row['megapixels']:.0f} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def card_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table with what a reader of the model card must know."""
    return f"""By `python -m tests.benchmarks.training_curve`: PSNR in dB on validation images by
the averaged weights of that moment, all with the covariance tables and settings of the last.
Denoising is the mean over sigma .05 to .5 and all conditions; a task has {NUM_LEVELS} evaluations.
Hours of one core; scores and starts are left out.

{table(rows)}"""


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--run", "runs", multiple=True, type=click.Path(path_type=Path, exists=True))
@click.option("--length", default=LENGTH, show_default=True, help="Of the averages on the way.")
@click.option("--card", is_flag=True, help="Write the table into the model's card.")
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def main(
    data: Path, model: Path, runs: tuple[Path, ...], length: float, card: bool, output: Path
) -> None:
    """Measure what has no row yet, print, and tell the card."""
    how, rows = how_of(model), Rows(output, ("how", "point"))
    measure: Measure | None = None
    with torch.no_grad():
        for point in points_of(runs, length):
            if rows.get(how, point.name) is None:
                measure = measure or Measure(Model.load(model), Dataset(data))
                rows.put({"how": how, **measure.row(point)})
                click.echo(f"{point.name}: {rows.get(how, point.name)}")
    same = [row for row in rows if row["how"] == how]
    click.echo(table(same))
    if card:
        click.echo(f"model: {store_card_section(model, HEADING, card_section(same))}")


if __name__ == "__main__":
    main()
