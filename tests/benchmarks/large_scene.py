"""A large scene restored end to end: an aerial image repeated with overlaps, 70% of it missing.

    python -m tests.benchmarks.large_scene --side 5000 --levels 12      25 MP at 12 evaluations
    python -m tests.benchmarks.large_scene --side 10000 --levels 4      100 MP at 4

No sample is that large, so one is made: the 1300^2 aerial image of the samples laid out again and
again, turned by quarter turns, neighbours faded into each other over 100 px, its 11 bits brought to
8 (in a file of 16 bits it would drown in the task's noise). It is measured by the task's own
degradation (`--task`), in a process of its own; `sashiko restore` then does it with two workers and
without a server, and the truth is compared band by band. results/large_scene.json keeps time, peak
memory of driver and workers beside what the plan foretold, seams, and PSNR.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

RESULTS = Path(__file__).parent / "results" / "large_scene.json"
LABEL = "las-vegas"
OVERLAP_PX = 100
Array = np.ndarray[Any, Any]


def scene_of(image: Array, side: int) -> Array:
    """Lay an image (c h w) out over side x side pixels, neighbours faded into each other.

    Args:
        image: square.
        side: of the scene, pixels.
    """
    length = image.shape[-1]
    step = length - OVERLAP_PX
    rise = (np.arange(OVERLAP_PX) + 0.5) / OVERLAP_PX
    count = max(1, -(-(side - OVERLAP_PX) // step))
    total = count * step + OVERLAP_PX
    scene = np.zeros((len(image), total, total), np.float32)
    for row in range(count):
        for column in range(count):
            copy = np.rot90(image, (row + 2 * column) % 4, axes=(1, 2)).astype(np.float32)
            weight = np.outer(_fade(row, count, rise, length), _fade(column, count, rise, length))
            y, x = row * step, column * step
            scene[:, y : y + length, x : x + length] += copy * weight.astype(np.float32)
    return scene[:, :side, :side]


def _fade(place: int, count: int, rise: Array, length: int) -> Array:
    """Weights of one copy along an axis: the rise of one is the fall of the other."""
    weight = np.ones(length)
    if place:
        weight[:OVERLAP_PX] = rise
    if place < count - 1:
        weight[-OVERLAP_PX:] = rise[::-1]
    return weight


def make(work: Path, source: Path, side: int, task: str) -> None:
    """Write the scene as truth.npy and its measurements as scene.zarr."""
    from domains.base import Item
    from domains.registry import load_domain
    from flows.config import load_task
    from flows.store import MeasurementWriter

    domain = load_domain("city")
    item = domain.read(source)
    image = item.pixels[:, 0, : min(item.pixels.shape[2:]), : min(item.pixels.shape[2:])]
    scene = np.rint(scene_of(image * (255.0 / image.max()), side)).astype(np.uint8)
    np.save(work / "truth.npy", scene)
    digest = hashlib.sha256(scene.tobytes()).hexdigest()
    record = replace(
        item.record,
        item_id="large-scene",
        shape=(scene.shape[0], 1, side, side),
        source_digest=digest,
        source_format="tiff",
        dtype="uint8",
        affine=None,
        meta={},
    )
    measurement = domain.simulate(Item(scene[:, None], record), load_task(task), 0)
    with MeasurementWriter(work / "scene.zarr") as writer:
        writer.add(measurement)


def drive(work: Path, levels: int, workers: int, block: int) -> dict[str, Any]:
    """Restore the scene with the starter, and say what it took."""
    from flows.api_restore import plan, restore
    from flows.config import ComputeSettings, MethodSettings, RestoreSettings
    from flows.console import Terminal
    from flows.engine.memory import peak_bytes

    settings = RestoreSettings(
        input=work / "scene.zarr",
        output=work / "out",
        model="starter",
        method=MethodSettings(num_levels=levels),
        block_size=block,
        compute=ComputeSettings(executor="ray", num_workers=workers, num_gpus_per_worker=0),
    )
    with Terminal() as terminal:
        result = restore(settings, terminal)
    driver, planned, account = peak_bytes(), plan(settings), result.account
    return {
        "blocks": result.num_blocks,
        "computed": account.num_computed,
        "seconds": round(account.seconds, 1),
        "device_seconds": round(account.device_seconds, 1),
        "foretold_seconds": round(planned.predicted_seconds, 1),
        "megapixels_per_s": round(account.megapixels_per_s, 4),
        "num_bytes": account.num_bytes,
        "driver_bytes": driver,
        "driver_foretold": planned.driver_peak_bytes,
        "worker_bytes": account.peak_bytes,
        "worker_foretold": planned.worker_peak_bytes,
        "nfe": result.published[0].nfe,
        "residual": result.published[0].residual,
        "seam": account.worst_seam and asdict(account.worst_seam),
        "file_bytes": result.files[0].stat().st_size,
    }


def psnr(work: Path) -> float:
    """Of the published pixels against the truth, on 0 to 255, band by band."""
    from flows.engine.restored import open_restored

    truth = np.load(work / "truth.npy", mmap_mode="r")
    restored = open_restored(work / "out")
    [entry] = restored.items()
    total = 0.0
    for y in range(0, truth.shape[1], 512):
        rows = slice(y, y + 512)
        pixels = restored.read(entry, plane=(rows, slice(None)))[:, 0]
        total += float(np.square(pixels.astype(np.float64) - truth[:, rows]).sum())
    return -10 * math.log10(total / truth.size / 255.0**2)


def keep(row: dict[str, Any]) -> None:
    """Put a row into the results, in the place of one of the same size, task and levels."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    key = ("side", "task", "levels", "block")
    others = [r for r in rows if [r[k] for k in key] != [row[k] for k in key]]
    text = ",\n ".join(json.dumps(r) for r in [*others, row])
    RESULTS.write_text(f"[\n {text}\n]\n")


@click.command(help=__doc__)
@click.option("--side", default=5000, show_default=True)
@click.option("--levels", default=12, show_default=True)
@click.option("--task", default="inpaint-random70", show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--block", default=512, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/large-scene"))
@click.option("--source", type=click.Path(path_type=Path), help="[default: of the samples]")
@click.option("--part", hidden=True)
def main(
    side: int,
    levels: int,
    task: str,
    workers: int,
    block: int,
    work: Path,
    source: Path | None,
    part: str | None,
) -> None:
    """See the module."""
    if part == "make":
        assert source is not None
        make(work, source, side, task)
        return
    if part == "drive":
        sys.stdout.write("\n" + json.dumps(drive(work, levels, workers, block)) + "\n")
        return
    work.mkdir(parents=True, exist_ok=True)
    common = [sys.executable, "-m", "tests.benchmarks.large_scene", "--work", str(work)]
    asked = f"--side {side} --levels {levels} --task {task} --workers {workers} --block {block}"
    common += asked.split()
    if not (work / "scene.zarr").exists():
        found = source or sample()
        subprocess.run([*common, "--part", "make", "--source", str(found)], check=True)
    told = subprocess.run([*common, "--part", "drive"], check=True, stdout=subprocess.PIPE)
    row = {"side": side, "task": task, "levels": levels, "block": block, "workers": workers}
    row |= json.loads(told.stdout.splitlines()[-1]) | {"psnr": round(psnr(work), 3)}
    keep(row)
    sys.stdout.write(json.dumps(row, indent=1) + "\n")
    shutil.rmtree(work)


def sample() -> Path:
    """The aerial image of the samples."""
    from flows.api_data import samples
    from flows.config import SamplesSettings

    return next(s.path for s in samples(SamplesSettings()) if s.label == LABEL)


if __name__ == "__main__":
    main()
