"""What `--plan` says of the work that is left, beside what a run then does."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from engine_kit import image_settings, make_store, put_images, tiny_plan

from flows.answers import plan_text
from flows.api_restore import plan, prepare, restore
from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.forecast import foretell
from flows.engine.restored import open_restored
from flows.roots import S3Root
from flows.store import Measurements

SHAPE = (1, 3, 700, 520)


class StopError(Exception):
    """Stops a run."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("in") / "m.zarr", shape=SHAPE)


def test_bytes_are_those_of_the_arrays_that_a_run_writes(store, tmp_path):
    planned = tiny_plan(store, tmp_path)
    told = foretell(planned, files=False)
    run_plan(planned, InlineExecutor())
    entries = open_restored(tmp_path).items()
    levels = [[zarr.open_array(e.path, path=str(k)).nbytes for k in range(3)] for e in entries]
    assert told.pixel_bytes == sum(sizes[0] for sizes in levels)
    assert told.pyramid_bytes == sum(sum(sizes[1:]) for sizes in levels)
    assert told.num_bytes == sum(map(sum, levels))


def test_what_is_done_is_left_out_whether_published_or_receipted(store, tmp_path):
    planned = tiny_plan(store, tmp_path)
    whole = foretell(planned)
    assert (whole.num_items, whole.num_blocks) == (0, 0)
    assert whole.work_seconds == pytest.approx(planned.predicted_work_seconds)
    assert "done already" not in plan_text(planned, whole)

    def stop(event):
        if event.kind == "block" and event.done == 5:
            raise StopError

    with pytest.raises(StopError):
        run_plan(planned, InlineExecutor(), stop)
    left = foretell(planned)
    assert (left.num_items, left.num_blocks) == (1, 5)
    assert left.work_seconds == pytest.approx(whole.work_seconds / 6)
    assert left.pixel_bytes == 4 * np.prod(SHAPE[2:])
    assert left.pyramid_bytes == whole.pyramid_bytes / 2
    assert left.file_bytes == whole.file_bytes / 2
    assert "done already: 1 item, 5 blocks (counted, not checked)" in plan_text(planned, left)
    assert run_plan(planned, InlineExecutor()).num_computed == 6 - left.num_blocks
    done = foretell(planned)
    assert (done.num_items, done.num_blocks, done.seconds, done.num_bytes) == (2, 6, 0, 0)
    assert "bytes, before compression: none" in plan_text(planned, done)


def test_files_and_the_measurements_made_of_images_are_counted(tmp_path):
    images = put_images(tmp_path / "images", 3)
    settings = image_settings(images, tmp_path / "out")
    told = foretell(plan(settings))
    with prepare(settings, lambda _: None) as job:
        entries = Measurements(job.given.path).entries()
        assert told.scratch_bytes == sum(e.num_bytes for e in entries) > 0
        job.given.withdraw()
    result = restore(settings)
    assert told.file_bytes == sum(np.load(path).nbytes for path in result.files)
    assert foretell(plan(settings)).num_bytes == 0


def test_on_s3_pixels_are_copied_and_no_files_are_written(store, tmp_path, monkeypatch):
    from dataclasses import replace

    planned = replace(tiny_plan(store, tmp_path), output=S3Root("bucket-a", "out"))
    monkeypatch.setattr("flows.engine.forecast.open_objects", lambda _: EmptyPlace())
    told = foretell(planned)
    assert (told.copy_bytes, told.file_bytes) == (told.pixel_bytes, 0)


class EmptyPlace:
    """Nothing was ever put there."""

    def names(self, prefix):
        return []
