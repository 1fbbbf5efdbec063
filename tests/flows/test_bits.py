"""Bits a dimension on items: whole numbers and their bin, fitted ends, a bound that holds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_kit import make_model, picture

from diffusion_core.model import Model
from domains.base import BadInputError, Item, ItemRecord
from flows.bits import bits_per_dim, crop_of, fit, variance_reduction


def item(dtype="uint8", domain="city", channels=1, number=3):
    pixels = picture(number, (channels, 2, 48, 56)).astype(dtype)
    record = ItemRecord(
        item_id="still", domain=domain, shape=pixels.shape, dtype=dtype,
        units="HU" if domain == "ct" else "intensity", source_digest="e" * 64, source_format="png",
        meta={"value_range": [0.0, 255.0]} if domain == "city" else {},
    )  # fmt: skip
    return Item(pixels, record)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model.load(make_model(tmp_path_factory.mktemp("bits") / "model"))


@pytest.mark.parametrize(
    ("domain", "dtype", "step"), [("city", "uint8", 2 / 255), ("ct", "int16", 2 / 3000)]
)
def test_a_crop_knows_the_step_of_its_source(domain, dtype, step):
    crop = crop_of(item(dtype, domain), 1, 32)
    assert crop.x0.shape == (1, 1, 32, 32)
    assert crop.bin_width == pytest.approx(step)
    whole = (crop.x0.double() + 1) / step
    assert (whole - whole.round()).abs().max() < 2e-3


def test_the_scale_of_mri_is_the_volume_s():
    found = item("int16", "mri")
    top = np.percentile(found.pixels, 99.9)
    assert crop_of(found, 0, 32).bin_width == pytest.approx(2 / top)


def test_fractions_and_odd_bands_are_refused():
    with pytest.raises(BadInputError, match="fractions"):
        crop_of(item("float32"), 0, 32)
    with pytest.raises(BadInputError, match="4 channels"):
        crop_of(item(channels=4), 0, 32)


def test_bits_are_counted_for_the_source_s_bins(model):
    crop = crop_of(item(), 0, 40)
    fitted = fit(model, [crop_of(item(number=5), z, 40) for z in (0, 1)], num_levels=13)
    low, high = fitted.sigma_range
    assert 0.004 < low < high <= 4.0 + 1e-9
    (bound,) = bits_per_dim(model, crop, fitted, num_levels=9)
    # An untrained network knows nothing of this picture, but a little more than even odds.
    assert 0 < bound.bits_per_dim.item() < 10
    fine = replace(crop, bin_width=crop.bin_width / 64)
    (finer,) = bits_per_dim(model, fine, fitted, num_levels=9)
    assert finer.bits_per_dim.item() > bound.bits_per_dim.item() + 3
    found = variance_reduction(model, [crop], fitted, num_levels=13)
    assert set(found) == {"learned", "log-uniform", "log-normal"}
    assert all(np.isfinite(v) and v > 0 for v in found.values())
    assert torch.isfinite(bound.error).all()
