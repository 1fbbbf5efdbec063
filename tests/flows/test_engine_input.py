"""The input that is read is the one that was planned, or the run says so."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_kit import make_store, published, same, tiny_plan
from tiny_domain import tiny_item, tiny_measurement

from flows.api_upkeep import verify
from flows.engine.campaign import CampaignError, run_plan
from flows.engine.executor import InlineExecutor
from flows.store import Measurements, MeasurementWriter


def run(plan):
    return run_plan(plan, InlineExecutor())


def test_an_input_that_is_another_than_the_plan_s_is_refused(tmp_path):
    store, out = make_store(tmp_path / "m.zarr", shape=(1, 2, 12, 16)), tmp_path / "out"
    plan, executor = tiny_plan(store, out), InlineExecutor()
    assert len(run_plan(plan, executor).published) == 2
    other = make_store(tmp_path / "other.zarr", items=3, shape=(1, 3, 16, 12))
    shutil.rmtree(store)
    other.rename(store)
    with pytest.raises(CampaignError, match=r"m\.zarr changed since the plan was made.*plan again"):
        run_plan(replace(plan, output=tmp_path / "again"), executor)
    anew = tiny_plan(store, tmp_path / "new")  # an executor that knows the first one is not misled
    assert len(run_plan(anew, executor).published) == 3
    run(tiny_plan(store, tmp_path / "fresh"))
    assert same(published(tmp_path / "new"), published(tmp_path / "fresh"))
    shutil.rmtree(store)
    with pytest.raises(CampaignError, match=r"m\.zarr is gone"):
        run_plan(replace(anew, output=tmp_path / "later"), executor)


def test_chunks_of_another_store_are_noticed_where_all_of_an_array_is_read(tmp_path):
    shape = (1, 1, 12, 16)
    store, other = make_store(tmp_path / "m.zarr", shape=shape), tmp_path / "other.zarr"
    with MeasurementWriter(other) as writer:
        pixels = np.random.default_rng(5).standard_normal(shape)
        writer.add(tiny_measurement(tiny_item("item-0", pixels), np.ones((1, 1, 12, 16), bool)))
    chunk = next(p for p in store.rglob("item-0/given/y/c/**/*") if p.is_file())
    shutil.copy(other / chunk.relative_to(store), chunk)
    result = run(tiny_plan(store, tmp_path / "out"))
    assert [(q.item_id, q.kind) for q in result.quarantined] == [("item-0", "input")]
    assert "item-0/given/y is damaged" in result.quarantined[0].reason


def make_two(folder: Path, shape: tuple[int, int, int, int]) -> tuple[Path, Path]:
    """Two stores of the same items and shapes, with other pixels."""
    store, other = make_store(folder / "m.zarr", items=1, shape=shape), folder / "other.zarr"
    with MeasurementWriter(other) as writer:
        pixels = np.random.default_rng(5).standard_normal(shape)
        holes = np.ones((shape[1], 1, *shape[2:]), bool)
        writer.add(tiny_measurement(tiny_item("item-0", pixels), holes))
    return store, other


def given_up(store: Path, output: Path) -> list[tuple[str, str]]:
    return [(q.item_id, q.kind) for q in run(tiny_plan(store, output)).quarantined]


@pytest.mark.parametrize("index", ["y/c/1/0/0/0", "array-mask/c/2/0/0/0"])
def test_a_chunk_of_another_store_among_several_slices_is_noticed_when_it_is_read(tmp_path, index):
    store, other = make_two(tmp_path, (1, 3, 12, 16))
    place = f"measurements/item-0/given/{index}"
    shutil.copy(other / place, store / place)
    assert given_up(store, tmp_path / "out") == [("item-0", "input")]
    [damage] = verify(store).outputs["."].damages
    assert (damage.file, damage.fault) == (place, "altered")


def test_the_chunk_of_another_slice_or_tile_is_noticed_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("flows.engine.grid.MAX_CANVAS_PX", 1)
    monkeypatch.setattr("flows.store.MAX_CANVAS_PX", 1)
    monkeypatch.setattr("flows.store.MAX_CHUNK_PX", 16)
    store = make_store(tmp_path / "m.zarr", items=1, shape=(1, 1, 40, 40))
    measured = store / "measurements/item-0/given/y/c/0/0"
    assert sorted(p.name for p in measured.iterdir()) == ["0", "1", "2"]
    assert given_up(store, tmp_path / "before") == []
    shutil.copy(measured / "0/0", measured / "1/1")
    assert given_up(store, tmp_path / "out") == [("item-0", "input")]


@pytest.mark.parametrize("how", ["gone", "another's", "torn"])
def test_the_record_of_a_store_s_chunks_is_vouched_for_by_its_manifest(tmp_path, how):
    store, other = make_two(tmp_path, (1, 2, 12, 16))
    record = "records/measurements/item-0/given.json"
    if how == "gone":
        (store / record).unlink()
    elif how == "torn":
        (store / record).write_bytes((store / record).read_bytes()[:-20])
    else:
        shutil.copytree(other / "measurements", store / "measurements", dirs_exist_ok=True)
        shutil.copy(other / record, store / record)
    assert given_up(store, tmp_path / "out") == [("item-0", "input")]
    faults = {d.file: d.fault for d in verify(store).outputs["."].damages}
    assert faults[record] == ("missing" if how == "gone" else "altered")


def test_a_store_that_an_older_version_wrote_is_read_as_before(tmp_path):
    store = make_store(tmp_path / "m.zarr", shape=(1, 2, 12, 16))
    before = run(tiny_plan(store, tmp_path / "new")), published(tmp_path / "new")
    digest = Measurements(store).content_digest
    shutil.rmtree(store / "records")
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest.pop("records").keys() == {f"measurements/item-{i}/given" for i in range(2)}
    (store / "manifest.json").write_text(json.dumps(manifest))
    assert Measurements(store).content_digest == digest
    after = run(tiny_plan(store, tmp_path / "old"))
    assert after.campaign == before[0].campaign
    assert same(published(tmp_path / "old"), before[1])
    assert verify(store).intact


def test_a_store_replaced_while_a_block_is_read_is_noticed(tmp_path, monkeypatch):
    store = make_store(tmp_path / "m.zarr", shape=(1, 2, 12, 16))
    plan, read = tiny_plan(store, tmp_path / "out"), Measurements.read

    def replaced(self, *where):
        found = read(self, *where)
        shutil.rmtree(store)
        make_store(store, shape=(1, 2, 12, 16))
        return found

    monkeypatch.setattr(Measurements, "read", replaced)
    with pytest.raises(CampaignError, match="changed since the plan"):
        run(plan)
