"""Fault 18: gc while campaigns run, and what it may and may not remove."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage_kit import content_of, flip_a_bit
from engine_kit import lines, method, published, same, tiny_plan
from kills import MOMENTS, fork, has_ended, num_operations, reap, run_and_kill

from flows import cli, quiet
from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.fencing import DRIVERS, Attempt, driving, holder_of, living_drivers, take_fence
from flows.engine.garbage import Collection, collect_garbage
from flows.engine.objects import LocalObjects
from flows.engine.publish import manifest_key
from flows.engine.verify import verify_output

ITEMS, SLICES = 6, 2
AN_HOUR_LATER = {"min_age_s": -3600.0, "silence_s": 0.0}


@pytest.fixture(autouse=True)
def _nobody_is_left() -> Iterator[None]:
    yield
    reap()


def kinds(found: Collection) -> set[str]:
    return {garbage.kind for garbage in found.garbage}


def leave_remains(plan) -> None:
    """Kill drivers all over an output, so that there is something to collect."""
    for at in (7, 12, 19, 23, 5):
        run_and_kill(plan, at, MOMENTS[at % 3])


# --- with a campaign in another process ----------------------------------------------------------


def test_gc_in_a_loop_takes_nothing_from_a_campaign_that_runs(store, undisturbed, tmp_path):
    log, output = tmp_path / "log", tmp_path / "out"
    plan = tiny_plan(store, output, method(log=str(log)))
    leave_remains(plan)
    objects, child, rounds = LocalObjects(output), None, 0

    def work() -> None:
        result = run_plan(plan, InlineExecutor())
        assert (result.num_retries, result.quarantined) == (0, ())

    def left() -> int:
        receipts = sum(
            len(list(output.glob(f".work/{item.key}/receipts/*.json")))
            for item in plan.items
            if not objects.exists(manifest_key(item.key))
        )
        return ITEMS * SLICES - receipts - SLICES * len(published(output))

    to_do, before = left(), lines(log)
    child = fork(work)
    while not has_ended(child):
        collect_garbage(objects, min_age_s=0.0)
        rounds += 1
    assert rounds >= 2
    assert lines(log) - before == to_do, "no block was computed for a second time"
    assert same(published(output), undisturbed)
    assert verify_output(objects).intact
    collect_garbage(objects, **AN_HOUR_LATER)
    assert files(output / ".work") == []


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_gc_that_takes_everybody_for_dead_costs_blocks_and_never_bytes(
    store, undisturbed, tmp_path
):
    """As if every driver were stopped for an hour between any two of its operations."""
    plan, objects = tiny_plan(store, tmp_path), LocalObjects(tmp_path)
    for _ in range(5):
        child = fork(lambda: run_plan(plan, InlineExecutor(), max_attempts=1000))
        while not has_ended(child):
            collect_garbage(objects, **AN_HOUR_LATER)
            seen = published(tmp_path)
            assert same(seen, {key: undisturbed[key] for key in seen})
        if len(published(tmp_path)) == ITEMS:
            break
    run_plan(plan, InlineExecutor())  # a busy machine may have left something to do
    assert same(published(tmp_path), undisturbed)
    assert verify_output(objects).intact


def test_after_any_kill_gc_leaves_what_the_next_run_goes_on_from(store, undisturbed, tmp_path):
    log = tmp_path / "log"
    one = tiny_plan(store, tmp_path / "n", method(log=str(log)), items=["item-0"])
    for at in range(2, num_operations(one, tmp_path / "n") + 1, 3):
        output = tmp_path / f"out-{at}"
        plan = tiny_plan(store, output, method(log=str(log)), items=["item-0"])
        assert run_and_kill(plan, at, MOMENTS[at % 3])
        objects, item = LocalObjects(output), plan.items[0]
        receipts = len(list(output.glob(f".work/{item.key}/receipts/*.json")))
        whole = objects.exists(manifest_key(item.key))
        found = collect_garbage(objects, **AN_HOUR_LATER)
        assert found.stuck == ()
        before = lines(log)
        result = run_plan(plan, InlineExecutor())
        assert lines(log) - before == (0 if whole else SLICES - receipts)
        key = ("item-0", "twice")
        assert same(published(output), {key: undisturbed[key]})
        assert result.quarantined == ()
        collect_garbage(objects, **AN_HOUR_LATER)
        assert files(output / ".work") == []
        assert len(list((output / "items").glob("*/*/*"))) == 1


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("operation", ["link", "adopt"])
def test_a_publisher_whose_folder_is_cleared_away_under_it_begins_again(
    store, undisturbed, tmp_path, monkeypatch, operation, moment
):
    plan, original, times = tiny_plan(store, tmp_path), getattr(LocalObjects, operation), []

    def cleared_away(objects, *arguments):
        times.append(operation)
        if len(times) == 2 and moment == "before":
            collect_garbage(objects, **AN_HOUR_LATER)
        original(objects, *arguments)
        if len(times) == 2 and moment == "after":
            collect_garbage(objects, **AN_HOUR_LATER)

    monkeypatch.setattr(LocalObjects, operation, cleared_away)
    result = run_plan(plan, InlineExecutor())
    assert (len(result.published), result.num_computed) == (ITEMS, ITEMS * SLICES)
    assert same(published(tmp_path), undisturbed)
    assert len(list((tmp_path / "items").glob("*/*/*"))) == ITEMS, "what it lost it removed"
    assert verify_output(LocalObjects(tmp_path)).intact


# --- leases and fences ---------------------------------------------------------------------------


def test_a_driver_is_heard_of_while_it_works_and_not_after(tmp_path):
    objects = LocalObjects(tmp_path)
    with driving(objects, "c" * 64):
        [driver] = living_drivers(objects)
        assert objects.now() - 60 < driver.started_s <= objects.now()
        assert living_drivers(objects, silence_s=0.0) == []
    assert living_drivers(objects) == []
    assert objects.names(DRIVERS) == []


def test_a_lease_is_written_again_and_again(tmp_path):
    objects, beats, enough = LocalObjects(tmp_path), [], threading.Event()
    put = objects.replace

    def heard(key: str, data: bytes) -> None:
        put(key, data)
        beats.append(key)
        if len(beats) == 3:
            enough.set()

    objects.replace = heard
    with driving(objects, "c" * 64, beat_s=0.001):
        assert enough.wait(60)
    assert len(set(beats)) == 1
    assert objects.names(DRIVERS) == []


def test_what_is_younger_than_the_oldest_living_driver_stays(tmp_path):
    objects = LocalObjects(tmp_path)
    objects.put(".work/files-1/old", b"1")
    an_hour_ago = time.time() - 3600
    for path in (tmp_path / ".work/files-1/old", tmp_path / ".work/files-1"):
        os.utime(path, (an_hour_ago, an_hour_ago))
    with driving(objects, "c" * 64):
        objects.put(".work/files-2/new", b"2")
        found = collect_garbage(objects, min_age_s=-3600.0)
        assert found.num_living == 1
        assert [g.keys for g in found.garbage] == [(".work/files-1",)]
    assert objects.exists(".work/files-2/new")
    assert collect_garbage(objects, min_age_s=3600.0).garbage == (), "too young"
    collect_garbage(objects, min_age_s=-3600.0)
    assert not objects.exists(".work/files-2")


def test_a_new_folder_is_young_though_the_chunks_linked_into_it_are_old(tmp_path):
    objects = LocalObjects(tmp_path)
    chunk, draft = tmp_path / "chunk", tmp_path / Attempt.new("a" * 64).draft
    chunk.write_bytes(b"1")
    os.utime(chunk, (time.time() - 3600,) * 2)
    (draft / "0/c").mkdir(parents=True)
    os.link(chunk, draft / "0/c/0")
    assert collect_garbage(objects, min_age_s=60.0).garbage == ()
    for folder in (draft, draft / "0", draft / "0/c"):
        os.utime(folder, (time.time() - 3600,) * 2)
    assert kinds(collect_garbage(objects, min_age_s=60.0)) == {"draft of an item"}
    assert chunk.exists()
    assert not draft.exists()


def test_a_lease_that_is_being_written_protects_everything(tmp_path):
    objects = LocalObjects(tmp_path)
    objects.put(".work/files-1/old", b"1")
    objects.put(f"{DRIVERS}/torn.json", b'{"started')
    assert collect_garbage(objects, min_age_s=-3600.0).garbage == ()


def test_of_publisher_and_gc_one_gets_the_fence(tmp_path):
    objects, attempt = LocalObjects(tmp_path), Attempt.new("a" * 64)
    assert holder_of(objects, attempt) is None
    assert take_fence(objects, attempt, "gc")
    assert not take_fence(objects, attempt, "publisher")
    assert holder_of(objects, attempt) == "gc"


# --- what is garbage -----------------------------------------------------------------------------


def put_unnamed(output: Path, plan) -> tuple[Path, Attempt]:
    """A folder without manifest, of an attempt at the plan's first item."""
    item, attempt = plan.items[0], Attempt.new(plan.items[0].key)
    folder = output / f"items/{item.item_id}/{item.task}/twice-{attempt}.ome.zarr"
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_text("{}")
    return folder, attempt


def test_a_publisher_that_died_with_its_fence_keeps_its_folder_until_another_published(
    store, tmp_path
):
    plan, objects = tiny_plan(store, tmp_path, items=["item-0"]), LocalObjects(tmp_path)
    folder, attempt = put_unnamed(tmp_path, plan)
    take_fence(objects, attempt, "publisher")
    found = collect_garbage(objects, **AN_HOUR_LATER)
    assert folder.exists()
    assert "its publisher may be at it" in found.notes[0]
    run_plan(plan, InlineExecutor())
    assert kinds(collect_garbage(objects, **AN_HOUR_LATER)) == {
        "folder without manifest",
        "lease or fence",
    }
    assert not folder.exists()
    assert len(published(tmp_path)) == 1


def test_a_damaged_manifest_protects_the_folders_of_its_item(store, tmp_path):
    plan, objects = tiny_plan(store, tmp_path), LocalObjects(tmp_path)
    run_plan(plan, InlineExecutor())
    before = content_of(tmp_path / "items")
    flip_a_bit(next((tmp_path / "manifests").iterdir()))
    found = collect_garbage(objects, **AN_HOUR_LATER)
    assert "restore the item again first" in found.notes[0]
    assert content_of(tmp_path / "items") == before
    run_plan(plan, InlineExecutor())
    found = collect_garbage(objects, **AN_HOUR_LATER)
    assert kinds(found) == {"folder without manifest", "set aside as corrupt"}
    assert len(content_of(tmp_path / "items")) == len(before)
    assert verify_output(objects).intact


def test_a_receipt_that_cannot_be_read_protects_the_attempts_at_its_block(store, tmp_path):
    plan, objects = tiny_plan(store, tmp_path, items=["item-0"]), LocalObjects(tmp_path)
    run_and_kill(plan, 8, "before")
    receipts = sorted(tmp_path.glob(".work/*/receipts/*.json"))
    staged = content_of(tmp_path / ".work" / plan.items[0].key / "stage")
    assert receipts
    flip_a_bit(receipts[0])
    collect_garbage(objects, **AN_HOUR_LATER)
    left = content_of(tmp_path / ".work" / plan.items[0].key / "stage")
    block = receipts[0].name.removesuffix(".json")
    assert {k: v for k, v in staged.items() if k.startswith(block)}.items() <= left.items()


def test_what_is_not_ours_is_never_garbage(store, tmp_path):
    plan, objects = tiny_plan(store, tmp_path, items=["item-0"]), LocalObjects(tmp_path)
    run_plan(plan, InlineExecutor())
    (tmp_path / "elsewhere").mkdir()
    foreign = tmp_path / f"elsewhere/twice-{'0' * 12}-{'0' * 8}.ome.zarr"
    foreign.mkdir()
    (foreign / "precious").write_text("x")
    (tmp_path / "items/item-0/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "items/item-0/given/notes.txt").write_text("mine")
    given = tmp_path / ".work/given-of-mine"
    given.mkdir(parents=True)
    (given / "zarr.json").write_text("{}")
    before = content_of(tmp_path)
    assert collect_garbage(objects, **AN_HOUR_LATER).garbage == ()
    assert content_of(tmp_path) == before


def test_a_dry_run_shows_the_same_and_removes_nothing(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quiet, "hush", lambda: None)
    plan, objects = tiny_plan(store, tmp_path), LocalObjects(tmp_path)
    leave_remains(plan)
    put_unnamed(tmp_path, plan)
    before = content_of(tmp_path)
    dry = collect_garbage(objects, dry_run=True, **AN_HOUR_LATER)
    assert len(dry.garbage) > 2
    assert dry.unfinished_bytes > 0
    after = content_of(tmp_path)
    assert after == before
    assert cli.run(["gc", str(tmp_path), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dry_run"] is True
    wet = collect_garbage(objects, **AN_HOUR_LATER)
    assert wet.garbage == dry.garbage
    assert cli.run(["gc", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "unfinished items, for the next run of them" in out
    assert out.splitlines()[-1] == "nothing to remove"
