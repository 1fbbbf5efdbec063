"""Peak memory of driver and worker, from a volume to one of sixteen times as much.

    python -m tests.benchmarks.memory [--prefect]

Two kinds of item, each in a process of its own, with a worker of Ray in another:

    scene     a photograph with holes, 1600^2 and 6400^2 x 3, cut into tiles of 256 px (telea)
    volume    CT of 128^2 from 60 views, 128 and 2048 slices, 16 a block (fbp)

What is read is the kernel's record of a process's highest resident memory (VmHWM): of the driver
at its end, files handed over; of the worker around each block, kept in its receipt. Asked: within
5% from once to sixteen times, and never above what the plan foretold. results/memory.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

RESULTS = Path(__file__).parent / "results" / "memory.json"
TIMES = (1, 16)
KINDS = ("scene", "volume")
MOST_GROWTH = 1.05


def make(kind: str, times: int, path: Path) -> None:
    """Write the measurements of an item of correlated noise."""
    from domains.base import Item, ItemRecord
    from domains.registry import load_domain
    from flows.config import load_task
    from flows.store import MeasurementWriter

    rng = np.random.default_rng(0)
    side = 1600 * int(times**0.5)
    shape = (3, 1, side, side) if kind == "scene" else (1, 128 * times, 128, 128)
    coarse = rng.integers(0, 255, (*shape[:2], shape[2] // 8, shape[3] // 8)).astype(np.uint8)
    pixels = coarse.repeat(8, axis=2).repeat(8, axis=3)
    record = ItemRecord(
        item_id=kind,
        domain="city" if kind == "scene" else "ct",
        shape=shape,
        dtype="uint8" if kind == "scene" else "int16",
        units="intensity" if kind == "scene" else "HU",
        source_digest="0" * 64,
        source_format="png" if kind == "scene" else "nifti",
        spacing_mm=None if kind == "scene" else (1.0, 1.0, 1.0),
    )
    domain = load_domain(record.domain)
    with MeasurementWriter(path) as writer:
        if kind == "scene":
            mask = (rng.random((1, 1, side, side)) < 0.1).astype(bool)
            item = Item(pixels, record)
            writer.add(domain.given(item, mask=mask, kernel=None, scale=None, sigma_y=0.0))
        else:
            item = Item(pixels.astype(np.int16) * 8 - 1000, record)
            writer.add(domain.simulate(item, load_task("ct-sparse60"), 0))


def drive(kind: str, store: Path, output: Path, *, prefect: bool) -> dict[str, Any]:
    """Restore a store with one worker; returns peaks and predictions in bytes."""
    from flows.api_restore import plan, restore
    from flows.config import ComputeSettings, MethodSettings, RestoreSettings
    from flows.engine.memory import peak_bytes

    method = MethodSettings(name="telea" if kind == "scene" else "fbp", kind="baseline")
    compute = ComputeSettings(executor="ray", num_workers=1, num_gpus_per_worker=0)
    settings = RestoreSettings(
        input=store,
        output=output,
        method=method,
        compute=compute,
        slices_per_block=16,
        block_size=256,
    )
    start = time.perf_counter()
    if prefect:
        from flows.restore import restore_flow

        result = restore_flow(settings)
    else:
        result = restore(settings)
    seconds, driver = time.perf_counter() - start, peak_bytes()
    planned = plan(settings)
    return {
        "blocks": result.num_blocks,
        "driver_bytes": driver,
        "driver_foretold": planned.driver_peak_bytes,
        "worker_bytes": result.account.peak_bytes,
        "worker_foretold": planned.worker_peak_bytes,
        "seconds": round(seconds, 1),
    }


def row_of(kind: str, times: int, *, prefect: bool) -> dict[str, Any]:
    """Make and restore in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        common = [sys.executable, "-m", "tests.benchmarks.memory", "--part"]
        store, output = str(Path(folder, "m.zarr")), str(Path(folder, "out"))
        subprocess.run([*common, f"make:{kind}:{times}:{store}"], check=True)
        asked = f"drive:{kind}:{store}:{output}"
        told = subprocess.run(
            [*common, asked, *(["--prefect"] if prefect else [])],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    return {"kind": kind, "times": times, **json.loads(told.stdout.splitlines()[-1])}


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Growth from once to sixteen times, and the share of what was foretold."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        small, large = (r for r in rows if r["kind"] == kind)
        for who in ("driver", "worker"):
            growth = large[f"{who}_bytes"] / small[f"{who}_bytes"]
            share = max(r[f"{who}_bytes"] / r[f"{who}_foretold"] for r in (small, large))
            found[f"{kind}, {who}"] = {
                "growth": round(growth, 3),
                "share_of_foretold": round(share, 3),
                "held": growth <= MOST_GROWTH and share <= 1,
            }
    return found


@click.command(help=__doc__)
@click.option("--prefect", is_flag=True, help="As the Prefect flow, whose process is larger.")
@click.option("--part", hidden=True)
def main(prefect: bool, part: str | None) -> None:
    """Measure all sizes, or carry out one part in this process."""
    if part is not None:
        what, kind, *rest = part.split(":")
        if what == "make":
            make(kind, int(rest[0]), Path(rest[1]))
        else:
            told = drive(kind, Path(rest[0]), Path(rest[1]), prefect=prefect)
            sys.stdout.write("\n" + json.dumps(told) + "\n")
        return
    rows = []
    for kind in KINDS:
        for times in TIMES:
            rows.append(row_of(kind, times, prefect=prefect))
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known["prefect" if prefect else "plain"] = {"held": verdict(rows), "rows": rows}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    sys.stdout.write(json.dumps(verdict(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
