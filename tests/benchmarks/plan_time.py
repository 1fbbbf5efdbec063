"""What a block takes beside what the plan foretells, in seconds of one core, by parts.

    python -m tests.benchmarks.plan_time STORE ...      stores of measurements
    python -m tests.benchmarks.plan_time --side 1600    a scene of that side, cut into blocks

One block of each task of each store, by the task's own solver and the starter. CPU
seconds of the process on one thread: on a shared machine the clock on the wall says more of the
others. The denoiser's share is counted by itself, and the rest per step of the linear solves.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from domains.registry import load_domain
from flows.config import MethodSettings, config_path
from flows.engine import block as blocks
from flows.engine.objects import LocalObjects
from flows.engine.plan import ItemPlan, make_plan
from flows.engine.receipt import new_attempt, stage_block
from flows.store import Measurements
from tests.benchmarks import large_scene

RESULTS = Path(__file__).parent / "results" / "plan_time.json"
SCENE_TASKS = ("inpaint-random70", "inpaint-strokes")


def measure(store: Path, item: ItemPlan) -> dict[str, Any]:
    """Compute the block in the middle of an item, and tell what it took."""
    restorer, spent = blocks.Restorer(), [0.0]
    entry = Measurements(store).entry(item.item_id, item.task)
    whole, bounded = item.grid.block(item.num_blocks // 2), blocks._on_device

    def timed(denoise: Any, device: str) -> Any:
        inner = bounded(denoise, device)

        def call(x: Any, sigma: Any) -> Any:
            start = time.process_time()
            out = inner(x, sigma)
            spent[0] += time.process_time() - start
            return out

        return call

    blocks._on_device = timed
    try:
        measurement = restorer.read(store, item, whole)
        load_domain(item.record.domain).problem(measurement)  # what is loaded once is left out
        restorer.model_of(item)
        start = time.process_time()
        measurement = restorer.read(store, item, whole)
        read = time.process_time() - start
        pixels, account = restorer.compute(measurement, item, whole)
        computed = time.process_time() - start
        with tempfile.TemporaryDirectory() as folder:
            stage_block(LocalObjects(Path(folder)), item, whole, new_attempt(whole), pixels)
        total = time.process_time() - start
    finally:
        blocks._on_device = bounded
    return {
        "task": item.task,
        "params": {k: v for k, v in entry.params.items() if k in ("num_views", "canvas")},
        "exact": entry.noise.get("sigma_y") == 0.0,
        "operator": item.operator,
        "method": item.method.name,
        "tolerance": item.method.options.get("tolerance"),
        "levels": item.method.num_levels,
        "canvas": list(whole.read.shape),
        "channels": item.grid.shape[0],
        "foretold_s": round(item.cost.seconds, 2),
        "cpu_s": round(total, 2),
        "denoiser_s": round(spent[0], 2),
        "data_s": round(computed - read - spent[0], 2),
        "read_write_s": round(read + total - computed, 3),
        "operator_calls": account.num_operator_calls,
    }


def rows_of(
    store: Path, method: str, levels: int, tasks: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """One row a task of a store."""
    asked = {"name": method} if method != "own" else {}
    ways = [MethodSettings(**asked, **({"num_levels": levels} if levels else {}))]
    plan = make_plan(
        store.absolute(), store.parent / "out", model=config_path("models", "starter"),
        tasks=tasks or None, methods_for=lambda entry: ways,
    )  # fmt: skip
    first = {item.task: item for item in reversed(plan.items)}
    for _, item in sorted(first.items()):
        yield measure(plan.measurements, item)


@click.command()
@click.argument("stores", nargs=-1, type=click.Path(path_type=Path))
@click.option("--side", default=0, help="Of a scene to be made, in pixels.")
@click.option("--method", default="own", help="A solver; default: the task's own.")
@click.option("--levels", default=0, help="Noise levels; default: the task's own.")
@click.option("--task", "tasks", multiple=True, help="Only this; several can be given.")
@click.option("--keep", is_flag=True, help="Add to results/plan_time.json.")
def main(
    stores: tuple[Path, ...],
    side: int,
    method: str,
    levels: int,
    tasks: tuple[str, ...],
    keep: bool,
) -> None:
    """Print a row a task and method."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for task in (tasks or SCENE_TASKS) if side else ():
            work = Path(folder, task)
            work.mkdir()
            large_scene.make(work, large_scene.sample(), side, task)
            stores = (*stores, work / "scene.zarr")
        for store in stores:
            for row in rows_of(store, method, levels, tasks):
                rows.append(row)
                click.echo(json.dumps(row))
    if keep:
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        lines = ",\n ".join(json.dumps(row) for row in [*before, *rows])
        RESULTS.write_text(f"[\n {lines}\n]\n")


if __name__ == "__main__":
    main()
