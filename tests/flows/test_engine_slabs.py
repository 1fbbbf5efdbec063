"""Stacks restored jointly: how they are cut, what names them, and that no cut or worker shows."""

from dataclasses import replace

import numpy as np
import pytest
from engine_kit import published, same
from evaluation_kit import make_model, picture
from hypothesis import given
from hypothesis import strategies as st

from diffusion_core.posterior import make_solver
from domains.base import Item, ItemRecord
from domains.registry import load_domain
from flows.config import MethodSettings, load_task
from flows.engine import block as blocks
from flows.engine import grid as grids
from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.grid import SLAB_HALO, make_grid
from flows.engine.methods import ALONG_Z, COUPLING, resolve_method
from flows.engine.plan import content_of, make_plan
from flows.store import Measurements, MeasurementWriter

FRAMES = 14


def clip(path, *, source_format="video", bands=3, frames=FRAMES):
    """A still scene under moving strokes, as a measurement store."""
    scene = picture(1, (bands, 1, 24, 32))
    pixels = np.repeat(scene, frames, axis=1)
    record = ItemRecord("clip", "city", pixels.shape, "uint8", "intensity", "c" * 64, source_format)
    measurement = load_domain("city").simulate(Item(pixels, record), load_task("video-strokes"), 0)
    with MeasurementWriter(path) as writer:
        writer.add(measurement)
    return path


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("site")
    make_model(root / "model")
    clip(root / "m.zarr")
    return root


def plan(site, output, options=None, **settings):
    way = MethodSettings(name="covprox", num_levels=3, options=options or {})
    return make_plan(
        site / settings.pop("store", "m.zarr"), output, way, site / "model",
        dtype="float32", **settings,
    )  # fmt: skip


def pixels(asked, **run):
    run_plan(asked, InlineExecutor(**run))
    [found] = published(asked.output).values()
    return found


# --- the grid ------------------------------------------------------------------------------------


@given(
    z=st.integers(1, 300),
    h=st.integers(8, 2100),
    w=st.integers(8, 2100),
    operator=st.sampled_from(["mask", "fourier"]),
)
def test_slabs_write_every_slice_once_and_read_their_neighbours(z, h, w, operator):
    shape = (1, z, h, w)
    grid = make_grid(shape, operator, slices_per_block=2, block_size=512, jointly=True)
    alone = make_grid(shape, operator, slices_per_block=2, block_size=512)
    assert (grid.tile_h, grid.tile_w, grid.halo) == (alone.tile_h, alone.tile_w, alone.halo)
    written = [0] * z
    for block in grid:
        if (block.write.y0, block.write.x0) == (0, 0):
            for place in range(block.write.z0, block.write.z1):
                written[place] += 1
        assert block.read.z0 == max(block.write.z0 - grid.halo_z, 0)
        assert block.read.z1 == min(block.write.z1 + grid.halo_z, z)
        assert block.read.shape[0] <= grid.canvas[0]
    assert written == [1] * z
    assert grid.halo_z == (SLAB_HALO if grid.counts[0] > 1 else 0)


def test_how_deep_a_slab_is_depends_on_the_plane_alone():
    def depth(**settings):
        shape = (1, 100, 512, 512)
        grid = make_grid(shape, "fourier", **{"block_size": 512, **settings}, jointly=True)
        return grid.slices, grid.halo_z

    assert depth(slices_per_block=1) == depth(slices_per_block=8) == (16, SLAB_HALO)
    assert depth(slices_per_block=1, block_size=64) == depth(slices_per_block=1)


# --- who is restored jointly ---------------------------------------------------------------------


def test_frames_of_a_clip_are_restored_jointly_unless_told_otherwise(site, tmp_path):
    [default] = plan(site, tmp_path).items
    assert default.method.options[COUPLING] == ALONG_Z["mask"]
    assert default.num_blocks == 1
    [alone] = plan(site, tmp_path, along_z=False).items
    assert COUPLING not in alone.method.options
    assert alone.num_blocks == FRAMES
    assert "halo_z" not in content_of(alone)["grid"], "it has the key that it had before"
    [own] = plan(site, tmp_path, {COUPLING: 0.05}).items
    assert own.method.options[COUPLING] == 0.05
    assert len({default.key, alone.key, own.key}) == 3


def test_slices_of_volumes_are_restored_jointly_on_request(site, tmp_path):
    clip(site / "tiff.zarr", source_format="tiff")
    clip(site / "single.zarr", frames=1)
    [default] = plan(site, tmp_path, store="tiff.zarr").items
    assert COUPLING not in default.method.options
    [asked] = plan(site, tmp_path, store="tiff.zarr", along_z=True).items
    assert asked.method.options[COUPLING] > 0
    [single] = plan(site, tmp_path, store="single.zarr", along_z=True).items
    assert COUPLING not in single.method.options, "a still has no neighbour"


def test_only_our_solver_s_mean_is_coupled(site):
    [entry] = Measurements(site / "m.zarr").entries()
    for way in (
        MethodSettings(name="diffpir"),
        MethodSettings(name="telea"),
        MethodSettings(name="covprox", options={"mode": "sample"}),
    ):
        assert COUPLING not in resolve_method(way, entry, along_z=True).options
    again = resolve_method(None, entry)
    assert resolve_method(again, entry) == again, "what is resolved stays as it is"


# --- pixels --------------------------------------------------------------------------------------


def test_coupling_nought_makes_the_bytes_of_frames_by_themselves(site, tmp_path):
    alone = pixels(plan(site, tmp_path / "alone", along_z=False))
    nought = pixels(plan(site, tmp_path / "nought", {COUPLING: 0.0}))
    np.testing.assert_array_equal(nought, alone)
    jointly = pixels(plan(site, tmp_path / "jointly"))
    assert abs(jointly - alone).max() > 1


def test_frames_of_a_still_scene_come_nearer_to_each_other(site, tmp_path):
    def flicker(found):
        return float(abs(np.diff(found, axis=1)).mean())

    alone = pixels(plan(site, tmp_path / "alone", along_z=False))
    jointly = pixels(plan(site, tmp_path / "jointly"))
    assert flicker(jointly) < 0.8 * flicker(alone)


@pytest.fixture
def slabs_of_four(monkeypatch):
    monkeypatch.setattr(grids, "SLAB_PX", 4 * 24 * 32)


def test_neither_order_nor_lanes_nor_a_retry_changes_a_byte(site, tmp_path, slabs_of_four):
    first = plan(site, tmp_path / "first")
    assert first.items[0].num_blocks == 4
    expected = published_of(first)
    turned = plan(site, tmp_path / "turned", slices_per_block=1, block_size=64)
    assert turned.campaign == first.campaign
    backwards = replace(turned, items=tuple(replace(i) for i in turned.items))
    assert same(published_of(backwards, num_lanes=3), expected)


def published_of(asked, **run):
    run_plan(replace(asked, **run), InlineExecutor())
    return published(asked.output)


def test_slabs_give_what_the_whole_stack_gives(site, tmp_path, monkeypatch):
    whole = pixels(plan(site, tmp_path / "whole"))
    monkeypatch.setattr(grids, "SLAB_PX", 4 * 24 * 32)
    cut = plan(site, tmp_path / "cut")
    assert cut.items[0].grid.counts[0] == 4
    slabs = pixels(cut)
    alone = pixels(plan(site, tmp_path / "alone", along_z=False))
    apart = float(abs(slabs - whole).max())
    assert apart < 0.1 * float(abs(whole - alone).max())
    monkeypatch.setattr(grids, "SLAB_HALO", 0)
    bare = plan(site, tmp_path / "bare")
    assert float(abs(pixels(bare) - whole).max()) > 2 * apart, "the halo is what does it"


def test_each_slice_has_its_own_residual(site, tmp_path, slabs_of_four):
    asked = plan(site, tmp_path / "out")
    run_plan(asked, InlineExecutor())
    from flows.engine.restored import open_restored

    [entry] = open_restored(tmp_path / "out").items()
    assert len(entry.facts["residuals"]) == FRAMES


def test_bands_beside_the_frames_are_no_neighbours(site, tmp_path, monkeypatch):
    """Four bands are grey images of their own, in one batch with the frames."""
    made = []

    def watched(name, prior, options):
        made.append(options["z_stride"])
        return make_solver(name, prior, options)

    monkeypatch.setattr(blocks, "make_solver", watched)
    clip(site / "bands.zarr", bands=4)
    four = pixels(plan(site, tmp_path / "four", store="bands.zarr"))
    assert four.shape == (4, FRAMES, 24, 32)
    assert made == [4]
    pixels(plan(site, tmp_path / "three"))
    assert made == [4, 1]
