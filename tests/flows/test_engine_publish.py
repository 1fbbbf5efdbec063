"""From receipts to published items: what readers see, and what happens to what is damaged."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from engine_kit import SHAPE, kinds, lines, make_store, method, published, recorder, same, tiny_plan

from domains.base import BadInputError
from flows import ome
from flows.engine import publish as publishing
from flows.engine.campaign import CampaignError, run_plan
from flows.engine.events import Progress
from flows.engine.executor import InlineExecutor
from flows.engine.grid import MAX_CANVAS_PX
from flows.engine.objects import LocalObjects
from flows.engine.receipt import load_receipt, load_receipts, seal, unseal
from flows.engine.restored import open_restored
from flows.store import Measurements


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("in") / "m.zarr")


def run(plan, on_event=None, **settings):
    return run_plan(plan, InlineExecutor(), on_event, **settings)


def expected(store: Path, item: str = "item-0") -> np.ndarray:
    """What the method "twice" makes, by numpy: 2 y, and a network unit is 100 of the source's."""
    y = Measurements(store).read(item, "given").y
    return np.moveaxis(y * np.float32(2) * np.float32(100), 1, 0)


class StopError(Exception):
    """Raised by a handler to stop a run at an event."""


def run_until(plan, kind: str, number: int) -> None:
    """Run until the nth event of a kind has been told, as if the driver were killed there."""
    seen = 0

    def handler(event):
        nonlocal seen
        seen += event.kind == kind
        if seen == number:
            raise StopError

    with pytest.raises(StopError):
        run(plan, handler)


# --- what readers see ----------------------------------------------------------------------------


def test_published_pixels_are_those_of_the_method_in_source_units(store, tmp_path):
    run(tiny_plan(store, tmp_path))
    entry = open_restored(tmp_path).items()[0]
    pixels = open_restored(tmp_path).read(entry)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, expected(store))
    np.testing.assert_array_equal(
        open_restored(tmp_path).read(entry, z=slice(2, 4)), expected(store)[:, 2:4]
    )
    assert (entry.item_id, entry.task, entry.method) == ("item-0", "given", "twice")
    assert entry.nfe == 0
    assert entry.model_digest is None
    assert entry.record.units == "percent"
    assert entry.seconds > 0
    assert entry.peak_bytes > 2**20


def test_tiles_with_their_halo_make_the_pixels_of_the_whole_plane(tmp_path, monkeypatch):
    store = make_store(tmp_path / "m.zarr", items=1, shape=(1, 2, 170, 235))
    whole = tiny_plan(store, tmp_path / "whole", method("box-blur"))
    run(whole)
    monkeypatch.setattr("flows.engine.grid.MAX_CANVAS_PX", 64 * 64)
    tiles = tiny_plan(store, tmp_path / "tiles", method("box-blur"), block_size=64)
    assert tiles.num_blocks == 2 * 3 * 4
    run(tiles)
    assert whole.campaign != tiles.campaign
    assert MAX_CANVAS_PX > 170 * 235
    one, other = published(tmp_path / "whole"), published(tmp_path / "tiles")
    np.testing.assert_array_equal(*one.values(), *other.values())
    # Each tile's residual is that of its own pixels, not of those around it.
    [entry] = open_restored(tmp_path / "tiles").items()
    measurement = Measurements(store).read("item-0", "given")
    x = np.moveaxis(open_restored(tmp_path / "tiles").read(entry), 0, 1) / 100
    for block, told in zip(tiles.items[0].blocks(), entry.facts["residuals"], strict=True):
        r = block.write
        box = (slice(r.z0, r.z1), slice(None), slice(r.y0, r.y1), slice(r.x0, r.x1))
        mask = measurement.arrays["mask"][box]
        misfit = (measurement.y[box] - x[box])[mask] / 0.1
        assert told == pytest.approx((misfit**2).mean(), rel=1e-4)


def test_the_residual_is_that_of_the_published_pixels(store, tmp_path):
    """A mask of mean 1 where measured, sigma_y .1, x = 2 y: |y - 2 y|^2 / .01 = mean y^2 / .01."""
    run(tiny_plan(store, tmp_path))
    entry = open_restored(tmp_path).items()[0]
    measurement = Measurements(store).read("item-0", "given")
    mask = np.broadcast_to(measurement.arrays["mask"], measurement.y.shape)
    per_slice = [
        (y[m].astype(float) ** 2).mean() / 0.01 for y, m in zip(measurement.y, mask, strict=True)
    ]
    assert entry.residual == pytest.approx(np.mean(per_slice), rel=1e-5)
    assert entry.facts["residuals"] == pytest.approx(per_slice, rel=1e-5)
    assert not entry.exact_data


def test_the_store_is_ome_zarr_with_halving_levels_and_true_coordinates(tmp_path):
    store = make_store(tmp_path / "m.zarr", items=1, shape=(1, 2, 601, 700))
    run(tiny_plan(store, tmp_path / "out"))
    entry = open_restored(tmp_path / "out").items()[0]
    group = zarr.open_group(entry.path, mode="r")
    multiscale = group.attrs["ome"]["multiscales"][0]
    assert group.attrs["ome"]["version"] == "0.5"
    assert [axis["name"] for axis in multiscale["axes"]] == ["c", "z", "y", "x"]
    assert multiscale["axes"][1] == {"name": "z", "type": "space", "unit": "millimeter"}
    arrays = [group[dataset["path"]] for dataset in multiscale["datasets"]]
    assert [a.shape for a in arrays] == [(1, 2, 601, 700), (1, 2, 301, 350), (1, 2, 151, 175)]
    assert all(a.metadata.dimension_names == ("c", "z", "y", "x") for a in arrays)
    full = arrays[0][:]
    even = full[..., :600, :].reshape(1, 2, 300, 2, 350, 2).mean(axis=(3, 5))
    np.testing.assert_allclose(arrays[1][:, :, :300], even, rtol=1e-5, atol=1e-4)
    last = full[..., 600, :].reshape(1, 2, 350, 2).mean(axis=3)
    np.testing.assert_allclose(arrays[1][:, :, 300], last, rtol=1e-5, atol=1e-4)
    # The centre of pixel (0, 0) of level k is the mean of the centres that it averages.
    for level, dataset in enumerate(multiscale["datasets"]):
        scale, shift = (t for t in dataset["coordinateTransformations"])
        assert scale["scale"] == [1.0, 2.0, 0.5 * 2**level, 0.25 * 2**level]
        centre = 0.25 * np.arange(2**level).mean()
        assert shift["translation"] == [0.0, 0.0, 2 * centre, centre]
    channel = group.attrs["ome"]["omero"]["channels"][0]
    assert (channel["window"]["min"], channel["window"]["max"]) == (full.min(), full.max())


def test_provenance_tells_how_to_make_the_pixels_again_and_nothing_of_the_machine(store, tmp_path):
    plan = tiny_plan(store, tmp_path)
    run(plan)
    entry = open_restored(tmp_path).items()[0]
    facts = json.loads((entry.path / "zarr.json").read_text())["attributes"]["sashiko"]
    assert facts["input_digest"] == Measurements(store).digest("item-0", "given")
    assert facts["campaign"] == plan.campaign
    assert facts["key"] == entry.key
    assert facts["method"]["name"] == "twice"
    assert {"sashiko", "torch", "numpy"} <= facts["versions"].keys()
    assert str(tmp_path) not in json.dumps(facts)


def test_every_published_object_is_in_the_ledger_with_its_hash(store, tmp_path):
    run(tiny_plan(store, tmp_path))
    entry = open_restored(tmp_path).items()[0]
    data = (entry.path / "ledger.json").read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry.facts["ledger_sha256"]
    ledger = unseal(data)
    on_disk = {
        str(p.relative_to(entry.path)): p
        for p in entry.path.rglob("*")
        if p.is_file() and p.name != "ledger.json"
    }
    assert {"zarr.json", "0/zarr.json", "0/c/0/0/0/0"} <= on_disk.keys()
    assert ledger.keys() == on_disk.keys()
    for name, (size, digest) in ledger.items():
        stored = on_disk[name].read_bytes()
        assert (len(stored), hashlib.sha256(stored).hexdigest()) == (size, digest)


def test_nothing_unpublished_is_left_behind(store, tmp_path):
    run(tiny_plan(store, tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {".work", "items", "manifests", "campaigns"}
    assert not [path for path in (tmp_path / ".work").rglob("*") if path.is_file()]
    assert not list(tmp_path.rglob("*.partial"))


def test_what_is_published_is_not_computed_again_whatever_it_was_planned_with(store, tmp_path):
    log = tmp_path / "log"
    way = method(log=str(log))
    run(tiny_plan(store, tmp_path / "out", way, items=["item-0"]))
    result = run(tiny_plan(store, tmp_path / "out", way, method("box-blur")))
    assert lines(log) == 12
    assert len(result.reused) == 1
    assert len(result.published) == 4


def test_an_empty_folder_holds_no_restored_items(tmp_path):
    with pytest.raises(BadInputError, match="holds no restored items"):
        open_restored(tmp_path)


# --- damage --------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def staged_files(output: Path) -> list[Path]:
    return sorted(output.glob(".work/*/stage/*"))


def test_a_flipped_bit_in_a_staged_chunk_is_found_and_the_block_computed_again(store, tmp_path):
    log, output = tmp_path / "log", tmp_path / "out"
    plan = tiny_plan(store, output, method(log=str(log)), items=["item-0"])
    run_until(plan, "block", 4)
    flip_a_bit(staged_files(output)[1])
    events, handler = recorder()
    result = run(plan, handler)
    assert lines(log) == SHAPE[1] + 1
    assert "corrupt" in kinds(events)
    assert result.num_computed == 3
    np.testing.assert_array_equal(published(output)["item-0", "twice"], expected(store))


def test_a_staged_chunk_that_is_gone_or_short_invalidates_its_receipt(store, tmp_path):
    plan = tiny_plan(store, tmp_path, items=["item-0"])
    run_until(plan, "block", 4)
    first, second, *_ = staged_files(tmp_path)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    assert load_receipts(LocalObjects(tmp_path), plan.items[0]).keys() == {2, 3}
    assert run(plan).num_computed == 2 + 2
    np.testing.assert_array_equal(published(tmp_path)["item-0", "twice"], expected(store))


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "foreign"])
def test_an_invalid_receipt_is_set_aside_and_its_block_computed_again(store, tmp_path, damage):
    plan = tiny_plan(store, tmp_path, items=["item-0"])
    run_until(plan, "block", 4)
    receipts = sorted(tmp_path.glob(".work/*/receipts/*.json"))
    data = receipts[0].read_bytes()
    if damage == "flipped":
        flip_a_bit(receipts[0])
    else:
        other = receipts[1].read_bytes()
        replaced = {"torn": data[:-40], "empty": b"", "foreign": other}[damage]
        receipts[0].write_bytes(replaced)
    objects, item = LocalObjects(tmp_path), plan.items[0]
    assert load_receipt(objects, item, 0) is None
    assert receipts[0].with_name(receipts[0].name + ".corrupt-0").exists()
    assert load_receipts(objects, item).keys() == {1, 2, 3}
    assert run(plan).num_computed == 3
    np.testing.assert_array_equal(published(tmp_path)["item-0", "twice"], expected(store))


def test_a_seal_breaks_with_any_bit_of_its_content():
    sealed = bytearray(seal({"a": [1, 2.5], "b": "text"}))
    assert unseal(bytes(sealed)) == {"a": [1, 2.5], "b": "text"}
    for position in range(0, len(sealed), 7):
        torn = bytearray(sealed)
        torn[position] ^= 1
        content = unseal(bytes(torn))
        assert content is None or content == {"a": [1, 2.5], "b": "text"}  # white space


def test_a_damaged_manifest_hides_the_item_until_it_is_made_again(store, tmp_path):
    plan = tiny_plan(store, tmp_path, items=["item-0"])
    run(plan)
    flip_a_bit(next(tmp_path.glob("manifests/*.json")))
    assert published(tmp_path) == {}
    events, handler = recorder()
    run(plan, handler)
    assert "corrupt" in kinds(events)
    np.testing.assert_array_equal(published(tmp_path)["item-0", "twice"], expected(store))


def test_a_flipped_bit_in_a_published_chunk_is_told_to_the_reader(store, tmp_path):
    run(tiny_plan(store, tmp_path, items=["item-0"]))
    entry = open_restored(tmp_path).items()[0]
    flip_a_bit(entry.path / "0/c/0/3/0/0")
    with pytest.raises(BadInputError, match="chunk is damaged"):
        open_restored(tmp_path).read(entry)
    (entry.path / "0/c/0/3/0/0").unlink()
    with pytest.raises(BadInputError, match="missing"):
        open_restored(tmp_path).read(entry)


# --- two drivers ---------------------------------------------------------------------------------


def test_of_two_drivers_one_publishes_and_the_other_says_so_and_stops(store, tmp_path):
    log = tmp_path / "log"
    plan = tiny_plan(store, tmp_path / "out", method(log=str(log)), items=["item-0"])
    events: list = []

    def first(event):
        events.append(event)
        if event.kind == "block" and event.done == 2:
            run(plan)  # the second driver overtakes, and finishes

    result = run(plan, first)
    assert lines(log) == SHAPE[1], "the second driver went on from the first one's receipts"
    assert kinds(events) == ["start", "lost", "done"]
    assert result.num_lost == 1
    assert len(result.published) == 1
    np.testing.assert_array_equal(published(tmp_path / "out")["item-0", "twice"], expected(store))


def test_of_two_drivers_at_the_finish_one_manifest_wins(store, tmp_path, monkeypatch):
    plan = tiny_plan(store, tmp_path, items=["item-0"])
    assemble = publishing._assemble

    def overtaken(*args):
        monkeypatch.setattr(publishing, "_assemble", assemble)
        ledger = assemble(*args)
        other = LocalObjects(tmp_path)
        done = publishing.publish(other, plan, plan.items[0], args[2], {})
        assert done.won
        return ledger

    monkeypatch.setattr(publishing, "_assemble", overtaken)
    events, handler = recorder()
    result = run(plan, handler)
    assert result.num_lost == 1
    assert "lost" in kinds(events)
    assert len(list(tmp_path.glob("items/*/*/*"))) == 1, "the loser removed its own folder"
    assert len(list(tmp_path.glob("manifests/*"))) == 1
    np.testing.assert_array_equal(published(tmp_path)["item-0", "twice"], expected(store))


def test_a_failure_of_a_driver_that_was_overtaken_condemns_nothing(store, tmp_path):
    way = method("refuse", once=str(tmp_path / "once"))
    plan = tiny_plan(store, tmp_path / "out", way, items=["item-0"])

    class Overtaken(InlineExecutor):
        def run(self, next_job):
            for outcome in super().run(next_job):
                if outcome.failure is not None:
                    run(plan)  # another driver does the item before the failure is heard of
                yield outcome

    result = run_plan(plan, Overtaken())
    assert (result.num_lost, result.quarantined) == (1, ())
    assert len(result.published) == 1


def test_a_driver_that_wakes_up_after_another_published_touches_nothing(store, tmp_path):
    plan = tiny_plan(store, tmp_path, items=["item-0"])
    before: dict = {}

    def first(event):
        if event.kind == "block" and event.done == SHAPE[1]:  # all done, about to publish
            run(plan)
            before.update({p: p.stat().st_mtime_ns for p in tmp_path.rglob("items/**/*")})

    run(plan, first)
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("items/**/*")}
    assert before == after


# --- failures ------------------------------------------------------------------------------------


def quarantined(output: Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in (output / "quarantine").glob("*.json")]


@pytest.mark.parametrize(
    ("name", "reason", "attempts"),
    [
        ("refuse", "cannot be used", 1),
        ("not-finite", "NaN or infinite", 1),
        ("stumble", "stumbled", 3),
    ],
)
def test_an_item_that_cannot_be_done_is_quarantined_and_the_others_finish(
    store, tmp_path, name, reason, attempts
):
    events, handler = recorder()
    plan = tiny_plan(store, tmp_path, method(name, where=["item-0"]))
    result = run(plan, handler)
    assert published(tmp_path).keys() == {("item-1", name)}
    np.testing.assert_array_equal(published(tmp_path)["item-1", name], expected(store, "item-1"))
    [entry] = result.quarantined
    assert (entry.item_id, entry.attempts) == ("item-0", attempts)
    assert reason in entry.reason
    assert entry.input_digest == Measurements(store).digest("item-0", "given")
    assert reason in quarantined(tmp_path)[0]["reason"]
    assert kinds(events).count("quarantined") == 1
    assert events[-1].done == events[-1].total == 12


def test_what_fails_once_is_tried_again(store, tmp_path):
    way = method("stumble", once=str(tmp_path / "once"))
    result = run(tiny_plan(store, tmp_path / "out", way))
    assert result.num_retries == 1
    assert result.quarantined == ()
    np.testing.assert_array_equal(published(tmp_path / "out")["item-0", "stumble"], expected(store))


def test_an_item_that_was_quarantined_leaves_quarantine_when_it_succeeds(store, tmp_path):
    marker = tmp_path / "once"
    plan = tiny_plan(store, tmp_path / "out", method("refuse", once=str(marker)), items=["item-0"])
    assert len(run(plan).quarantined) == 1
    assert len(quarantined(tmp_path / "out")) == 1
    assert run(plan).quarantined == ()
    assert quarantined(tmp_path / "out") == []


def test_a_full_disk_stops_the_run_and_keeps_what_is_done(store, tmp_path):
    plan = tiny_plan(store, tmp_path, method("twice"), method("disk-full"))
    with pytest.raises(CampaignError, match=r"No space left on device.*run it again"):
        run(plan)
    assert quarantined(tmp_path) == []


def test_a_disk_that_fills_while_publishing_stops_the_run_and_a_later_run_goes_on(
    store, tmp_path, monkeypatch
):
    plan = tiny_plan(store, tmp_path)
    adopt = LocalObjects.adopt

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalObjects, "adopt", full)
    with pytest.raises(CampaignError, match="cannot be published"):
        run(plan)
    assert published(tmp_path) == {}
    monkeypatch.setattr(LocalObjects, "adopt", adopt)
    assert run(plan).num_computed == 6
    np.testing.assert_array_equal(published(tmp_path)["item-0", "twice"], expected(store))


def test_a_damaged_input_chunk_quarantines_its_item(tmp_path):
    store = make_store(tmp_path / "m.zarr")
    chunk = next(p for p in (store / "measurements/item-0").rglob("y/c/3/**/*") if p.is_file())
    flip_a_bit(chunk)
    result = run(tiny_plan(store, tmp_path / "out"))
    assert [q.item_id for q in result.quarantined] == ["item-0"]
    assert published(tmp_path / "out").keys() == {("item-1", "twice")}


# --- same bytes, progress ------------------------------------------------------------------------


def test_the_order_of_items_and_blocks_changes_no_byte(store, tmp_path):
    plan = tiny_plan(store, tmp_path / "one")
    run(plan)

    class Backwards(InlineExecutor):
        def run(self, next_job):
            jobs = []
            while (job := next_job()) is not None:
                jobs.append(job)
            remaining = iter(jobs[::-1])
            yield from super().run(lambda: next(remaining, None))

    run_plan(replace(plan, output=tmp_path / "two", items=plan.items[::-1]), Backwards())
    assert same(published(tmp_path / "one"), published(tmp_path / "two"))


def test_progress_counts_to_the_end_and_foretells_the_rest():
    now = 0.0
    events, handler = recorder()
    progress = Progress(10, 100.0, handler, clock=lambda: now)
    progress.skip(2, 20.0)
    assert progress.facts()["eta_s"] is None
    now = 8.0
    for _ in range(4):
        progress.advance(10.0, 500_000)
    progress.tell("block", "half")
    assert (events[0].done, events[0].total) == (6, 10)
    assert events[0].facts["eta_s"] == pytest.approx(8.0)
    assert events[0].facts["megapixels_per_s"] == pytest.approx(0.25)


def test_the_time_left_knows_nothing_of_the_time_that_workers_take_to_start():
    now = 0.0
    progress = Progress(10, 100.0, recorder()[1], clock=lambda: now)
    now = 32.0  # of which 30 until it was begun
    progress.advance(10.0, 1, 2.0)
    assert progress.facts()["eta_s"] is None, "one block may be the one that warms up"
    now = 34.0
    progress.advance(10.0, 1, 2.0)
    assert progress.facts()["eta_s"] == pytest.approx(16.0)
    assert progress.facts()["elapsed_s"] == pytest.approx(34.0)


def test_chunks_round_trip_and_refuse_to_be_shared():
    chunk = (1, 1, 8, 8)
    values = np.arange(2 * 13 * 8, dtype=np.float32).reshape(1, 2, 13, 8)
    found = dict(ome.cut_chunks(values, (0, 4, 8, 0), chunk))
    assert found.keys() == {(0, z, y, 0) for z in (4, 5) for y in (1, 2)}
    data = ome.encode_chunk(found[0, 5, 2, 0], chunk)
    decoded = ome.decode_chunk(data, chunk)
    np.testing.assert_array_equal(decoded[..., :5, :], values[:, 1:, 8:])
    assert not decoded[..., 5:, :].any()
    with pytest.raises(ValueError, match="not on the chunk grid"):
        list(ome.cut_chunks(values, (0, 0, 4, 0), chunk))


# --- objects -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["../x", "/etc/x", "a/../../x", "."])
def test_keys_that_leave_the_root_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="not a key"):
        LocalObjects(tmp_path).put(key, b"")


def test_create_lets_one_win_and_link_shares_bytes(tmp_path):
    objects = LocalObjects(tmp_path)
    assert objects.create("a/b", b"first")
    assert not objects.create("a/b", b"second", durable=False)
    assert objects.get("a/b") == b"first"
    assert objects.names("a") == ["b"]
    objects.link("a/b", "c/d")
    objects.remove("a")
    assert objects.get("c/d") == b"first"
    with pytest.raises(FileExistsError):
        objects.create("e", b"") and objects.link("c/d", "e")


def test_a_file_that_can_have_no_more_links_is_copied(tmp_path, monkeypatch):
    import errno

    def refuse(*_):
        raise OSError(errno.EMLINK, "Too many links")

    objects = LocalObjects(tmp_path)
    assert objects.create("a", b"first")
    assert objects.link("a", "b"), "the same bytes"
    monkeypatch.setattr("os.link", refuse)
    assert not objects.link("a", "c"), "a copy, to be looked at"
    assert objects.get("c") == b"first"
    with pytest.raises(FileExistsError):
        objects.link("a", "c")


def test_what_is_made_durable_has_durable_folders(tmp_path, monkeypatch):
    from flows.engine import objects as places

    flushed = []
    monkeypatch.setattr(places, "sync", lambda path: flushed.append(path))
    root = LocalObjects(tmp_path / "out")
    root.create("campaigns/c/account.json", b"{}")
    folders = [tmp_path, root.root, root.root / "campaigns", root.root / "campaigns/c"]
    assert sorted(flushed) == folders
    flushed.clear()
    root.create("campaigns/c/other.json", b"{}")
    assert flushed == [root.root / "campaigns/c"]
    flushed.clear()
    root.create("campaigns/d/other.json", b"{}", durable=False)
    assert flushed == []
