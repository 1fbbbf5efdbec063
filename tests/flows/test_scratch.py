"""Measurements made of images, in the work area: who reads them keeps them, else they go."""

from pathlib import Path

import pytest
from engine_kit import content_free, image_settings, put_images

from domains.base import BadInputError
from flows import api_restore
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
