"""Restoration of the demo's test images by a model, beside the best classical methods.

    python -m tests.benchmarks.restoration --model MODEL --work FOLDER [--task T ...]

FOLDER keeps the images (fetched by `sashiko samples`' catalogue: the demo's slices and windows, and
for tasks between slices or frames 31 slices of lung2, brain2, and 8 frames of bikes) and
what was restored; a command that was stopped goes on there. Every task is evaluated as
`sashiko evaluate` does it: CovProx with the model's settings and its task's evaluations, kriging,
and the task's classical methods with parameters frozen on validation images. With
--bm3d-python PYTHON, an environment that has PyPI's bm3d (its licence allows no commercial use, so
it is a process of its own, peer_call.py), BM3D is told sigma and restores denoise-25 too:

    python3.11 -m venv B && B/bin/pip install bm3d==4.0.3

A student (--model configs/models/starter-distilled) restores by itself in four evaluations, only
the tasks that it was distilled for; name another --output for its rows.

Rows go to tests/benchmarks/results/restoration.json: psnr, psnr_hole, ssim of a slice, still or
frame on [0, 1]. `--card` writes the table into the model's card; `--pictures FOLDER` keeps a strip
a task there, of the image whose gain is the median: measurement, classical, ours, truth. Tasks for
which a gain is asked come first; without --task all are done that there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from diffusion_core.model import DISTILLED, is_student, store_card_section, weights_digest
from domains.metrics import score
from domains.registry import load_domain
from flows.api_data import DemoItem, demo_items, ingest_samples
from flows.api_evaluate import EvaluateResult, evaluate
from flows.config import (
    ComputeSettings,
    EvaluateSettings,
    config_path,
    load_task,
    task_names,
)
from flows.report.rows import summarise
from flows.report.write import stories_of, strips
from flows.store import Dataset, Measurements
from tests.benchmarks.peer_function import PeerFunction
from tests.benchmarks.rows import Rows

RESULTS = Path(__file__).parent / "results" / "restoration.json"
HEADING = "Restoration of test images"
ASKED: Mapping[str, float] = {
    "ct-sparse60": 3.0,
    "ct-sparse20": 3.0,
    "kspace-x4-real": 3.0,
    "inpaint-random70": 1.5,
    "sr-x4": 0.6,
    "deblur-gauss": 0.6,
    "inpaint-strokes": 0.2,
    "denoise-25": 0.8,
    "kspace-x4": 1.5,
    "kspace-x8": 1.5,
    "ct-lowdose": 1.5,
}
"""Gain over the best classical method that the starter aims at, in dB; of other tasks none."""
STACKED = frozenset(
    {"ct-sr-z3", "mri-motion", "mri-sr-z3", "slices-missing", "video-missing", "video-strokes"}
)
"""Tasks that go on from slice to slice, or from frame to frame: they need neighbours."""
STACKS = (
    DemoItem("lung2", slices=tuple(range(15, 46)), crop=(128, 128, 256, 256)),
    DemoItem("brain2", slices=tuple(range(23))),
    DemoItem("bikes-3", slices=tuple(range(200, 208)), crop=(8, 64, 256, 512)),
)
PICTURE_PX = 1000
KEPT = ("domain", "region", "group", "psnr", "psnr_hole", "ssim", "nfe", "seconds")
AERIAL = ("pan2", "sample-geotiff")
ITEMS: Mapping[str, Sequence[str]] = {"destripe-slc": AERIAL, "inpaint-clouds": AERIAL}
"""Tasks that are of some images only: what satellites miss is of scenes from above."""
BM3D_SIGMA = 25 / 255
"""Of denoise-25, on the [0, 1] that BM3D sees."""


def task_order() -> list[str]:
    """Those for which a gain is asked, then the others by name."""
    return [*ASKED, *(name for name in task_names() if name not in ASKED)]


def images_of(task: str, work: Path) -> Path:
    """The dataset that a task is measured on, made where it is not there: the demo's, or stacks."""
    stacked = task in STACKED
    dataset = work / ("stacks.zarr" if stacked else "items.zarr")
    if not dataset.exists():
        ingest_samples(dataset, items=STACKS if stacked else demo_items())
    return dataset


def own_method(model: Path) -> str:
    """What a model restores with."""
    return DISTILLED if is_student(model) else "covprox"


def evaluated(task: str, dataset: Path, model: Path, folder: Path) -> EvaluateResult:
    """A task by ours, kriging, and the task's classical methods."""
    return evaluate(
        EvaluateSettings(
            input=dataset,
            tasks=[task],
            items=list(ITEMS[task]) if task in ITEMS else None,
            model=str(model),
            methods=[own_method(model), "kriging", *load_task(task).baselines],
            output=folder / task,
            compute=ComputeSettings(executor="inline"),
        )
    )


def keep_picture(made: EvaluateResult, task: str, folder: Path) -> None:
    """The strip of the report, as JPEG."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for _, strip in strips(stories_of(made)):
        picture = Image.fromarray(strip)
        picture.thumbnail((PICTURE_PX, PICTURE_PX))
        picture.save(folder / f"{task}.jpg", quality=85)


def rows_of(made: EvaluateResult, task: str, bm3d_python: Path | None) -> Iterator[dict[str, Any]]:
    """The rows of an evaluated task, and those of BM3D if it is there."""
    for row in made.rows:
        yield _row(row, task, f"{row['item']}/{row['slice']}", row["method"])
    if task == "denoise-25" and bm3d_python is not None:
        with (
            PeerFunction(bm3d_python, "bm3d", "bm3d") as one,
            PeerFunction(bm3d_python, "bm3d", "bm3d_rgb") as three,
        ):
            yield from _bm3d(Dataset(made.dataset), Measurements(made.measurements), one, three)


def _row(figures: Mapping[str, Any], task: str, item: str, method: str) -> dict[str, Any]:
    kept = {name: figures[name] for name in KEPT if figures.get(name) is not None}
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in kept.items()}
    return {"task": task, "item": item, "method": method, **rounded}


def _bm3d(
    dataset: Dataset, measurements: Measurements, one: PeerFunction, three: PeerFunction
) -> Iterator[dict[str, Any]]:
    """Photographs as colours, other images band by band."""
    for entry in measurements.entries():
        record, domain = entry.record, load_domain(entry.record.domain)
        truth = dataset.read(entry.item_id)
        problem = domain.problem(measurements.read(entry.item_id, entry.task))
        noisy = (problem.y.movedim(1, -1).numpy() + 1) / 2  # (z h w c) on [0, 1]
        restored = np.stack([_denoised(image, one, three) for image in noisy])
        x = problem.to_source(problem.y.new_tensor(restored * 2 - 1).movedim(-1, 1))
        images = np.moveaxis(x.numpy(), 1, 0)
        for z, figures in enumerate(score(domain, truth, images)):
            facts = {"domain": record.domain, "region": "image", "group": record.group, "nfe": 0}
            yield _row({**figures, **facts}, entry.task, f"{entry.item_id}/{z}", "bm3d")


def _denoised(image: np.ndarray, one: PeerFunction, three: PeerFunction) -> np.ndarray:
    """One image (h w c)."""
    if image.shape[-1] == 3:
        return three(image, sigma_psd=BM3D_SIGMA)
    bands = [one(image[..., band], sigma_psd=BM3D_SIGMA) for band in range(image.shape[-1])]
    return np.stack([band.reshape(image.shape[:2]) for band in bands], axis=-1)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: by task, ours against the classical method of the highest mean."""
    lines = [
        "| task | images | evaluations | ours, SSIM | best classical, SSIM | gain (std) | asked "
        "| seconds: ours, classical |",
        "|---" * 8 + "|",
    ]
    flat = [{**row, "slice": 0} for row in rows if row["method"] != "bm3d"]
    for found in sorted(summarise(flat), key=lambda s: task_order().index(s.task)):
        ours, best = found.ours, found.best_classical
        if ours is None or best is None:
            continue
        gains = [ours.values[key] - best.values[key] for key in ours.values]
        where = " (hole)" if found.metric == "psnr_hole" else ""
        asked = f"{ASKED[found.task]:+.1f}" if found.task in ASKED else ""
        lines.append(
            f"| {found.task}{where} | {ours.num_rows} | {ours.means['nfe']:.0f} "
            f"| {ours.means[found.metric]:.2f}, {ours.means['ssim']:.3f} "
            f"| {best.means[found.metric]:.2f}, {best.means['ssim']:.3f} {best.method} "
            f"| {ours.gain_db:+.2f} ({np.std(gains, ddof=1):.2f}) | {asked} "
            f"| {ours.means['seconds']:.1f}, {best.means['seconds']:.1f} |"
        )
    bm3d = [row["psnr"] for row in rows if row["method"] == "bm3d"]
    if bm3d:
        lines.append(f"\nBM3D, told sigma, has {np.mean(bm3d):.2f} dB on denoise-25.")
    return "\n".join(lines)


def card_section(rows: Sequence[Mapping[str, Any]], weights: str) -> str:
    """The table with what a reader of the model card must know."""
    return f"""By `python -m tests.benchmarks.restoration`, weights {weights}:
PSNR in dB on [0, 1], mean over slices, stills and frames of the test split, which
neither training nor calibration saw; the gain's standard deviation is over them. One patient a
modality: nothing here speaks of differences between patients.

{table(rows)}"""


@click.command(help=__doc__)
@click.option("--model", default=None, type=click.Path(path_type=Path), help="[default: starter]")
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--task", "tasks", multiple=True, type=click.Choice(task_order()))
@click.option("--bm3d-python", type=click.Path(path_type=Path, exists=True))
@click.option("--card", is_flag=True, help="Write the table into the model's card.")
@click.option("--pictures", type=click.Path(path_type=Path), help="Keep a strip a task there.")
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def main(
    model: Path | None,
    work: Path,
    tasks: tuple[str, ...],
    bm3d_python: Path | None,
    card: bool,
    pictures: Path | None,
    output: Path,
) -> None:
    """Measure, print, and tell the card."""
    path = model or config_path("models", "starter")
    weights = weights_digest(path)[:12]
    rows = Rows(output)
    for task in tasks or task_order():
        made = evaluated(task, images_of(task, work), path, work / weights)
        for row in rows_of(made, task, bm3d_python):
            rows.put({**row, "weights": weights})
        if pictures is not None:
            keep_picture(made, task, pictures)
        click.echo(table([row for row in rows if row["task"] == task]))
    same = [row for row in rows if row.get("weights") == weights]
    click.echo(table(same))
    if card:
        click.echo(f"model: {store_card_section(path, HEADING, card_section(same, weights))}")


if __name__ == "__main__":
    main()
