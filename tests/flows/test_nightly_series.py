"""Scans of many files in the nightly run: one item each, taken whole, accounted for by content."""

import json
import os
import shutil
import time
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_kit import CANARY, OWN, series, stored_values
from evaluation_kit import make_model
from kspace_kit import scan, write_bart
from nightly_kit import fates, found_by_command, run

from domains.files import files_digest
from flows.api_upkeep import retry_quarantined
from flows.engine.restored import open_restored
from flows.engine.worker import BlockWorker
from flows.inbox import JobFolder

SOFT = "domain: ct\nsigma_y: 0.05\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nightly-series")
    return make_model(folder / "model", conditions={"ct": 1, "mri": 1, "mri-complex": 2})


@pytest.fixture
def inbox(tmp_path: Path, registry_home: Path) -> Path:
    return tmp_path / "inbox"


def job_of(inbox: Path, text: str = SOFT) -> Path:
    folder = inbox / "scans"
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(text)
    return folder


def being_written(path: Path) -> None:
    """Give a file a time of change that lies ahead: however short one waits, it has not settled."""
    os.utime(path, (time.time() + 1000,) * 2)


def settled(path: Path) -> None:
    os.utime(path, (time.time(),) * 2)


def output_files(inbox: Path) -> list[Path]:
    return sorted(p for p in (inbox.parent / "out/scans/files").rglob("*") if p.is_file())


def test_a_series_is_one_item_that_comes_back_as_a_series_once(inbox: Path, model: Path):
    source = series(job_of(inbox) / "a", stored_values())
    (job,) = run(inbox, model).jobs
    assert (job.status, len(job.restored), job.quarantined) == ("restored", 1, ())
    assert fates(inbox) == ["restored"]
    (note,) = (inbox.parent / "out/nightly/seen").glob("*.json")
    assert json.loads(note.read_text())["sha256"] == files_digest(list(source.iterdir()))
    written = [p for p in output_files(inbox) if p.suffix != ".json"]
    derived = [pydicom.dcmread(path) for path in written]
    assert len(derived) == 5
    assert {str(d.PatientName) for d in derived} == {CANARY}
    assert len({d.SeriesInstanceUID for d in derived}) == 1
    (job,) = run(inbox, model).jobs
    assert (job.status, job.num_known, job.num_waiting) == ("nothing new", 1, 0)


def test_other_names_and_another_order_are_not_new_but_one_slice_more_is(inbox: Path, model: Path):
    values = stored_values((6, 20, 18))
    folder = job_of(inbox) / "a"
    series(folder, values, change=lambda k, ds: k < 5)
    run(inbox, model)
    for number, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        path.rename(folder / f"renamed-{number}")
    (job,) = run(inbox, model).jobs
    assert (job.status, job.num_known) == ("nothing new", 1)
    series(inbox.parent / "more", values, change=lambda k, ds: k == 5)
    (last,) = (inbox.parent / "more").iterdir()
    shutil.copy(last, folder / "last")
    (job,) = run(inbox, model).jobs
    assert (len(job.restored), job.num_known) == (1, 0)
    depths = [e.record.shape[1] for e in open_restored(inbox.parent / "out/scans").items()]
    assert sorted(depths) == [5, 6]


def test_a_series_waits_until_all_of_its_folder_has_settled(inbox: Path, model: Path):
    job_folder = job_of(inbox)
    one = series(job_folder / "one", stored_values())
    series(job_folder / "two", stored_values(seed=1))
    last = max(one.iterdir())
    draft = one / "IM0006.part"
    draft.write_bytes(last.read_bytes()[:400])
    for path in (last, draft):
        settled(draft)
        being_written(path)
        (job,) = run(inbox, model).jobs
        assert job.num_waiting == 1, path.name
        settled(path)
    assert len(open_restored(inbox.parent / "out/scans").items()) == 1, "that of the other folder"
    (job,) = run(inbox, model).jobs
    assert (len(job.restored), job.num_known, job.num_waiting) == (1, 1, 0)
    assert fates(inbox) == ["restored", "restored"]


@pytest.mark.parametrize("harm", ["pixels", "header"])
def test_a_broken_slice_is_told_with_a_command_that_finds_it(inbox: Path, model: Path, harm: str):
    job_folder = job_of(inbox)
    series(job_folder / "good", stored_values())
    bad = series(job_folder / f"{CANARY} bad", stored_values(seed=1))
    broken = sorted(bad.iterdir())[2]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-500] if harm == "pixels" else whole[:300])
    result = run(inbox, model)
    (job,) = result.jobs
    assert (job.status, len(job.restored)) == ("restored", 1)
    assert job.quarantined
    assert broken in found_by_command(result, inbox)
    assert not found_by_command(result, inbox) & set((job_folder / "good").iterdir())
    assert CANARY not in result.summary() + result.page.read_text() + result.report.read_text()
    (job,) = run(inbox, model).jobs
    assert job.status == "nothing new", "told once"
    broken.write_bytes(whole)
    (job,) = run(inbox, model).jobs
    assert (len(job.restored), job.quarantined) == (1, ()), "nothing is lost"


def test_what_failed_for_no_fault_of_the_series_comes_again(
    inbox: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    source = series(job_of(inbox) / "a", stored_values())

    def stumble(worker, objects, job):
        raise RuntimeError("stumbled")

    with monkeypatch.context() as patch:
        patch.setattr(BlockWorker, "_carry_out", stumble)
        result = run(inbox, model)
    assert result.jobs[0].status == "quarantined"
    assert fates(inbox) == []
    assert found_by_command(result, inbox) == {min(source.iterdir())}
    (job,) = run(inbox, model).jobs
    assert (job.status, len(job.restored)) == ("restored", 1)


def test_a_refused_series_is_tried_again_when_somebody_asks(inbox: Path, model: Path):
    folder = job_of(inbox)
    series(folder / "good", stored_values(seed=1))
    series(folder / "a", stored_values(), change=lambda k, ds: k != 2)
    (job,) = run(inbox, model).jobs
    assert [bad.reason[:27] for bad in job.quarantined] == ["1 of 5 slices are missing: "]
    assert fates(inbox) == ["quarantined", "restored"]
    assert run(inbox, model).jobs[0].status == "nothing new"
    assert len(retry_quarantined(inbox.parent / "out")) == 1
    assert fates(inbox) == ["restored"]


def test_missing_slices_are_another_job_than_noise(inbox: Path):
    folder = series(job_of(inbox) / "a", stored_values()).parent
    lead = min((folder / "a").iterdir())
    told = []
    for mask in ("slices", "nodata", "auto"):
        (folder / "job.yaml").write_text(f"domain: ct\nmask: {mask}\n")
        told.append(JobFolder(folder).instructions(lead))
    assert told[0] != told[1] != told[2] != told[0]


def test_real_slices_of_five_files_are_one_night_s_item(inbox: Path, model: Path):
    shutil.copytree(OWN / "dicomdirtests/98892001/CT5N", job_of(inbox) / "CT5N")
    (scanned,) = JobFolder(inbox / "scans").scans()
    assert len(scanned.files) == 5
    (job,) = run(inbox, model).jobs
    assert (len(job.restored), job.quarantined) == (1, ())
    written = [pydicom.dcmread(p) for p in output_files(inbox) if p.suffix != ".json"]
    places = {tuple(d.ImagePositionPatient) for d in written}
    sources = [pydicom.dcmread(path) for path in scanned.files]
    assert places == {tuple(d.ImagePositionPatient) for d in sources}


def write_sinogram(stem: Path, header: bool) -> Path:
    p = np.hypot(*np.mgrid[:24, :32]).astype(np.float32) / 200
    np.save(stem.with_suffix(".npy"), p)
    told = {"beam": "parallel", "num_views": 24, "arc_degrees": 180, "bin_mm": 1.0,
            "counts_per_ray": 30000}  # fmt: skip
    if header:
        stem.with_suffix(".json").write_text(json.dumps(told))
    return stem.with_suffix(".json")


def write_kspace(stem: Path, header: bool) -> Path:
    write_bart(stem, scan(32, 32).k)
    if not header:
        stem.with_suffix(".hdr").unlink()
    return stem.with_suffix(".hdr")


def write_pair(stem: Path, header: bool) -> Path:
    values = np.random.default_rng(0).integers(0, 900, (20, 24, 3)).astype(np.int16)
    nibabel.save(
        nibabel.Nifti1Pair(values, np.diag([1.0, 1.2, 2.0, 1.0])), stem.with_suffix(".img")
    )
    if not header:
        stem.with_suffix(".hdr").unlink()
    return stem.with_suffix(".hdr")


PAIRS = [
    pytest.param(write_sinogram, "domain: ct\n", id="sinogram"),
    pytest.param(write_kspace, "domain: mri\n", id="BART"),
    pytest.param(write_pair, "domain: mri\nsigma_y: 0.05\n", id="NIfTI"),
]


@pytest.mark.parametrize(("write", "job"), PAIRS)
def test_a_header_beside_its_data_is_part_of_them(inbox: Path, model: Path, write, job: str):
    folder = job_of(inbox, job)
    header = write(folder / "scan", header=True)
    being_written(header)
    assert run(inbox, model).jobs[0].num_waiting == 1
    settled(header)
    (done,) = run(inbox, model).jobs
    assert (len(done.restored), done.quarantined) == (1, ())
    assert fates(inbox) == ["restored"]
    assert run(inbox, model).jobs[0].status == "nothing new"


@pytest.mark.parametrize(("write", "job"), PAIRS)
def test_a_header_that_comes_a_night_later_is_not_too_late(
    inbox: Path, model: Path, write, job: str
):
    folder = job_of(inbox, job)
    write(folder / "scan", header=False)
    result = run(inbox, model)
    assert "beside it" in result.jobs[0].quarantined[0].reason
    (data,) = (p for p in folder.iterdir() if p.name != "job.yaml")
    assert found_by_command(result, inbox) == {data}
    write(folder / "scan", header=True)
    (done,) = run(inbox, model).jobs
    assert (len(done.restored), done.quarantined) == (1, ())
