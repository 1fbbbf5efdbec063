"""Faults 8 and 18 on S3: `verify` and `gc` by the same code, seen by a client that is not ours."""

import threading

import pytest
from engine_kit import make_store, published, same, tiny_plan

from flows.api_upkeep import gc, quarantined, verify
from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.fencing import Attempt, take_fence
from flows.engine.garbage import collect_garbage
from flows.engine.objects import open_objects
from flows.engine.restored import open_restored
from flows.engine.s3_objects import S3Objects

AN_HOUR_LATER = {"min_age_s": -3600.0, "silence_s": 0.0}
ITEMS, SLICES = 2, 2


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(
        tmp_path_factory.mktemp("in") / "m.zarr", items=ITEMS, shape=(1, SLICES, 20, 24)
    )


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    run_plan(tiny_plan(store, output), InlineExecutor())
    return published(output)


class StopError(Exception):
    """Stops a run."""


def run_until_block(plan, number):
    def handler(event):
        if event.kind == "block" and event.done == number:
            raise StopError

    with pytest.raises(StopError):
        run_plan(plan, InlineExecutor(), handler)


def flipped(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


def test_what_is_damaged_on_s3_is_named_hidden_and_made_anew(store, undisturbed, s3):
    plan = tiny_plan(store, s3.root)
    run_plan(plan, InlineExecutor())
    assert verify(s3.root).intact
    entry = open_restored(s3.root).items()[0]
    key = f"{entry.facts['path']}/0/c/0/1/0/0"
    s3.write(key, flipped(s3.read(key)))
    [damage] = verify(s3.root, hide_damaged=True).outputs["."].damages
    assert (damage.file, damage.fault) == (key, "altered")
    assert run_plan(plan, InlineExecutor()).num_computed == SLICES
    assert verify(s3.root).intact
    assert same(published(s3.root), undisturbed)
    assert quarantined(s3.root) == []


def test_gc_on_s3_takes_what_nobody_needs_and_leaves_what_the_next_run_goes_on_from(
    store, undisturbed, s3
):
    plan, objects = tiny_plan(store, s3.root), open_objects(s3.root)
    run_until_block(plan, 1)
    receipted = [key for key in s3.names(".work/") if "/stage/" in key or "/receipts/" in key]
    item, dead, doomed = plan.items[0], Attempt.new("0" * 64), Attempt.new(plan.items[0].key)
    remains = [
        f".work/{item.key}/stage/000001-dead.0.1.0.0",
        f"items/{item.item_id}/{item.task}/twice-{dead}.ome.zarr/zarr.json",
    ]
    fenced = f"items/{item.item_id}/{item.task}/twice-{doomed}.ome.zarr/zarr.json"
    for key in (*remains, fenced):
        s3.write(key, b"{}")
    take_fence(objects, doomed, "publisher")
    assert gc(s3.root).outputs["."].garbage == (), "a day has not passed"
    collect_garbage(objects, **AN_HOUR_LATER)
    left = s3.names()
    assert not set(remains) & set(left)
    assert {*receipted, fenced} <= set(left)
    assert run_plan(plan, InlineExecutor()).num_computed == ITEMS * SLICES - 1
    collect_garbage(objects, **AN_HOUR_LATER)
    assert fenced not in s3.names(), "another manifest of the item is there now"
    assert s3.names(".work/") == [str(k) for k in s3.names(".work/fences/")]
    assert same(published(s3.root), undisturbed)


def test_gc_in_a_loop_takes_nothing_from_a_campaign_that_runs_on_s3(store, undisturbed, s3):
    plan, over = tiny_plan(store, s3.root), threading.Event()

    def collect():
        while not over.is_set():
            collect_garbage(open_objects(s3.root), min_age_s=0.0)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        result = run_plan(plan, InlineExecutor())
    finally:
        over.set()
        collector.join()
    assert (result.num_computed, result.num_retries) == (ITEMS * SLICES, 0)
    assert same(published(s3.root), undisturbed)
    assert verify(s3.root).intact


def test_a_copy_that_went_wrong_on_the_server_is_seen_before_it_is_published(
    store, undisturbed, s3, monkeypatch
):
    link, spoilt = S3Objects.link, []

    def spoils(self, key, new_key):
        shared = link(self, key, new_key)
        if not spoilt:
            spoilt.append(new_key)
            s3.write(new_key, flipped(s3.read(new_key)))
        return shared

    monkeypatch.setattr(S3Objects, "link", spoils)
    result = run_plan(tiny_plan(store, s3.root), InlineExecutor(), sleep=lambda _: None)
    assert "/0/c/" in spoilt[0]
    assert (result.num_computed, result.account.retries) == (ITEMS * SLICES, {"io": 1})
    assert verify(s3.root).intact
    assert same(published(s3.root), undisturbed)


@pytest.mark.parametrize("part", ["/1/c/", "/1/zarr.json", "/ledger.json"])
def test_what_is_put_beside_the_copies_is_looked_at_too(tmp_path, s3, monkeypatch, part):
    store = make_store(tmp_path / "m.zarr", items=1, shape=(1, 1, 300, 20))
    put, spoilt = S3Objects.put, []

    def spoils(self, key, data):
        wrong = part in key and not spoilt
        if wrong:
            spoilt.append(key)
        put(self, key, flipped(data) if wrong else data)

    monkeypatch.setattr(S3Objects, "put", spoils)
    result = run_plan(tiny_plan(store, s3.root), InlineExecutor(), sleep=lambda _: None)
    assert spoilt
    assert result.account.retries == {"io": 1}
    assert verify(s3.root).intact


def test_a_manifest_that_is_gone_from_s3_is_named_and_gc_leaves_its_pixels(store, s3):
    run_plan(tiny_plan(store, s3.root), InlineExecutor())
    entry = open_restored(s3.root).items()[0]
    s3.delete(f"manifests/{entry.key}.json")
    [damage] = verify(s3.root).outputs["."].damages
    assert (damage.key, damage.fault) == (entry.key[:12], "missing")
    before = s3.names(entry.facts["path"])
    collect_garbage(open_objects(s3.root), **AN_HOUR_LATER)
    assert s3.names(entry.facts["path"]) == before
