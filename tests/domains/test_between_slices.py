"""Missing and thick slices: volumes cut along y, and turned back when they are written."""

from dataclasses import replace

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from dicom_kit import series, stored_values
from scipy.interpolate import CubicSpline

from diffusion_core.operators import PoolRows
from diffusion_core.testing import DomainContract, LinearOperatorContract
from domains.base import BadInputError, Item
from domains.between_slices import lacks_slices, missing_planes, turned
from domains.ct import reader as ct_reader
from domains.ct.domain import CT
from domains.imaging import slices_first
from domains.keyed import pixel_digest
from domains.mri.domain import MRI
from flows.config import load_task
from tests.benchmarks.linear_convergence import picture

SMOOTH = {"linear-z": lambda z: 40 * z - 300, "cubic-z": lambda z: 0.3 * z**3 - 5 * z**2 + 9 * z}


class TestPoolRows(LinearOperatorContract):
    def make(self, dtype):
        return PoolRows(3, 20), (2, 1, 20, 9)


def test_pooled_rows_are_means_and_the_last_group_is_what_is_left():
    x = torch.arange(24.0).reshape(1, 1, 8, 3)
    y = PoolRows(3, 8).A(x)
    np.testing.assert_array_equal(y[0, 0, :, 0], [3.0, 12.0, 19.5])
    weights = PoolRows(3, 8).A(PoolRows(3, 8).A_adjoint(torch.ones(1, 1, 3, 1)))
    np.testing.assert_allclose(weights[0, 0, :, 0], [1 / 3, 1 / 3, 1 / 2])
    with pytest.raises(ValueError, match="9 rows, not 8"):
        PoolRows(3, 8).A(torch.zeros(1, 1, 9, 3))


def volume(z=17):
    base = picture("ct", 32)
    planes = np.concatenate([base.pixels] * z, axis=1)[:, :z]
    planes = (planes * np.linspace(0.5, 1, z)[:, None, None]).astype(np.int16)
    affine = ((0, -0.8, 0, 10.0), (-0.7, 0, 0.3, 20.0), (0, 0, 2.5, 30.0), (0, 0, 0, 1.0))
    record = replace(base.record, shape=planes.shape, spacing_mm=(2.5, 0.7, 0.8), affine=affine)
    return Item(planes, record)


class TestThickSlices(DomainContract):
    def make_domain(self):
        return CT()

    def make_item(self):
        return volume()

    def make_tasks(self):
        return [load_task("ct-sr-z3")]

    def test_units_go_there_and_back(self):
        """Of the volume cut along y, which the next tests hold against the uncut one."""

    def test_slices_are_measured_apart(self):
        """Not these: what is measured apart is the slices along y."""


@pytest.mark.parametrize("name", ["slices-missing", "ct-sr-z3"])
def test_the_truth_is_the_clean_volume_cut_along_y(name):
    item = volume()
    measurement = CT().simulate(item, load_task(name), 0)
    assert measurement.record.shape == (1, 32, 17, 32)
    assert measurement.truth_digest == pixel_digest(item.pixels)
    seen = CT().as_measured(item, measurement.record)
    np.testing.assert_array_equal(seen.pixels[0, 5], item.pixels[0, :, 5])
    np.testing.assert_allclose(
        np.array(seen.record.affine) @ (3, 7, 5, 1), np.array(item.record.affine) @ (3, 5, 7, 1)
    )
    assert seen.record.spacing_mm == (0.7, 2.5, 0.8)


@pytest.mark.parametrize("method", SMOOTH)
@pytest.mark.parametrize("name", ["slices-missing", "ct-sr-z3"])
def test_interpolation_is_exact_for_what_it_can_describe(method, name):
    item = volume()
    z = np.arange(17.0)
    profile = SMOOTH[method](z)
    item = Item(np.broadcast_to(profile[:, None, None], (1, 17, 32, 32)).astype("f4"), item.record)
    task = replace(load_task(name), noise={"kind": "gaussian", "sigma_y": 0.0})
    measurement = CT().simulate(item, task, 0)
    problem = CT().problem(measurement)
    x = CT().baselines()[method](measurement, problem, {})
    found = problem.to_source(x)[4, 0, :, 9].numpy()
    expected = profile
    if name == "ct-sr-z3":  # through the means of groups, flat beyond the first and the last
        places = np.array([1, 4, 7, 10, 13, 15.5])
        means = [profile[i : i + 3].mean() for i in range(0, 17, 3)]
        spline = CubicSpline(places, means, bc_type="not-a-knot")
        at = np.clip(z, 1, 15.5)
        expected = spline(at) if method == "cubic-z" else np.interp(at, places, means)
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_every_other_slice_is_missing_but_the_last():
    for num, gone in ((17, [1, 3, 5, 7, 9, 11, 13, 15]), (6, [1, 3])):
        mask = CT().simulate(volume(num), load_task("slices-missing"), 0).arrays["mask"]
        assert np.flatnonzero(~mask[0, 0].any(axis=1)).tolist() == gone
    with pytest.raises(BadInputError, match="2 slices are too few"):
        CT().simulate(volume(2), load_task("slices-missing"), 0)


@pytest.mark.parametrize("domain", [CT(), MRI()])
def test_a_mask_that_takes_slices_turns_the_volume_and_others_do_not(domain):
    item = volume()
    missing = np.zeros((17, 32, 32), bool)
    missing[3:5] = True
    assert lacks_slices(missing, item.record)
    given = domain.given(item, mask=missing, kernel=None, scale=None, sigma_y=0.0)
    assert given.record.shape == (1, 32, 17, 32)
    assert np.flatnonzero(~given.arrays["mask"][7, 0].any(axis=1)).tolist() == [3, 4]
    missing[:, 0, 0], missing[3:5] = True, False
    assert not lacks_slices(missing, item.record)
    given = domain.given(item, mask=missing, kernel=None, scale=None, sigma_y=0.0)
    assert given.record.shape == (1, 17, 32, 32)


@pytest.mark.parametrize("with_affine", [True, False])
def test_a_turned_volume_is_written_as_its_source_lay(tmp_path, with_affine):
    item = volume()
    codes = "".join(nibabel.aff2axcodes(np.array(item.record.affine)))
    meta = {**item.record.meta, "orientation": codes if with_affine else "LPS"}
    affine = item.record.affine if with_affine else None
    item = Item(item.pixels, replace(item.record, meta=meta, affine=affine))
    plain = nibabel.load(CT().write(item, tmp_path / "a"))
    other = nibabel.load(CT().write(turned(item), tmp_path / "b"))
    np.testing.assert_array_equal(np.asanyarray(other.dataobj), np.asanyarray(plain.dataobj))
    np.testing.assert_allclose(other.affine, plain.affine)


def test_a_missing_slice_of_a_series_is_filled_and_written_between_its_neighbours(tmp_path):
    values = stored_values((1, 20, 18)) + np.zeros((7, 1, 1), int)
    values += 10 * np.arange(7)[:, None, None]
    source = series(tmp_path / "in", values, change=lambda k, ds: k not in (2, 3))
    item = ct_reader.read(source)
    given = CT().given(item, mask=missing_planes(item.record), kernel=None, scale=None, sigma_y=0.0)
    problem = CT().problem(given)
    x = CT().baselines()["linear-z"](given, problem, {})
    pixels = slices_first(problem.to_source(x).numpy())
    facts = {"method": {"name": "linear-z"}, "model_digest": None}
    out = CT().write_back(
        given.record, lambda z, y, x: pixels[:, z, y, x], tmp_path / "out", source, facts
    )
    files = sorted(out.iterdir())
    stored = np.stack([pydicom.dcmread(file).pixel_array for file in files])
    np.testing.assert_array_equal(stored, values)
    assert [float(pydicom.dcmread(f).ImagePositionPatient[2]) for f in files] == [
        7 + 2.5 * k for k in range(7)
    ]
    whole = ct_reader.read(out)
    assert "found" not in whole.record.meta
    with pytest.raises(BadInputError, match="no slice is missing"):
        missing_planes(whole.record)
