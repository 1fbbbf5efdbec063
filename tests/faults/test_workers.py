"""Faults 2, 6 and 13 in Ray: workers killed in mid-write, stopped, or killed by their item."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage_kit import visible
from engine_kit import method, published, recorder, same, tiny_plan

from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor, RayExecutor
from flows.engine.garbage import collect_garbage
from flows.engine.objects import LocalObjects
from flows.engine.quarantine import load_quarantine
from flows.engine.verify import verify_output

pytestmark = pytest.mark.ray

KIT = Path(__file__).parents[1] / "kit"
ITEMS, SLICES = 2, 3


@pytest.fixture(scope="module")
def pool() -> Iterator[RayExecutor]:
    from flows.engine.ray_session import ray_session

    with pytest.MonkeyPatch.context() as patch:
        known = [str(KIT), os.environ.get("PYTHONPATH")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, known)))
        with ray_session(None, num_cpus=2), RayExecutor(2) as executor:
            yield executor


def by_item(output: Path) -> dict:
    return of_items(published(output))


def of_items(found: dict) -> dict:
    return {item: pixels for (item, _), pixels in found.items()}


def test_a_worker_killed_in_mid_write_leaves_nothing_torn_and_its_block_is_retried(
    pool, store, undisturbed, tmp_path
):
    output = tmp_path / "out"
    way = method("torn-write", once=str(tmp_path / "once"))
    events, handler = recorder()
    result = run_plan(tiny_plan(store, output, way), pool, handler)
    assert result.num_retries >= 1
    assert {e.facts["failure"] for e in events if e.kind == "retry"} <= {"worker", "lost"}
    assert result.quarantined == ()
    assert same(by_item(output), of_items(undisturbed))
    assert verify_output(LocalObjects(output)).intact
    assert (tmp_path / "once").exists()


def test_an_item_that_kills_its_worker_each_time_is_given_up_and_then_left_alone(
    pool, store, undisturbed, tmp_path
):
    plan = tiny_plan(store, tmp_path, method("kill", where=["item-0"]))
    key = next(item.key for item in plan.items if item.item_id == "item-0")
    before = pool.num_replaced
    [entry] = run_plan(plan, pool, max_attempts=2, max_runs=1).quarantined
    assert (entry.item_id, entry.kind, entry.num_runs) == ("item-0", "worker", 1)
    # Its other blocks may be in hands already when the first is given up, and kill as well.
    assert 2 <= pool.num_replaced - before <= 2 * SLICES
    before = pool.num_replaced
    [entry] = run_plan(plan, pool, max_attempts=2, max_runs=1).quarantined
    assert pool.num_replaced == before, "it kills nobody any more"
    assert entry == load_quarantine(LocalObjects(tmp_path), key)
    assert same(by_item(tmp_path), {"item-1": of_items(undisturbed)["item-1"]})


def test_a_worker_that_stands_still_while_another_driver_finishes_touches_nothing(
    pool, store, undisturbed, tmp_path
):
    """Its block is computed by the other; it goes on an hour later, after gc."""
    output, told = tmp_path / "out", tmp_path / "pid"
    way = method("stop", once=str(tmp_path / "once"), pid=str(told))
    plan = tiny_plan(store, output, way)
    before: dict = {}

    def other_driver() -> None:
        run_plan(plan, InlineExecutor())
        collect_garbage(LocalObjects(output), min_age_s=-3600.0, silence_s=0.0)
        before.update(visible(output))
        os.kill(int(told.read_text()), signal.SIGCONT)

    def handler(event):
        if told.exists() and not before and event.kind == "block":
            other_driver()

    result = run_plan(plan, pool, handler)
    assert before, "a worker stood still"
    assert visible(output) == before
    assert same(by_item(output), of_items(undisturbed))
    assert len(result.published) == ITEMS
