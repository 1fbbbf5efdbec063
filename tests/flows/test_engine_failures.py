"""What becomes of failures: by their class, over attempts, and over runs."""

import errno
import json
import os
from pathlib import Path

import pytest
from engine_kit import lines, make_store, method, published, recorder, tiny_plan

from flows.engine.backlog import Backlog, wait_after
from flows.engine.campaign import CampaignError, run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.objects import LocalObjects
from flows.engine.quarantine import list_quarantine, load_quarantine, release
from flows.engine.receipt import ReadBackError
from flows.engine.worker import failure_of
from flows.store_files import StrictStore


class Clock:
    """Time passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("in") / "m.zarr", shape=(1, 2, 12, 16))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("in") / "m.zarr", items=8, shape=(1, 1, 8, 8))


def run(plan, on_event=None, **settings):
    return run_plan(plan, InlineExecutor(), on_event, **settings)


class OutOfMemoryError(RuntimeError):
    """Of torch's name."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), "io"),
        (TimeoutError("no answer"), "io"),
        (ConnectionResetError("gone"), "io"),
        (ReadBackError("other bytes"), "io"),
        (OSError(errno.ENOSPC, "No space left on device"), "fatal"),
        (OSError(errno.EROFS, "Read-only file system"), "fatal"),
        (MemoryError(), "memory"),
        (OutOfMemoryError("CUDA out of memory"), "memory"),
        (RuntimeError("surprise"), "transient"),
    ],
)
def test_errors_are_sorted_by_what_they_call_for(error, kind):
    assert failure_of(error).kind == kind


def test_what_ray_says_of_a_dead_worker_is_memory_only_where_it_was():
    from ray.exceptions import OutOfMemoryError, RayActorError

    from flows.engine.seats import for_its_memory

    assert for_its_memory(OutOfMemoryError("Task was killed due to the node running low on memory"))
    killed = RayActorError(
        error_msg="killed by SIGKILL by OOM killer due to high memory usage, or else"
    )
    assert not for_its_memory(killed)


def test_a_block_that_waits_lets_others_go_first():
    clock = Clock()
    backlog = Backlog(iter(["a", "b"]), clock, clock.sleep)
    backlog.put("late", 4.0)
    backlog.put("again")
    backlog.put_next("sooner")
    backlog.put_first("first")
    assert backlog.wait()
    taken = [backlog.take() for _ in range(6)]
    assert taken == ["first", "a", "b", "sooner", "again", None]
    assert clock.slept == []
    assert backlog.wait()
    assert (clock.slept, backlog.take()) == ([4.0], "late")
    assert not backlog.wait()
    assert Backlog(iter("x"), clock).wait()


def test_storage_that_fails_is_asked_again_after_a_longer_while_each_time(many, tmp_path):
    clock, (events, handler) = Clock(), recorder()
    way = method("unread", where=["item-0"], times=2, once=str(tmp_path / "once"))
    plan = tiny_plan(many, tmp_path / "out", way, items=["item-0"])
    result = run(plan, handler, clock=clock, sleep=clock.sleep)
    assert clock.slept == [1.0, 4.0] == [wait_after(1), wait_after(2)]
    assert [e.facts["failure"] for e in events if e.kind == "retry"] == ["io", "io"]
    assert result.quarantined == ()
    assert result.account.retries == {"io": 2}
    assert published(tmp_path / "out").keys() == {("item-0", "unread")}


def test_what_fails_of_itself_is_tried_again_at_once(store, tmp_path):
    clock = Clock()
    result = run(
        tiny_plan(store, tmp_path, method("stumble", where=["item-0"])),
        clock=clock,
        sleep=clock.sleep,
    )
    assert clock.slept == []
    assert [(q.kind, q.attempts) for q in result.quarantined] == [("transient", 3)]


def test_one_item_that_cannot_be_read_is_quarantined_and_the_others_finish(many, tmp_path):
    clock = Clock()
    plan = tiny_plan(many, tmp_path, method("unread", where=["item-3"]))
    result = run(plan, clock=clock, sleep=clock.sleep)
    assert [(q.item_id, q.kind) for q in result.quarantined] == [("item-3", "io")]
    assert len(result.published) == 7


def test_items_that_cannot_be_read_among_others_that_can_are_to_blame_themselves(many, tmp_path):
    clock, bad = Clock(), [f"item-{i}" for i in (0, 1, 2, 4, 5, 6)]
    plan = tiny_plan(many, tmp_path, method("unread", where=bad))
    result = run(plan, clock=clock, sleep=clock.sleep)
    assert sorted(q.item_id for q in result.quarantined) == bad
    assert len(result.published) == 2


def test_storage_that_fails_for_item_after_item_stops_the_run_and_condemns_nobody(many, tmp_path):
    clock = Clock()
    with pytest.raises(CampaignError, match=r"storage fails: 5 items .*Input/output error.*again"):
        run(tiny_plan(many, tmp_path, method("unread")), clock=clock, sleep=clock.sleep)
    assert list_quarantine(LocalObjects(tmp_path)) == []


def test_storage_that_fails_for_all_of_a_few_items_stops_the_run_too(many, tmp_path):
    clock = Clock()
    few = [f"item-{i}" for i in range(4)]
    plan = tiny_plan(many, tmp_path, method("unread"), items=few)
    with pytest.raises(CampaignError, match=r"storage fails: 4 items .*Input/output error.*again"):
        run(plan, clock=clock, sleep=clock.sleep)
    assert list_quarantine(LocalObjects(tmp_path)) == []


def test_of_one_item_alone_that_fails_nothing_is_told_of_the_storage(many, tmp_path):
    """The last open item of a run: it is given up, and the run ends."""
    clock = Clock()
    plan = tiny_plan(many, tmp_path, method("unread"), items=["item-0"])
    result = run(plan, clock=clock, sleep=clock.sleep)
    assert [(q.item_id, q.kind) for q in result.quarantined] == [("item-0", "io")]


def test_two_open_items_that_fail_are_an_outage(many, tmp_path):
    clock = Clock()
    plan = tiny_plan(many, tmp_path, method("unread"), items=["item-0", "item-1"])
    with pytest.raises(CampaignError, match=r"storage fails: 2 items"):
        run(plan, clock=clock, sleep=clock.sleep)
    assert list_quarantine(LocalObjects(tmp_path)) == []


def test_items_that_cannot_be_published_among_others_that_can_are_to_blame_themselves(
    many, tmp_path, monkeypatch
):
    """Each published item says that the disk takes some: five failures in all are no row."""
    from flows.engine import publish

    assemble, clock = publish._assemble, Clock()

    def fails(objects, item, *rest):
        if item.item_id not in ("item-3", "item-6", "item-7"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return assemble(objects, item, *rest)

    monkeypatch.setattr(publish, "_assemble", fails)
    result = run(tiny_plan(many, tmp_path), clock=clock, sleep=clock.sleep)
    assert len(result.quarantined) == 5
    assert {e.item_id for e in result.published} == {"item-3", "item-6", "item-7"}


def input_fails(monkeypatch, code: int, where: str = "") -> None:
    get = StrictStore.get

    async def fail(self, key, prototype=None, byte_range=None):
        if "/c/" in key and where in key:
            raise OSError(code, os.strerror(code), key)
        return await get(self, key, prototype, byte_range)

    monkeypatch.setattr(StrictStore, "get", fail)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_an_outage_of_the_input_s_storage_condemns_no_item(many, tmp_path, monkeypatch, code):
    clock = Clock()
    plan = tiny_plan(many, tmp_path)
    with monkeypatch.context() as patch:
        input_fails(patch, code)
        with pytest.raises(CampaignError, match="storage fails: 5 items"):
            run(plan, clock=clock, sleep=clock.sleep)
    assert list_quarantine(LocalObjects(tmp_path)) == []
    assert len(run(plan).published) == 8


def test_a_bad_sector_of_the_input_is_its_item_s_after_the_usual_attempts(
    many, tmp_path, monkeypatch
):
    clock = Clock()
    input_fails(monkeypatch, errno.EIO, "item-2/")
    result = run(tiny_plan(many, tmp_path), clock=clock, sleep=clock.sleep)
    assert [(q.item_id, q.kind, q.attempts) for q in result.quarantined] == [("item-2", "io", 3)]
    assert len(result.published) == 7


def test_an_input_that_may_not_be_read_stops_the_run(many, tmp_path, monkeypatch):
    input_fails(monkeypatch, errno.EACCES, "item-2/")
    with pytest.raises(CampaignError, match="Permission denied"):
        run(tiny_plan(many, tmp_path))
    assert list_quarantine(LocalObjects(tmp_path)) == []


def test_an_item_given_up_by_three_runs_is_left_alone_until_somebody_asks(store, tmp_path):
    log, output = tmp_path / "log", tmp_path / "out"
    plan = tiny_plan(store, output, method("stumble", log=str(log), where=["item-0"]))
    objects, key = LocalObjects(output), next(i.key for i in plan.items if i.item_id == "item-0")
    for number in (1, 2, 3):
        assert len(run(plan).quarantined) == 1
        record = load_quarantine(objects, key)
        assert (record.num_runs, record.kind, record.attempts) == (number, "transient", 3)
        assert record.when
        assert record.source_digest == "source-item-0"
    computed = lines(log)
    events, handler = recorder()
    [entry] = run(plan, handler).quarantined
    assert (entry.num_runs, lines(log)) == (3, computed), "not tried, and still told"
    [event] = [e for e in events if e.kind == "quarantined"]
    assert "quarantine retry" in event.message
    assert events[-1].done == events[-1].total
    assert release(objects, ["item-7"]) == ([], ["item-7"])
    assert [e.item_id for e in release(objects, ["item-0"])[0]] == ["item-0"]
    assert load_quarantine(objects, key) is None
    [entry] = run(plan).quarantined
    assert entry.num_runs == 1


def test_quarantine_is_left_by_id_by_beginning_of_key_or_all_together(store, tmp_path):
    plan = tiny_plan(store, tmp_path, method("refuse"), method("stumble"))
    run(plan)
    objects = LocalObjects(tmp_path)
    assert len(list_quarantine(objects)) == 4
    assert len(release(objects, [plan.items[0].key[:8]])[0]) == 1
    assert release(objects, [plan.items[1].key[:7]])[0] == [], "too short to be meant"
    assert len(release(objects, ["item-0"])[0]) in (1, 2)
    release(objects, [])
    assert list_quarantine(objects) == []


def test_records_of_older_versions_and_torn_ones_are_read_as_far_as_they_go(tmp_path):
    objects = LocalObjects(tmp_path)
    old = {"item_id": "a", "task": "t", "method": "m", "reason": "r", "key": "0" * 64, "odd": 1}
    objects.put(f"quarantine/{'0' * 64}.json", json.dumps(old).encode())
    objects.put("quarantine/input-1.json", b'{"item_id": "inp')
    [entry] = list_quarantine(objects)
    assert (entry.item_id, entry.num_runs, entry.when) == ("a", 1, "")
