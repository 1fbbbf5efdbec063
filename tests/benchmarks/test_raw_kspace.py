"""Hidden samples are hidden, and the figures say 1 where noise alone is left."""

import numpy as np
import pytest
import torch
from kspace_kit import scan

from diffusion_core.model import Model
from domains.mri.domain import MRI
from flows.config import config_path
from tests.benchmarks import raw_kspace
from tests.benchmarks.rows import Rows


@pytest.fixture
def measurement(tmp_path):
    full = scan(64, 48)
    kept = np.random.default_rng(0).random((64, 48)) < 0.5
    kept[22:43, 14:35] = True
    np.save(tmp_path / "scan.npy", (full.k * kept).astype(np.complex64))
    return MRI().measured(tmp_path / "scan.npy")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_hidden_samples_are_of_the_scan_and_not_of_its_centre(measurement, share):
    trial = raw_kspace.hide(measurement, share, 1)
    given, hidden = (m.arrays["mask"][0, 0] for m in (trial.given.measurement, trial.hidden))
    whole = measurement.arrays["mask"][0, 0]
    assert not (given & hidden).any()
    assert np.array_equal(given | hidden, whole)
    free = whole.sum() - 21 * 21
    assert hidden.sum() == pytest.approx(share * free, abs=25)
    assert np.fft.fftshift(given)[22:43, 14:35].all()
    assert np.array_equal(trial.given.measurement.y + trial.hidden.y, measurement.y)
    other = raw_kspace.hide(measurement, share, 2).hidden.arrays["mask"]
    assert (share == 0) == np.array_equal(other[0, 0], hidden)


def test_what_explains_everything_leaves_noise_alone(measurement):
    """The image of all samples, by few steps of SENSE, knows the hidden ones up to noise."""
    trial = raw_kspace.hide(measurement, 0.2, 1)
    whole = raw_kspace.hide(measurement, 0.0, 1).given
    ratio = whole.measurement.params["scale_q"] / trial.given.measurement.params["scale_q"]
    figures = raw_kspace.misfit(trial, raw_kspace.sense(whole, 12) * ratio)
    assert 0.4 < figures["fitted"] < 1.3
    assert 0.4 < figures["held_out"] < 1.3
    nothing = raw_kspace.misfit(trial, torch.zeros(whole.problem.shape))
    assert nothing["nrmse"] == pytest.approx(1.0)


def test_rows_hold_every_method_but_the_draw_that_tunes(measurement, tmp_path, monkeypatch):
    monkeypatch.setattr(raw_kspace, "STRENGTHS", (12.0, 50.0))
    monkeypatch.setattr(raw_kspace, "SENSE_STEPS", (3, 5))
    rows = Rows(tmp_path / "rows.json", raw_kspace.KEY)
    model = Model.load(config_path("models", "starter"), dtype=torch.float32)
    raw_kspace.run(measurement, model, rows, (0.2,), 2)
    assert {row["method"] for row in rows} == set(raw_kspace.METHODS)
    assert {row["draw"] for row in rows} == {1}
    found = {row["method"]: row["held_out"] for row in rows}
    assert found["covprox"] < found["zero-filled"]
    assert len(raw_kspace.table(rows).splitlines()) == 2 + len(raw_kspace.METHODS)
