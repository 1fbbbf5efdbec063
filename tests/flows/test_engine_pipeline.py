"""Inside a worker: reading, computing and writing overlap, and change nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_kit import make_store, tiny_plan

from flows.engine import worker as working
from flows.engine.block import Restorer
from flows.engine.executor import InlineExecutor
from flows.engine.memory import peak_memory
from flows.engine.objects import LocalObjects
from flows.engine.receipt import load_receipt
from flows.engine.seats import MAX_NODE_LOSSES, Suspicions
from flows.engine.worker import BlockJob, BlockWorker

WAIT_S = 30.0
"""For what must happen at once: a deadlock is a failure, not a hang."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("in") / "m.zarr", items=2, shape=(1, 3, 20, 24))


def jobs_of(store: Path, output: Path) -> list[BlockJob]:
    plan = tiny_plan(store, output)
    return [
        BlockJob(plan.measurements, plan.output, item, index)
        for item in plan.items
        for index in range(item.num_blocks)
    ]


class Stages:
    """Tells when a block comes to a stage, and may hold it there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: dict[tuple[str, int], threading.Event] = {}
        self.hold: dict[tuple[str, int], tuple[str, int]] = {}
        self.lock = threading.Lock()
        self.inside = self.most = 0
        self.wrap(monkeypatch, Restorer, "read", lambda args: args[3].index)
        self.wrap(monkeypatch, Restorer, "compute", lambda args: args[3].index)
        self.wrap(monkeypatch, working, "stage_block", lambda args: args[2].index)

    def event(self, stage: str, block: int) -> threading.Event:
        with self.lock:
            return self.begun.setdefault((stage, block), threading.Event())

    def wrap(self, monkeypatch, owner, name, index_of):
        original, stage = getattr(owner, name), name

        def wrapped(*args):
            index = index_of(args)
            self.event(stage, index).set()
            self.count(stage, +1)
            if (stage, index) in self.hold:
                awaited = self.hold[stage, index]
                assert self.event(*awaited).wait(WAIT_S), f"{awaited} waits for {stage} {index}"
            try:
                return original(*args)
            finally:
                self.count(stage, -1)

        monkeypatch.setattr(owner, name, wrapped)

    def count(self, stage: str, step: int) -> None:
        if stage == "compute":
            with self.lock:
                self.inside += step
                self.most = max(self.most, self.inside)


def test_the_next_block_is_read_and_the_last_one_written_while_one_is_computed(
    store, tmp_path, monkeypatch
):
    stages = Stages(monkeypatch)
    stages.hold = {
        ("read", 1): ("compute", 0),  # block 0 comes first
        ("compute", 0): ("read", 1),
        ("stage_block", 0): ("compute", 1),
        ("compute", 1): ("stage_block", 0),
    }
    worker, jobs = BlockWorker(), jobs_of(store, tmp_path)[:2]
    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(worker.attempt, jobs))
    assert [outcome.failure for outcome in outcomes] == [None, None]
    assert stages.most == 1, "one lane computes one block at a time"


@pytest.mark.parametrize("lanes", [2, 3])
def test_as_many_blocks_are_computed_at_once_as_there_are_lanes(
    store, tmp_path, monkeypatch, lanes
):
    stages = Stages(monkeypatch)
    last = ("compute", lanes - 1)
    stages.hold = {("compute", index): last for index in range(lanes)}
    worker, jobs = BlockWorker(lanes), jobs_of(store, tmp_path)[:3]
    with ThreadPoolExecutor(lanes + 1) as threads:
        outcomes = list(threads.map(worker.attempt, jobs))
    assert [outcome.failure for outcome in outcomes] == [None] * 3
    assert stages.most <= lanes


def test_threads_of_a_worker_make_the_receipts_that_one_thread_makes(store, tmp_path):
    alone = BlockWorker()
    expected = [alone.attempt(job) for job in jobs_of(store, tmp_path / "one")]
    worker = BlockWorker(2)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(worker.attempt, jobs_of(store, tmp_path / "two")))
    for one, other in zip(expected, found, strict=True):
        assert one.receipt.chunks == other.receipt.chunks
        kept = load_receipt(LocalObjects(tmp_path / "two"), other.job.item, other.job.block)
        assert kept == other.receipt


def test_waiting_for_a_lane_is_not_counted_as_work(store, tmp_path, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(working.time, "perf_counter", lambda: float(next(now)))
    outcome = BlockWorker().attempt(jobs_of(store, tmp_path)[0])
    # Asked at the start, once read, in the lane, once written: 0 1 2 3.
    assert outcome.receipt.account.seconds == 2.0


def test_a_measurement_that_begins_amid_another_takes_nothing_from_its_record(monkeypatch):
    resident = iter([70, 10])
    monkeypatch.setattr("flows.engine.memory.peak_bytes", lambda: next(resident))
    with peak_memory() as first:
        with peak_memory() as second:  # 70 bytes were on the record when it started anew
            assert second() == 10
        monkeypatch.setattr("flows.engine.memory.peak_bytes", lambda: 10)
        assert first() == 70


# --- whom a dead worker died of ------------------------------------------------------------------


class Unreachable(Exception):
    def __str__(self) -> str:
        return "The actor is dead because its node has died."


def kinds_of(outcomes) -> list[str]:
    return [outcome.failure.kind for outcome in outcomes]


def test_a_worker_that_dies_with_blocks_of_one_item_died_of_that_item(store, tmp_path):
    suspicions, jobs = Suspicions(), jobs_of(store, tmp_path)[:2]
    assert kinds_of(suspicions.outcomes(jobs, Exception("killed"))) == ["worker", "returned"]
    assert not any(map(suspicions.has, jobs))


def test_blocks_of_several_items_are_tried_alone_before_one_is_blamed(store, tmp_path):
    suspicions, jobs = Suspicions(), jobs_of(store, tmp_path)
    mixed = [jobs[0], jobs[3]]
    assert kinds_of(suspicions.outcomes(mixed, Exception("killed"))) == ["lost", "returned"]
    assert [suspicions.has(job) for job in jobs] == [True, False, False, True, False, False]
    suspicions.acquit(jobs[0])
    assert not suspicions.has(jobs[0])
    assert kinds_of(suspicions.outcomes([jobs[3]], Exception("killed"))) == ["worker"]


def test_a_machine_that_goes_is_held_against_no_item_unless_it_goes_on(store, tmp_path):
    suspicions, jobs = Suspicions(), jobs_of(store, tmp_path)[:2]
    for _ in range(MAX_NODE_LOSSES):
        assert kinds_of(suspicions.outcomes(jobs, Unreachable())) == ["lost", "returned"]
    assert kinds_of(suspicions.outcomes(jobs, Unreachable())) == ["worker", "returned"]


def test_the_inline_executor_asks_for_a_block_when_the_one_before_is_written(store, tmp_path):
    jobs = jobs_of(store, tmp_path)
    objects, left = LocalObjects(tmp_path), iter(jobs)
    receipts = []

    def next_job():
        receipts.append(sum(load_receipt(objects, j.item, j.block) is not None for j in jobs))
        return next(left, None)

    assert len(list(InlineExecutor().run(next_job))) == len(jobs)
    assert receipts == [0, 1, 2, 3, 4, 5, 6]
