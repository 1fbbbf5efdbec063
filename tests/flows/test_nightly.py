"""The nightly run on a real engine: new work once, drafts left, bad files quarantined, no names."""

import json
import os
import shutil
import time
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from evaluation_kit import INLINE, make_model, picture
from nightly_kit import fates, found_by_command, run
from PIL import Image

from diffusion_core.model import model_digest
from domains.base import BadInputError
from domains.files import file_digest
from flows import api_nightly, registry
from flows.api_nightly import NightlyError
from flows.api_upkeep import quarantined, retry_quarantined, verify
from flows.config import NightlySettings, SimulateSettings
from flows.engine.restored import open_restored
from flows.engine.worker import BlockWorker

NAME = "john-doe-1970"
"""Stands in every file name, and must stand in nothing that is written."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("nightly") / "model")


@pytest.fixture
def inbox(tmp_path: Path, registry_home: Path) -> Path:
    folder = tmp_path / "inbox"
    (folder / "streets" / "masks").mkdir(parents=True)
    (folder / "streets" / "job.yaml").write_text("domain: city\nmask: masks\n")
    return folder


def add(inbox: Path, number: int, job: str = "streets") -> Path:
    """A photograph with a square hole, and the mask that says where."""
    path = inbox / job / f"{NAME}-{number}.png"
    pixels = np.moveaxis(picture(number, (3, 1, 32, 40))[:, 0], 0, -1).copy()
    mask = np.zeros((32, 40), np.uint8)
    mask[8:16, 10:20] = 255
    pixels[mask > 0] = 0
    Image.fromarray(pixels).save(path)
    Image.fromarray(mask).save(path.parent / "masks" / path.name)
    return path


def test_new_files_are_restored_once_and_the_night_is_reported(inbox: Path, model: Path):
    add(inbox, 1)
    add(inbox, 2)
    (job,) = run(inbox, model).jobs
    assert (job.status, len(job.restored), job.num_known) == ("restored", 2, 0)
    assert all(figures.residual is not None for figures in job.restored)
    add(inbox, 3)
    result = run(inbox, model)
    (job,) = result.jobs
    assert (job.status, len(job.restored), job.num_known) == ("restored", 1, 2)
    (job,) = run(inbox, model).jobs
    assert (job.status, job.num_known) == ("nothing new", 3)
    assert len(open_restored(inbox.parent / "out" / "streets").items()) == 3
    report = json.loads(result.report.read_text())
    assert report["jobs"][0]["num_known"] == 2
    assert job.name in result.page.read_text()


def test_a_new_name_is_not_new_but_another_mask_is(inbox: Path, model: Path):
    path = add(inbox, 1)
    run(inbox, model)
    mask = path.parent / "masks" / path.name
    path.rename(path.with_name("other.png"))
    mask.rename(mask.with_name("other.png"))
    (job,) = run(inbox, model).jobs
    assert (job.status, job.num_known) == ("nothing new", 1)
    output = inbox.parent / "out" / "streets"
    white = np.zeros((32, 40), np.uint8)
    white[:4] = 255
    Image.fromarray(white).save(mask.with_name("other.png"))
    (job,) = run(inbox, model).jobs
    assert len(job.restored) == 1
    assert len(open_restored(output).items()) == 2


def test_files_still_being_written_are_left_for_later(inbox: Path, model: Path):
    add(inbox, 1)
    path = add(inbox, 2)
    shutil.copy(path, path.with_name("copy.png.partial"))
    (inbox / ".upload").mkdir()
    (inbox / "later.partial").mkdir()
    (job,) = run(inbox, model, settle_s=3600).jobs
    assert (job.status, job.num_waiting) == ("nothing new", 2)
    (job,) = run(inbox, model, settle_s=0).jobs
    assert len(job.restored) == 2


def test_an_old_time_stamp_does_not_hide_a_file_that_was_just_written(inbox: Path, model: Path):
    path = add(inbox, 1)
    os.utime(path, (time.time() - 9999,) * 2)
    (job,) = run(inbox, model, settle_s=3600).jobs
    assert job.num_waiting == 1


def test_a_bad_file_is_quarantined_once_and_the_others_finish(inbox: Path, model: Path):
    add(inbox, 1)
    (inbox / "streets" / f"{NAME}-bad.png").write_text("no picture")
    result = run(inbox, model)
    (job,) = result.jobs
    assert (len(job.restored), len(job.quarantined)) == (1, 1)
    assert len(result.quarantined) == 1
    (job,) = run(inbox, model).jobs
    assert (job.status, job.num_known, job.quarantined) == ("nothing new", 2, ())


def failing(monkeypatch, digest: str):
    """Blocks of one image fail for no fault of theirs, until undone."""
    compute = BlockWorker._carry_out

    def stumble(worker, objects, job):
        if job.item.record.source_digest == digest:
            raise RuntimeError("stumbled")
        return compute(worker, objects, job)

    monkeypatch.setattr(BlockWorker, "_carry_out", stumble)


def test_what_failed_for_no_fault_of_its_own_is_tried_by_three_nights_then_when_asked(
    inbox: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    output = inbox.parent / "out"
    add(inbox, 1)
    bad = file_digest(add(inbox, 2))
    with monkeypatch.context() as patch:
        failing(patch, bad)
        (job,) = run(inbox, model).jobs
        assert (len(job.restored), len(job.quarantined)) == (1, 1)
        assert fates(inbox) == ["restored"]
        for expected in (["restored"], ["quarantined", "restored"]):
            (job,) = run(inbox, model).jobs
            assert (job.status, len(job.quarantined), job.num_known) == ("quarantined", 1, 1)
            assert fates(inbox) == expected
        (job,) = run(inbox, model).jobs
        assert (job.status, job.num_known) == ("nothing new", 2)
    (job,) = run(inbox, model).jobs
    assert job.status == "nothing new", "nobody has asked"
    [given_up] = quarantined(output)
    assert (given_up.output, given_up.entry.num_runs) == ("streets", 3)
    assert given_up.entry.source_digest == bad
    assert len(retry_quarantined(output)) == 1
    assert fates(inbox) == ["restored"]
    (job,) = run(inbox, model).jobs
    assert (len(job.restored), job.quarantined) == (1, ())
    assert quarantined(output) == []
    assert verify(output).intact
    assert list(verify(output).outputs) == ["streets"]


def test_the_ledger_tells_the_fates_of_equal_images_apart(inbox: Path, model: Path):
    path = add(inbox, 1)
    (path.parent / "other.png").write_bytes(path.read_bytes())
    (path.parent / "masks/other.png").write_text("no picture")
    (job,) = run(inbox, model).jobs
    assert (len(job.restored), len(job.quarantined)) == (1, 1)
    notes = (inbox.parent / "out/nightly/seen").iterdir()
    assert sorted(json.loads(note.read_text())["fate"] for note in notes) == [
        "quarantined",
        "restored",
    ]


def test_a_night_of_nothing_but_a_bad_file_finishes_too(inbox: Path, model: Path):
    (inbox / "streets" / f"{NAME}-bad.png").write_text("no picture")
    result = run(inbox, model)
    (job,) = result.jobs
    assert (job.status, len(job.quarantined)) == ("quarantined", 1)
    (bad,) = job.quarantined
    assert not bad.reason.startswith("sha256")
    assert NAME not in result.report.read_text()
    assert len(result.quarantined) == 1
    assert run(inbox, model).quarantined == []


def test_of_files_that_are_all_bad_each_has_its_own_reason(inbox: Path, model: Path):
    for name in ("text.png", "dot.png"):
        shutil.copy(add(inbox, 1), inbox / "streets" / "masks" / name)
    (inbox / "streets" / f"{NAME}-1.png").unlink()
    (inbox / "streets" / "text.png").write_text("no picture")
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(inbox / "streets" / "dot.png")
    (job,) = run(inbox, model).jobs
    reasons = {bad.item: bad.reason for bad in job.quarantined}
    text, dot = (
        f"sha256 {file_digest(inbox / 'streets' / name)[:12]}" for name in ("text.png", "dot.png")
    )
    assert set(reasons) == {text, dot}
    assert reasons[text].startswith("not a readable PNG image (by its first bytes it is plain")
    assert "too small" in reasons[dot]
    assert "sha256" not in "".join(reasons.values())


def test_no_name_of_a_file_reaches_reports_and_ledger(inbox: Path, model: Path):
    add(inbox, 1)
    bad = inbox / "streets" / f"{NAME}-bad.png"
    bad.write_text("no picture")
    lonely = add(inbox, 2)
    (lonely.parent / "masks" / lonely.name).unlink()
    result = run(inbox, model)
    told = {entry.item for entry in result.jobs[0].quarantined}
    assert told == {f"sha256 {file_digest(path)[:12]}" for path in (bad, lonely)}
    night = inbox.parent / "out" / "nightly"
    written = [p for p in night.rglob("*") if p.is_file()]
    assert len(written) == 5
    assert not [p for p in written if NAME in p.name or NAME in p.read_text()]
    assert NAME not in result.summary()
    for entry in result.jobs[0].quarantined:
        for text in (result.summary(), result.page.read_text(), result.report.read_text()):
            assert entry.item in text
            assert entry.reason in unescape(text)
    assert found_by_command(result, inbox) == {bad, lonely}
    records = list((inbox.parent / "out/streets/quarantine").rglob("*.json"))
    digests = {json.loads(record.read_text())["input_digest"] for record in records}
    assert digests == {file_digest(path) for path in (bad, lonely)}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "there is no such file"),
        ("domain: [", "not YAML"),
        ("domain: city\nmsk: m\n", "'msk': did you mean 'mask'?"),
    ],
)
def test_a_job_that_cannot_be_read_is_quarantined_and_stops_no_other(
    inbox: Path, model: Path, text: str | None, reason: str
):
    add(inbox, 1)
    (inbox / "a-broken").mkdir()
    if text is not None:
        (inbox / "a-broken" / "job.yaml").write_text(text)
    broken, good = run(inbox, model).jobs
    assert (broken.status, good.status) == ("quarantined", "restored")
    assert reason in broken.reason


def test_without_a_champion_the_starter_restores_and_then_the_champion(
    inbox: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    other = make_model(inbox.parent / "starter", seed=1)
    monkeypatch.setattr(registry, "config_path", lambda *parts: other)
    add(inbox, 1)
    (job,) = run(inbox, "champion").jobs
    assert [f.model_digest for f in job.restored] == [model_digest(other)]
    registry.register_model(model, ["sashiko-city"])
    registry.promote("sashiko-city", 1)
    add(inbox, 2)
    (job,) = run(inbox, "champion").jobs
    assert {f.model_digest for f in job.restored} == {model_digest(model)}


def test_a_failure_is_reported_after_the_other_jobs_are_done(
    inbox: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    add(inbox, 1)
    shutil.copytree(inbox / "streets", inbox / "a-failing")
    restore = api_nightly.restore

    def fail_once(settings, on_event):
        if settings.output.name == "a-failing":
            raise OSError("the disk is full")
        return restore(settings, on_event)

    monkeypatch.setattr(api_nightly, "restore", fail_once)
    with pytest.raises(NightlyError, match="1 of 2 jobs failed, first a-failing: OSError"):
        run(inbox, model)
    monkeypatch.setattr(api_nightly, "restore", restore)
    failing, streets = run(inbox, model).jobs
    assert (failing.status, streets.status) == ("restored", "nothing new")


def test_measurements_are_taken_as_they_are(inbox: Path, model: Path, tmp_path: Path):
    from evaluation_kit import make_dataset

    from flows.api_data import simulate

    data = make_dataset(tmp_path / "clean.zarr")
    shutil.rmtree(inbox / "streets")
    simulate(
        SimulateSettings(dataset=data, tasks=["inpaint-random70"], output=inbox / "scans.zarr")
    )
    (job,) = run(inbox, model).jobs
    assert (job.name, job.status, len(job.restored)) == ("scans.zarr", "restored", 2)
    (job,) = run(inbox, model).jobs
    assert (job.status, job.num_known) == ("nothing new", 2)


def test_an_inbox_that_is_not_there_is_refused(tmp_path: Path, model: Path):
    with pytest.raises(BadInputError, match="no such folder"):
        run(tmp_path / "inbox", model)


@pytest.mark.prefect
def test_the_flow_tells_of_quarantine_in_its_state(inbox: Path, model: Path, prefect_server: str):
    from flows.nightly import nightly_flow

    add(inbox, 1)
    (inbox / "streets" / f"{NAME}-bad.png").write_text("no picture")
    settings = NightlySettings(
        inbox=inbox,
        output=inbox.parent / "out",
        model=str(model),
        settle_s=0,
        dtype="float32",
        compute=INLINE,
    )
    state = nightly_flow(settings, return_state=True)
    assert (state.type.value, state.name) == ("COMPLETED", "Quarantined")
    assert nightly_flow(settings, return_state=True).name == "Completed"
