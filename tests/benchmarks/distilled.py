"""What distillation is worth: CovProx, its unrolled teacher, student and regressor at few levels.

    python -m tests.benchmarks.distilled --data LEARN.zarr --part validation --student DIR
    python -m tests.benchmarks.distilled --data TEST.zarr --part test --student DIR --few DIR \\
        --regressor DIR --task ct-sparse60

LEARN.zarr holds the training and validation samples, TEST.zarr those of the test split (`sashiko
samples`). Rows, one an image, go to tests/benchmarks/results/distilled.json:

    covprox      the starter with its shipped settings, at 12, 4, 2 and 1 evaluations
    fitted       the same with settings that `sashiko calibrate` fitted for 4, 2 and 1 (--few)
    unrolled     the starter's own network in the student's chain, before any distillation
    student      `sashiko distill configs/distill-starter.yaml`
    regressor    `sashiko distill configs/distill-regressor.yaml`: one pass, no data step
    kriging      the start, solved as the student's is: no evaluation
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from diffusion_core.model import DISTILLED, Model, solver_settings
from diffusion_core.networks.student import StudentDenoiser, student_of
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.posterior import make_solver
from diffusion_core.protocols import Denoiser
from domains.metrics import mean_score, score
from flows.config import (
    DistillSettings,
    MethodSettings,
    config_path,
    load_method,
    load_task,
    read_settings,
)
from flows.engine.methods import calibrated_method
from flows.store import Dataset
from flows.training.distilling import student_options
from flows.tune import Case, Selection, case_of, cut

RESULTS = Path(__file__).parent / "results" / "distilled.json"
TASKS = ("ct-sparse60", "kspace-x4-real", "inpaint-random70")
EVALUATIONS = (1, 2, 4)
MOST = 12
PARTS: Mapping[str, Mapping[str, Sequence[Selection]]] = {
    "validation": {
        "ct": (Selection("lung1", 2, shrink=2), Selection("torso")),
        "mri": (Selection("stroke-t2-b"), Selection("stroke-flair-b"), Selection("brain1")),
        "city": (
            Selection("berlin-01", size=(192, 192), shrink=4),
            Selection("berlin-02", size=(192, 192), shrink=4),
            Selection("pan3", size=(192, 192)),
            Selection("bikes-2", size=(192, 192)),
        ),
    },
    "test": {
        "ct": (Selection("lung2", 2, shrink=2),),
        "mri": (Selection("brain2", 4),),
        "city": (
            Selection("china", size=(256, 256)),
            Selection("sample-geotiff", size=(256, 256)),
            Selection("pan2", size=(256, 256)),
            Selection("bikes-3", size=(256, 256)),
        ),
    },
}
"""lung1 and brain1 are training items; of the others nothing was learned (configs/calibrate-*)."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to restore: its name, a model, a method."""

    name: str
    model: Model
    method: MethodSettings
    unrolled: bool = False

    def restore(self, case: Case) -> tuple[torch.Tensor, int]:
        """(restored batch, evaluations)."""
        problem, method = case.problem, self.method
        solver = make_solver(method.name, self.model.prior(problem.condition), method.options)
        sigmas = power_sigmas(method.num_levels, method.sigma_max, method.sigma_min, method.rho)
        draws = KeyedDraws(0, case.truth.record.source_digest, (0, 0, 0))
        denoise = self._denoiser(problem.condition)
        found = solver(denoise, problem.operator, problem.y, problem.noise, sigmas, draws)
        return found.x, found.num_denoiser_calls

    def _denoiser(self, condition: str) -> Denoiser:
        if self.model.is_distilled:
            return self.model.student(condition)
        if not self.unrolled:
            return self.model.denoiser(condition)
        student = student_of(self.model.module)
        student.network.to(next(self.model.module.network.parameters()).dtype)
        index = list(self.model.conditions).index(condition)
        return StudentDenoiser(student.eval(), index, self.model.conditions[condition])


def ways_of(
    task: str, starter: Model, few: Model | None, student: Model | None, regressor: Model | None
) -> Iterator[Way]:
    """All that is compared on a task."""
    own = load_method(task)

    def covprox(model: Model, count: int) -> MethodSettings:
        fits = solver_settings(model.path).get("tasks", {}).get(task, {})
        return calibrated_method(own.model_copy(update={"num_levels": count}), fits, "mean", count)

    for count in (MOST, *EVALUATIONS):
        yield Way("covprox", starter, covprox(starter, count))
    if few is not None:
        for count in EVALUATIONS:
            yield Way("fitted", few, covprox(few, count))
    yield Way("kriging", starter, _kriging())
    recipe = student_options(read_settings(DistillSettings, config_path("distill-starter.yaml")))
    for count in EVALUATIONS:
        yield Way("unrolled", starter, _distilled(recipe, count), unrolled=True)
        if student is not None:
            yield Way("student", student, _distilled(_options(student), count))
    if regressor is not None:
        yield Way("regressor", regressor, _distilled(_options(regressor), 1))


def _options(model: Model) -> Mapping[str, Any]:
    options: Mapping[str, Any] = solver_settings(model.path)[DISTILLED]
    return options


def _distilled(options: Mapping[str, Any], count: int) -> MethodSettings:
    return MethodSettings(name=DISTILLED, num_levels=count, options=dict(options))


def _kriging() -> MethodSettings:
    options = {"tolerance": 1e-4, "max_steps": 200}
    return MethodSettings(name="kriging", num_levels=1, options=options)


def measure(
    task: str, dataset: Dataset, part: str, ways: Sequence[Way], items: Sequence[str]
) -> Iterator[Row]:
    """Rows of a task: PSNR in dB of each image by each way."""
    protocol = load_task(task)
    for selection in PARTS[part][protocol.domain]:
        if items and selection.label not in items:
            continue
        item = cut(dataset, selection)
        for z in range(item.pixels.shape[1]):
            case = case_of(protocol, item.slices(z, z + 1))
            for way in ways:
                x, nfe = way.restore(case)
                restored = case.problem.to_source(x).numpy().swapaxes(0, 1)
                figures = mean_score(score(case.domain, case.truth, restored, region=case.hole))
                yield {
                    "part": part,
                    "task": task,
                    "item": f"{selection.label}/{z}",
                    "way": way.name,
                    "nfe": nfe,
                    "psnr_db": round(float(figures["psnr"]), 3),
                    "model_digest": way.model.digest,
                }


def table(rows: Sequence[Row]) -> str:
    """Mean PSNR by task, way and evaluations, and less CovProx at 12, image by image."""
    lines = [
        "| part | task | way | evaluations | dB | less covprox at 12 |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str, int], dict[str, float]] = {}
    for row in rows:
        key = row["part"], row["task"], row["way"], row["nfe"]
        groups.setdefault(key, {})[row["item"]] = row["psnr_db"]
    for (part, task, way, nfe), by_item in groups.items():
        best = groups.get((part, task, "covprox", MOST), {})
        apart = [by_item[item] - best[item] for item in by_item if item in best]
        gain = f"{np.mean(apart):+.2f} ({min(apart):+.2f} to {max(apart):+.2f})" if apart else ""
        mean = np.mean(list(by_item.values()))
        lines.append(f"| {part} | {task} | {way} | {nfe} | {mean:.2f} | {gain} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path))
@click.option("--part", required=True, type=click.Choice(sorted(PARTS)))
@click.option("--task", "tasks", multiple=True, default=TASKS, show_default=True)
@click.option("--item", "items", multiple=True, help="Only images of this item.")
@click.option("--way", "ways", multiple=True, help="Only this way to restore.")
@click.option("--student", type=click.Path(path_type=Path))
@click.option("--regressor", type=click.Path(path_type=Path))
@click.option("--few", type=click.Path(path_type=Path), help="Starter calibrated for few levels.")
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def main(
    data: Path,
    part: str,
    tasks: Sequence[str],
    items: Sequence[str],
    ways: Sequence[str],
    student: Path | None,
    regressor: Path | None,
    few: Path | None,
    output: Path,
) -> None:
    """Measure; rows replace older ones of the same part, task, way, evaluations and image."""

    def load(path: Path | None) -> Model | None:
        return None if path is None else Model.load(path, dtype=torch.bfloat16)

    starter = Model.load(config_path("models", "starter"), dtype=torch.bfloat16)
    models = load(few), load(student), load(regressor)
    dataset = Dataset(data)
    for task in tasks:
        with torch.no_grad():
            compared = [w for w in ways_of(task, starter, *models) if not ways or w.name in ways]
            rows = list(measure(task, dataset, part, compared, items))
        old = json.loads(output.read_text())["rows"] if output.is_file() else []
        made = {_place(row) for row in rows}
        kept = [row for row in old if _place(row) not in made]
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"rows": kept + rows}, indent=1) + "\n")
        click.echo(table([row for row in kept + rows if row["task"] == task]))


def _place(row: Row) -> tuple[Any, ...]:
    return row["part"], row["task"], row["way"], row["nfe"], row["item"]


if __name__ == "__main__":
    main()
