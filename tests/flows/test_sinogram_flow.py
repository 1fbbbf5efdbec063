"""A scan as the scanner left it, restored by the command."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from domains.ct.degradations import MU_WATER_PER_MM
from flows.cli import run

BINS, VIEWS, RADIUS = 64, 60, 20.0


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SASHIKO_CACHE", str(tmp_path / "cache"))


def write_scan(folder: Path) -> None:
    """A disc of water, 40 mm across, in the middle; 30000 photons a ray."""
    folder.mkdir()
    t = np.arange(BINS) - (BINS - 1) / 2
    p = MU_WATER_PER_MM * 2 * np.sqrt(np.maximum(RADIUS**2 - t**2, 0))
    counts = np.random.default_rng(0).poisson(30000 * np.exp(-np.tile(p, (VIEWS, 1))))
    np.save(folder / "scan.npy", counts)
    geometry = {
        "beam": "parallel", "num_views": VIEWS, "arc_degrees": 180, "bin_mm": 1.0,
        "values": "counts", "counts_per_ray": 30000,
    }  # fmt: skip
    (folder / "scan.json").write_text(json.dumps(geometry))


@pytest.mark.parametrize("method", [["--method", "sirt"], []], ids=["sirt", "ours"])
def test_a_scan_becomes_an_image_in_hounsfield_units(tmp_path, method):
    write_scan(tmp_path / "in")
    args = ["--domain", "ct", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert run(["restore", *args, *method, "--no-prefect", "--executor", "inline"]) == 0
    image = np.asanyarray(nibabel.load(tmp_path / "out/files/scan.nii.gz").dataobj)[:, :, 0]
    x = np.arange(BINS) - (BINS - 1) / 2
    radius = np.hypot(x[:, None], x)
    assert image[radius < RADIUS - 3].mean() == pytest.approx(0, abs=15)
    assert image[(radius > RADIUS + 3) & (radius < 30)].mean() == pytest.approx(-1000, abs=20)


def test_a_scan_says_itself_what_was_measured(tmp_path, capsys):
    write_scan(tmp_path / "in")
    args = ["--domain", "ct", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert run(["restore", *args, "--scale", "2", "--no-prefect"]) == 2
    assert "says itself what was measured" in capsys.readouterr().err
