"""Raw measurements as input of `restore`: nothing has to be said of them, and nothing may be."""

import json
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from engine_kit import recorder
from kspace_kit import lines, scan, write_bart

from domains.base import BadInputError
from flows.api_data import ingest
from flows.api_nightly import nightly
from flows.api_restore import restore
from flows.config import (
    ComputeSettings,
    IngestSettings,
    MethodSettings,
    NightlySettings,
    RestoreSettings,
)
from flows.engine.methods import resolve_method
from flows.store import Measurements


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))


def settings(folder, **changes):
    values = {
        "input": folder / "scans",
        "output": folder / "out",
        "domain": "mri",
        "method": MethodSettings(name="zero-filled", kind="baseline"),
        "compute": ComputeSettings(executor="inline"),
        **changes,
    }
    return RestoreSettings(**values)


@pytest.fixture
def folder(tmp_path):
    """A scan of an odd size in BART's format, the same in NumPy's, and a real array."""
    (tmp_path / "scans/CANARY").mkdir(parents=True)
    k = scan(65, 48).k * lines(48)
    write_bart(tmp_path / "scans/CANARY/first", k)
    np.save(tmp_path / "scans/second.npy", k.astype(np.complex64))
    np.save(tmp_path / "scans/third.npy", np.abs(k))
    return tmp_path


def test_raw_scans_are_restored_and_the_others_told_of(folder):
    _, handler = recorder()
    result = restore(settings(folder), handler)
    assert len(result.published) == 2
    assert result.num_unknown == 0  # the .hdr belongs to its .cfl
    (bad,) = result.quarantined
    assert "raw k-space is complex" in bad.reason
    names = sorted(str(p.relative_to(folder / "out/files")) for p in result.files)
    assert names == ["CANARY/first", "second"]
    magnitudes = []
    for file in result.files:
        image = nibabel.load(file / "magnitude.nii.gz")
        phase = nibabel.load(file / "phase.nii.gz").get_fdata()
        assert image.shape == (48, 65, 1)
        assert np.abs(phase).max() <= np.pi + 1e-6
        magnitudes.append(image.get_fdata())
        facts = json.loads(file.with_name(f"{file.name}.json").read_text())
        assert facts["record"]["meta"]["channels"] == ["magnitude", "phase"]
        assert "CANARY" not in json.dumps({k: v for k, v in facts.items() if k != "file"})
    assert np.allclose(*magnitudes, rtol=1e-4, atol=1e-4)
    again = restore(settings(folder))
    assert again.num_computed == 0
    assert again.num_reused == 2


@pytest.mark.parametrize("option", [{"mask": "nodata"}, {"scale": 2}, {"sigma_y": 0.1}])
def test_nothing_may_be_said_of_what_raw_scans_say_themselves(folder, option):
    with pytest.raises(BadInputError, match="says itself what was measured"):
        restore(settings(folder, **option))
    assert not (folder / "out").exists()


def test_images_among_raw_scans_still_need_a_word(folder):
    image = nibabel.Nifti1Image(np.ones((32, 32, 2), np.int16), np.eye(4))
    nibabel.save(image, folder / "scans/volume.nii.gz")
    result = restore(settings(folder))
    reasons = sorted(q.reason for q in result.quarantined)
    assert len(reasons) == 2
    assert reasons[1].startswith("say what is wrong with the images: --mask")


def test_a_file_of_another_kind_is_told_apart_from_an_image(folder):
    (folder / "scan.dat").write_bytes(b"raw")
    with pytest.raises(BadInputError, match="not a kind of file that 'mri' reads: "):
        restore(settings(folder, input=folder / "scan.dat"))


def test_another_header_is_another_scan(folder):
    first = restore(settings(folder, input=folder / "scans/CANARY"))
    header = folder / "scans/CANARY/first.hdr"
    header.write_text(header.read_text().replace("# Creator\nme", "# Creator\nyou"))
    second = restore(settings(folder, input=folder / "scans/CANARY"))
    assert first.published[0].item_id != second.published[0].item_id


def test_raw_scans_become_a_store_of_measurements_and_do_not_mix_with_images(folder):
    asked = IngestSettings(source=folder / "scans", domain="mri", output=folder / "d.zarr")
    result = ingest(asked)
    assert ["raw k-space is complex" in q.reason for q in result.quarantined] == [True]
    store = Measurements(folder / "d.zarr")
    assert [e.operator for e in store.entries()] == ["multi-coil", "multi-coil"]
    assert {e.record.group for e in store.entries()} > {result.items[-1].item_id}
    assert "CANARY" not in (folder / "d.zarr" / "manifest.json").read_text()
    (folder / "t1").mkdir()
    (folder / "t1/second.npy").write_bytes((folder / "scans/second.npy").read_bytes())
    for wrong, words in (
        ({"mask": "auto"}, "leave out --mask and --guide"),
        ({"guides": {"t1": folder / "t1"}}, "leave out --mask and --guide"),
        ({"guides": {"t1": folder / "scans"}}, "every image there is a guide"),
    ):
        with pytest.raises(BadInputError, match=words):
            ingest(asked.model_copy(update={**wrong, "output": folder / "e.zarr"}))
    nibabel.save(
        nibabel.Nifti1Image(np.ones((32, 32, 2), np.float32), np.eye(4)), folder / "scans/a.nii"
    )
    mixed = ingest(asked.model_copy(update={"output": folder / "mixed.zarr"}))
    assert len(mixed.items) == 1
    assert sum("in a folder of its own" in q.reason for q in mixed.quarantined) == 3


def test_a_model_that_does_not_know_such_images_is_named(folder):
    """The shipped student restores magnitudes; a raw scan's image is complex."""
    asked = settings(folder, input=folder / "scans/second.npy", method=None)
    with pytest.raises(BadInputError, match=r"not trained for 'mri-complex' \(it knows ct, mri"):
        restore(asked.model_copy(update={"model": "starter-distilled"}))


def test_rician_noise_is_taken_off_a_users_volume(tmp_path):
    """Air, black in truth, reads 1.25 sigma; it comes back near 0, the body near what it was."""
    n = 20.0 * np.random.default_rng(0).standard_normal((2, 48, 40, 2))
    truth = np.zeros((48, 40, 2))
    truth[12:36, 10:30] = 200.0
    noisy = np.hypot(truth + n[0], n[1]).astype(np.float32)
    (tmp_path / "scans").mkdir()
    nibabel.save(nibabel.Nifti1Image(noisy, np.eye(4)), tmp_path / "scans/a.nii.gz")
    top = float(np.percentile(noisy, 99.9))
    method = MethodSettings(name="nlm", kind="baseline")
    asked = settings(tmp_path, noise="rician", sigma_y=40.0 / top, method=method)
    (file,) = restore(asked).files
    found = nibabel.load(file).get_fdata()
    assert noisy[truth == 0].mean() > 24
    assert found[:8].mean() < 8
    assert found[16:32, 14:26].mean() == pytest.approx(200, abs=3)
    with pytest.raises(BadInputError, match="images that have noise alone"):
        restore(settings(tmp_path, noise="rician"))
    method = MethodSettings(name="tv", kind="baseline")
    other = settings(tmp_path, noise="rician", sigma_y=0.1, domain="ct", method=method)
    with pytest.raises(BadInputError, match="have no rician noise"):
        restore(other)


@pytest.mark.parametrize("task", ["given", "denoise-rician"])
def test_levels_of_rician_noise_end_at_the_noise_of_the_image_itself(task):
    noise = {"kind": "rician", "sigma": 5.0, "sigma_y": 0.09}
    record = SimpleNamespace(shape=(1, 1, 8, 8))
    entry = SimpleNamespace(task=task, operator="identity", noise=noise, record=record)
    found = resolve_method(None, entry)
    assert (found.num_levels, found.sigma_min) == (2, pytest.approx(0.09))
    assert found.sigma_max == pytest.approx(0.125)


def test_a_scan_of_two_files_in_the_inbox_is_restored_once(folder):
    """Its header is taken with it, and is no file of its own."""
    inbox = folder / "inbox"
    (inbox / "scans").mkdir(parents=True)
    (inbox / "scans/job.yaml").write_text("domain: mri\n")
    write_bart(inbox / "scans/first", scan(32, 24).k)
    asked = NightlySettings(
        inbox=inbox,
        output=folder / "nights",
        model="starter",
        settle_s=0,
        compute=ComputeSettings(executor="inline"),
    )
    first, second = nightly(asked), nightly(asked)
    assert [job.status for job in first.jobs] == ["restored"]
    assert [job.status for job in second.jobs] == ["nothing new"]
    assert (folder / "nights/scans/files/first/magnitude.nii.gz").is_file()
