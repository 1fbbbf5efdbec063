"""Damaged pictures: patterns, kernels and scales, bands, and users' own damage."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from diffusion_core.operators import Blur, Mask, Pool
from diffusion_core.testing import DomainContract
from domains import imaging
from domains.base import BadInputError, Item, ItemRecord
from domains.city import degradations, kernels
from domains.city.domain import City
from flows.config import load_task

SIZE = (64, 88)
TASKS = ("inpaint-random70", "inpaint-strokes", "sr-x4", "deblur-gauss", "denoise-25")
TASKS += ("deblur-lens", "sr-x4-bicubic")


def picture(
    channels: int = 3, depth: int = 2, dtype: str = "uint8", size: tuple[int, int] = SIZE
) -> Item:
    """Smooth random fields with edges, over the whole range of the dtype."""
    rng = np.random.default_rng(6)
    fields = ndimage.gaussian_filter(rng.standard_normal((channels, depth, *size)), (0, 0, 3, 3))
    fields += 0.15 * (fields > 0)
    unit = (fields - fields.min()) / np.ptp(fields)
    white = 65535 if dtype == "uint16" else 255
    pixels = np.rint(unit * white).astype(dtype) if dtype != "float32" else unit.astype("float32")
    record = ItemRecord(
        item_id="street", domain="city", shape=pixels.shape, dtype=dtype, units="intensity",
        source_digest="c" * 64, source_format="tiff",
        meta={"value_range": [0.0, 4095.0]} if dtype == "int16" else {},
    )  # fmt: skip
    return Item(pixels, record)


class CityContract(DomainContract):
    def make_domain(self):
        return City()

    def make_tasks(self):
        return [load_task(name) for name in TASKS]


class TestColour(CityContract):
    def make_item(self):
        return picture(3)


class TestColourFilters(CityContract):
    def make_item(self):
        return picture(3)

    def make_tasks(self):
        return [load_task("demosaic")]


class TestMotion(CityContract):
    def make_item(self):
        return picture(3)

    def make_tasks(self):
        return [load_task("deblur-motion")]


class TestGrey(CityContract):
    def make_item(self):
        return picture(1, dtype="float32")


class TestFourBandsOfSixteenBits(CityContract):
    def make_item(self):
        return picture(4, dtype="uint16")


@pytest.mark.parametrize(
    ("channels", "condition", "shape"),
    [(3, "city", (2, 3)), (1, "city-grey", (2, 1)), (4, "city-grey", (8, 1))],
)
def test_bands_decide_the_condition(channels, condition, shape):
    domain = City()
    problem = domain.problem(domain.simulate(picture(channels), load_task("inpaint-random70"), 0))
    assert (problem.condition, problem.shape[:2]) == (condition, shape)
    assert problem.facts["num_bands"] == (channels if channels == 4 else 1)


def test_folded_bands_come_back_in_their_places():
    domain, item = City(), picture(4, depth=3)
    measurement = domain.simulate(item, load_task("inpaint-random70"), 0)
    problem = domain.problem(measurement)
    assert problem.y.shape == (12, 1, *SIZE)
    band_2_of_frame_1 = problem.y[1 * 4 + 2, 0].numpy()
    assert np.array_equal(band_2_of_frame_1, measurement.y[1, 2])
    image = problem.to_source(problem.y)
    assert image.shape == (3, 4, *SIZE)
    assert problem.known.shape == (3, 1, *SIZE)
    known = problem.known.expand(image.shape).numpy()
    gap = np.abs(image.numpy() - np.moveaxis(item.pixels, 0, 1))[known]
    assert np.abs(gap).mean() < 0.05 * 127.5  # noise of .05, half a range of 127.5


def test_seventy_of_a_hundred_pixels_are_missing_in_all_channels():
    measurement = City().simulate(picture(), load_task("inpaint-random70"), seed=0)
    mask = measurement.arrays["mask"]
    assert mask.shape == (2, 1, *SIZE)
    missing = (~mask).reshape(2, -1).sum(axis=1)
    assert (missing == round(0.7 * SIZE[0] * SIZE[1])).all()
    assert not np.array_equal(mask[0], mask[1])
    assert not measurement.y[~np.broadcast_to(mask, measurement.y.shape)].any()


def test_random_pixels_favour_no_place():
    rng = np.random.default_rng(0)
    hits = sum(degradations.random_pixels(8, 9, 0.7, rng).astype(int) for _ in range(1000))
    assert np.abs(hits - 700).max() < 5 * math.sqrt(1000 * 0.7 * 0.3)


@pytest.mark.parametrize("size", [(64, 88), (200, 120), (416, 640)])
def test_strokes_cover_a_fifth_in_pieces_wider_than_a_pixel(size):
    missing = degradations.strokes(*size, 0.2, np.random.default_rng(1))
    assert 0.2 <= missing.mean() < 0.22
    radius = max(int(0.015 * min(size)) - 1, 1)
    survives = ndimage.binary_opening(missing, iterations=radius)
    assert survives.sum() > 0.8 * missing.sum()


def test_strokes_are_drawn_as_capsules():
    """A segment marks exactly the pixels within its radius: distance to 10^4 points on it."""
    missing = np.zeros((30, 40), bool)
    start, end = np.array([5.3, 8.1]), np.array([21.7, 36.2])
    degradations._draw_segment(missing, start, end, 3.0)
    points = start + np.linspace(0, 1, 2001)[:, None] * (end - start)
    rows, columns = np.mgrid[:30, :40]
    distance = np.min([np.hypot(rows - p[0], columns - p[1]) for p in points], axis=0)
    clear = np.abs(distance - 3.0) > 1e-3
    assert np.array_equal(missing[clear], (distance < 3.0)[clear])


def test_a_box_is_a_hole_of_half_the_side_in_the_middle():
    missing = degradations.box(64, 88, 0.25, np.random.default_rng(0))
    assert missing[16:48, 22:66].all()
    assert missing.sum() == 32 * 44


def test_a_box_task_knows_what_is_around_the_box():
    domain = City()
    problem = domain.problem(domain.simulate(picture(), load_task("inpaint-box"), 0))
    assert not problem.known[0, 0, 32, 44]
    assert problem.known[0, 0, 8, 44]


def test_the_gaussian_kernel_has_the_transfer_of_a_gaussian():
    """exp(-2 pi^2 s^2 f^2) by Poisson summation, cut at 4 standard deviations."""
    kernel = torch.from_numpy(kernels.gaussian_kernel(3.0)).double()
    assert abs(float(kernel.sum()) - 1) < 1e-6
    transfer = Blur(kernel, (64, 88)).transfer
    fy, fx = np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(88)
    expected = np.exp(-2 * np.pi**2 * 9 * (fy**2 + fx**2))
    assert np.abs(transfer.numpy() - expected).max() < 2e-4


@pytest.mark.parametrize("intensity", [0.0, 0.5, 1.0])
def test_a_motion_kernel_is_a_path_about_the_middle(intensity):
    rng = np.random.default_rng(3)
    for _ in range(20):
        kernel = kernels.motion_kernel(61, intensity, rng).astype(float)
        assert kernel.shape == (61, 61)
        assert abs(kernel.sum() - 1) < 1e-6
        assert kernel.min() >= 0
        assert np.abs(np.array(ndimage.center_of_mass(kernel)) - 30).max() < 0.05
        assert ndimage.label(kernel > 0, np.ones((3, 3)))[1] == 1
        assert 15 < (kernel > 0).sum() < 61 * 61 / 8


def test_a_calm_hand_moves_straight():
    """Without intensity the path is a line: a kernel of rank two by its principal axes."""
    rng = np.random.default_rng(0)
    widths = {}
    for intensity in (0.0, 1.0):
        across = []
        for _ in range(20):
            kernel = kernels.motion_kernel(61, intensity, rng).astype(float)
            y, x = np.mgrid[-30:31, -30:31]
            moments = [(kernel * a * b).sum() for a, b in ((y, y), (y, x), (x, x))]
            values = np.linalg.eigvalsh(np.array([moments[:2], moments[1:]]))
            across.append(math.sqrt(values[0]))
            length = math.sqrt(12 * values[1])
            assert intensity > 0 or 29 < length < 62
        widths[intensity] = np.mean(across)
    assert widths[0.0] < 0.5  # what sharing points out among pixels adds
    assert widths[1.0] > 1.5


def test_motion_is_of_the_item_and_the_seed():
    domain, task, item = City(), load_task("deblur-motion"), picture(3, depth=2)
    first = domain.simulate(item, task, seed=0)
    assert first.arrays["kernel"].shape == (61, 61)
    assert np.array_equal(first.arrays["kernel"], domain.simulate(item, task, 0).arrays["kernel"])
    other = domain.simulate(item, task, seed=1)
    assert not np.array_equal(first.arrays["kernel"], other.arrays["kernel"])


def test_a_lens_is_sharp_in_the_middle_and_smears_outwards():
    grid = kernels.lens_kernels((1.0, 4.0), (3, 5))
    assert np.allclose(grid.sum(axis=(-2, -1)), 1, atol=1e-5)
    y, x = np.mgrid[-16:17, -16:17]
    variance = [(k * x**2).sum() for k in grid[1]], [(k * y**2).sum() for k in grid[1]]
    out = 1 + 3 / math.sqrt(2)  # the middle of an edge is 1 / sqrt 2 as far out as a corner
    half = 1 + 1.5 / math.sqrt(2)
    assert np.allclose(variance[0], np.array([out, half, 1, half, out]) ** 2, rtol=0.02)
    assert np.allclose(variance[1], 1, rtol=0.01)
    corner = (grid[0, 0] * (x + y) ** 2 / 2).sum(), (grid[0, 0] * (x - y) ** 2 / 2).sum()
    assert np.allclose(corner, (16, 1), rtol=0.03)


@pytest.mark.parametrize(
    ("task", "better", "worse"),
    [("deblur-lens", "richardson-lucy", None), ("demosaic", "tv", "bilinear")],
)
def test_classical_methods_restore_the_new_measurements(task, better, worse):
    domain, item = City(), picture(3, depth=1)
    measurement = domain.simulate(item, load_task(task), 0)
    problem, truth = domain.problem(measurement), domain.truth_signal(item, measurement)
    params = {"tv": {"strength": 2.0, "edge": 0.1}, "richardson-lucy": {"num_iterations": 10}}

    def error(name):
        x = domain.baselines()[name](measurement, problem, params.get(name, {}))
        return float((x - truth).square().mean())

    reference = error(worse) if worse else float((problem.y - truth).square().mean())
    assert error(better) < 0.98 * reference


def test_bilinear_demosaicing_keeps_a_flat_colour_and_a_ramp():
    domain, item = City(), picture(3, depth=1)
    ramp = np.arange(88) + np.zeros((3, 1, 64, 1)) + 40 * np.arange(3)[:, None, None, None]
    item = Item(ramp.astype(np.uint8), replace(item.record, shape=(3, 1, 64, 88)))
    task = replace(load_task("demosaic"), noise={"kind": "gaussian", "sigma_y": 0.0})
    measurement = domain.simulate(item, task, 0)
    problem = domain.problem(measurement)
    x = domain.baselines()["bilinear"](measurement, problem, {})
    gap = (x - domain.truth_signal(item, measurement))[..., 1:-1, 1:-1]
    assert float(gap.abs().max()) < 1e-5


def test_a_mosaic_wants_three_bands():
    with pytest.raises(BadInputError, match="needs 3"):
        City().simulate(picture(1), load_task("demosaic"), 0)


@pytest.mark.parametrize(("size", "intensity"), [(60, 0.5), (1, 0.5), (61, 1.5)])
def test_kernels_that_are_none_are_refused(size, intensity):
    with pytest.raises(BadInputError, match="odd size"):
        kernels.motion_kernel(size, intensity, np.random.default_rng(0))


def test_noise_of_denoise_25_is_25_of_255():
    item = picture(3, depth=6)
    measurement = City().simulate(item, load_task("denoise-25"), seed=0)
    residual = (measurement.y + 1) * 127.5 - np.moveaxis(item.pixels, 0, 1)
    assert abs(residual.std() - 25) < 0.25


@pytest.mark.parametrize(
    ("item", "white"),
    [
        (picture(dtype="uint8"), 255),
        (picture(dtype="uint16"), 65535),
        (picture(dtype="float32"), 1),
        (picture(dtype="int16"), 4095),
    ],
)
def test_white_is_the_dtypes_maximum_or_the_sensors(item, white):
    offset, gain = City().unit_scale(item.pixels, item.record)
    assert offset == 0
    assert np.isclose(gain, 1 / white)


def test_a_users_mask_marks_what_is_missing():
    item, domain = picture(), City()
    missing = np.zeros(SIZE, np.uint8)
    missing[10:20, 10:30] = 255
    measurement = domain.given(item, mask=missing, kernel=None, scale=None, sigma_y=0.0)
    problem = domain.problem(measurement)
    assert isinstance(problem.operator, Mask)
    assert np.array_equal(problem.known[0, 0].numpy(), missing == 0)
    back = problem.to_source(problem.y).numpy()
    known = np.broadcast_to(missing == 0, back.shape)
    assert np.abs(back - np.moveaxis(item.pixels, 0, 1))[known].max() < 1e-3
    assert not measurement.y[~known].any()
    assert measurement.task == "given"
    assert measurement.truth_digest is None


@pytest.mark.parametrize("shape", [SIZE, (1, *SIZE), (2, *SIZE), (1, 2, *SIZE), (3, 2, *SIZE)])
def test_masks_may_be_for_all_frames_for_each_or_for_each_channel(shape):
    missing = np.random.default_rng(0).random(shape) < 0.3
    measured = imaging.measured_pixels(missing, picture().record)
    assert measured.shape == (2, 3 if shape[0] == 3 else 1, *SIZE)
    full = np.broadcast_to(missing, (3, 2, *SIZE))
    assert np.array_equal(np.broadcast_to(measured, (2, 3, *SIZE)), ~np.moveaxis(full, 0, 1))


def test_a_users_kernel_is_scaled_to_keep_the_light():
    item, domain = picture(), City()
    kernel = np.random.default_rng(0).random((5, 9)) * 40
    problem = domain.problem(domain.given(item, mask=None, kernel=kernel, scale=None, sigma_y=0.01))
    flat = torch.full(problem.shape, 0.3)
    assert torch.allclose(problem.operator.A(flat), flat[..., : SIZE[0], : SIZE[1]], atol=1e-5)
    assert float(problem.noise.variance(flat)) == pytest.approx(1e-4)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("taps", [(1, 1), (5, 9), (6, 17), (31, 4)])
def test_a_users_blurred_picture_is_cut_out_of_its_scene(taps, channels):
    """The scene blurred by scipy and then cropped is A of the canvas: nothing wraps, exactly."""
    rng, domain = np.random.default_rng(1), City()
    kernel = rng.random(taps) / np.prod(taps)
    h, w = 41, 58
    scene = rng.uniform(0, 1, (channels, 2, h + 80, w + 80))
    blurred = ndimage.convolve(scene, kernel[None, None] / kernel.sum())
    frame = np.s_[:, :, 40 : 40 + h, 40 : 40 + w]
    item = picture(channels, dtype="float32")
    record = replace(item.record, shape=(channels, 2, h, w))
    given = domain.given(
        Item(blurred[frame].astype(np.float32), record),
        mask=None,
        kernel=kernel,
        scale=None,
        sigma_y=0.0,
    )
    problem = domain.problem(given)
    (top, left), (H, W) = given.params["margin"], given.params["canvas"]
    assert problem.shape[2:] == (H, W)
    assert not any(n % 8 for n in (top, left, H, W))
    canvas = scene[:, :, 40 - top : 40 - top + H, 40 - left : 40 - left + W]
    x = domain.truth_signal(Item(canvas, replace(record, shape=(channels, 2, H, W))), given)
    assert torch.allclose(problem.operator.A(x), problem.y, atol=2e-5)
    for image in (problem.to_source(x).numpy(), problem.to_source(problem.y).numpy()):
        assert image.shape == (2, channels, h, w)
    assert np.abs(problem.to_source(x).numpy() - scene[frame].swapaxes(0, 1)).max() < 1e-5
    assert given.record.shape == (channels, 2, h, w)


def test_a_coarse_picture_is_a_measurement_of_one_four_times_finer():
    affine = ((2.0, 0.0, 0.0, 10.0), (0.0, 3.0, 0.0, 20.0), (0.0, 0.0, 1.0, 0.0), (0, 0, 0, 1.0))
    item = picture()
    item = Item(item.pixels, replace(item.record, affine=affine, spacing_mm=(1.0, 3.0, 2.0)))
    measurement = City().given(item, mask=None, kernel=None, scale=4, sigma_y=0.0)
    problem = City().problem(measurement)
    assert isinstance(problem.operator, Pool)
    assert measurement.record.shape == (3, 2, 256, 352)
    assert problem.shape == (2, 3, 256, 352)
    assert problem.operator.A(torch.zeros(problem.shape)).shape == problem.y.shape
    assert measurement.record.spacing_mm == (1.0, 0.75, 0.5)
    # The mean place of 4 x 4 fine pixels is the place of the coarse pixel they make.
    fine = np.array(measurement.record.affine)
    x, y = np.meshgrid(np.arange(4, 8), np.arange(8, 12))
    places = fine @ np.stack([x.ravel(), y.ravel(), 0 * x.ravel(), 1 + 0 * x.ravel()])
    assert np.allclose(places.mean(axis=1), np.array(affine) @ [1, 2, 0, 1])


GIVEN = {"mask": None, "kernel": None, "scale": None, "sigma_y": 0.0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": np.zeros((64, 87))}, "64 x 87 pixels, the image 2 x 64 x 88"),
        ({"mask": np.ones(SIZE)}, "every pixel as missing"),
        ({"mask": np.zeros(SIZE), "scale": 2}, "give one of"),
        ({"kernel": np.ones(3)}, "2-D"),
        ({"kernel": np.zeros((3, 3))}, "not above 0"),
        ({"kernel": np.full((3, 3), np.nan)}, "finite"),
        ({"kernel": np.ones((65, 3))}, "larger than"),
        ({"scale": 1}, "2 or more"),
        ({"scale": 2.5}, "whole number"),
        ({"sigma_y": -0.1}, "sigma_y"),
        ({"sigma_y": math.nan}, "sigma_y"),
    ],
)
def test_damage_that_does_not_fit_is_refused(given, message):
    with pytest.raises(BadInputError, match=message):
        City().given(picture(), **{**GIVEN, **given})


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("inpaint-random70", {"operator_params": {"pattern": "dots"}}, "unknown pattern"),
        (
            "inpaint-random70",
            {"operator_params": {"pattern": "random", "missing_share": 1.0}},
            "between 0 and 1",
        ),
        ("deblur-gauss", {"operator_params": {"kernel": "disk"}}, "unknown blur kernel"),
        (
            "deblur-gauss",
            {"operator_params": {"kernel": "gaussian", "std_px": 0}},
            "above 0",
        ),
        ("sr-x4", {"noise": {"kind": "snr"}}, "not for images"),
        ("sr-x4", {"operator": "fourier"}, "no operator 'fourier'"),
        ("sr-x4", {"domain": "ct"}, "for the domain 'ct'"),
    ],
)
def test_tasks_that_city_cannot_do_are_refused(task, changes, message):
    with pytest.raises(BadInputError, match=message):
        City().simulate(picture(), replace(load_task(task), **changes), seed=0)


def test_pictures_that_do_not_divide_say_what_would():
    with pytest.raises(BadInputError, match="crop it to 60 x 88"):
        City().simulate(picture(size=(63, 90)), load_task("sr-x4"), seed=0)
