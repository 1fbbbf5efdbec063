"""Holes wider than the network sees, through the engine: when, in blocks, and switched off."""

import json
from dataclasses import replace

import numpy as np
from evaluation_kit import picture

from domains.base import Item, ItemRecord
from domains.registry import load_domain
from flows.config import MethodSettings, config_path
from flows.engine.block import Restorer
from flows.engine.methods import resolve_method
from flows.engine.plan import make_plan
from flows.store import MeasurementWriter

SHAPE = (1, 1, 240, 440)


def store_of(path, *boxes, shape=SHAPE, sigma_y=0.05):
    """A measurement of a picture of waves, boxes (top, left, height, width) of it missing."""
    record = ItemRecord("a", "city", shape, "uint8", "intensity", "0" * 64, "png")
    missing = np.zeros(shape[2:], bool)
    for top, left, height, width in boxes:
        missing[top : top + height, left : left + width] = True
    domain, item = load_domain("city"), Item(picture(2, shape), record)
    measured = domain.given(item, mask=missing, kernel=None, scale=None, sigma_y=sigma_y)
    with MeasurementWriter(path) as writer:
        writer.add(measured)
    return item.pixels, missing


def restored(store, *, block_size=512, levels=2, seed=0, **options):
    """(pixels, nfe) of the one item, block by block, by the shipped model in float32."""
    plan = make_plan(
        store,
        store.parent / "out",
        MethodSettings(num_levels=levels, options=options),
        config_path("models", "starter"),
        dtype="float32",
        block_size=block_size,
        seed=seed,
    )
    [item] = plan.items
    worker, pixels, nfe = Restorer(), np.zeros(item.grid.shape, np.float32), []
    for block in item.blocks():
        measured = worker.read(store, item, block)
        overview = worker.overview(store, item, block)
        values, account = worker.compute(measured, item, block, overview)
        box = block.write
        pixels[..., box.y0 : box.y1, box.x0 : box.x1] = values
        nfe.append(account.nfe)
    return pixels, nfe


def test_a_wide_hole_is_filled_otherwise_than_without_its_coarse_scales(tmp_path):
    truth, missing = store_of(tmp_path / "m.zarr", (40, 120, 160, 170))
    guided, nfe = restored(tmp_path / "m.zarr")
    alone, _ = restored(tmp_path / "m.zarr", large_holes=False)
    assert nfe == [2]
    errors = [np.sqrt(((x - truth)[..., missing] ** 2).mean()) for x in (guided, alone)]
    assert errors[0] < errors[1]
    far = np.abs(guided - alone)[..., :, 420:]
    assert np.abs(guided - alone).max() > 5 > 0.5 > far.max()


def test_narrower_holes_give_the_same_bytes_with_and_without(tmp_path):
    store_of(tmp_path / "m.zarr", (70, 20, 90, 400), (10, 30, 20, 20))
    guided, _ = restored(tmp_path / "m.zarr")
    alone, _ = restored(tmp_path / "m.zarr", large_holes=False)
    assert np.array_equal(guided, alone)


def test_a_wide_hole_is_the_same_in_blocks_and_at_once(tmp_path, monkeypatch):
    """A hole over three blocks, wider than what each reads beyond its own part.

    The largest blocks read the whole plane: the last is a strip of 8 pixels. Of the mean: samples
    differ by a hundredth of the range, with a wide hole or without.
    """
    store_of(tmp_path / "m.zarr", (30, 60, 180, 320))
    monkeypatch.setattr("flows.engine.grid.MAX_CANVAS_PX", 32 * 32)
    found = {size: restored(tmp_path / "m.zarr", block_size=size)[0] for size in (128, 432)}
    assert 0 < np.abs(found[128] - found[432]).max() < 1e-3 * 255


def test_samples_of_a_wide_hole_differ_by_the_seed_at_its_coarse_scale_too(tmp_path):
    store_of(tmp_path / "m.zarr", (40, 120, 160, 170))
    (one, nfe), (two, _) = (restored(tmp_path / "m.zarr", seed=s, mode="sample") for s in (0, 1))
    assert nfe == [3]  # two at the finest scale, and two of a sixteenth of its pixels
    middle = (slice(None), slice(None), slice(100, 140), slice(180, 230))
    assert abs(float((one - two)[middle].mean())) > 1


def test_bands_folded_into_the_batch_are_guided_each_by_its_own_mask(tmp_path):
    shape = (2, 1, 200, 200)
    store_of(tmp_path / "m.zarr", (30, 30, 140, 140), shape=shape)
    guided, _ = restored(tmp_path / "m.zarr")
    alone, _ = restored(tmp_path / "m.zarr", large_holes=False)
    for band in range(2):
        assert np.abs(guided[band] - alone[band]).max() > 2


def test_a_plan_tells_the_memory_of_the_scale_that_a_cut_plane_is_guided_by():
    from flows.engine.cost import coarse_factor, predict
    from flows.engine.grid import make_grid

    grid = make_grid((3, 1, 8000, 8000), "mask", slices_per_block=1, block_size=512)
    assert coarse_factor(grid) == 8
    assert coarse_factor(replace(grid, shape=(3, 1, 6000, 6000))) == 4
    told = {
        kind: predict(
            grid, kind, {}, MethodSettings(), "float32", input_bytes=0, model_bytes=0
        ).peak_bytes
        for kind in ("mask", "identity")
    }
    assert told["mask"] - told["identity"] == 180 * 3 * (1000**2 - 704**2)


def test_it_is_on_for_masks_and_switched_off_by_one_flag(tmp_path):
    from click.testing import CliRunner

    from flows.cli import cli
    from flows.store import Measurements

    store_of(tmp_path / "m.zarr", (30, 30, 20, 20))
    asked = ["restore", "--input", str(tmp_path / "m.zarr"), "--output", str(tmp_path / "out")]
    asked += ["--model", str(config_path("models", "starter")), "--executor", "inline"]
    told = {}
    for flags in ([], ["--no-large-holes"], ["--no-large-holes", "--levels", "3"]):
        answer = CliRunner().invoke(cli, [*asked, *flags, "--plan", "--json"])
        assert answer.exit_code == 0, answer.output
        [item] = json.loads(answer.output)["items"]
        told[len(flags)] = item["method"]
    assert told[0]["options"]["large_holes"] is True
    assert told[1]["options"]["large_holes"] is False
    assert told[3]["options"]["large_holes"] is False
    assert (told[1]["num_levels"], told[3]["num_levels"]) == (12, 3)
    entry = Measurements(tmp_path / "m.zarr").entries()[0]
    assert "large_holes" not in resolve_method(MethodSettings(name="telea"), entry).options
    assert "large_holes" not in resolve_method(MethodSettings(name="dds"), entry).options
    noisy = replace(entry, operator="identity")
    assert "large_holes" not in resolve_method(None, noisy).options
