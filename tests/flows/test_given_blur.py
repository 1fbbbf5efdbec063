"""Photographs that were really blurred: light comes over the border from a scene that is not seen.

The scene is blurred by scipy, then cropped, then noise is added and 8 bits are kept: nothing of
ours makes the data. A model that takes the picture for periodic gets bars along all four sides.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy import ndimage
from skimage.data import coffee

from diffusion_core.operators import CroppedBlur
from domains.base import Item, ItemRecord
from domains.city.domain import City
from domains.city.kernels import gaussian_kernel
from domains.metrics import psnr
from domains.registry import load_domain
from flows.api_restore import plan, restore
from flows.config import ComputeSettings, MethodSettings, RestoreSettings, config_path
from flows.engine.methods import CUT_OUT
from flows.engine.restored import open_restored

SIDE, STRIP = 128, 20
SIGMA_Y = 0.02
FEW = MethodSettings(num_levels=4)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))


def gaussian() -> np.ndarray:
    return gaussian_kernel(2.0)


def panned() -> np.ndarray:
    """A camera that moved sideways: its transfer has zeros."""
    kernel = np.zeros((3, 15), np.float32)
    kernel[1] = 1 / 15
    return kernel


def photograph(kernel: np.ndarray, corner: tuple[int, int], seed: int) -> tuple[np.ndarray, ...]:
    """(blurred, sharp), both (h w 3) uint8, cut out of the scene after it was blurred."""
    scene = coffee().astype(np.float64)
    blurred = ndimage.convolve(scene, kernel[..., None].astype(np.float64))
    frame = np.s_[corner[0] : corner[0] + SIDE, corner[1] : corner[1] + SIDE]
    noise = np.random.default_rng(seed).standard_normal((SIDE, SIDE, 3)) * SIGMA_Y * 127.5
    return np.clip(np.rint(blurred[frame] + noise), 0, 255).astype(np.uint8), coffee()[frame]


def settings(folder: Path, kernel: np.ndarray, out: str = "out", **changes) -> RestoreSettings:
    np.save(folder / "kernel.npy", kernel)
    values = {
        "input": folder / "photos",
        "output": folder / out,
        "domain": "city",
        "kernel": folder / "kernel.npy",
        "sigma_y": SIGMA_Y,
        "model": str(config_path("models", "starter")),
        "dtype": "float32",
        "method": FEW,
        "compute": ComputeSettings(executor="inline"),
        **changes,
    }
    return RestoreSettings(**values)


def decibels(image: np.ndarray, sharp: np.ndarray) -> tuple[float, float, float]:
    """PSNR of the whole, of a strip along the border, of what is inside it."""
    strip = np.ones((SIDE, SIDE, 1), bool)
    strip[STRIP:-STRIP, STRIP:-STRIP] = False
    pair = sharp / 255, image / 255
    return psnr(*pair), psnr(*pair, strip), psnr(*pair, ~strip)


def a_folder(folder: Path, picture: np.ndarray) -> None:
    (folder / "photos").mkdir()
    Image.fromarray(picture).save(folder / "photos/a.png")


@pytest.mark.parametrize("make_kernel", [gaussian, panned])
def test_a_real_blurred_photograph_is_sharper_up_to_its_border(tmp_path, make_kernel):
    kernel = make_kernel()
    blurred, sharp = photograph(kernel, (60, 200), seed=0)
    a_folder(tmp_path, blurred)
    result = restore(settings(tmp_path, kernel))
    restored = np.asarray(Image.open(result.files[0]))
    assert restored.shape == blurred.shape
    whole_before, strip_before, inside_before = decibels(blurred, sharp)
    whole, strip, inside = decibels(restored, sharp)
    assert whole >= whole_before + 1.0
    assert strip >= strip_before + 0.5
    # Of what the inside gains a strip of which half the data are not seen may lose 1.5 dB.
    assert strip - strip_before >= inside - inside_before - 1.5
    # Of the picture's own data, and none else: one each, were the noise not cut off at white.
    assert 0.8 < result.published[0].residual < 1.1


@pytest.mark.parametrize("make_kernel", [gaussian, panned])
def test_with_a_periodic_model_it_would_get_worse_than_it_was(tmp_path, monkeypatch, make_kernel):
    kernel, given = make_kernel(), City.given

    def periodic(self, item, **damage):
        return replace(given(self, item, **damage), operator="blur")

    monkeypatch.setattr(City, "given", periodic)
    blurred, sharp = photograph(kernel, (60, 200), seed=0)
    a_folder(tmp_path, blurred)
    result = restore(settings(tmp_path, kernel))
    whole, strip, _ = decibels(np.asarray(Image.open(result.files[0])), sharp)
    assert whole < decibels(blurred, sharp)[0] - 1.0
    assert strip < decibels(blurred, sharp)[1] - 3.0


def test_blocks_and_tiles_of_blurred_frames_equal_all_at_once(tmp_path, monkeypatch):
    frames = np.stack([photograph(panned(), (40, 90 * i), seed=i)[0][:64, :72] for i in range(3)])
    (tmp_path / "photos").mkdir()
    tifffile.imwrite(tmp_path / "photos/a.tif", frames, photometric="rgb")
    restore(settings(tmp_path, panned(), "one"))
    # All of a canvas is within reach of 96 px: tiles of a smaller one are no tiles.
    monkeypatch.setattr("flows.engine.block.DENOISER_PLANE_PX", 100)
    monkeypatch.setattr("flows.engine.block.DENOISER_TILE_PX", 40)
    apart = restore(settings(tmp_path, panned(), "three", slices_per_block=1))
    assert apart.num_blocks == 3
    stores = [open_restored(tmp_path / out) for out in ("one", "three")]
    one, three = (store.read(store.items()[0]) for store in stores)
    assert np.abs(one - three).max() < 1e-3 * 255


def test_the_plan_knows_the_larger_canvas_and_the_longer_solves(tmp_path):
    blurred, _ = photograph(panned(), (60, 200), seed=0)
    a_folder(tmp_path, blurred)
    (item,) = plan(settings(tmp_path, panned())).items
    assert item.operator == "cropped-blur"
    assert item.method.options.items() >= CUT_OUT.items()
    own = MethodSettings(name="covprox", options={"max_steps": 7})
    (asked,) = plan(settings(tmp_path, panned(), method=own)).items
    assert (asked.method.options["max_steps"], asked.method.options["tolerance"]) == (7, 3e-3)
    (wide,) = plan(settings(tmp_path, np.ones((61, 61)))).items
    assert wide.cost.peak_bytes > item.cost.peak_bytes
    assert wide.cost.seconds > 1.5 * item.cost.seconds


@pytest.mark.parametrize("domain", ["ct", "mri"])
def test_medical_pictures_are_cut_out_of_their_scene_too(domain):
    shape = (1, 2, 40, 44)
    pixels = np.random.default_rng(0).uniform(1, 900, shape).astype(np.float32)
    record = ItemRecord("a", domain, shape, "float32", "HU", "0" * 64, "nifti")
    given = load_domain(domain).given(
        Item(pixels, record), mask=None, kernel=np.ones((5, 3)), scale=None, sigma_y=0.01
    )
    problem = load_domain(domain).problem(given)
    assert isinstance(problem.operator, CroppedBlur)
    assert problem.operator.A(torch.zeros(problem.shape)).shape == problem.y.shape == (2, 1, 40, 44)
    assert problem.to_source(torch.zeros(problem.shape)).shape == (2, 1, 40, 44)
