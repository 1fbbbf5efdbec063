"""Files handed over: whose pixels stand under whose provenance."""

import json
from pathlib import Path

import numpy as np
import pytest
from damage_kit import flip_a_bit
from engine_kit import make_store, method, published, tiny_plan

from flows import handover
from flows.api_upkeep import verify
from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.objects import LocalObjects
from flows.handover import hand_over


class _Killed(BaseException):
    pass


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def entries(tmp_path: Path, output: Path):
    """The same item restored twice."""
    store = make_store(tmp_path / "m.zarr", items=1, shape=(1, 2, 20, 24))
    plans = [tiny_plan(store, output, method(name)) for name in ("twice", "box-blur")]
    return [run_plan(plan, InlineExecutor()).published[0] for plan in plans]


def told_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def test_who_comes_second_to_a_place_takes_another(entries, output, monkeypatch):
    first, second = entries
    written = handover._written

    def overtaken(*given):
        monkeypatch.setattr(handover, "_written", written)
        with monkeypatch.context() as patch:
            patch.setattr(LocalObjects, "link", _die)  # after its provenance is there
            with pytest.raises(_Killed):
                hand_over(output, first, ["x"])
        return written(*given)

    monkeypatch.setattr(handover, "_written", overtaken)
    files = [*hand_over(output, second, ["x"]), *hand_over(output, first, ["x"])]
    pixels = published(output)
    for path, entry in zip(files, (second, first), strict=True):
        assert np.array_equal(np.load(path), pixels["item-0", entry.method])
        assert told_of(path)["key"] == entry.key
    assert files[1].name == "x.npy"


def _die(*given):
    raise _Killed


def test_a_file_that_is_altered_is_found_and_written_anew(entries, output):
    (path,) = hand_over(output, entries[0], ["x"])
    good = path.read_bytes()
    assert told_of(path)["file_bytes"] == len(good)
    assert verify(output).intact
    flip_a_bit(path)
    bad = path.read_bytes()
    found = verify(output, hide_damaged=True)
    (damage,) = found.outputs["."].damages
    assert (damage.file, damage.fault, damage.key) == ("files/x.npy", "altered", entries[0].key)
    assert found.hidden == (), "the item itself is intact"
    assert hand_over(output, entries[0], ["x"]) == [path]
    assert path.read_bytes() == good
    assert [p.read_bytes() for p in path.parent.glob("x.npy.altered-*")] == [bad]
    assert verify(output).intact
    path.unlink()
    assert verify(output).intact, "it is its owner's to take away"


@pytest.mark.parametrize("more", [{}, {"file": "../../elsewhere.npy"}, {"file": 3}])
def test_a_provenance_that_names_no_file_is_written_anew(entries, output, more):
    (path,) = hand_over(output, entries[0], ["x"])
    path.with_suffix(".json").write_text(json.dumps({"key": entries[0].key, **more}))
    assert hand_over(output, entries[0], ["x"]) == [path]
    assert told_of(path)["file"] == "x.npy"


def test_a_file_of_somebody_elses_is_left_alone(entries, output):
    (output / "files").mkdir()
    (output / "files/x.npy").write_text("mine")
    (path,) = hand_over(output, entries[0], ["x"])
    assert path.name == f"x--twice-{entries[0].key[:8]}.npy"
    assert (output / "files/x.npy").read_text() == "mine"


def test_a_provenance_beyond_reading_is_left_alone_once(entries, output):
    (output / "files").mkdir()
    own = f"x--twice-{entries[0].key[:8]}"
    for name in ("x", own):
        (output / f"files/{name}.json").write_text("{")
    assert [p.name for p in hand_over(output, entries[0], ["x"])] == [f"{own}.npy"]
    assert (output / "files/x.json").read_text() == "{"
