"""A disk fills at several moments of a run, and is given space again: STORE DISK UNDISTURBED."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import click
from engine_kit import published, same, tiny_plan

from flows.engine.campaign import CampaignError, run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.objects import LocalObjects
from flows.engine.receipt import load_receipts
from flows.engine.verify import verify_output


def num_receipts(plan) -> int:
    objects = LocalObjects(plan.output)
    return sum(len(load_receipts(objects, item)) for item in plan.items)


def fill(disk: Path, *, leave: int) -> Path:
    """Fill the disk but for so many bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            size = ballast.stat().st_size
    with ballast.open("r+b") as file:
        file.truncate(max(0, size - leave))
    return ballast


if __name__ == "__main__":
    store, disk, undisturbed = map(Path, sys.argv[1:])
    run_plan(tiny_plan(store, undisturbed), InlineExecutor())
    plan = tiny_plan(store, disk / "out")
    errors: list[str] = []
    torn = twice = 0
    for leave in (40_000, 90_000, 140_000):
        ballast = fill(disk, leave=leave)
        before = num_receipts(plan) + 3 * len(published(disk / "out"))
        try:
            run_plan(plan, InlineExecutor())
        except CampaignError as error:
            errors.append(str(error))
        except OSError as error:
            errors.append(f"raw: {error}")
        after = num_receipts(plan) + 3 * len(published(disk / "out"))
        twice += after < before
        torn += len(verify_output(LocalObjects(disk / "out")).damages)
        ballast.unlink()
    before = num_receipts(plan) + 3 * len(published(disk / "out"))
    result = run_plan(plan, InlineExecutor())
    twice += result.num_computed != plan.num_blocks - before
    click.echo(
        json.dumps(
            {
                "errors": errors,
                "torn": torn,
                "num_quarantined": len(result.quarantined),
                "num_computed_twice": twice,
                "same": same(published(disk / "out"), published(undisturbed)),
            }
        )
    )
