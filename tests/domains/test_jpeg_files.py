"""JPEG files by their coefficients: against Pillow's decoder, its tables, the files' own pixels."""

import io
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from skimage import data
from test_city_physics import picture

from diffusion_core.operators import JPEG
from diffusion_core.testing import DomainContract
from domains.base import BadInputError
from domains.city import jpeg
from domains.city.domain import City
from domains.city.jpeg_file import JPEGError, read_coefficients
from flows.config import load_task

DOMAIN, TASK = City(), load_task("jpeg-q10")
SCENE = data.astronaut()[:203, 150:307]
"""Sides that no block divides."""
KINDS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_blocks": 7},
    "progressive-restarts": {"progressive": True, "restart_marker_rows": 2},
}


def coded(image=SCENE, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def planes_of(file):
    """(rows, columns) of every component as its coefficients say, unrounded, by scipy."""
    from scipy.fft import idctn

    for c in file.components:
        blocks = idctn(c.coefficients * c.table, axes=(-2, -1), norm="ortho") + 128
        rows, columns = blocks.shape[:2]
        yield blocks.transpose(0, 2, 1, 3).reshape(8 * rows, 8 * columns)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quality", [8, 75, 95])
def test_coefficients_are_what_pillow_makes_pixels_of(kind, quality):
    """Grey files: the decoder's own inverse DCT, rounded; libjpeg's works in integers."""
    content = coded(mode="L", quality=quality, **KINDS[kind])
    file = read_coefficients(content)
    assert (file.size, len(file.components)) == ((203, 157), 1)
    (plane,) = planes_of(file)
    shown = np.asarray(Image.open(io.BytesIO(content))).astype(float)
    gap = np.abs(np.clip(plane[:203, :157], 0, 255) - shown)
    assert gap.max() < 1.01
    assert (gap < 0.51).mean() > 0.98
    table = Image.open(io.BytesIO(content)).quantization[0]
    assert np.array_equal(file.components[0].table, _in_rows(table))


def _in_rows(table):
    """Pillow's tables are (since 8.3) in the order of rows."""
    return np.array(table).reshape(8, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_colours_are_decoded_as_pillow_does(kind, subsampling):
    """Of 4:4:4 to a level; shared chrominance is enlarged alike inside, not at the borders."""
    content = coded(quality=60, subsampling=subsampling, **KINDS[kind])
    params = jpeg._params_of(read_coefficients(content), 1)
    operator = jpeg.operator_of(params)
    flat = jpeg._flat(read_coefficients(content))
    y = operator.data_of(torch.from_numpy(flat.astype(np.float64))[None])
    ours = (127.5 * (operator.decoded(y)[0].permute(1, 2, 0) + 1)).numpy()
    shown = np.asarray(Image.open(io.BytesIO(content))).astype(float)
    gap = np.abs(ours - shown)[2:-2, 2:-2]
    assert gap.mean() < 0.6
    assert np.quantile(gap, 0.99) < 2.1


def test_progressive_and_sequential_files_hold_the_same_integers():
    files = [read_coefficients(coded(quality=50, **KINDS[kind])) for kind in KINDS]
    for other in files[1:]:
        for ours, theirs in zip(files[0].components, other.components, strict=True):
            assert np.array_equal(ours.coefficients, theirs.coefficients)
            assert ours.sampling == theirs.sampling


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("quality", [10, 75, 95])
def test_the_picture_explains_its_file_within_half_a_step(quality, subsampling):
    """y = A x + n, |n| <= 1/2 but for the coder's own rounding of colours and means."""
    params = {"quality": quality, "subsampling": subsampling}
    item = picture(3, size=(61, 83))
    task = replace(TASK, operator_params=params)
    measurement = DOMAIN.simulate(item, task, 0)
    problem, truth = DOMAIN.problem(measurement), DOMAIN.truth_signal(item, measurement)
    gap = (problem.y - problem.operator.A(truth)).abs()
    std = problem.noise.variance(problem.y).sqrt()
    slack = 7 * (std**2 - 1 / 12).clamp_min(0).sqrt()
    assert bool((gap <= 0.5 + slack + 0.02).all())
    assert float(gap.max()) > 0.3
    luminance, chrominance = JPEG(quality).tables(3)[[0, 1]].numpy()
    assert np.array_equal(measurement.params["tables"][0], luminance)
    assert np.array_equal(measurement.params["tables"][1], chrominance)


def test_a_file_is_read_as_it_is(tmp_path: Path):
    path = tmp_path / "a.jpg"
    path.write_bytes(coded(quality=40))
    item = DOMAIN.read(path)
    found = DOMAIN.given_spoilt(item, path, damage="jpeg", exposure=None)
    assert found.params["factors"] == [[1, 1], [2, 2], [2, 2]]
    assert found.y.dtype == np.int16
    problem = DOMAIN.problem(found)
    shown = problem.to_source(problem.operator.decoded(problem.y))[0].numpy()
    assert np.abs(shown - item.pixels[:, 0]).mean() < 0.6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_comes_back_upright(tmp_path: Path, orientation):
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[274] = orientation
    path.write_bytes(coded(quality=75, subsampling=0, exif=exif))
    item = DOMAIN.read(path)
    problem = DOMAIN.problem(DOMAIN.given_spoilt(item, path, damage="jpeg", exposure=None))
    shown = problem.to_source(problem.operator.decoded(problem.y))[0].numpy()
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path))).transpose(2, 0, 1)
    assert shown.shape == upright.shape == item.pixels[:, 0].shape
    assert np.abs(shown - upright).mean() < 0.6


def test_rgb_files_have_no_chrominance(tmp_path: Path):
    content = coded(quality=75, keep_rgb=True)
    file = read_coefficients(content)
    assert not file.is_ycc
    shown = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)
    for plane, band in zip(planes_of(file), shown, strict=True):
        assert np.abs(np.clip(plane[:203, :157], 0, 255) - band).max() < 1.01


def test_strength_is_that_of_the_lowest_steps_and_coarser_files_are_stronger():
    stds = [jpeg.artefact_std(read_coefficients(coded(quality=q))) for q in (5, 10, 20, 75, 100)]
    assert all(a > b for a, b in pairwise(stds))
    assert stds[-1] == pytest.approx(12**-0.5, rel=0.01)
    lowest = np.array([80, 55, 60, 60, 70, 70, 50, 65, 70, 80.0])  # five times Table K.1's first
    assert stds[1] == pytest.approx(np.sqrt((lowest**2).mean() / 12), rel=1e-6)


def test_damaged_files_are_refused_in_words_and_never_otherwise():
    content = coded(quality=50)
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(150):
        broken = bytearray(content[: rng.integers(2, len(content))] if trial % 3 == 0 else content)
        for place in rng.integers(2, min(len(broken), 700), 1 + trial % 4):
            broken[place] = rng.integers(0, 256)
        try:
            file = read_coefficients(bytes(broken))
            assert all(np.isfinite(c.coefficients).all() for c in file.components)
        except JPEGError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GIF89a" + b"\0" * 40, "does not begin"),
        (b"\xff\xd8\xff\xd9", "holds no picture"),
        (b"\xff\xd8\xff\xc9\x00\x0b" + b"\0" * 20, "losslessly, arithmetically"),
        (coded(quality=50)[:900], "too early|holds no picture"),
    ],
)
def test_files_of_another_kind_are_told(content, words):
    with pytest.raises(JPEGError, match=words):
        read_coefficients(content)


def test_what_is_no_jpeg_file_cannot_be_taken_for_one(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.fromarray(SCENE).save(path)
    with pytest.raises(BadInputError, match="it is no JPEG file"):
        DOMAIN.given_spoilt(DOMAIN.read(path), path, damage="jpeg", exposure=None)
    with pytest.raises(BadInputError, match="know no damage 'rust'"):
        DOMAIN.given_spoilt(DOMAIN.read(path), path, damage="rust", exposure=None)
    with pytest.raises(BadInputError, match="quality of 1 to 95"):
        DOMAIN.simulate(picture(), replace(TASK, operator="identity"), 0)


class TestJPEGContract(DomainContract):
    # What rounds to 0 errs less than evenly; and smooth pictures are mostly zeros.
    chi2_bounds = (0.01, 1.05)

    def make_domain(self):
        return City()

    def make_item(self):
        return picture(3)

    def make_tasks(self):
        return [TASK]

    def test_simulation_is_keyed_by_digest_and_seed(self):
        """A coder draws nothing: the same picture is always the same file."""
        domain, item, task, measurement = self._cases()[0]
        again = domain.simulate(item, task, seed=7)
        assert np.array_equal(measurement.y, again.y)


class TestJPEGOfFourBands(TestJPEGContract):
    def make_item(self):
        return picture(4, dtype="uint16")
