"""Fault 8: a bit flips anywhere: detected, made good or quarantined, and named by `verify`."""

from pathlib import Path

import pytest
import zarr
from damage_kit import flip_a_bit
from engine_kit import make_store, method, published, same, tiny_plan

from flows import cli, quiet
from flows.api_upkeep import verify
from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.restored import open_restored
from flows.engine.verify import Verification


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("in") / "m.zarr", shape=(1, 3, 300, 20))


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("undisturbed")
    run_plan(tiny_plan(store, output), InlineExecutor())
    return published(output)


class StopError(Exception):
    """Stops a run."""


def run_until_block(plan, number: int) -> None:
    def handler(event):
        if event.kind == "block" and event.done == number:
            raise StopError

    with pytest.raises(StopError):
        run_plan(plan, InlineExecutor(), handler)


def damaged(output: Path) -> dict[str, str]:
    [found] = verify(output).outputs.values()
    assert isinstance(found, Verification)
    return {damage.file: damage.fault for damage in found.damages}


def test_an_output_is_intact_and_everything_in_it_was_looked_at(store, tmp_path):
    run_plan(tiny_plan(store, tmp_path), InlineExecutor())
    found = verify(tmp_path).outputs["."]
    files = [p for p in (tmp_path / "items").rglob("*") if p.is_file() and p.name != "ledger.json"]
    assert found.intact
    assert (found.num_items, found.num_objects) == (2, len(files))
    assert found.num_bytes == sum(path.stat().st_size for path in files)
    assert found.num_uncovered == 0


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("0/c/0/1/0/0", "altered"),
        ("1/c/0/2/0/0", "altered"),
        ("zarr.json", "altered"),
        ("1/zarr.json", "altered"),
        ("ledger.json", "unreadable"),
    ],
)
@pytest.mark.parametrize("gone", [False, True])
def test_damage_to_a_published_item_is_named_and_mended_by_the_next_run(
    store, undisturbed, tmp_path, place, fault, gone
):
    plan = tiny_plan(store, tmp_path)
    run_plan(plan, InlineExecutor())
    entry = open_restored(tmp_path).items()[0]
    file = entry.path / place
    file.unlink() if gone else flip_a_bit(file)
    named = str(file.relative_to(tmp_path))
    assert damaged(tmp_path) == {named: "missing" if gone else fault}
    assert verify(tmp_path, hide_damaged=True).hidden == (entry.key,)
    assert len(published(tmp_path)) == 1, "hidden from readers"
    assert run_plan(plan, InlineExecutor()).num_computed == 3
    assert damaged(tmp_path) == {}
    assert same(published(tmp_path), undisturbed)


def test_a_ledger_that_is_whole_and_not_the_item_s_own_is_named(store, tmp_path):
    run_plan(tiny_plan(store, tmp_path), InlineExecutor())
    one, other = (entry.path / "ledger.json" for entry in open_restored(tmp_path).items())
    one.write_bytes(other.read_bytes())
    assert damaged(tmp_path) == {str(one.relative_to(tmp_path)): "unreadable"}


def test_a_flipped_manifest_is_named_and_the_next_run_makes_the_item_anew(
    store, undisturbed, tmp_path
):
    plan = tiny_plan(store, tmp_path)
    run_plan(plan, InlineExecutor())
    manifest = next((tmp_path / "manifests").iterdir())
    flip_a_bit(manifest)
    assert damaged(tmp_path) == {f"manifests/{manifest.name}": "unreadable"}
    run_plan(plan, InlineExecutor())
    assert damaged(tmp_path) == {}
    assert same(published(tmp_path), undisturbed)


@pytest.mark.parametrize("what", ["stage", "receipts"])
@pytest.mark.parametrize("gone", [False, True])
def test_damage_to_staged_work_is_named_and_computed_again(
    store, undisturbed, tmp_path, what, gone
):
    plan = tiny_plan(store, tmp_path)
    run_until_block(plan, 2)
    file = min(tmp_path.glob(f".work/*/{what}/*"))
    file.unlink() if gone else flip_a_bit(file)
    named = str(file.relative_to(tmp_path))
    kinds = {("stage", False): "altered", ("stage", True): "missing"}
    expected = {("receipts", False): {named: "unreadable"}, ("receipts", True): {}}
    found = damaged(tmp_path)
    assert found == expected.get((what, gone), {named: kinds.get((what, gone))})
    assert verify(tmp_path, hide_damaged=True).hidden == ()
    result = run_plan(plan, InlineExecutor())
    assert result.num_computed == 6 - 1
    assert damaged(tmp_path) == {}
    assert same(published(tmp_path), undisturbed)


def test_a_flipped_input_chunk_is_named_and_quarantines_its_item_and_leaves_the_output_intact(
    undisturbed, tmp_path
):
    store = make_store(tmp_path / "m.zarr", shape=(1, 3, 300, 20))
    chunk = next(p for p in (store / "measurements/item-0").rglob("y/c/1/**/*") if p.is_file())
    assert damaged(store) == {}
    flip_a_bit(chunk)
    named = str(chunk.relative_to(store))
    assert damaged(store) == {named: "altered"}
    result = run_plan(tiny_plan(store, tmp_path / "out"), InlineExecutor())
    assert [(q.item_id, q.kind) for q in result.quarantined] == [("item-0", "input")]
    assert damaged(tmp_path / "out") == {}
    key = ("item-1", "twice")
    assert same(published(tmp_path / "out"), {key: undisturbed[key]})
    masks = (store / "measurements/item-1").rglob("array-mask/c/**/*")
    other = next(path for path in masks if path.is_file())
    other.unlink()
    assert damaged(store) == {named: "altered", str(other.relative_to(store)): "missing"}


def test_values_that_were_written_over_are_named_though_their_checksums_hold(tmp_path):
    store = make_store(tmp_path / "m.zarr", shape=(1, 2, 8, 8))
    array = zarr.open_array(store / "measurements/item-0/given/y", mode="r+")
    array[0] = array[1]
    assert damaged(store) == {"measurements/item-0/given/y/c/0/0/0/0": "altered"}


def test_the_command_names_what_is_damaged_with_the_next_step(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quiet, "hush", lambda: None)
    run_plan(tiny_plan(store, tmp_path, method()), InlineExecutor())
    assert cli.run(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "intact"
    chunk = next((tmp_path / "items").rglob("0/c/0/1/0/0"))
    flip_a_bit(chunk)
    assert cli.run(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert str(chunk.relative_to(tmp_path)) in out
    assert "altered, of item-" in out
    assert "--set-aside" in out
    assert cli.run(["verify", str(tmp_path), "--set-aside"]) == 1
    assert "1 damaged items are hidden now" in capsys.readouterr().out
    assert cli.run(["verify", str(tmp_path)]) == 0
    assert cli.run(["verify", str(tmp_path / "items")]) == 2
    assert "no output of ours" in capsys.readouterr().err
