"""What the engine itself costs: a block of nothing, several actors, a job of a minute.

    python -m tests.benchmarks.engine [--only PART]

overhead   a method that doubles its input, 1,000 blocks of one slice of 64 x 64, two actors, store
           and output on the disk and on a file system in memory: wall milliseconds a block,
           publishing included, three runs; the processors' milliseconds a block, which depend less
           on who else is at work, of the driver and of both actors; and, from a profile (which
           slows it down), where those of one process go
naps       a method that sleeps a quarter of a second, 1, 2, 4 and 8 actors: speed over that of one
           actor that loses nothing, that is, blocks * nap / (actors * wall)
speedup    a method that keeps a core busy, one actor and two in turn: the ratio of their wall
           times, the best of three and all, for blocks of about a quarter of a second (a plane of
           256 x 256 by the starter takes two to four) and of a tenth of that
minute     naps again, a minute of them on two actors: the share of the wall time that is not naps

Actors are up and have loaded everything before a clock starts. The work of the engine is done by
the cores that the methods would use: on a machine that is busy with other things all of it is
slower, so results/engine.json says what the load was.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import psutil

KIT = Path(__file__).parents[1] / "kit"
RESULTS = Path(__file__).parent / "results" / "engine.json"
NAP_S = 0.25
ROUNDS = (600, 60)
"""Convolutions of a block: a millisecond each, or less."""

MEMORY = Path("/dev/shm")
"""Linux's file system in memory: without a disk, what is left is the engine."""

STAGES = {
    "read": "read",
    "compute": "compute",
    "stage_block": "write, read back, hash",
    "create_receipt": "receipt",
    "_publish": "publish (driver)",
}
sys.path.insert(0, str(KIT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(KIT), os.environ.get("PYTHONPATH", "")])

from engine_kit import make_store, method, tiny_plan  # noqa: E402

from flows.engine.campaign import run_plan  # noqa: E402
from flows.engine.executor import Executor, InlineExecutor, RayExecutor  # noqa: E402


def store_of(folder: Path, num_items: int, num_slices: int, side: int) -> Path:
    """A store of the tiny domain."""
    path = folder / f"m-{num_items}-{num_slices}-{side}.zarr"
    return path if path.exists() else make_store(
        path, items=num_items, shape=(1, num_slices, side, side)
    )  # fmt: skip


def timed(executor: Executor, store: Path, **way: Any) -> tuple[float, int]:
    """Wall seconds of a run on actors that are warm, and its blocks.

    Its output stays until the end: ext4 is slow to make files soon after thousands were removed.
    """
    folder = tempfile.mkdtemp(dir=store.parent)
    plan = tiny_plan(store, Path(folder), method(way.pop("name"), **way))
    start = time.perf_counter()
    result = run_plan(plan, executor)
    seconds = time.perf_counter() - start
    assert result.num_computed == plan.num_blocks
    return seconds, plan.num_blocks


def warm(executor: RayExecutor, store: Path) -> None:
    """Start all actors, and let each have done a block."""
    import ray

    executor.start()
    ray.get([seat.starting for seat in executor._seats if seat.starting])
    timed(executor, store, name="twice")
    time.sleep(1.0)  # Ray's own idle workers go


def processor_seconds(pool: RayExecutor) -> dict[str, float]:
    """Seconds of processors that the driver and the actors have had."""
    import ray

    pids = [ray.get(seat.actor.__ray_call__.remote(lambda _: os.getpid())) for seat in pool._seats]
    actors = sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)
    return {"driver": sum(psutil.Process().cpu_times()[:2]), "actors": actors}


def overhead(folder: Path, num_items: int = 10, num_slices: int = 100) -> dict[str, Any]:
    """A block of nothing, on the disk and, where there is one, on a file system in memory."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else folder) as memory:
        places = {"disk": folder} | ({"memory": Path(memory)} if MEMORY.is_dir() else {})
        stores = {
            name: store_of(place, num_items, num_slices, 64) for name, place in places.items()
        }
        with RayExecutor(2) as pool:
            warm(pool, store_of(folder, 2, 20, 64))
            for name, store in stores.items():
                found[f"on_{name}"] = two_actors(pool, store)
    store, inline = stores["disk"], InlineExecutor()
    timed(inline, store_of(folder, 2, 20, 64), name="twice")
    seconds, blocks = timed(inline, store, name="twice")
    found["one_process_ms_a_block"] = round(1e3 * seconds / blocks, 2)
    profile = cProfile.Profile()
    profile.runcall(timed, inline, store, name="twice")
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    found["profiled_ms_a_block"] = {
        label: round(1e3 * sum(v[3] for k, v in stats.items() if k[2] == name) / blocks, 2)
        for name, label in STAGES.items()
    }
    return found


def two_actors(pool: RayExecutor, store: Path) -> dict[str, Any]:
    """Milliseconds of a block, by the clock and of the processors."""
    before = processor_seconds(pool)
    runs = [timed(pool, store, name="twice") for _ in range(3)]
    blocks = sum(number for _, number in runs)
    after = processor_seconds(pool)
    return {
        "ms_a_block": [round(1e3 * s / n, 2) for s, n in runs],
        "of_processors": {
            who: round(1e3 * (after[who] - before[who]) / blocks, 2) for who in after
        },
    }


def naps(folder: Path, actors: tuple[int, ...] = (1, 2, 4, 8), each: int = 40) -> dict[str, Any]:
    """Share of linear speed that several actors reach."""
    found = {}
    for count in actors:
        store = store_of(folder, 2, count * each // 2, 64)
        with RayExecutor(count) as pool:
            warm(pool, store_of(folder, 2, 20, 64))
            seconds, blocks = timed(pool, store, name="nap", seconds=NAP_S)
        found[str(count)] = round(blocks * NAP_S / (count * seconds), 4)
    return found


def speedup(
    folder: Path, all_rounds: tuple[int, ...] = ROUNDS, repeats: int = 3, blocks: int = 32
) -> dict[str, Any]:
    """Two actors against one, in turn."""
    store = store_of(folder, 2, blocks // 2, 256)
    found = {}
    with RayExecutor(2) as two:
        warm(two, store)
        one = replace_pool(two)
        for rounds in all_rounds:
            walls = []
            for _ in range(repeats):
                alone, _ = timed(one, store, name="toil", rounds=rounds)
                both, _ = timed(two, store, name="toil", rounds=rounds)
                walls.append((alone, both))
            ratios = [round(alone / both, 3) for alone, both in walls]
            block_s = round(min(alone for alone, _ in walls) / blocks, 3)
            found[f"{rounds}_rounds"] = {"block_s": block_s, "best": max(ratios), "all": ratios}
    return found


def replace_pool(pool: RayExecutor) -> RayExecutor:
    """The same actors, all but the first left out."""
    single = RayExecutor(1)
    single._seats = pool._seats[:1]
    return single


def minute(folder: Path, seconds: float = 60.0) -> dict[str, Any]:
    """What a job of naps on two actors loses."""
    store = store_of(folder, 4, round(seconds / NAP_S / 2), 64)
    with RayExecutor(2) as pool:
        warm(pool, store_of(folder, 2, 20, 64))
        wall, blocks = timed(pool, store, name="nap", seconds=NAP_S)
    ideal = blocks * NAP_S / 2
    return {"wall_s": round(wall, 2), "lost_share": round(1 - ideal / wall, 4)}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "overhead": overhead,
    "naps": naps,
    "speedup": speedup,
    "minute": minute,
}


@click.command(help=__doc__)
@click.option("--only", type=click.Choice(list(PARTS)), multiple=True)
def main(only: tuple[str, ...]) -> None:
    """Run the parts, print what was found, and keep it."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in only or PARTS:
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            values = PARTS[name](Path(folder))
        found[name] = {**values, "load_before": round(load, 2), "cores": os.cpu_count()}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        sys.stdout.write(f"{name}: {json.dumps(found[name])}\n")


if __name__ == "__main__":
    main()
