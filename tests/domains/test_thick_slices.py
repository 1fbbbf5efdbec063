"""Thick slices of a user's volume made thinner: each value where the files say that it lies."""

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_kit import errors_of, series, validator

from domains.base import BadInputError
from domains.city.domain import City
from domains.ct.domain import CT
from domains.dicom_derived import Provenance
from domains.dicom_writer import write_series
from domains.imaging import slices_first
from domains.mri.domain import MRI
from tests.benchmarks.linear_convergence import picture

AXES = {
    "axial": np.array([[-0.8, 0, 0, 9], [0, -0.7, 0, 20], [0, 0, 5.0, 30], [0, 0, 0, 1]]),
    "from head to feet": np.array(
        [[0.8, 0, 0, 9], [0, 0.7, 0, 20], [0, 0, -5.0, 90], [0, 0, 0, 1]]
    ),
    "coronal": np.array([[-0.8, 0, 0, 9], [0, 0, -5.0, 20], [0, -0.7, 0, 30], [0, 0, 0, 1]]),
    "tilted": np.array([[-0.8, 0, 0, 9], [0, -0.7, 0.9, 20], [0, 0, 5.0, 30], [0, 0, 0, 1]]),
}


def thinner(domain, item, scale_z):
    """The volume with more slices by straight lines, (c z h w) as its record lies."""
    measurement = domain.given_thick(item, scale_z=scale_z, sigma_y=0.0)
    problem = domain.problem(measurement)
    x = domain.baselines()["linear-z"](measurement, problem, {})
    return measurement.record, slices_first(problem.to_source(x).numpy())


@pytest.mark.parametrize("scale_z", [2, 3])
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("domain", [CT(), MRI()], ids=["ct", "mri"])
def test_a_thinner_volume_lies_where_the_thick_one_lay(tmp_path, domain, axes, scale_z):
    """Values are 20 times the place across the slices, mm: so are those of the fine grid."""
    affine, shape = AXES[axes], (20, 24, 6)
    normal = affine[:3, 2] / np.linalg.norm(affine[:3, 2])
    places = nibabel.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    values = np.round(20 * places @ normal + 3000).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "a.nii.gz")
    record, pixels = thinner(domain, domain.read(tmp_path / "a.nii.gz"), scale_z)
    written = nibabel.load(domain.write(type(picture("ct", 32))(pixels, record), tmp_path / "b"))
    assert written.shape == (20, 24, 6 * scale_z)
    assert written.header.get_zooms() == pytest.approx(
        (*np.linalg.norm(affine[:3, :2], axis=0), np.linalg.norm(affine[:3, 2]) / scale_z)
    )
    at = nibabel.affines.apply_affine(written.affine, np.moveaxis(np.indices(written.shape), 0, -1))
    expected = 20 * at @ normal + 3000
    inner = slice(scale_z, -scale_z)  # beyond the middles of the outer slices nothing is known
    found = np.asanyarray(written.dataobj)
    np.testing.assert_allclose(found[..., inner], expected[..., inner], atol=1.0)
    corners = nibabel.affines.apply_affine(
        written.affine, [(0, 0, -0.5), (0, 0, 6 * scale_z - 0.5)]
    )
    whole = nibabel.affines.apply_affine(affine, [(0, 0, -0.5), (0, 0, 5.5)])
    np.testing.assert_allclose(corners, whole, atol=1e-4)


@pytest.mark.parametrize("scale_z", [3, 6])
@pytest.mark.parametrize("step", [(0.0, 0.0, 5.0), (0.0, 0.6, 5.0)], ids=["straight", "tilted"])
def test_a_derived_series_of_thinner_slices_says_where_each_lies(tmp_path, step, scale_z):
    """Values are 20 times the place that their own header states, mm."""
    values = 1024 + np.broadcast_to(100 * np.arange(5)[:, None, None] + 140, (5, 20, 18))

    def thick(k, ds):
        ds.SliceThickness, ds.SpacingBetweenSlices = 5.0, 5.0

    source = series(tmp_path / "in", values, step=step, change=thick)
    item = CT().read(min(source.iterdir()))
    record, pixels = thinner(CT(), item, scale_z)
    made = Provenance("linear-z", "0.1.0")
    out = write_series(record, lambda z, y, x: pixels[:, z, y, x], tmp_path / "out", source, made)
    slices = [pydicom.dcmread(path) for path in sorted(out.iterdir())]
    assert len(slices) == 5 * scale_z
    assert len({s.SOPInstanceUID for s in slices}) == len({s.InstanceNumber for s in slices})
    assert len({s.InstanceNumber for s in slices}) == 5 * scale_z
    heights = np.array([float(s.ImagePositionPatient[2]) for s in slices])
    np.testing.assert_allclose(np.diff(heights), 5.0 / scale_z, atol=1e-6)
    np.testing.assert_allclose(heights.mean(), 7 + 10.0, atol=1e-6)
    lateral = np.array([float(s.ImagePositionPatient[1]) for s in slices])
    np.testing.assert_allclose(np.diff(lateral), step[1] / scale_z, atol=1e-6)
    assert [float(s.SliceThickness) for s in slices] == pytest.approx([5.0 / scale_z] * len(slices))
    assert [float(s.SpacingBetweenSlices) for s in slices] == pytest.approx(
        [5.0 / scale_z] * len(slices)
    )
    located = np.array([float(s.SliceLocation) for s in slices])
    np.testing.assert_allclose(np.abs(np.diff(located)), 5.0 / scale_z, atol=1e-6)
    inner = slice(scale_z, -scale_z)
    found = np.array([s.pixel_array.mean() - 1024 for s in slices])
    np.testing.assert_allclose(found[inner], 20 * heights[inner], atol=1.0)
    again = CT().read(min(out.iterdir()))
    assert again.record.shape == (1, 5 * scale_z, 20, 18)
    assert not again.record.meta.get("missing_slices")


def test_a_validator_finds_no_error_in_thinner_slices(tmp_path):
    validator()
    values = np.random.default_rng(0).integers(0, 2000, (4, 20, 18))
    source = series(tmp_path / "in", values)
    before = set().union(*(errors_of(f) for f in source.iterdir()))
    record, pixels = thinner(CT(), CT().read(min(source.iterdir())), 3)
    made = Provenance("linear-z", "0.1.0")
    out = write_series(record, lambda z, y, x: pixels[:, z, y, x], tmp_path / "out", source, made)
    assert not set().union(*(errors_of(f) for f in out.iterdir())) - before


def test_what_has_no_slices_is_not_made_thinner():
    for domain in (CT(), MRI()):
        with pytest.raises(BadInputError, match="nothing before and behind"):
            domain.given_thick(picture(domain.name, 32).slices(0, 1), scale_z=2, sigma_y=0.0)
    with pytest.raises(BadInputError, match="have no slices"):
        City().given_thick(picture("city", 32), scale_z=2, sigma_y=0.0)
