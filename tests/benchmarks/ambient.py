"""Training from damaged data alone, beside clean images: three pixels in ten never measured, or two
lines of k-space in three.

    python -m tests.benchmarks.ambient data --extra DIR --work WORK
    python -m tests.benchmarks.ambient run --work WORK [--way clean --way ambient]
    python -m tests.benchmarks.ambient report

The images are those of configs/samples.yaml: MRI (brain1, seg3d) and a street (lund, 29
photographs), as stores of measurements by masks; for `clean` the masks hide nothing, so that both
are trained on the same views in the same steps by the product. Each has a second part of as many
steps, the damaged ones' on what the first part's model made of them. Validation photographs
(berlin) lack pixels as well: not even the tables of covariances come from a whole image.

Ways with -k in their names learn from MRI alone: `ambient-k` from k-space of which every slice has
other lines (acceleration 3, 30 dB), first as total variation restores it, then twice more as the
model of the part before does; `clean-k` from the images themselves.

Rows go to tests/benchmarks/results/ambient.json: PSNR in dB on whole test images (brain2, china and
bikes-3), of denoising by level and of tasks by CovProx in 12 evaluations with the settings of
configs/tasks. ambient.yaml holds the settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml

from diffusion_core.model import Model
from domains.base import Domain, Item, Task
from domains.registry import load_domain
from domains.samples import SampleFile, fetch_samples, sample_item
from flows.api_train import train
from flows.config import ComputeSettings, Home, TrainSettings, load_method, load_task
from flows.store import Dataset, DatasetWriter, MeasurementWriter
from flows.training.validation import denoising_psnr
from flows.tune import case_of
from tests.benchmarks.few_shot import restored
from tests.benchmarks.rows import Row, Rows

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "ambient.json"
GROUPS = ("brain1", "seg3d", "lund", "berlin")
SIDE_PX = 192
MISSING = (0.0, 0.3)
TESTED = {"brain2": (7, 10, 13, 16), "china": (0,), "bikes-3": (13, 40)}
TASKS = {"brain2": ("kspace-x4-real", "mri-sr-x2"), "china": ("inpaint-random70", "sr-x4")}
TASKS["bikes-3"] = TASKS["china"]
CONDITIONS = {"mri": "mri", "city": "city"}
SIGMAS = (0.05, 0.1, 0.2, 0.5)
LINES = Task(
    "kspace-x3-real",
    "mri",
    "fourier",
    {"acceleration": 3.0, "centre_share": 0.08, "phase": "zero"},
    {"kind": "snr", "snr_db": 30.0},
)


def table() -> dict[str, Any]:
    """ambient.yaml."""
    return dict(yaml.safe_load((HERE / "ambient.yaml").read_text()))


def settings_of(way: str, work: Path) -> TrainSettings:
    """Of one training."""
    known = table()
    own = dict(known["ways"][way])
    store, corruption = work / f"{own.pop('store')}.zarr", {}
    if "further" in own:
        corruption["further"] = own.pop("further")
    if "after" in own:
        own["init_from"] = work / "runs" / own.pop("after") / "model"
    if filled := own.pop("filled", False):
        corruption["filled_by"] = own["init_from"] if filled is True else filled
    return TrainSettings(
        **{**known["base"], **own},
        name=way,
        data=[store],
        corruption=corruption or None,
        output=work / "runs",
        compute=ComputeSettings(executor="inline"),
    )


def missing_pixels(sample: SampleFile, shape: Sequence[int], share: float) -> Any:
    """(z h w), True where nothing was measured: by chance, keyed by the file."""
    key = int(sample.meta["sha256"][:15], 16)
    rng = np.random.Generator(np.random.Philox(key=[key, round(1000 * share)]))
    return rng.random(tuple(shape)) < share


def tested(item: Item) -> Iterator[Item]:
    """Single slices or frames of a test item: their centres, of photographs."""
    for z in TESTED[item.record.item_id]:
        one = item.slices(z, z + 1)
        if item.record.domain != "city":
            yield one
            continue
        h, w = one.pixels.shape[-2:]
        top, left = (h - SIDE_PX) // 2, (w - SIDE_PX) // 2
        pixels = one.pixels[..., top : top + SIDE_PX, left : left + SIDE_PX]
        pixels = np.ascontiguousarray(pixels)
        yield Item(pixels, replace(one.record, shape=pixels.shape))


def measured(model: Model, test: Dataset) -> dict[str, dict[str, float]]:
    """PSNR in dB by figure and image."""
    figures: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for item_id in TESTED:
            condition = CONDITIONS[test.record(item_id).domain]
            if condition not in model.conditions:
                continue
            images = list(tested(test.read(item_id)))
            views = [load_domain(i.record.domain).training_windows(i)[condition][0] for i in images]
            for number, view in enumerate(views):
                x0 = torch.from_numpy(np.ascontiguousarray(view[:, 0]))[None]
                asked = {c: [x0] if c == condition else [] for c in model.conditions}
                for name, db in denoising_psnr(model.module, asked, SIGMAS).items():
                    figures.setdefault(name, {})[f"{item_id}/{number}"] = round(db, 3)
            for name in TASKS[item_id]:
                task, method = load_task(name), load_method(name)
                found = restored(model, [case_of(task, i) for i in images], task.region, method)
                for number, db in enumerate(found):
                    figures.setdefault(name, {})[f"{item_id}/{number}"] = round(db, 3)
    return figures


def table_of(rows: Sequence[Row]) -> str:
    """Markdown: means over images, and what each way is off the clean one of as many steps."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row["psnr"]), []).append(row)
    return "\n\n".join(_table_of(group) for group in groups.values())


def _table_of(rows: Sequence[Row]) -> str:
    by_way = {row["way"]: row for row in rows}
    names = list(dict.fromkeys(name for row in rows for name in row["psnr"]))
    lines = [f"| figure | {' | '.join(by_way)} |", "|---" * (1 + len(by_way)) + "|"]
    for name in names:
        cells = [
            _cell(row, by_way.get(way.replace("ambient", "clean")), name)
            for way, row in by_way.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row, clean: Row | None, name: str) -> str:
    found: Mapping[str, float] = row["psnr"][name]
    mean = f"{np.mean(list(found.values())):.2f}"
    if clean is None or row is clean:
        return mean
    gains = [db - clean["psnr"][name][image] for image, db in found.items()]
    return f"{mean} ({np.mean(gains):+.2f}, {min(gains):+.2f} to {max(gains):+.2f})"


@click.group(help=__doc__)
def main() -> None:
    """See the module."""


@main.command()
@click.option("--extra", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--work", required=True, type=click.Path(path_type=Path))
def data(extra: Path, work: Path) -> None:
    """The stores of measurements, and the whole test images."""
    found = fetch_samples(Home().cache / "samples", extra=extra, report=click.echo)
    with DatasetWriter(work / "test.zarr") as writer:
        for sample in found:
            if sample.label in TESTED:
                writer.add(sample_item(load_domain(sample.domain).read(sample.path), sample))
    for share in MISSING:
        with MeasurementWriter(work / f"missing-{round(100 * share)}.zarr") as writer:
            for domain, item, sample in _learned_from(found):
                mask = missing_pixels(sample, item.pixels.shape[1:], share)
                taken = domain.given(item, mask=mask, kernel=None, scale=None, sigma_y=0.0)
                writer.add(taken)
    heads = [item for domain, item, _ in _learned_from(found) if domain.name == LINES.domain]
    with DatasetWriter(work / "heads.zarr") as whole, MeasurementWriter(work / "k.zarr") as writer:
        for item in heads:
            whole.add(item)
            writer.add(load_domain(LINES.domain).simulate(item, LINES, 0))


def _learned_from(found: Sequence[SampleFile]) -> Iterator[tuple[Domain, Item, SampleFile]]:
    for sample in found:
        if sample.group in GROUPS:
            domain = load_domain(sample.domain)
            yield domain, sample_item(domain.read(sample.path), sample), sample


@main.command()
@click.option("--work", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--way", "ways", multiple=True, help="Only these; default all without a row.")
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def run(work: Path, ways: Sequence[str], output: Path) -> None:
    """Train and measure, on one thread."""
    torch.set_num_threads(1)
    rows = Rows(output, ("way",))
    for way in ways or [way for way in table()["ways"] if rows.get(way) is None]:
        model = Model.load(train(settings_of(way, work)).model_path)
        psnr = measured(model, Dataset(work / "test.zarr"))
        rows.put({"way": way, "steps": model.config["num_steps"], "psnr": psnr})
        click.echo(table_of(list(rows)))


@main.command()
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def report(output: Path) -> None:
    """The table of what was measured."""
    click.echo(table_of(list(Rows(output, ("way",)))))


if __name__ == "__main__":
    main()
