"""DICOM through ingest and restore: series in, derived series out, and the patient nowhere else."""

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_kit import CANARY, series, stored_values
from engine_kit import recorder

from domains.base import BadInputError
from flows.api_data import ingest
from flows.api_restore import restore
from flows.config import ComputeSettings, IngestSettings, MethodSettings, RestoreSettings
from flows.inbox import JobFolder
from flows.store import Dataset

CANARIES = (CANARY.encode(), b"Kanarienvogel", "Kanarienvogel".encode("utf-16-le"))


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))


def settings(tmp_path: Path, **changes) -> RestoreSettings:
    values = {
        "input": tmp_path / "in",
        "output": tmp_path / "out",
        "domain": "ct",
        "sigma_y": 0.05,
        "method": MethodSettings(name="tv", kind="baseline", options={"num_iterations": 5}),
        "compute": ComputeSettings(executor="inline"),
        **changes,
    }
    return RestoreSettings(**values)


def without_canary(*folders: Path) -> None:
    for folder in folders:
        for file in (p for p in folder.rglob("*") if p.is_file()):
            data = file.read_bytes()
            assert not any(word in data for word in CANARIES), file


def test_series_become_items_and_what_lacks_slices_is_left_out(tmp_path):
    values = stored_values()
    series(tmp_path / "in" / "Kanarienvogel a", values)
    series(tmp_path / "in" / "b", values[:, ::-1], change=lambda k, ds: k != 2)
    series(tmp_path / "in" / "c", values, step=(0.0, 0.5, 2.4))
    told, events = recorder()
    result = ingest(
        IngestSettings(source=tmp_path / "in", domain="ct", output=tmp_path / "ds.zarr"), events
    )
    assert [record.shape for record in result.items] == [(1, 5, 20, 18)] * 2
    dataset = Dataset(tmp_path / "ds.zarr")
    read = {dataset.read(r.item_id).pixels.tobytes() for r in dataset.items()}
    assert read == {(values - 1024).astype(np.int16)[None].tobytes()}
    assert [q.reason for q in result.quarantined] == [
        "1 of 5 slices are missing: 3; have them restored by `sashiko restore --mask slices`, or "
        "export the series again"
    ]
    assert any("gantry tilted by 11.8 degrees" in event.message for event in told)
    without_canary(tmp_path / "ds.zarr", tmp_path / "home")


def test_a_series_comes_back_as_a_derived_series(tmp_path):
    source = series(tmp_path / "in" / "a", stored_values())
    result = restore(settings(tmp_path))
    (written,) = result.files
    assert written.is_dir()
    files = sorted(written.iterdir())
    assert len(files) == 5
    own = pydicom.dcmread(min(source.iterdir()))
    for file in files:
        dataset = pydicom.dcmread(file)
        assert dataset.PatientName == CANARY
        assert dataset.StudyInstanceUID == own.StudyInstanceUID
        assert "tv, no model" in dataset.DerivationDescription
    provenance = json.loads(written.with_name(written.name + ".json").read_text())
    assert (provenance["file"], provenance["model_digest"]) == (written.name, None)
    pixels = np.stack([pydicom.dcmread(f).pixel_array for f in files])
    assert pixels.std() < stored_values().std()
    assert restore(settings(tmp_path)).files == result.files
    again = restore(settings(tmp_path, output=tmp_path / "again"))
    for file, other in zip(files, sorted(again.files[0].iterdir()), strict=True):
        assert file.read_bytes() == other.read_bytes()
    without_canary(
        tmp_path / "home", *(p for p in (tmp_path / "out").iterdir() if p.name != "files")
    )


def test_a_series_that_lacks_slices_is_not_denoised_as_if_it_were_whole(tmp_path):
    series(tmp_path / "in", stored_values(), change=lambda k, ds: k != 2)
    with pytest.raises(BadInputError, match="1 of 5 slices are missing: 3"):
        restore(settings(tmp_path))


def test_a_night_finds_the_slices_whatever_they_are_called(tmp_path):
    job = tmp_path / "job"
    series(job / "a", stored_values())
    (job / "job.yaml").write_text("domain: ct\nsigma_y: 0.05\n")
    (job / "notes.txt").write_text("no image")
    (found,) = JobFolder(job).scans()
    assert found.files == tuple(sorted((job / "a").iterdir()))


def test_missing_slices_are_restored_by_the_command(tmp_path):
    values = np.broadcast_to(stored_values((1, 24, 24)), (7, 24, 24)) + 9
    series(tmp_path / "in" / "a", values, change=lambda k, ds: k not in (2, 3))
    method = MethodSettings(name="linear-z", kind="baseline")
    result = restore(settings(tmp_path, sigma_y=0.0, mask="slices", method=method))
    (written,) = result.files
    stored = np.stack([pydicom.dcmread(f).pixel_array for f in sorted(written.iterdir())])
    np.testing.assert_array_equal(stored, values)
    series(tmp_path / "whole", values)
    with pytest.raises(BadInputError, match="no slice is missing"):
        restore(settings(tmp_path, input=tmp_path / "whole", sigma_y=0.0, mask="slices"))


def test_chosen_slices_are_restored_with_those_that_lack(tmp_path):
    values = np.broadcast_to(stored_values((1, 24, 24)), (7, 24, 24)) + 9
    bad = values.copy()
    bad[5] = 0
    series(tmp_path / "in" / "a", bad, change=lambda k, ds: k != 2)
    method = MethodSettings(name="linear-z", kind="baseline")
    asked = settings(tmp_path, sigma_y=0.0, mask="slices:5", method=method)
    (written,) = restore(asked).files
    stored = np.stack([pydicom.dcmread(f).pixel_array for f in sorted(written.iterdir())])
    np.testing.assert_array_equal(stored, values)
    with pytest.raises(BadInputError, match="slice 7 is not one of its 7, which count from 0"):
        restore(settings(tmp_path, output=tmp_path / "o", sigma_y=0.0, mask="slices:1,7"))


def test_moved_slices_are_found_and_replaced_or_told_to_be_none(tmp_path, monkeypatch):
    values = np.broadcast_to(stored_values((1, 24, 24)), (7, 24, 24)) + 9
    bad = values.copy()
    bad[3] += np.arange(24) % 2 * 500
    series(tmp_path / "in", bad)
    method = MethodSettings(name="linear-z", kind="baseline")
    asked = settings(tmp_path, sigma_y=0.0, mask="moved", method=method)
    with pytest.raises(BadInputError, match="no slice looks as if it moved; name some"):
        restore(asked)
    monkeypatch.setattr("domains.ct.domain.CT.moved_slices", lambda self, item: [3])
    (written,) = restore(asked).files
    stored = np.stack([pydicom.dcmread(f).pixel_array for f in sorted(written.iterdir())])
    np.testing.assert_array_equal(stored, values)


def test_thinner_slices_of_a_series_come_as_a_series(tmp_path):
    series(tmp_path / "in", stored_values())
    method = MethodSettings(name="linear-z", kind="baseline")
    result = restore(settings(tmp_path, sigma_y=0.0, scale_z=3, method=method))
    (written,) = result.files
    heights = [pydicom.dcmread(f).ImagePositionPatient[2] for f in sorted(written.iterdir())]
    np.testing.assert_allclose(np.diff(np.array(heights, float)), 2.5 / 3, atol=1e-6)
    assert len(heights) == 15


def test_slices_are_of_volumes_alone(tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 32)).save(tmp_path / "a.png")
    for mask in ("slices", "slices:1", "moved"):
        with pytest.raises(BadInputError, match="restored one by one"):
            restore(settings(tmp_path, input=tmp_path / "a.png", domain="city", mask=mask))
