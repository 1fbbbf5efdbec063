"""Fault 1 and 4: kill -9 a driver anywhere, run again: same bytes, and nothing receipted twice."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from engine_kit import lines, make_store, method, published, same, tiny_plan
from kills import MOMENTS, num_operations, run_and_kill

from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.objects import LocalObjects
from flows.engine.publish import load_manifest
from flows.engine.receipt import load_receipts

ITEMS, SLICES = 2, 3
DRIVER = Path(__file__).parents[1] / "kit" / "driver.py"


def num_receipts(plan) -> int:
    """Receipts of the items that are not published: a kill may leave those of published ones."""
    objects = LocalObjects(plan.output)
    left = [item for item in plan.items if load_manifest(objects, item.key) is None]
    return sum(len(load_receipts(objects, item)) for item in left)


def test_a_driver_killed_at_any_operation_resumes_to_the_same_bytes(store, undisturbed, tmp_path):
    operations = num_operations(tiny_plan(store, tmp_path / "count"), tmp_path / "count")
    for at in range(1, operations + 1):
        output = tmp_path / f"out-{at}"
        plan = tiny_plan(store, output)
        assert run_and_kill(plan, at, MOMENTS[at % 3])
        seen = published(output)
        assert same(seen, {key: undisturbed[key] for key in seen}), "half an item was visible"
        receipts = num_receipts(plan)
        result = run_plan(plan, InlineExecutor())
        whole = SLICES * len(seen)
        assert result.num_computed == ITEMS * SLICES - receipts - whole
        assert same(published(output), undisturbed)
        assert not list((output / ".work").glob("*/stage")), "the work of published items is gone"


@pytest.mark.parametrize(
    ("wanted", "seed"), [(20, 7), pytest.param(200, 8, marks=pytest.mark.slow)]
)
def test_a_driver_killed_again_and_again_computes_every_receipted_block_once(
    wanted, seed, tmp_path
):
    """So many kills at random moments, over as many campaigns as these take."""
    chance = random.Random(seed)
    kills = campaigns = 0
    while kills < wanted:
        campaigns += 1
        kills += killed_on_its_way(tmp_path / str(campaigns), chance, wanted - kills)
    assert kills == wanted


def killed_on_its_way(folder: Path, chance: random.Random, most: int) -> int:
    """One campaign with other pixels than any before, killed until it is done; returns kills."""
    folder.mkdir()
    shape = (1, SLICES, 20 + chance.randint(0, 9), 24)
    store = make_store(folder / "m.zarr", items=ITEMS, shape=shape)
    run_plan(tiny_plan(store, folder / "undisturbed"), InlineExecutor())
    output, log = folder / "out", folder / "log"
    plan = tiny_plan(store, output, method(log=str(log)))
    kills = lost = 0
    while kills < most and run_and_kill(plan, chance.randint(1, 12), chance.choice(MOMENTS)):
        kills += 1
        # A kill between computing and receipt loses one block; never more, and never a receipt.
        done = num_receipts(plan) + SLICES * len(published(output))
        assert lines(log) - done - lost in (0, 1)
        lost = lines(log) - done
        seen, whole = published(output), published(folder / "undisturbed")
        assert same(seen, {key: whole[key] for key in seen}), "half an item was visible"
    run_plan(plan, InlineExecutor())
    assert lines(log) == ITEMS * SLICES + lost
    assert same(published(output), published(folder / "undisturbed"))
    return kills


def test_a_driver_process_killed_from_outside_resumes(store, undisturbed, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    arguments = [sys.executable, str(DRIVER), str(store), str(output), str(log)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as driver:
        told = (json.loads(line) for line in driver.stdout)
        next(event for event in told if event["kind"] == "block" and event["done"] == 2)
        driver.send_signal(signal.SIGKILL)
    plan = tiny_plan(store, output, method(log=str(log)))
    receipts, seen = num_receipts(plan), published(output)
    before = lines(log)
    run_plan(plan, InlineExecutor())
    assert receipts + SLICES * len(seen) >= 2
    assert lines(log) - before == ITEMS * SLICES - receipts - SLICES * len(seen)
    assert same(published(output), undisturbed)
