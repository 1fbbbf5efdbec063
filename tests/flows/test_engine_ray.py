"""The pool of Ray actors: same bytes as in this process, and workers may die."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from engine_kit import SHAPE, kinds, lines, make_store, method, published, recorder, same, tiny_plan

from flows.config import ComputeSettings
from flows.engine.campaign import CampaignError, run_plan
from flows.engine.executor import (
    ExecutorError,
    InlineExecutor,
    RayExecutor,
    default_workers,
    make_executor,
)
from flows.engine.worker import BlockJob

pytestmark = pytest.mark.ray

KIT = Path(__file__).parents[1] / "kit"
BLOCKS = SHAPE[1]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One local Ray for all tests here; its workers find the tiny domain as a guest's is found."""
    import ray

    from flows.engine.ray_session import ray_session

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(KIT), before]))
    try:
        with ray_session(None, num_cpus=3):  # logical: two for the pool, one for single workers
            yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def pool(local_ray) -> Iterator[RayExecutor]:
    """Two workers that live through all tests, as they live through many plans."""
    with RayExecutor(2) as executor:
        yield executor


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("in") / "m.zarr")


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """(item, "twice") -> pixels, computed in this process."""
    output = tmp_path_factory.mktemp("undisturbed")
    run_plan(tiny_plan(store, output), InlineExecutor())
    return published(output)


def as_method(pixels: dict, name: str) -> dict:
    """The same pixels under the name of a method that makes them when it behaves."""
    return {(item, name): values for (item, _), values in pixels.items()}


def await_workers(pool: RayExecutor) -> None:
    """Until all are up."""
    import ray

    pool.start()
    ray.get([seat.starting for seat in pool._seats if seat.starting])


def test_two_workers_make_the_bytes_of_one_process_and_share_the_work(
    pool, store, undisturbed, tmp_path
):
    log = tmp_path / "log"
    plan = tiny_plan(store, tmp_path / "out", method(log=str(log)))
    await_workers(pool)  # tiny blocks would all be done by the first actor that is up
    result = run_plan(plan, pool)
    assert same(published(tmp_path / "out"), undisturbed)
    assert result.num_computed == lines(log) == 2 * BLOCKS
    workers = {line.split()[1] for line in log.read_text().splitlines()}
    assert str(os.getpid()) not in workers
    assert len(workers) == 2


def test_the_threads_of_a_worker_share_one_heap(pool):
    """Elsewise a worker held a quarter more than the plan foretold."""
    import ray

    await_workers(pool)
    asked = [s.actor.__ray_call__.remote(lambda _: dict(os.environ)) for s in pool._seats]
    assert [environ["MALLOC_ARENA_MAX"] for environ in ray.get(asked)] == ["1", "1"]


def test_shuffled_items_make_the_same_bytes_and_the_pool_serves_several_plans(
    pool, store, undisturbed, tmp_path
):
    plan = tiny_plan(store, tmp_path)
    run_plan(replace(plan, items=plan.items[::-1]), pool)
    assert same(published(tmp_path), undisturbed)


def test_a_worker_killed_in_mid_block_is_replaced_and_its_block_tried_again(
    pool, store, undisturbed, tmp_path
):
    log, replaced = tmp_path / "log", pool.num_replaced
    way = method("kill", once=str(tmp_path / "once"), log=str(log))
    events, handler = recorder()
    result = run_plan(tiny_plan(store, tmp_path / "out", way), pool, handler)
    assert pool.num_replaced == replaced + 1
    assert result.num_retries == 1
    assert result.quarantined == ()
    assert "retry" in kinds(events)
    assert lines(log) == 2 * BLOCKS, "only the block it was at was computed again"
    assert same(published(tmp_path / "out"), as_method(undisturbed, "kill"))


def test_an_item_that_always_kills_its_worker_is_quarantined_and_the_others_finish(
    pool, store, undisturbed, tmp_path
):
    replaced = pool.num_replaced
    way = method("kill", where=["item-0"])
    result = run_plan(tiny_plan(store, tmp_path, way), pool, max_attempts=2)
    [entry] = result.quarantined
    assert entry.item_id == "item-0"
    assert entry.kind == "worker"
    assert "its worker died" in entry.reason
    # A block of it that the other worker was at when it was given up may take that one too.
    assert 2 <= pool.num_replaced - replaced <= 3
    seen = published(tmp_path)
    assert same(seen, {("item-1", "kill"): undisturbed["item-1", "twice"]})


def test_of_items_in_the_hands_of_one_worker_only_the_one_that_kills_it_is_given_up(pool, tmp_path):
    store = make_store(tmp_path / "m.zarr", items=6, shape=(1, 1, 20, 24))
    way, log = method("kill", where=["item-2"]), tmp_path / "log"
    plan = tiny_plan(store, tmp_path / "out", way.model_copy(
        update={"options": {**way.options, "log": str(log)}}))  # fmt: skip
    result = run_plan(plan, pool, max_attempts=1)
    assert [entry.item_id for entry in result.quarantined] == ["item-2"]
    assert len(published(tmp_path / "out")) == 5


def test_no_more_blocks_are_given_out_than_the_workers_hold(pool, store, tmp_path):
    plan = tiny_plan(store, tmp_path)
    jobs = iter([(item, n) for item in plan.items for n in range(item.num_blocks)])
    given = answered = most = 0
    await_workers(pool)

    def next_job():
        nonlocal given, most
        item, index = next(jobs, (None, 0))
        if item is None:
            return None
        given += 1
        most = max(most, given - answered)
        return BlockJob(plan.measurements, plan.output, item, index)

    for outcome in pool.run(next_job):
        assert outcome.receipt is not None
        answered += 1
    assert answered == given == 2 * BLOCKS
    assert 2 < most <= 4, "two workers, two blocks each"


def test_a_stopped_campaign_frees_the_pool_for_the_next(pool, store, undisturbed, tmp_path):
    with pytest.raises(CampaignError, match="No space left"):
        run_plan(tiny_plan(store, tmp_path / "full", method("disk-full")), pool)
    run_plan(tiny_plan(store, tmp_path / "next"), pool)
    assert same(published(tmp_path / "next"), undisturbed)


def test_a_campaign_interrupted_under_ray_resumes_without_it(pool, store, undisturbed, tmp_path):
    log = tmp_path / "log"
    plan = tiny_plan(store, tmp_path / "out", method(log=str(log)))

    def interrupt(event):
        if event.kind == "block" and event.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, pool, interrupt)
    result = run_plan(plan, InlineExecutor())
    assert result.num_computed <= 2 * BLOCKS - 5
    assert same(published(tmp_path / "out"), undisturbed)


def test_workers_that_cannot_start_fail_the_run_and_quarantine_nothing(
    local_ray, store, tmp_path, monkeypatch
):
    class Broken:
        def __init__(self, num_lanes):
            raise OSError("no such library")

        def ready(self): ...

        def attempt(self, job): ...

    monkeypatch.setattr("flows.engine.executor.BlockWorker", Broken)
    with RayExecutor(1) as executor, pytest.raises(ExecutorError, match="workers cannot start"):
        run_plan(tiny_plan(store, tmp_path), executor)
    assert not (tmp_path / "quarantine").exists()


def test_more_workers_than_ray_has_places_for_are_not_waited_for(
    pool, store, undisturbed, tmp_path
):
    """The third place is free, so that one of 50 starts: one worker, and the bytes of two."""
    with RayExecutor(50) as crowd:
        result = run_plan(tiny_plan(store, tmp_path), crowd)
        assert crowd.num_workers == 3
    assert result.num_computed == 2 * BLOCKS
    assert same(published(tmp_path), undisturbed)


def test_a_gpu_that_is_not_there_is_an_error_and_no_endless_wait(local_ray, store, tmp_path):
    plan, wants_gpu = tiny_plan(store, tmp_path), RayExecutor(1, num_gpus_per_worker=1.0)
    with wants_gpu, pytest.raises(ExecutorError, match="no place with 1 GPU"):
        run_plan(plan, wants_gpu)


def test_ray_that_misses_its_deadline_is_started_again(monkeypatch):
    import ray

    from flows.engine.ray_session import connect

    starts = []

    def slow(**settings):
        starts.append(settings["num_cpus"])
        assert settings["address"] == "local", "another's cluster on this machine is not ours"
        if len(starts) < 3:
            raise Exception("The current node timed out during startup.")  # Ray raises no other

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    assert connect(None, 2)
    assert starts == [2, 2, 2]


def test_the_settings_choose_the_executor_and_the_workers_default_to_the_cores():
    assert isinstance(make_executor(ComputeSettings(executor="inline")), InlineExecutor)
    assert make_executor(ComputeSettings(num_workers=3)).num_workers == 3
    assert make_executor(ComputeSettings()).num_workers == default_workers(0.0)
    assert default_workers(0.0) == len(os.sched_getaffinity(0))
