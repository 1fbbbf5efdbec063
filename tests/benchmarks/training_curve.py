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

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from flows.config import TrainSettings, config_path, load_method, load_task
from flows.engine.methods import calibrated_method
from flows.store import Dataset
from flows.training.curve import hours_by_step, megapixels
from flows.training.run_folder import SNAPSHOTS
from flows.training.validation import denoising_psnr, validation_images
from flows.tune import case_of, cut
from tests.benchmarks.rows import Row, Rows

RESULTS = Path(__file__).parent / "results" / "training_curve.json"
HEADING = "Restoration against training"
TASKS = ("ct-sparse60", "kspace-x4-real", "inpaint-random70", "sr-x4", "deblur-gauss")
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
                done = max((hours[s] for s in hours if s <= step), default=0.0)
                weights = reconstruct(run / SNAPSHOTS, length, step)
                name = f"{run.name}/{step}"
                yield Point(name, seen + megapixels(settings, step), spent + done, weights)
        seen, spent = seen + megapixels(settings, last), spent + hours[last]
        weights = load_file(run / "model" / "weights.safetensors")
        yield Point(f"{run.name}/{last}", seen, spent, weights)


class Measure:
    """The images, measured once."""

    def __init__(self, model: Model, dataset: Dataset) -> None:
        self._model = model
        parts = read_parts(config_path("calibrate-starter-samples.yaml"))
        fits = solver_settings(model.path).get("tasks", {})
        self._tasks = {}
        for name in TASKS:
            task = load_task(name)
            items = [cut(dataset, part) for part in parts[task.domain]]
            cases = [case_of(task, i.slices(z, z + 1)) for i in items for z in range(_depth(i))]
            own = load_method(name).model_copy(update={"num_levels": NUM_LEVELS})
            method = calibrated_method(own, fits.get(name, {}), "mean", NUM_LEVELS)
            self._tasks[name] = cases, task.region, method
        recipe = {**model.config["training"], "data": [dataset.path]}
        settings = TrainSettings.model_validate(recipe)
        self._images = validation_images(settings, NUM_IMAGES, SIDE_PX)

    def row(self, point: Point) -> Row:
        """PSNR of a point's weights."""
        module = self._model.module
        module.load_state_dict(point.weights)
        denoised = denoising_psnr(module, self._images, SIGMAS)
        model = replace(self._model, module=module)
        restored = {
            name: round(Bench(model, cases, region).psnr(method), 3)
            for name, (cases, region, method) in self._tasks.items()
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
    weights, rows = weights_digest(model)[:12], Rows(output, ("weights", "point"))
    measure: Measure | None = None
    with torch.no_grad():
        for point in points_of(runs, length):
            if rows.get(weights, point.name) is None:
                measure = measure or Measure(Model.load(model), Dataset(data))
                rows.put({"weights": weights, **measure.row(point)})
                click.echo(f"{point.name}: {rows.get(weights, point.name)}")
    same = [row for row in rows if row["weights"] == weights]
    click.echo(table(same))
    if card:
        click.echo(f"model: {store_card_section(model, HEADING, card_section(same))}")


if __name__ == "__main__":
    main()
