"""The CT projector against closed forms and scikit-image; scans against Poisson statistics."""

import json
import math
import mmap
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.transform import radon

from diffusion_core.testing import DomainContract, LinearOperatorContract
from domains.base import BadInputError, Item, ItemRecord
from domains.ct import degradations, matrices
from domains.ct.domain import CT, geometry_of
from domains.ct.fold import fold_of
from domains.ct.geometry import FanGeometry, ParallelGeometry
from domains.ct.operators import FanBeam, ParallelBeam
from domains.files import select
from flows.config import load_task

SPACING = (5.0, 0.9, 0.9)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    matrices.set_cache_dir(tmp_path_factory.mktemp("projectors"))
    yield
    matrices.set_cache_dir(None)


def grid_mm(height: int, width: int, pixel_mm: tuple[float, float], finer: int = 1):
    """(y, x) of the centres of pixels, or of finer x finer subpixels, about the centre."""
    y = (np.arange(height * finer) + 0.5) / finer - height / 2
    x = (np.arange(width * finer) + 0.5) / finer - width / 2
    return np.meshgrid(y * pixel_mm[0], x * pixel_mm[1], indexing="ij")


def disk(height, width, pixel_mm, centre_mm, radius_mm, finer=16):
    """Share of each pixel inside a disk."""
    y, x = grid_mm(height, width, pixel_mm, finer)
    inside = np.hypot(y - centre_mm[0], x - centre_mm[1]) < radius_mm
    return inside.reshape(height, finer, width, finer).mean(axis=(1, 3))


def disk_projection(geometry: ParallelGeometry, centre_mm, radius_mm) -> np.ndarray:
    """Chord of a disk averaged over each bin: by the antiderivative of 2 sqrt(R^2 - s^2)."""

    def antiderivative(s):
        s = np.clip(s, -radius_mm, radius_mm)
        return s * np.sqrt(radius_mm**2 - s**2) + radius_mm**2 * np.arcsin(s / radius_mm)

    y0, x0 = centre_mm
    seen_at = x0 * np.cos(geometry.angles) + y0 * np.sin(geometry.angles)
    edges = geometry.bin_centres_mm[None] - seen_at[:, None]
    half = geometry.bin_mm / 2
    return (antiderivative(edges + half) - antiderivative(edges - half)) / geometry.bin_mm


def whole_matrix(geometry):
    """Of all views, nothing folded."""
    return matrices.matrix_pair(geometry, range(geometry.num_views))[0]


def project(image: np.ndarray, geometry: ParallelGeometry) -> np.ndarray:
    x = torch.from_numpy(image).float()[None, None]
    return ParallelBeam(geometry).A(x)[0, 0].numpy()


def phantom_item(depth: int = 2, size: tuple[int, int] = (61, 57)) -> Item:
    """A body of soft tissue with lungs, bone and texture, in air, with a table beneath."""
    h, w = size
    pixel = SPACING[1:]
    y, x = grid_mm(h, w, pixel)
    rng = np.random.default_rng(3)
    planes = []
    for z in range(depth):
        hu = np.full((h, w), -1000.0)
        hu[(y / 20) ** 2 + (x / 22) ** 2 < 1] = 40 + 10 * z
        for side in (-9, 9):
            hu[(y / 10) ** 2 + ((x - side) / 6) ** 2 < 1] = -820
        hu[np.hypot(y - 12, x) < 4] = 700
        hu[24:26] = np.where(np.abs(x[24:26]) < 3, 300, hu[24:26])
        hu[h - 2 :, 10 : w - 10] = 100
        # Scanners see edges through a point spread of about a pixel.
        planes.append(ndimage.gaussian_filter(hu, 0.8) + rng.normal(0, 10, hu.shape))
    pixels = np.rint(np.stack(planes))[None].astype(np.int16)
    record = ItemRecord(
        item_id="phantom", domain="ct", shape=pixels.shape, dtype="int16", units="HU",
        source_digest="a" * 64, source_format="nrrd", spacing_mm=SPACING,
    )  # fmt: skip
    return Item(pixels, record)


class TestParallelBeam(LinearOperatorContract):
    def make(self, dtype):
        geometry = ParallelGeometry.covering(17, 23, (0.7, 0.7), 9, 180.0)
        return ParallelBeam(geometry, scale=0.03), (2, 1, 17, 23)


class TestParallelBeamOblongPixels(LinearOperatorContract):
    def make(self, dtype):
        geometry = ParallelGeometry.covering(17, 12, (0.5, 1.1), 7, 120.0)
        return ParallelBeam(geometry), (2, 1, 17, 12)


class TestParallelBeamFoldedInFour(LinearOperatorContract):
    def make(self, dtype):
        geometry = ParallelGeometry.covering(19, 19, (0.7, 0.7), 12, 180.0)
        return ParallelBeam(geometry, scale=0.03), (2, 1, 19, 19)


class TestFanBeam(LinearOperatorContract):
    def make(self, dtype):
        geometry = FanGeometry.covering(17, 23, (0.7, 0.9), 9, 360.0, 40.0, 70.0)
        return FanBeam(geometry, scale=0.03), (2, 1, 17, 23)


class TestCT(DomainContract):
    # The scan is finer than A by design. On this thin phantom, where few photons are lost and noise
    # is least, that adds a quarter to chi^2; on the samples' lung slices 3%.
    chi2_bounds = (0.93, 1.35)
    zero_where_unseen = False

    def make_domain(self):
        return CT()

    def make_item(self):
        return phantom_item()

    def make_tasks(self):
        return [load_task(name) for name in ("ct-sparse60", "ct-sparse20", "ct-limited120")]


def test_low_dose_is_720_views_of_few_photons_and_some_electrons():
    """The phantom has 61 x 57 pixels: the views fold in two, not in four."""
    item, domain, task = phantom_item(depth=1), CT(), load_task("ct-lowdose")
    measurement = domain.simulate(item, task, seed=0)
    assert measurement.y.shape[2] == 720
    problem = domain.problem(measurement)
    assert len(problem.operator.fold.stored) == 361
    Ax = problem.operator.A(domain.truth_signal(item, measurement))
    chi2 = ((problem.y - Ax) ** 2 / problem.noise.variance(Ax)).mean()
    assert 0.95 < float(chi2) < 1.1


def test_non_local_means_clean_a_backprojection_of_few_photons():
    item, domain = phantom_item(depth=1), CT()
    task = replace(load_task("ct-sparse60"), noise={"kind": "poisson", "counts_per_ray": 500.0})
    measurement = domain.simulate(item, task, seed=0)
    problem, truth = domain.problem(measurement), domain.truth_signal(item, measurement)
    filtered = {"window": "hann", "cutoff": 0.8}
    plain = domain.baselines()["fbp"](measurement, problem, filtered)
    cleaned = domain.baselines()["fbp-nlm"](measurement, problem, filtered | {"strength": 0.1})
    errors = [float((image - truth).square().mean()) for image in (plain, cleaned)]
    assert errors[1] < 0.8 * errors[0]


def test_views_divide_the_arc_and_leave_its_end_out():
    geometry = ParallelGeometry.covering(8, 8, (1.0, 1.0), 4, 180.0)
    assert np.allclose(np.degrees(geometry.angles), [0, 45, 90, 135])


def test_the_detector_covers_the_diagonal_with_bins_of_one_pixel():
    geometry = ParallelGeometry.covering(30, 40, (0.5, 0.5), 4, 180.0)
    assert (geometry.num_bins, geometry.bin_mm) == (50, 0.5)
    assert np.allclose(geometry.bin_centres_mm[[0, -1]], [-12.25, 12.25])


@pytest.mark.parametrize("pixel_mm", [(0.7, 0.7), (0.5, 1.1), (1.1, 0.5)])
def test_no_light_is_lost_in_any_view(pixel_mm):
    """Every view's bins hold the image's mass: sum_k y_k bin = sum of pixels times their area."""
    geometry = ParallelGeometry.covering(17, 23, pixel_mm, 37, 180.0)
    matrix = whole_matrix(geometry)
    mass = np.asarray(matrix.sum(axis=0)) * geometry.bin_mm / geometry.num_views
    assert np.allclose(mass, pixel_mm[0] * pixel_mm[1], rtol=2e-6)
    image = np.random.default_rng(0).random((17, 23))
    per_view = project(image, geometry).sum(axis=1) * geometry.bin_mm
    assert np.allclose(per_view, image.sum() * pixel_mm[0] * pixel_mm[1], rtol=1e-5)


@pytest.mark.parametrize("pixel_mm", [(1.0, 1.0), (0.5, 1.1)])
def test_a_pixel_casts_its_exact_shadow(pixel_mm):
    """Against a fine raster of points of the pixel, counted bin by bin."""
    geometry = ParallelGeometry.covering(5, 7, pixel_mm, 11, 180.0)
    image = np.zeros((5, 7))
    image[3, 1] = 1.0
    y, x = grid_mm(5, 7, pixel_mm, finer=400)
    part = np.s_[3 * 400 : 4 * 400, 400:800]
    y, x = y[part].ravel(), x[part].ravel()
    edges = (np.arange(geometry.num_bins + 1) - geometry.num_bins / 2) * geometry.bin_mm
    for got, theta in zip(project(image, geometry), geometry.angles, strict=True):
        s = x * np.cos(theta) + y * np.sin(theta)
        counts, _ = np.histogram(s, edges)
        expected = counts / counts.sum() * pixel_mm[0] * pixel_mm[1] / geometry.bin_mm
        assert np.abs(got - expected).max() < 5e-3 * expected.max()


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_a_disk_casts_its_chords():
    """The closed form: 0.6% off at 50 pixels across, and less than half of it at 100."""
    centre, radius, errors = (-7.0, 12.0), 21.0, []
    for finer in (1, 2):
        h, w, pixel_mm = 101 * finer, 120 * finer, (0.8 / finer, 0.8 / finer)
        geometry = ParallelGeometry.covering(h, w, pixel_mm, 31, 180.0)
        got = project(disk(h, w, pixel_mm, centre, radius), geometry)
        errors.append(relative(got, disk_projection(geometry, centre, radius)))
    assert errors[0] < 6e-3
    assert errors[1] < errors[0] / 2


def test_it_agrees_with_scikit_image():
    """radon() turns the image by interpolation: within 0.5% on a smooth image."""
    y, x = grid_mm(65, 65, (1.0, 1.0))
    image = np.exp(-((x - 9) ** 2 + (y + 4) ** 2) / 60) + np.exp(-((x + 5) ** 2 + y**2) / 150)
    geometry = ParallelGeometry.covering(65, 65, (1.0, 1.0), 24, 180.0)
    ours = project(image, geometry)
    # scikit-image turns the other way, and with 92 bins its centre is at bin 46, ours at 45.5.
    theirs = radon(image, theta=-np.degrees(geometry.angles), circle=False).T
    assert ours.shape == theirs.shape
    assert relative((ours + np.roll(ours, 1, axis=1)) / 2, theirs) < 5e-3


@pytest.mark.parametrize(
    ("size", "pixel_mm", "views", "arc", "copies", "stored"),
    [
        ((21, 21), (0.8, 0.8), 60, 180.0, 4, 16),
        ((21, 21), (0.8, 0.8), 120, 120.0, 4, 46),
        ((21, 21), (0.8, 0.8), 31, 180.0, 2, 16),  # 90 degrees fall between two views
        ((21, 21), (0.8, 0.5), 20, 180.0, 2, 11),
        ((17, 20), (0.8, 0.8), 13, 180.0, 2, 7),
        ((17, 20), (0.8, 0.8), 5, 163.0, 1, 5),
        ((21, 21), (0.8, 0.8), 8, 360.0, 1, 8),
    ],
)
def test_a_folded_projector_is_the_whole_one(size, pixel_mm, views, arc, copies, stored):
    geometry = ParallelGeometry.covering(*size, pixel_mm, views, arc)
    fold = fold_of(geometry)
    assert (fold.num_copies, len(fold.stored)) == (copies, stored)
    beam, dense = ParallelBeam(geometry), whole_matrix(geometry).toarray().astype(np.float64)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 1, *size)), rng.standard_normal((2, 1, views, geometry.num_bins))
    got = beam.A(torch.from_numpy(x)).numpy().reshape(2, -1)
    assert relative(got, x.reshape(2, -1) @ dense.T) < 3e-7
    back = beam.A_adjoint(torch.from_numpy(y)).numpy().reshape(2, -1)
    assert relative(back, y.reshape(2, -1) @ dense) < 3e-7
    single = beam.A(torch.from_numpy(x).float()).numpy().reshape(2, -1)
    assert relative(single, got) < 1e-6


def test_a_batch_does_not_change_the_rounding_of_a_slice():
    geometry = ParallelGeometry.covering(33, 33, (0.8, 0.8), 12, 180.0)
    x = torch.from_numpy(np.random.default_rng(0).random((5, 1, 33, 33))).float()
    beam = ParallelBeam(geometry)
    y = beam.A(x)
    assert torch.equal(beam.A(x[3:4]), y[3:4])
    assert torch.equal(beam.A_adjoint(y[3:4]), beam.A_adjoint(y)[3:4])


def test_a_scan_of_many_views_stays_within_its_memory():
    """A stored entry is 8 bytes, each view's entries about 2.3 a pixel, a quarter of the views.

    So 720 views of 512 x 512 take 2 sides x 8 bytes x 2.3 x 181 x 512^2 = 1.7 GiB, of the 2 GiB
    that a node may spend on it, once for all its workers.
    """
    side, views = 64, 720
    geometry = ParallelGeometry.covering(side, side, (0.8, 0.8), views, 180.0)
    beam = ParallelBeam(geometry)
    assert len(beam.fold.stored) == 181
    at_full_size = beam.num_bytes * (512 / side) ** 2
    assert at_full_size < 2 * 2**30
    assert is_mapped(beam.stored.matrix.data)
    assert beam.stored._in_place()[0].values().data_ptr() == beam.stored.matrix.data.ctypes.data


def test_a_fan_from_far_away_is_a_parallel_beam():
    """The gap falls with the distance: a tenth of it from ten times as far."""
    parallel = ParallelGeometry.covering(31, 27, (0.8, 0.8), 8, 180.0)
    image = np.random.default_rng(0).random((31, 27))
    gaps = []
    for distance in (1e3, 1e4):
        bins = {"num_bins": parallel.num_bins, "bin_mm": 0.8 * 2}
        fan = FanGeometry.covering(31, 27, (0.8, 0.8), 8, 180.0, distance, 2 * distance)
        got = project(image, replace(fan, **bins))
        gaps.append(relative(got, project(image, parallel)))
    assert gaps[0] < 0.05
    assert gaps[1] < gaps[0] / 7


def fan_disk_projection(geometry, centre_mm, radius_mm, finer=64):
    """Chords of a disk along the rays from the source, averaged over points of each bin."""
    edges = (np.arange(geometry.num_bins * finer) + 0.5) / finer - geometry.num_bins / 2
    t = edges * geometry.bin_mm
    y0, x0 = centre_mm
    views = []
    for theta in geometry.angles:
        s = x0 * np.cos(theta) + y0 * np.sin(theta)
        depth = geometry.source_mm + y0 * np.cos(theta) - x0 * np.sin(theta)
        length = np.hypot(t, geometry.detector_mm)
        off = (s * geometry.detector_mm - depth * t) / length  # of the centre from the ray
        chord = 2 * np.sqrt(np.maximum(radius_mm**2 - off**2, 0))
        views.append(chord.reshape(geometry.num_bins, finer).mean(axis=1))
    return np.stack(views)


def test_a_disk_casts_its_chords_along_a_fan():
    centre, radius, errors = (-7.0, 12.0), 21.0, []
    for finer in (1, 2):
        h, w, pixel_mm = 101 * finer, 120 * finer, (0.8 / finer, 0.8 / finer)
        geometry = FanGeometry.covering(h, w, pixel_mm, 13, 360.0, 150.0, 260.0)
        got = project(disk(h, w, pixel_mm, centre, radius), geometry)
        errors.append(relative(got, fan_disk_projection(geometry, centre, radius)))
    assert errors[0] < 7e-3
    assert errors[1] < errors[0] / 2


def test_a_pixel_casts_its_shadow_along_a_fan():
    """Against a fine raster of points of the pixel, each with the density of rays through it."""
    geometry = FanGeometry(5, 7, (1.0, 1.0), 11, 360.0, 120, 0.3, 8.0, 16.0)
    image = np.zeros((5, 7))
    image[3, 1] = 1.0
    y, x = grid_mm(5, 7, (1.0, 1.0), finer=200)
    part = np.s_[3 * 200 : 4 * 200, 200:400]
    y, x = y[part].ravel(), x[part].ravel()
    edges = (np.arange(geometry.num_bins + 1) - geometry.num_bins / 2) * geometry.bin_mm
    for got, theta in zip(project(image, geometry), geometry.angles, strict=True):
        s = x * np.cos(theta) + y * np.sin(theta)
        depth = geometry.source_mm + y * np.cos(theta) - x * np.sin(theta)
        density = geometry.detector_mm * np.hypot(depth, s) / depth**2 / geometry.bin_mm
        t = geometry.detector_mm * s / depth
        expected, _ = np.histogram(t, edges, weights=density / len(s))
        assert relative(got, expected) < 0.03


def test_a_fan_scan_is_restored_like_any_other():
    """The domain simulates it with finer pixels, and its problem has the fan's operator."""
    item, domain = phantom_item(), CT()
    params = {"num_views": 40, "arc_degrees": 360.0, "source_mm": 300.0, "detector_mm": 500.0}
    task = replace(load_task("ct-sparse60"), operator="fan-beam", operator_params=params)
    measurement = domain.simulate(item, task, seed=0)
    problem = domain.problem(measurement)
    assert isinstance(problem.operator, FanBeam)
    residual = problem.y - problem.operator.A(domain.truth_signal(item, measurement))
    chi2 = (residual**2 / problem.noise.variance(problem.y - residual)).mean()
    assert 0.93 < float(chi2) < 1.35
    image = domain.baselines()["sirt"](measurement, problem, {"num_iterations": 30})
    truth = domain.truth_signal(item, measurement)
    assert float((image - truth).square().mean()) < 0.05 * float((truth + 1).square().mean())
    with pytest.raises(BadInputError, match="choose sirt or tv"):
        domain.baselines()["fbp"](measurement, problem, {})
    with pytest.raises(BadInputError, match="do not clear"):
        domain.simulate(item, replace(task, operator_params=params | {"source_mm": 9.0}), seed=0)


def test_read_out_noise_is_in_the_counts_and_in_the_likelihood():
    item = phantom_item(depth=1)
    noise = {"kind": "poisson", "counts_per_ray": 1e4, "electronic_counts": 100.0}
    domain, task = CT(), replace(load_task("ct-sparse60"), noise=noise)
    runs = np.stack([domain.simulate(item, task, seed=s).y for s in range(24)])
    measurement = domain.simulate(item, task, seed=0)
    problem = domain.problem(measurement)
    Ax = problem.operator.A(domain.truth_signal(item, measurement))
    ratio = runs.var(axis=0, ddof=1) / problem.noise.variance(Ax).numpy()
    assert abs(ratio.mean() - 1) < 0.03


def test_the_scene_that_is_scanned_has_the_pixels_as_its_means():
    image = np.random.default_rng(0).standard_normal((2, 9, 11)).astype(np.float32)
    scene = degradations.finer_scene(image, (2, 3))
    assert scene.shape == (2, 18, 33)
    assert np.allclose(scene.reshape(2, 9, 2, 11, 3).mean(axis=(2, 4)), image, atol=1e-6)
    blocks = np.repeat(np.repeat(image, 2, axis=1), 3, axis=2)
    assert np.abs(scene - blocks).max() > 0.1  # a finer scene, not the same squares


def test_scanning_is_no_inverse_crime():
    """The scan differs from A (truth) by more than rounding, and by less than 0.5%."""
    item = phantom_item()
    geometry = geometry_of(item.record, {"num_views": 60, "arc_degrees": 180.0})
    mu = degradations.attenuation(item.pixels[0])
    scanned = degradations.scan(mu, geometry)
    projected = np.stack([project(plane, geometry) for plane in mu])
    assert 2e-4 < relative(scanned, projected) < 5e-3


@pytest.mark.parametrize("pixel_mm", [(0.8, 0.8), (0.5, 1.1), (1.1, 0.5)])
def test_a_scanned_disk_casts_its_chords(pixel_mm):
    centre, radius = (-3.0, 2.0), 12.0
    geometry = ParallelGeometry.covering(81, 60, pixel_mm, 13, 180.0)
    image = disk(81, 60, pixel_mm, centre, radius).astype(np.float32)
    got = degradations.scan(image[None], geometry)[0]
    expected = disk_projection(geometry, centre, radius)
    assert relative(got, expected) < 1.5e-2


def test_the_middle_of_a_water_cylinder_absorbs_a_fiftieth_a_millimetre():
    """Absolute scale, HU to counts: p = .02 / mm * chord, from a scan without noise to speak of."""
    pixel_mm, radius = (0.9, 0.9), 20.0
    hu = 1000.0 * disk(61, 57, pixel_mm, (0.0, 0.0), radius) - 1000.0
    record = replace(phantom_item().record, shape=(1, 1, 61, 57), dtype="float32")
    item = Item(hu.astype(np.float32)[None, None], record)
    task = replace(load_task("ct-sparse20"), noise={"kind": "poisson", "counts_per_ray": 1e12})
    domain = CT()
    measurement = domain.simulate(item, task, seed=0)
    geometry = geometry_of(record, measurement.params)
    expected = 0.02 * disk_projection(geometry, (0.0, 0.0), radius)
    assert relative(measurement.y[0, 0], expected) < 0.01
    problem = domain.problem(measurement)
    Ax = problem.operator.A(domain.truth_signal(item, measurement)) + problem.noise.offset
    assert relative(Ax[0, 0].numpy(), expected) < 0.01


def test_counts_are_poisson_and_the_likelihood_says_how_uncertain_their_logarithm_is():
    item = phantom_item(depth=1)
    domain, task = CT(), load_task("ct-sparse60")
    runs = np.stack([domain.simulate(item, task, seed=s).y for s in range(24)])
    measurement = domain.simulate(item, task, seed=0)
    problem = domain.problem(measurement)
    Ax = problem.operator.A(domain.truth_signal(item, measurement))
    ratio = runs.var(axis=0, ddof=1) / problem.noise.variance(Ax).numpy()
    assert abs(ratio.mean() - 1) < 0.03


def test_rays_without_a_count_are_taken_as_half_a_count():
    y = degradations.log_transform(np.array([0, 1, 1000]), 1000.0)
    assert np.allclose(y, [math.log(2000), math.log(1000), 0])


def test_a_selected_slice_keeps_the_noise_it_has_in_the_whole_volume():
    item, domain, task = phantom_item(depth=3), CT(), load_task("ct-sparse20")
    whole = domain.simulate(item, task, seed=5)
    part = domain.simulate(select(item, slices=[2]), task, seed=5)
    assert np.array_equal(part.y[0], whole.y[2])
    assert not np.array_equal(whole.y[0], whole.y[1])


def is_mapped(values: np.ndarray) -> bool:
    owner = values
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return isinstance(owner, mmap.mmap) and not values.flags.writeable


def test_a_built_projector_is_mapped_not_built_again(tmp_path, monkeypatch):
    geometry = ParallelGeometry.covering(9, 9, (1.0, 1.0), 3, 180.0)
    matrices.set_cache_dir(tmp_path)
    try:
        first, _ = matrices.matrix_pair(geometry, range(3))
        matrices._mapped.cache_clear()
        monkeypatch.setattr(matrices, "build", lambda *_: pytest.fail("built again"))
        again, transpose = matrices.matrix_pair(geometry, range(3))
        assert is_mapped(again.data)
        assert is_mapped(transpose.indices)
        assert (again != first).nnz == 0
        assert (transpose != again.T).nnz == 0
        assert json.loads((tmp_path / geometry.digest / "geometry.json").read_text())
        assert [p.name for p in tmp_path.iterdir()] == [geometry.digest]
    finally:
        matrices.set_cache_dir(None)


def cut_short(data: bytes) -> bytes:
    return data[:200]


def flipped(data: bytes) -> bytes:
    """One bit of the last value's exponent."""
    return data[:-1] + bytes([data[-1] ^ 0x40])


def zeroed(data: bytes) -> bytes:
    """The header is there and the rest never reached the disk."""
    return data[:128] + bytes(len(data) - 128)


@pytest.mark.parametrize("damage", [cut_short, flipped, zeroed])
@pytest.mark.parametrize("part", ["forward-data", "transpose-data", "forward-indptr"])
def test_a_damaged_projector_is_built_again(tmp_path, part, damage):
    geometry = ParallelGeometry.covering(9, 9, (1.0, 1.0), 3, 180.0)
    matrices.set_cache_dir(tmp_path)
    try:
        whole, transpose = (m.copy() for m in matrices.matrix_pair(geometry, range(3)))
        matrices._mapped.cache_clear()
        file = tmp_path / geometry.digest / f"{part}.npy"
        file.write_bytes(damage(file.read_bytes()))
        again = matrices.matrix_pair(geometry, range(3))
        assert (again[0] != whole).nnz == 0
        assert (again[1] != transpose).nnz == 0
    finally:
        matrices.set_cache_dir(None)


def test_a_projector_of_an_older_version_is_built_again_and_other_views_are_another(tmp_path):
    geometry = ParallelGeometry.covering(9, 9, (1.0, 1.0), 6, 180.0)
    matrices.set_cache_dir(tmp_path)
    try:
        even, odd = (matrices.matrix_pair(geometry, range(k, 6, 2))[0] for k in (0, 1))
        assert (even != odd).nnz > 0
        folder = matrices.folder_of(geometry, range(0, 6, 2), tmp_path)
        (folder / matrices.SUMS).unlink()
        matrices._mapped.cache_clear()
        assert (matrices.matrix_pair(geometry, range(0, 6, 2))[0] != even).nnz == 0
        assert (folder / matrices.SUMS).exists()
    finally:
        matrices.set_cache_dir(None)


def test_two_processes_may_build_the_same_projector(tmp_path):
    """The one that comes second keeps the first one's, and leaves nothing behind."""
    geometry = ParallelGeometry.covering(9, 9, (1.0, 1.0), 3, 180.0)
    folder = tmp_path / geometry.digest
    matrices._store(geometry, range(3), folder)
    stamp = (folder / "forward-data.npy").stat().st_mtime_ns
    matrices._store(geometry, range(3), folder)
    assert (folder / "forward-data.npy").stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == [geometry.digest]


def test_what_a_killed_builder_left_is_swept_away(tmp_path):
    geometry = ParallelGeometry.covering(9, 9, (1.0, 1.0), 3, 180.0)
    left, at_work = tmp_path / ".building-old", tmp_path / ".building-new"
    left.mkdir()
    at_work.mkdir()
    os.utime(left, (0, 0))
    matrices._store(geometry, range(3), tmp_path / geometry.digest)
    assert not left.exists()
    assert at_work.exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    matrices.set_cache_dir(tmp_path / "file" / "projectors")
    try:
        with pytest.raises(BadInputError, match="SASHIKO_CACHE"):
            whole_matrix(ParallelGeometry.covering(8, 9, (1.0, 1.0), 3, 180.0))
    finally:
        matrices.set_cache_dir(None)


def test_the_environment_says_where_projectors_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "_cache_dir", None)
    monkeypatch.setenv("SASHIKO_CACHE", str(tmp_path))
    assert matrices.cache_dir() == tmp_path / "projectors"


def test_the_body_is_filled_and_the_table_is_left_out():
    item = phantom_item()
    body = CT().body_mask(item.pixels, item.record)
    y, x = grid_mm(61, 57, SPACING[1:])
    ellipse = (y / 20) ** 2 + (x / 22) ** 2 < 1
    assert (body == ellipse).mean() > 0.99
    assert not body[:, -2:].any()
    assert not CT().body_mask(np.full((1, 2, 20, 20), -1000), item.record).any()


def test_metrics_see_minus_1000_to_2000_hu():
    offset, gain = CT().unit_scale(np.zeros((1, 1, 4, 4)), phantom_item().record)
    assert np.allclose((np.array([-1000.0, 500.0, 2000.0]) - offset) * gain, [0, 0.5, 1])


def test_a_damaged_volume_is_a_measurement_too():
    item, domain = phantom_item(), CT()
    missing = np.zeros((61, 57), bool)
    missing[20:30, 20:30] = True
    measurement = domain.given(item, mask=missing, kernel=None, scale=None, sigma_y=0.0)
    problem = domain.problem(measurement)
    assert (problem.condition, problem.shape) == ("ct", (2, 1, 61, 57))
    back = problem.to_source(problem.y)[:, 0].numpy()
    assert np.abs(back - item.pixels[0])[:, ~missing].max() < 1e-3
    assert measurement.truth_digest is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spacing_mm": None}, "no pixel spacing"),
        ({"shape": (2, 2, 61, 57)}, "channels"),
    ],
)
def test_items_that_are_no_ct_slices_are_refused(changes, message):
    item = phantom_item()
    record = replace(item.record, **changes)
    with pytest.raises(BadInputError, match=message):
        CT().simulate(Item(item.pixels, record), load_task("ct-sparse20"), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operator_params": {"num_views": 0, "arc_degrees": 180.0}}, "no scan has 0 views"),
        ({"noise": {"kind": "gaussian", "sigma_y": 0.1}}, "not for CT"),
        ({"operator": "blur"}, "has no operator 'blur'"),
        ({"operator": "mask"}, "mask of a volume needs operator_params {every: 2}"),
        ({"domain": "city"}, "is for the domain 'city'"),
    ],
)
def test_tasks_that_ct_cannot_do_are_refused(changes, message):
    with pytest.raises(BadInputError, match=message):
        CT().simulate(phantom_item(), replace(load_task("ct-sparse20"), **changes), seed=0)
