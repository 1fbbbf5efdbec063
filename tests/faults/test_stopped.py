"""Fault 6: a driver or a worker that stands still, and goes on after others have finished."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage_kit import content_of, visible
from engine_kit import make_store, published, same, tiny_plan
from kills import (
    MOMENTS,
    count_operations,
    goes_on_well,
    has_ended,
    num_operations,
    reap,
    start,
    start_and_stop,
)

from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.garbage import collect_garbage
from flows.engine.objects import LocalObjects
from flows.engine.worker import BlockJob, BlockWorker

AN_HOUR_LATER = {"min_age_s": -3600.0, "silence_s": 0.0}
"""A gc to whom everything is old and everybody dead."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("in") / "m.zarr", items=1, shape=(1, 2, 20, 24))


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("undisturbed")
    run_plan(tiny_plan(store, output), InlineExecutor())
    return published(output)


@pytest.fixture(autouse=True)
def _nobody_is_left() -> Iterator[None]:
    yield
    reap()


def moments(number: int) -> str:
    return MOMENTS[number % 3]


def every_other(operations: int, first: int) -> list[int]:
    """Operations to stop at: every other one, and all of the last, where items are published."""
    return sorted({*range(first, operations + 1, 2), *range(operations - 10, operations + 1)})


def test_a_driver_stopped_at_any_operation_touches_nothing_that_another_published(
    store, undisturbed, tmp_path
):
    operations = num_operations(tiny_plan(store, tmp_path / "n"), tmp_path / "n")
    for at in every_other(operations, 1):
        output = tmp_path / f"out-{at}"
        plan = tiny_plan(store, output)
        child = start_and_stop(lambda plan=plan: run_plan(plan, InlineExecutor()), at, moments(at))
        assert len(run_plan(plan, InlineExecutor()).published) == 1
        if at % 2:  # with what it left cleared away from under it, or not
            collect_garbage(LocalObjects(output), **AN_HOUR_LATER)
        before = visible(output)
        assert goes_on_well(child), "it says that it lost; it does not fail"
        assert visible(output) == before
        assert same(published(output), undisturbed)
        assert len(list((output / "items").glob("*/*/*"))) == 1


def test_a_driver_stopped_at_any_operation_and_taken_for_dead_by_gc_finishes_all_the_same(
    store, undisturbed, tmp_path
):
    """Nobody else is there: what gc cleared away, the driver does again."""
    operations = num_operations(tiny_plan(store, tmp_path / "n"), tmp_path / "n")
    for at in every_other(operations, 2):
        output = tmp_path / f"out-{at}"
        plan = tiny_plan(store, output)
        child = start_and_stop(
            lambda plan=plan: run_plan(plan, InlineExecutor()), at, moments(at + 1)
        )
        collect_garbage(LocalObjects(output), **AN_HOUR_LATER)
        seen = published(output)
        assert same(seen, {key: undisturbed[key] for key in seen})
        before = visible(output)
        assert goes_on_well(child)
        after = visible(output)
        assert {key: after.get(key) for key in before} == before
        run_plan(plan, InlineExecutor())
        assert same(published(output), undisturbed)


def test_a_worker_stopped_at_any_operation_touches_nothing_that_another_published(
    store, undisturbed, tmp_path
):
    def work(plan):
        return lambda: BlockWorker().attempt(BlockJob(store, plan.output, plan.items[0], 0))

    operations = count_operations(work(tiny_plan(store, tmp_path / "n")))
    assert operations == 2
    for at, moment in ((at, m) for at in range(1, operations + 1) for m in MOMENTS):
        output = tmp_path / f"out-{at}-{moment}"
        plan = tiny_plan(store, output)
        child = start_and_stop(work(plan), at, moment)
        run_plan(plan, InlineExecutor())
        before = content_of(output / "items") | content_of(output / "manifests")
        assert goes_on_well(child)
        assert content_of(output / "items") | content_of(output / "manifests") == before
        assert same(published(output), undisturbed)


def test_a_gc_stopped_at_any_operation_touches_nothing_that_is_published_meanwhile(
    store, undisturbed, tmp_path
):
    """It has decided what is garbage; then the item is published, and it goes on."""
    plan = tiny_plan(store, tmp_path / "n")
    operations = num_operations(plan, tmp_path / "n")
    chance = random.Random(5)
    for at in chance.sample(range(4, operations + 1), 12):
        output = tmp_path / f"out-{at}"
        plan = tiny_plan(store, output)
        driver = start_and_stop(lambda plan=plan: run_plan(plan, InlineExecutor()), at, "after")

        def collect(output=output):
            collect_garbage(LocalObjects(output), **AN_HOUR_LATER)

        collector = start(collect, chance.choice((1, 2, 3)), "before")
        goes_on_well(driver)
        run_plan(plan, InlineExecutor())
        before = visible(output)
        assert has_ended(collector) or goes_on_well(collector)
        assert visible(output) == before
        assert same(published(output), undisturbed)
