"""Fault 11: the engine's promises on S3 as on a disk, and before a network that has bad days.

Every test of the first part runs on a folder, against a real S3 API, and against that through a
proxy that answers 503, resets connections, loses answers and cuts bodies.
"""

import hashlib
import json
import random
import threading

import numpy as np
import pytest
import zarr
from engine_kit import kinds, lines, make_store, method, published, recorder, same, tiny_plan
from fault_proxy import KINDS, FaultProxy
from kills import MOMENTS, num_operations, run_and_kill
from object_places import BUCKET, CREDENTIALS, S3Place, use_endpoint

from domains.base import BadInputError
from flows.api_upkeep import verify
from flows.engine import publish as publishing
from flows.engine import s3_objects
from flows.engine.campaign import CampaignError, run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.garbage import collect_garbage
from flows.engine.many import each
from flows.engine.objects import StoreError, open_objects
from flows.engine.publish import load_manifest
from flows.engine.receipt import load_receipts, unseal
from flows.engine.restored import open_restored
from flows.engine.worker import BlockJob, BlockWorker
from flows.roots import S3Root
from flows.store import Measurements

ITEMS, SLICES = 2, 3
BLOCKS = ITEMS * SLICES


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    return make_store(folder / "m.zarr", items=ITEMS, shape=(1, SLICES, 20, 24))


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    """(item, method) -> pixels of a run on a disk that nothing happened to."""
    output = tmp_path_factory.mktemp("undisturbed")
    run_plan(tiny_plan(store, output), InlineExecutor())
    return published(output)


def run(plan, on_event=None, **settings):
    return run_plan(plan, InlineExecutor(), on_event, **settings)


class StopError(Exception):
    """Raised by a handler to stop a run at an event."""


def run_until_block(plan, number):
    def handler(event):
        if event.kind == "block" and event.done == number:
            raise StopError

    with pytest.raises(StopError):
        run(plan, handler)


def flipped(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


def receipts_of(plan):
    """Receipts of the items that are not published: a kill may leave those of published ones."""
    objects = open_objects(plan.output)
    left = [item for item in plan.items if load_manifest(objects, item.key) is None]
    return sum(len(load_receipts(objects, item)) for item in left)


# --- on a disk, on S3, and on S3 on a bad day -----------------------------------------------------


def test_a_run_publishes_the_same_bytes_and_every_receipt_once(store, undisturbed, place, tmp_path):
    log = tmp_path / "log"
    plan = tiny_plan(store, place.root, method(log=str(log)))
    receipts = []

    def handler(event):
        if event.kind == "block":
            receipts.extend(k for k in place.names(".work/") if "/receipts/" in k)
        assert event.kind not in ("retry", "corrupt", "lost"), event.message

    result = run(plan, handler)
    assert same(published(place.root), undisturbed)
    assert (result.num_computed, lines(log)) == (BLOCKS, BLOCKS)
    assert len(set(receipts)) == BLOCKS, "one receipt a block, none set aside"
    assert place.names(".work/") == []
    assert len(place.names("manifests/")) == ITEMS
    again = run(plan)
    assert (again.num_computed, len(again.reused), lines(log)) == (0, ITEMS, BLOCKS)


def test_what_is_stored_is_what_the_ledger_says_and_nothing_else(store, place):
    run(tiny_plan(store, place.root))
    for entry in open_restored(place.root).items():
        folder = entry.facts["path"]
        data = place.read(f"{folder}/ledger.json")
        assert hashlib.sha256(data).hexdigest() == entry.facts["ledger_sha256"]
        there = {key.removeprefix(f"{folder}/") for key in place.names(folder)}
        ledger = unseal(data)
        assert {*ledger, "ledger.json"} == there
        for name, (size, digest) in ledger.items():
            stored = place.read(f"{folder}/{name}")
            assert (len(stored), hashlib.sha256(stored).hexdigest()) == (size, digest)
    assert verify(place.root).intact
    place.write(f"{folder}/0/c/0/1/0/0", b"")
    [damage] = verify(place.root).outputs["."].damages
    assert damage.file == f"{folder}/0/c/0/1/0/0"


def test_a_run_that_was_stopped_goes_on_from_its_receipts(store, undisturbed, place, tmp_path):
    log = tmp_path / "log"
    plan = tiny_plan(store, place.root, method(log=str(log)))
    run_until_block(plan, 4)
    assert receipts_of(plan) + SLICES * len(published(place.root)) == 4
    assert run(plan).num_computed == BLOCKS - 4
    assert lines(log) == BLOCKS
    assert same(published(place.root), undisturbed)


@pytest.mark.parametrize("what", ["receipt", "chunk", "chunk gone", "manifest"])
def test_what_is_damaged_is_found_and_made_again(store, undisturbed, place, what, tmp_path):
    log = tmp_path / "log"
    plan = tiny_plan(store, place.root, method(log=str(log)), items=["item-0"])
    if what == "manifest":
        run(plan)
        [key] = place.names("manifests/")
    else:
        run_until_block(plan, 2)
        key = next(k for k in place.names(".work/") if ("/receipts/" in k) == (what == "receipt"))
    if what == "chunk gone":
        place.delete(key)
    else:
        place.write(key, flipped(place.read(key)))
    assert published(place.root) == {}
    run(plan)
    assert lines(log) == (2 * SLICES if what == "manifest" else SLICES + 1)
    assert same(published(place.root), {("item-0", "twice"): undisturbed["item-0", "twice"]})
    if what == "manifest":
        assert place.names("manifests/")[1] == f"{key}.corrupt-0"


def test_a_damaged_published_chunk_is_told_to_the_reader(store, place):
    run(tiny_plan(store, place.root, items=["item-0"]))
    [entry] = open_restored(place.root).items()
    chunk = f"{entry.facts['path']}/0/c/0/1/0/0"
    place.write(chunk, flipped(place.read(chunk)))
    with pytest.raises(BadInputError, match="damaged"):
        open_restored(place.root).read(entry)
    place.delete(chunk)
    with pytest.raises(BadInputError, match="missing"):
        open_restored(place.root).read(entry)


def test_of_two_drivers_one_publishes_and_the_other_leaves_nothing(
    store, undisturbed, place, monkeypatch
):
    plan = tiny_plan(store, place.root, items=["item-0"])
    assemble = publishing._assemble

    def overtaken(*args):
        monkeypatch.setattr(publishing, "_assemble", assemble)
        ledger = assemble(*args)
        assert publishing.publish(args[0], plan, plan.items[0], args[2], {}).won
        return ledger

    monkeypatch.setattr(publishing, "_assemble", overtaken)
    events, handler = recorder()
    assert run(plan, handler).num_lost == 1
    assert "lost" in kinds(events)
    folders = {key.split("/")[3] for key in place.names("items/")}
    assert len(folders) == len(place.names("manifests/")) == 1
    assert same(published(place.root), {("item-0", "twice"): undisturbed["item-0", "twice"]})


def test_of_many_who_create_an_object_one_wins(place):
    won, start = [], threading.Barrier(6)

    def create(number):
        objects = open_objects(place.root)
        start.wait()
        if objects.create("a/b", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert place.read("a/b") == b"%d" % won[0]
    assert len(won) == 1
    assert not open_objects(place.root).create("a/b", place.read("a/b")), "the same bytes, later"


def test_objects_keep_what_the_engine_needs_of_them(place):
    objects = open_objects(place.root)
    objects.put("a/b/one", b"1")
    objects.put("a/two", b"22")
    objects.put("a/b-side", b"")
    assert (objects.get("a/two"), objects.size("a/two"), objects.size("a/b")) != (b"", 0, 0)
    assert objects.names("a") == ["b", "b-side", "two"]
    assert (objects.names("none"), objects.names("a/b")) == ([], ["one"])
    assert [objects.exists(k) for k in ("a", "a/b/one", "a/b", "a/o", "c")] == [1, 1, 1, 0, 0]
    objects.link("a/two", "c/three")
    assert objects.rename("a/two", "a/four")
    assert not objects.rename("a/two", "a/five")
    objects.remove("a/b")
    objects.remove("a/b")
    assert place.names() == ["a/b-side", "a/four", "c/three"]  # and no folder that is empty
    assert objects.get("c/three") == objects.get("a/four") == b"22"
    objects.put("a/.x.partial", b"")
    objects.put("a/four.d/.y/z", b"333")
    assert objects.names("a") == ["b-side", "four", "four.d"]
    assert objects.hidden("a") == ["a/.x.partial", "a/four.d/.y"]
    before, usage = objects.now(), objects.usage("a/four.d")
    assert (usage.num_objects, usage.num_bytes, objects.usage("none")) == (1, 3, None)
    assert usage.modified_s <= before <= objects.now()
    assert objects.usage("c/three").num_bytes == 2
    assert objects.size("a/two") is None
    with pytest.raises(FileNotFoundError):
        objects.get("a/two")
    for key in ("../x", "/etc/x", "a/../../x", "."):
        with pytest.raises(ValueError, match="not a key"):
            objects.put(key, b"")


# --- S3 only -------------------------------------------------------------------------------------


def test_a_driver_killed_at_any_operation_on_s3_resumes_to_the_same_bytes(
    store, undisturbed, s3, s3_port
):
    plan = tiny_plan(store, s3.root)
    operations = num_operations(plan, S3Place(s3_port).root)
    for at in range(1, operations + 1, 11):
        place = S3Place(s3_port)
        plan = tiny_plan(store, place.root)
        assert run_and_kill(plan, at, MOMENTS[at % 3])
        seen = published(place.root)
        assert same(seen, {key: undisturbed[key] for key in seen}), "half an item was visible"
        receipts = receipts_of(plan)
        result = run(plan)
        assert result.num_computed == BLOCKS - receipts - SLICES * len(seen)
        assert same(published(place.root), undisturbed)
    left = {key.split("/")[1] for key in place.names(".work/")}
    assert "drivers" in left
    collect_garbage(open_objects(place.root), min_age_s=-3600.0, silence_s=0.0)
    assert place.names(".work/") == []
    assert same(published(place.root), undisturbed)


def test_a_driver_killed_again_and_again_on_a_bad_day_computes_every_block_once(
    store, undisturbed, s3_port, tmp_path, monkeypatch
):
    place, log, chance = S3Place(s3_port), tmp_path / "log", random.Random(5)
    with FaultProxy(s3_port, seed=3, rate=0.2) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        plan = tiny_plan(store, place.root, method(log=str(log)))
        lost = kills = 0
        while run_and_kill(plan, chance.randint(2, 7), chance.choice(MOMENTS)):
            kills += 1
            done = receipts_of(plan) + SLICES * len(published(place.root))
            assert lines(log) - done - lost in (0, 1)
            lost = lines(log) - done
            if kills == 4:  # publishing takes more operations than it is left
                run(plan)
                break
        seen = published(place.root)
    assert kills == 4
    assert lines(log) == BLOCKS + lost
    assert same(seen, undisturbed)


def test_the_plan_of_faults_met_every_kind_and_the_run_none_of_them(
    store, undisturbed, s3_port, tmp_path, monkeypatch
):
    place, log = S3Place(s3_port), tmp_path / "log"
    with FaultProxy(s3_port, seed=1, rate=0.4) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        result = run(tiny_plan(store, place.root, method(log=str(log))))
        assert same(published(place.root), undisturbed)
    assert set(proxy.done) == {"", *KINDS}
    assert (lines(log), result.num_retries, result.num_lost) == (BLOCKS, 0, 0)
    assert not [key for key in place.names() if "corrupt" in key]


def test_a_writer_whose_answer_is_lost_knows_that_it_won(s3_port, monkeypatch):
    """Each request once through, its answer never: only then is the second let through."""
    place = S3Place(s3_port)

    class LoseFirst(FaultProxy):
        def choose(self, method):
            self.done[method] += 1
            return "lost" if method == b"PUT" and self.done[method] == 1 else ""

    with LoseFirst(s3_port, seed=0, rate=0.0) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        assert open_objects(place.root).create("a", b"mine")
        assert proxy.done[b"PUT"] == 2
    with LoseFirst(s3_port, seed=0, rate=0.0) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        assert not open_objects(place.root).create("a", b"mine"), "it was another call that won"
    assert place.read("a") == b"mine"


def test_a_store_that_stays_away_stops_the_run_and_condemns_nothing(
    store, undisturbed, s3_port, monkeypatch
):
    place = S3Place(s3_port)
    monkeypatch.setattr(s3_objects, "RETRIES", 1)

    class Leaves(FaultProxy):
        def choose(self, method):
            self.done[method] += 1
            return "reset" if self.done[b"PUT"] > 6 else ""

    with Leaves(s3_port, seed=0, rate=0.0) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        with pytest.raises(CampaignError, match=r"store does not answer.*run it again"):
            run(tiny_plan(store, place.root))
    use_endpoint(monkeypatch, f"http://127.0.0.1:{s3_port}")
    assert place.names("quarantine/") == []
    plan = tiny_plan(store, place.root)
    left = BLOCKS - receipts_of(plan)
    assert left < BLOCKS
    assert run(plan).num_computed == left
    assert same(published(place.root), undisturbed)


def test_a_store_that_is_gone_is_no_fault_of_a_block_or_of_its_input(store, s3_port, monkeypatch):
    source, output = S3Place(s3_port), S3Place(s3_port)
    source.upload(store)
    monkeypatch.setattr(s3_objects, "RETRIES", 1)
    plan = tiny_plan(store, output.root)
    gone = threading.Event()

    class Leaves(FaultProxy):
        def choose(self, method):
            return "reset" if gone.is_set() else ""

    with Leaves(s3_port, seed=0, rate=0.0) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        measurements = Measurements(source.root)
        measurements.read("item-0", "given")
        gone.set()
        with pytest.raises(StoreError, match="does not answer"):
            measurements.read("item-0", "given")
        outcome = BlockWorker().attempt(BlockJob(store, output.root, plan.items[0], 0))
    assert outcome.failure.kind == "fatal"


def test_receipts_and_chunks_are_asked_for_several_at_once_and_kept_in_order():
    several, inside = threading.Event(), []

    class Slow:
        at_once = 4

    def ask(number):
        inside.append(number)
        if len(inside) >= 4:
            several.set()
        assert several.wait(30), "nobody came meanwhile"
        return -number

    taken = iter(range(100))
    results = each(Slow(), ask, taken)
    assert [next(results) for _ in range(20)] == [-n for n in range(20)]
    assert next(taken) < 40, "few are taken ahead"
    results.close()


def test_measurements_on_s3_are_restored_as_those_on_a_disk(store, undisturbed, s3, s3_port):
    source = S3Place(s3_port)
    source.upload(store)
    run(tiny_plan(source.root, s3.root))
    assert same(published(s3.root), undisturbed)
    chunk = next(key for key in source.names() if "/y/c/1/" in key and "item-1" in key)
    source.write(chunk, flipped(source.read(chunk)))
    again = S3Place(s3_port)
    assert [q.item_id for q in run(tiny_plan(source.root, again.root)).quarantined] == ["item-1"]


def test_published_items_on_s3_are_ome_zarr_for_others(store, undisturbed, s3):
    run(tiny_plan(store, s3.root, items=["item-0"]))
    [entry] = open_restored(str(s3.root)).items()
    assert str(entry.path) == f"{s3.root}/{entry.facts['path']}"
    files = {k.removeprefix(f"{entry.facts['path']}/"): k for k in s3.names(entry.facts["path"])}
    held = {
        name: zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(s3.read(key))
        for name, key in files.items()
    }
    group = zarr.open_group(zarr.storage.MemoryStore(held), mode="r")
    np.testing.assert_array_equal(group["0"][:], undisturbed["item-0", "twice"])
    assert json.loads(s3.read(files["zarr.json"]))["attributes"]["ome"]["version"] == "0.5"


def test_a_bucket_that_is_not_there_or_credentials_that_do_not_fit_are_told(s3, monkeypatch):
    with pytest.raises(StoreError, match="there is no bucket 'elsewhere'; make it"):
        open_objects(S3Root("elsewhere", "x")).names("")
    with pytest.raises(StoreError, match="no bucket"):
        open_objects("s3://elsewhere/x").get("a")
    with pytest.raises(BadInputError, match="holds no restored items"):
        open_restored(f"s3://{BUCKET}/nothing/here")
    from obstore.exceptions import PermissionDeniedError

    class Refused:
        def head(self, name):
            raise PermissionDeniedError("403")

    objects = s3_objects.S3Objects(s3.root)
    objects._store = Refused()
    with pytest.raises(PermissionError, match="refuses these credentials") as told:
        objects.size("a")
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in str(told.value)
