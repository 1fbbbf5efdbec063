"""What wrong assumptions cost: losses in dB against the same restoration with the right ones.

    python -m tests.benchmarks.robustness --data DATASET [--model DIR] [--task T ...] [--limit N]

DATASET holds the test items and, for the contrasts, two of validation (`sashiko samples`); several
can be given. CovProx with the model's own settings (mean mode, the task's number of levels, 12 but
for denoising), and total variation with its frozen parameters, which believes the same. Images of
256^2, CT shrunk to it. Rows, one an image, method and assumption, land in
tests/benchmarks/results/robustness.json; those of the same weights and settings are kept.

    noise x0.5, x2   the solver is told so much of the noise's standard deviation (of CT: counts a
                     ray by the inverse square). Denoising has no level but the noise's own (infra/
                     decisions/0007): who believes in another runs it at that
    dead ... known   2% of the pixels or samples that were measured read black, or 0 in k-space, and
                     the mask leaves them out; or 2% of the lines, which is one of 64 (the one
                     beside the middle holds a quarter of the energy: see the range)
    dead ... believed  the same data, and the mask says that they were measured: held against known
    kernel x0.9, x1.1  the blur is believed narrower, wider; of motion: its path shorter, longer, as
                     far as odd sizes go (55 and 67 for 61 px)
    offset +20 HU ...  the scanner reads so much too high: the shifted image is measured, restored,
                     shifted back and held against the image without the shift. In a sinogram 50 HU
                     more cost a quarter of the photons: see what total variation loses to that
    contrasts        nothing is wrong: k-space of T2 and FLAIR beside T1, over total variation.
                     These are of validation: both methods were fitted to this very person
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from diffusion_core.model import Model, weights_digest
from domains.base import Array, BadInputError, Item, Task
from domains.city.degradations import blur_kernel
from domains.ct.domain import UNITS
from domains.imaging import measure
from domains.keyed import slice_rngs
from domains.registry import load_domain
from flows.config import config_path, load_method, load_task
from flows.engine.methods import baseline_params
from flows.store import Dataset
from tests.benchmarks import nonlinear, ours
from tests.benchmarks.cases import TEST, Case, Part, cut
from tests.benchmarks.nonlinear import NUM_ITEMS, spread
from tests.benchmarks.ours import Method, Run
from tests.benchmarks.rows import Row, Rows, summary

RESULTS = Path(__file__).parent / "results" / "robustness.json"
KEY = ("task", "item", "method", "assumption")
METHODS = ("covprox", "tv")
DEAD_SHARE = 0.02
BLACK = -1.0
LEVELS_ARE_THE_NOISE = frozenset({"denoise-25"})
CONTRASTS: Mapping[str, Sequence[Part]] = {
    "T1": TEST["mri"],
    # Of 47 slices of 160 x 124; above the 30th hardly any head is left.
    "T2": [Part("stroke-t2-b", z) for z in (4, 12, 20, 28)],
    "FLAIR": [Part("stroke-flair-b", z) for z in (4, 12, 20, 28)],
}

Change = Callable[[Case], Case]


@dataclass(frozen=True)
class Trial:
    """A restoration under an assumption.

    Attributes:
        name: of the assumption.
        change: a case as it was measured -> as this trial has it.
        against: name of the trial whose PSNR less this one's is the loss.
    """

    name: str
    change: Change
    against: str = "right"


@dataclass(frozen=True)
class Study:
    """Trials of a task on some images, after the right one."""

    task: str
    parts: Sequence[Part]
    trials: Sequence[Trial] = ()


def as_measured(case: Case) -> Case:
    """Nothing is wrong."""
    return case


def told(case: Case, **parts: Any) -> Case:
    """The case with other words in its measurement (noise, arrays, y); the truth stays."""
    measurement = replace(case.measurement, **parts)
    return replace(case, measurement=measurement, problem=case.domain.problem(measurement))


def noise_told(case: Case, factor: float) -> Case:
    """The noise's standard deviation is believed `factor` times what it is."""
    noise = dict(case.measurement.noise)
    if "sigma_y" in noise:
        noise["sigma_y"] *= factor
    else:  # the variance of a line integral goes as 1 / counts
        noise["counts_per_ray"] /= factor**2
    return told(case, noise=noise)


def dead(case: Case, unit: str, *, known: bool) -> Case:
    """2% of what was measured reads nothing; the mask knows it, or does not.

    Args:
        case: of a mask operator.
        unit: "lines" of k-space as its mask has them, else pixels or samples.
        known: whether the mask leaves them out.
    """
    measurement = case.measurement
    y, mask = measurement.y, measurement.arrays["mask"]
    believed = mask if unit == "lines" else np.broadcast_to(mask, (len(y), 1, *y.shape[2:]))
    alive = without(believed, DEAD_SHARE, slice_rngs(0, measurement.record, f"dead {unit}"))
    nothing = 0 if np.iscomplexobj(y) else BLACK
    read = np.where(believed & ~alive, np.array(nothing, y.dtype), y)
    return told(case, y=read, arrays={"mask": alive if known else believed})


def without(mask: Array, share: float, rngs: Sequence[np.random.Generator]) -> Array:
    """A mask (z ...) less a share of what is True in each of its slices, one place at least."""
    left = np.array(mask)
    for plane, rng in zip(left, rngs, strict=True):
        places = rng.permutation(np.flatnonzero(plane))
        plane.flat[places[: max(1, round(share * len(places)))]] = False
    return left


def kernel_told(case: Case, factor: float) -> Case:
    """The blur is believed `factor` times as wide: a Gaussian's std, a motion's path and canvas."""
    params = dict(case.task.operator_params)
    if "std_px" in params:
        params["std_px"] *= factor
    else:
        params["size_px"] = 2 * round((params["size_px"] * factor - 1) / 2) + 1
    kernel = blur_kernel(case.truth, params, case.measurement.seed)
    return told(case, arrays={"kernel": kernel})


def offset(case: Case, hu: int) -> Case:
    """Measured of the image shifted by `hu`; what is restored is shifted back before it is scored.

    So the same HU are clipped by the metric, with and without the offset.
    """
    shifted = Item((case.truth.pixels + hu).astype(case.truth.pixels.dtype), case.truth.record)
    moved = case_of(case.task, case.name, shifted)
    to_source = moved.problem.to_source
    problem = replace(moved.problem, to_source=lambda x: to_source(x) - hu)
    return replace(moved, truth=case.truth, problem=problem)


RIGHT = Trial("right", as_measured)
NOISE = [Trial(f"noise x{f:g}", partial(noise_told, factor=f)) for f in (0.5, 2.0)]
KERNEL = [Trial(f"kernel x{f:g}", partial(kernel_told, factor=f)) for f in (0.9, 1.1)]
OFFSET = [Trial(f"offset {hu:+d} HU", partial(offset, hu=hu)) for hu in (20, -20, 50, -50)]


def dead_trials(unit: str) -> list[Trial]:
    """Known, and believed to have been measured."""
    known = Trial(f"dead {unit} known", partial(dead, unit=unit, known=True))
    believed = Trial(f"dead {unit} believed", partial(dead, unit=unit, known=False), known.name)
    return [known, believed]


STUDIES = (
    Study("denoise-25", TEST["city"], NOISE),
    Study("inpaint-random70", TEST["city"], [*NOISE, *dead_trials("pixels")]),
    Study("ct-sparse60", TEST["ct"], [*NOISE, *OFFSET]),
    Study("kspace-x4-real", TEST["mri"], NOISE),
    Study("deblur-gauss", TEST["city"], [*NOISE, *KERNEL]),
    Study("deblur-motion", TEST["city"], KERNEL),
    Study("kspace-x4", CONTRASTS["T1"], [*dead_trials("samples"), *dead_trials("lines")]),
    Study("kspace-x4", CONTRASTS["T2"]),
    Study("kspace-x4", CONTRASTS["FLAIR"]),
    Study("denoise-25", TEST["ct"], OFFSET),
)
TASKS = tuple(dict.fromkeys(study.task for study in STUDIES))


def case_of(task: Task, name: str, item: Item) -> Case:
    """An item measured as a task says, with seed 0; white noise suits CT's own scale as well."""
    domain = load_domain(item.record.domain)
    if task.domain == domain.name:
        measurement = domain.simulate(item, task, 0)
    else:
        measurement = measure(item, UNITS, task, 0, task.operator_params, {})
    return Case(task, name, domain, item, measurement, domain.problem(measurement))


def method_of(case: Case, model: Path) -> Method:
    """CovProx as the model and the task's file have it; its levels where they are the noise's."""
    task = case.task
    own = ours.covprox(task.name, load_method(task.name).num_levels, model)
    if task.name not in LEVELS_ARE_THE_NOISE:
        return own
    believed = case.measurement.noise["sigma_y"] / task.noise["sigma_y"]
    return replace(own, sigmas=own.sigmas * believed)


def restore(case: Case, name: str, model: Model) -> Run:
    """One method on one case."""
    if name == "covprox":
        return ours.run(method_of(case, model.path), case, model)
    return nonlinear.restore(case, name, model)


def settings_of(task: str, name: str, model: Path) -> dict[str, Any]:
    """What a row depends on beside the weights."""
    if name != "covprox":
        return baseline_params(task, name)
    own = ours.covprox(task, load_method(task).num_levels, model)
    return {"from": float(own.sigmas[0]), "to": float(own.sigmas[-1]), **own.options}


def run(
    datasets: Sequence[Dataset], studies: Sequence[Study], model: Model, rows: Rows, limit: int
) -> None:
    """Restore what no row of these weights and settings tells of."""
    weights = weights_digest(model.path)[:12]
    for study in studies:
        task = load_task(study.task)
        facts = {
            name: {"settings": settings_of(study.task, name, model.path), "weights": weights}
            for name in METHODS
        }
        for part in spread(study.parts, limit):
            wanted = [
                (trial, name)
                for trial in (RIGHT, *study.trials)
                for name in METHODS
                if not known(rows.get(study.task, part.name, name, trial.name), facts[name])
            ]
            if not wanted:
                continue
            case = case_of(task, part.name, cut(holder(datasets, part.label), part))
            for trial in dict.fromkeys(trial for trial, _ in wanted):
                changed = trial.change(case)
                for name in (name for t, name in wanted if t is trial):
                    put(rows, changed, trial, name, restore(changed, name, model), facts[name])


def known(row: Row | None, facts: Mapping[str, Any]) -> bool:
    """Whether a row is there, made with these weights and settings."""
    return row is not None and {name: row.get(name) for name in facts} == facts


def holder(datasets: Sequence[Dataset], label: str) -> Dataset:
    """The first dataset that holds an item.

    Raises:
        BadInputError: if none does.
    """
    for dataset in datasets:
        if any(record.item_id == label for record in dataset.items()):
            return dataset
    paths = ", ".join(str(dataset.path) for dataset in datasets)
    raise BadInputError(f"{paths}: no item '{label}'; give --data of all samples")


def put(
    rows: Rows, case: Case, trial: Trial, name: str, done: Run, facts: Mapping[str, Any]
) -> None:
    """Score, keep a row, say so. The trial that it is held against has been put before."""
    row: Row = {
        "task": case.task.name,
        "domain": case.domain.name,
        "item": case.name,
        "method": name,
        "assumption": trial.name,
        "nfe": done.nfe,
        **{key: round(value, 4) for key, value in case.figures(done.x).items()},
        **facts,
    }
    right = rows.get(case.task.name, case.name, name, trial.against)
    if trial is not RIGHT and right is not None:
        row |= {"against": trial.against, "loss_db": round(right["psnr"] - row["psnr"], 4)}
    rows.put(row)
    loss = f", lost {row['loss_db']:.2f} dB" if "loss_db" in row else ""
    click.echo(f"{case.task.name} {case.name} {name}, {trial.name}: {row['psnr']:.2f} dB{loss}")


def table(rows: Rows) -> str:
    """Losses in Markdown, mean over items and range; then contrasts over the baseline."""
    found = list(rows)
    lines = [
        "| task | images | assumption | items | CovProx loses, dB (range) | TV loses, dB (range) "
        "| CovProx less TV then, dB | and if right |",
        "|---" * 8 + "|",
        *_losses(found),
        "",
        "| kspace-x4 of | items | CovProx, dB | TV, dB | CovProx less TV, dB (range) |",
        "|---" * 5 + "|",
        *_contrasts(found),
    ]
    return "\n".join(lines)


def _losses(rows: Sequence[Row]) -> Iterator[str]:
    """One line a task, field and assumption, in the order of STUDIES."""
    lost = [row for row in rows if "loss_db" in row]
    for study in STUDIES:
        for trial in study.trials:
            part = [
                row
                for row in lost
                if (row["task"], row["assumption"]) == (study.task, trial.name)
                and row["item"] in {p.name for p in study.parts}
            ]
            if not part:
                continue
            losses = {m: [r["loss_db"] for r in part if r["method"] == m] for m in METHODS}
            wrong = _ahead(part)
            items = {row["item"] for row in part}
            right = _ahead(
                row
                for row in rows
                if row["item"] in items
                and (row["task"], row["assumption"]) == (study.task, trial.against)
            )
            yield (
                f"| {study.task} | {part[0]['domain']} | {trial.name} | {len(items)} | "
                f"{_ranged(losses['covprox'])} | {_ranged(losses['tv'])} | "
                f"{summary(wrong).mean:+.2f} | {summary(right).mean:+.2f} |"
            )


def _contrasts(rows: Sequence[Row]) -> Iterator[str]:
    """One line a contrast: every item of kspace-x4 with nothing wrong."""
    for contrast, parts in CONTRASTS.items():
        names = {part.name for part in parts}
        right = [
            row
            for row in rows
            if (row["task"], row["assumption"]) == ("kspace-x4", RIGHT.name)
            and row["item"] in names
        ]
        if right:
            means = [np.mean([r["psnr"] for r in right if r["method"] == m]) for m in METHODS]
            ahead = _ahead(right)
            yield (
                f"| {contrast} | {len(ahead)} | {means[0]:.2f} | {means[1]:.2f} | "
                f"{_ranged(ahead)} |"
            )


def _ahead(rows: Any) -> list[float]:
    """PSNR of CovProx less that of total variation, by items that have both."""
    psnr: dict[str, dict[str, float]] = {name: {} for name in METHODS}
    for row in rows:
        psnr[row["method"]][row["item"]] = row["psnr"]
    first, second = (psnr[name] for name in METHODS)
    return [first[item] - second[item] for item in first if item in second]


def _ranged(values: Sequence[float]) -> str:
    """Mean, and the range over items."""
    if not values:
        return ""
    return f"{summary(values).mean:+.2f} ({min(values):+.2f} to {max(values):+.2f})"


@click.command(help=__doc__)
@click.option("--data", multiple=True, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), default=TASKS)
@click.option("--model", type=click.Path(path_type=Path), help="Directory; default the starter.")
@click.option("--limit", default=NUM_ITEMS, show_default=True, help="Items a task at most.")
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    data: Sequence[Path],
    tasks: Sequence[str],
    model: Path | None,
    limit: int,
    output: Path,
    threads: int,
) -> None:
    """Run what is missing, and print the tables."""
    torch.set_num_threads(threads)
    rows = Rows(output, KEY)
    loaded = Model.load(model or config_path("models", "starter"), dtype=torch.bfloat16)
    studies = [study for study in STUDIES if study.task in tasks]
    try:
        with torch.no_grad():
            run([Dataset(path) for path in data], studies, loaded, rows, limit)
    except BadInputError as error:
        raise click.ClickException(str(error)) from error
    click.echo(table(rows))


if __name__ == "__main__":
    main()
