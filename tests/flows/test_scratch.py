"""Measurements made of images, in the work area: who reads them keeps them, else they go."""

import json
from pathlib import Path

import numpy as np
import pytest
from damage_kit import flip_a_bit
from engine_kit import content_free, image_settings, kinds, put_images, recorder

from domains.base import BadInputError
from flows import api_restore, cli, quiet
from flows.api_restore import collect, prepare, restore, restore_window
from flows.api_upkeep import gc
from flows.engine.events import ignore
from flows.engine.executor import InlineExecutor
from flows.engine.in_use import InUse, alone_with, lock_of


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return put_images(tmp_path / "in", 2)


def finish(job):
    with InlineExecutor() as executor:
        return collect(job, [restore_window(job, job.plan, executor, ignore)])


def test_a_run_that_ends_leaves_the_measurements_that_another_reads(images, tmp_path):
    output = tmp_path / "out"
    other = prepare(image_settings(images, output, "box-blur"), ignore)
    assert restore(image_settings(images, output)).quarantined == ()
    assert other.given.scratch.is_dir()
    result = finish(other)
    assert (len(result.published), result.quarantined) == (2, ())
    assert content_free(output / ".work"), "the last one takes them away"


def test_a_run_that_ends_while_another_plans_leaves_it_the_measurements(
    images, tmp_path, monkeypatch
):
    asked, planned = image_settings(images, tmp_path / "out"), api_restore._plan

    def late(*given):
        monkeypatch.setattr(api_restore, "_plan", planned)
        restore(asked)
        return planned(*given)

    monkeypatch.setattr(api_restore, "_plan", late)
    assert restore(asked).num_reused == 2
    assert content_free(tmp_path / "out/.work")


def test_gc_takes_the_measurements_of_a_run_that_stopped_and_of_no_other(images, tmp_path):
    output = tmp_path / "out"
    job = prepare(image_settings(images, output), ignore)
    place = f".work/{job.given.scratch.name}"
    assert gc(output, min_age_s=-3600).outputs["."].garbage == ()
    job.given.release()
    assert gc(output).outputs["."].garbage == (), "it is younger than a day"
    for dry_run in (True, False):
        assert job.given.scratch.is_dir()
        (found,) = gc(output, min_age_s=-3600, dry_run=dry_run).outputs["."].garbage
        assert (found.kind, found.keys) == ("measurements of images that no run uses", (place,))
    assert content_free(output / ".work")


def test_a_run_that_fails_holds_the_measurements_no_longer(images, tmp_path):
    with prepare(image_settings(images, tmp_path / "out"), ignore) as job:
        pass
    with alone_with(job.given.scratch) as alone:
        assert alone is True


def test_a_request_that_is_refused_gives_up_its_hold(images, tmp_path, monkeypatch):
    def refuse(*given):
        raise BadInputError("no")

    monkeypatch.setattr(api_restore, "_plan", refuse)
    with pytest.raises(BadInputError, match="no"):
        restore(image_settings(images, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_hold_lasts_until_its_last_user_ends_and_leaves_no_file(tmp_path):
    folder = tmp_path / "store"
    first, second = InUse(folder), InUse(folder)
    for user in (first, second):
        with alone_with(folder) as alone:
            assert alone is False
        user.end()
        user.end()  # once is enough
    with alone_with(folder) as alone:
        assert alone is True
    assert not lock_of(folder).exists()


def test_where_there_are_no_locks_nobody_is_told_to_be_alone(tmp_path, monkeypatch):
    def none(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    user = InUse(tmp_path / "store")
    with alone_with(tmp_path / "store") as alone:
        assert alone is None
    user.end()


# --- inputs that lie among results, and names that files cannot have -----------------------------


def test_an_output_that_is_the_input_is_refused(images, capsys, monkeypatch):
    monkeypatch.setattr(quiet, "hush", lambda: None)
    before = sorted(images.rglob("*"))
    with pytest.raises(BadInputError, match="this is the input too"):
        restore(image_settings(images, images / "../in"))
    told = ["--domain", "tiny", "--sigma-y", "0.1"]
    assert cli.run(["restore", "--input", str(images), "--output", str(images), *told]) == 2
    assert "this is the input too" in capsys.readouterr().err
    assert sorted(images.rglob("*")) == before


def test_results_below_the_input_are_not_restored_again(images):
    (images / "night/campaigns").mkdir(parents=True)
    np.save(images / "night/campaigns/im9.npy", np.ones((1, 1, 8, 8), np.float32))
    for name in ("twice", "box-blur", "twice"):
        result = restore(image_settings(images, images / f"outputs/{name}", name))
        places = [path.relative_to(images / f"outputs/{name}/files") for path in result.files]
        assert sorted(map(str, places)) == ["im0.npy", "im1.npy", "night/campaigns/im9.npy"]
        assert result.num_unknown == 0


def test_a_name_as_long_as_names_can_be_is_handed_over(images, tmp_path):
    name = "名" * 83  # of 249 bytes
    (images / "im0.npy").rename(images / f"{name}.npy")
    result = restore(image_settings(images, tmp_path / "out"))
    assert result.quarantined == ()
    assert {path.stem for path in result.files} == {name, "im1"}


@pytest.mark.parametrize("before", [False, True])
def test_a_place_that_is_taken_costs_one_file_and_no_other(images, tmp_path, before):
    put_images(images / "im0.json", 1, seed=4)  # where the provenance of im0 would be
    if before:
        np.save(images / "a.npy", np.load(images / "im1.npy") + 1)
    result = restore(image_settings(images, tmp_path / "out"))
    (bad,) = result.quarantined
    assert len(result.published) == len(result.files) + 1 == 3 + before
    assert (bad.kind, "im0" in bad.reason) == ("io", False)
    assert bad.reason.startswith("restored, but not written as a file: ")
    assert restore(image_settings(images, tmp_path / "out")).num_computed == 0


def test_a_full_disk_stops_the_handing_over(images, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flows.handover._written", full)
    with pytest.raises(OSError, match="No space left"):
        restore(image_settings(images, tmp_path / "out"))


# --- what a stopped run left is damaged ----------------------------------------------------------


def _flip_a_chunk(store: Path) -> None:
    flip_a_bit(next(p for p in sorted(store.rglob("*")) if "/y/c/" in str(p) and p.is_file()))


def _tear_the_manifest(store: Path) -> None:
    text = (store / "manifest.json").read_text()
    (store / "manifest.json").write_text(text[:-40])


def _forget_the_rejected(store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    del manifest["rejected"]
    (store / "manifest.json").write_text(json.dumps(manifest))


def _lose_an_array(store: Path) -> None:
    next(store.rglob("y/zarr.json")).unlink()


def _lose_the_group(store: Path) -> None:
    (store / "zarr.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [_flip_a_chunk, _tear_the_manifest, _forget_the_rejected, _lose_an_array, _lose_the_group],
)
def test_measurements_that_are_damaged_are_made_again_from_the_images(images, tmp_path, damage):
    asked = image_settings(images, tmp_path / "out")
    job = prepare(asked, ignore)
    job.given.release()  # as if killed here
    damage(job.given.path)
    events, handler = recorder()
    result = restore(asked, handler)
    assert (len(result.published), result.quarantined) == (2, ())
    assert {"corrupt", "file"} <= set(kinds(events))
    assert content_free(tmp_path / "out/.work")
