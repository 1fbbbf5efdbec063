"""A few slices of a contrast that the network never saw: what fine-tuning brings.

    python -m tests.benchmarks.few_shot data --extra DIR --work WORK
    python -m tests.benchmarks.few_shot core --work WORK
    python -m tests.benchmarks.few_shot run --work WORK [--way full --way low-rank ...] [--slices 8]
    python -m tests.benchmarks.few_shot report

The contrast is FLAIR, of one person (`stroke_flair.nii.gz` of configs/samples.yaml, in DIR). The
core is trained by the product on the catalogue without that person: T1 scans of others, CT,
photographs. Slices are learned from in the lower part of the head (z 20 to 79), tested in the upper
(z 88 to 112, every third): 9 mm lie between, and it is the same head, so that nothing here speaks
of other people or scanners. A quarter of the few slices (one at least) is held out of the training
and ends it; they count among the few.

Rows go to tests/benchmarks/results/few_shot.json: PSNR in dB of every test slice, of denoising
(mean over sigma .05, .1, .2, .5) and of two tasks by CovProx in 12 evaluations with the settings of
configs/tasks and the model's own table. few_shot.yaml holds the settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml

from diffusion_core.model import Model
from domains.base import Item
from domains.registry import load_domain
from domains.samples import SampleFile, fetch_samples, sample_item
from flows.api_train import train
from flows.calibration import Bench, psnr_of
from flows.config import (
    ComputeSettings,
    Home,
    MethodSettings,
    TrainSettings,
    config_path,
    load_method,
    load_task,
    read_settings,
)
from flows.store import Dataset, DatasetWriter
from flows.training.validation import denoising_psnr
from flows.tune import case_of
from tests.benchmarks.rows import Row, Rows

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "few_shot.json"
KEY = ("way", "slices", "draw")
PERSON, CONTRAST = "stroke", "stroke_flair.nii.gz"
LEARNED = (20, 80)
TESTED = range(88, 113, 3)
TASKS = ("kspace-x4-real", "mri-sr-x2")
SIGMAS = (0.05, 0.1, 0.2, 0.5)
SIZES = (2, 4, 8, 16, 32)
CONDITION = "mri"
LEARN, TEST = "flair-learn", "flair-test"


def table() -> dict[str, Any]:
    """few_shot.yaml."""
    return dict(yaml.safe_load((HERE / "few_shot.yaml").read_text()))


def settings_of(way: str, slices: int, draw: int, work: Path) -> TrainSettings:
    """Of a few-shot training."""
    known = table()
    shipped = read_settings(TrainSettings, config_path("train-few-shot.yaml"), [])
    values = {**shipped.model_dump(), "init_from": work / "runs" / "core" / "model"}
    values |= known["base"] | known["ways"][way]
    return TrainSettings(
        **{
            **values,
            "name": f"{way}-{slices}-{draw}",
            "data": [work / "flair.zarr"],
            "output": work / "runs",
            "few": {"slices": slices, "held_out": max(1, slices // 4), "draw": draw},
            "compute": ComputeSettings(executor="inline"),
        }
    )


def measured(model: Model, test: Item) -> dict[str, list[float]]:
    """PSNR in dB of every test slice, by what was asked."""
    slices = [test.slices(z, z + 1) for z in range(test.record.shape[1])]
    view = load_domain("mri").training_windows(test)[CONDITION][0]
    images = [torch.from_numpy(np.ascontiguousarray(view[:, z])[None]) for z in range(len(slices))]
    figures: dict[str, list[float]] = {"denoising": []}
    for image in images:
        asked = {name: [image] if name == CONDITION else [] for name in model.conditions}
        psnr = denoising_psnr(model.module, asked, SIGMAS)
        figures["denoising"].append(float(np.mean(list(psnr.values()))))
    for name in TASKS:
        task, method = load_task(name), load_method(name)
        figures[name] = restored(model, [case_of(task, one) for one in slices], task.region, method)
    return {name: [round(db, 3) for db in found] for name, found in figures.items()}


def restored(
    model: Model, cases: Sequence[Any], region: str, method: MethodSettings
) -> list[float]:
    """PSNR of each case, by a chain of the product's solver."""
    with torch.no_grad():
        return [psnr_of(rollout) for rollout in Bench(model, cases, region).run(method)]


def table_of(rows: Sequence[Row]) -> str:
    """Markdown: mean over the test slices, and what a way gains on the core, with its range."""
    core = next((row for row in rows if row["way"] == "core"), None)
    figures = ("denoising", *TASKS)
    lines = [f"| way | slices | steps | {' | '.join(figures)} |", "|---" * (3 + len(figures)) + "|"]
    order = ["core", *table()["ways"]]
    for row in sorted(rows, key=lambda r: (order.index(r["way"]), int(r["slices"]), r["draw"])):
        cells = [_cell(row, core, name) for name in figures]
        drawn = f" (draw {row['draw']})" if row["draw"] else ""
        lines.append(
            f"| {row['way']}{drawn} | {row['slices']} | {row['steps']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _cell(row: Row, core: Row | None, figure: str) -> str:
    mean = f"{np.mean(row['psnr'][figure]):.2f}"
    if core is None or row is core:
        return mean
    gain = np.subtract(row["psnr"][figure], core["psnr"][figure])
    return f"{mean} ({gain.mean():+.2f}, {gain.min():+.2f} to {gain.max():+.2f})"


@click.group(help=__doc__)
def main() -> None:
    """See the module."""


@main.command()
@click.option("--extra", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--work", required=True, type=click.Path(path_type=Path))
def data(extra: Path, work: Path) -> None:
    """The core's data without the person, and the person's FLAIR in two parts."""
    found = fetch_samples(Home().cache / "samples", extra=extra, report=click.echo)
    with DatasetWriter(work / "core.zarr") as writer:
        for sample in found:
            splits = ("train", "validation")
            if sample.group != PERSON and sample.split in splits and sample.meta["kind"] == "image":
                writer.add(sample_item(load_domain(sample.domain).read(sample.path), sample))
    flair = next(sample for sample in found if sample.path.name == CONTRAST)
    whole = load_domain("mri").read(flair.path)
    with DatasetWriter(work / "flair.zarr") as writer:
        writer.add(_part(whole, flair, LEARN, range(*LEARNED), "train"))
        writer.add(_part(whole, flair, TEST, TESTED, "test"))


def _part(whole: Item, sample: SampleFile, name: str, slices: range, split: Any) -> Item:
    record = replace(
        whole.record,
        item_id=name,
        split=split,
        group=sample.group,
        licence=sample.licence,
        shape=(1, len(slices), *whole.record.shape[2:]),
        spacing_mm=None,
        affine=None,
        meta={**whole.record.meta, "ships": sample.ships, "slices": list(slices)},
    )
    return Item(np.ascontiguousarray(whole.pixels[:, list(slices)]), record)


@main.command()
@click.option("--work", required=True, type=click.Path(path_type=Path))
def core(work: Path) -> None:
    """Train the core: half an hour of one core."""
    inline = ComputeSettings(executor="inline")
    settings = TrainSettings(
        **table()["core"], data=[work / "core.zarr"], output=work / "runs", compute=inline
    )
    click.echo(train(settings, lambda event: click.echo(event.message)).model_path)


@main.command()
@click.option("--work", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--way", "ways", multiple=True, help="Only these; default all.")
@click.option("--slices", "sizes", multiple=True, type=int, help="Only these; default 2 to 32.")
@click.option("--draw", default=0, show_default=True, help="Which choice of the slices.")
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def run(work: Path, ways: Sequence[str], sizes: Sequence[int], draw: int, output: Path) -> None:
    """Train and measure what has no row yet, on one thread."""
    torch.set_num_threads(1)
    rows = Rows(output, KEY)
    test = Dataset(work / "flair.zarr").read(TEST)
    if rows.get("core", "0", "0") is None:
        rows.put(_row("core", 0, 0, Model.load(work / "runs" / "core" / "model"), test))
    for slices in sizes or SIZES:
        for way in ways or table()["ways"]:
            if rows.get(way, str(slices), str(draw)) is None:
                path = train(settings_of(way, slices, draw, work)).model_path
                rows.put(_row(way, slices, draw, Model.load(path), test))
                click.echo(table_of(list(rows)))


def _row(way: str, slices: int, draw: int, model: Model, test: Item) -> Row:
    facts: Mapping[str, Any] = model.config
    return {
        "way": way,
        "slices": slices,
        "draw": draw,
        "steps": facts["num_steps"],
        "average": facts["average"],
        "psnr": measured(model, test),
    }


@main.command()
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def report(output: Path) -> None:
    """The table of what was measured."""
    click.echo(table_of(list(Rows(output, KEY))))


if __name__ == "__main__":
    main()
