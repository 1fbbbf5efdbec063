"""The input that is read is the one that was planned, or the run says so."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from engine_kit import make_store, published, same, tiny_plan
from tiny_domain import tiny_item, tiny_measurement

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
    assert "item-0/given/y is not what was written" in result.quarantined[0].reason


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
