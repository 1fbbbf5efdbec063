"""Patches from Zarr are those from memory, bit by bit, in bounded memory, whoever draws them."""

import threading

import numpy as np
import pytest
import torch
from train_kit import dataset_of, settings

from domains.base import BadInputError
from flows.api_train import train
from flows.training import data, sources
from flows.training.data import patch_source, prepare_views, view_bytes, views_fit
from flows.training.views import CHUNK_PX, ChunkCache, StoredView, Views, write_views

pytestmark = pytest.mark.usefixtures("registry_home")


def test_the_sequence_from_zarr_is_that_from_memory(dataset, tmp_path):
    """Two conditions, one made of the other's images; drawn in parts, and by several threads."""
    asked = settings(
        dataset, tmp_path, conditions={"city": 0.5, "city-grey": 0.5}, data_memory_gb=1e-9
    )
    whole = patch_source(asked).batch(0, 60)
    path = prepare_views(asked, tmp_path)
    assert path == tmp_path / "views.zarr"
    source = patch_source(asked, path, cache_bytes=40_000)  # less than one photograph's chunk
    parts = {}

    def draw(first):
        parts[first] = source.batch(first, 20)

    threads = [threading.Thread(target=draw, args=(first,)) for first in (40, 0, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("x0", "condition", "channels"):
        drawn = torch.cat([getattr(parts[first], name) for first in (0, 20, 40)])
        assert torch.equal(drawn, getattr(whole, name)), name


def test_the_share_of_a_condition_that_is_softened_is_smoother_and_the_rest_is_as_it_was(
    dataset, tmp_path
):
    both = {"city": 0.5, "city-grey": 0.5}
    sharp = patch_source(settings(dataset, tmp_path, conditions=both)).batch(0, 240)
    asked = settings(dataset, tmp_path, conditions=both, soft_shares={"city-grey": 0.4})
    soft = patch_source(asked).batch(0, 240)
    assert torch.equal(soft.condition, sharp.condition)
    city = sharp.condition == 0
    assert torch.equal(soft.x0[city], sharp.x0[city])

    def roughness(x):  # the same however a patch is turned
        x = x[~city, 0]
        return (x.diff(dim=-1).square() + x.diff(dim=-2).square().mT).mean(dim=(1, 2)).log()

    fallen = roughness(soft.x0) - roughness(sharp.x0)
    softened = fallen < -0.05
    assert 0.25 < softened.float().mean() < 0.55
    assert fallen[softened].mean() < -0.5
    assert fallen[~softened].abs().max() < 1e-4


def test_what_a_condition_is_made_of_is_read_and_nothing_else(dataset, tmp_path):
    grey = settings(dataset, tmp_path, conditions={"city-grey": 1.0})
    batch = patch_source(grey).batch(0, 2)  # from colour photographs: there are no others
    assert torch.equal(batch.channels.sum(dim=1), torch.ones(2))
    assert {name for name, _ in data.load_windows(grey, "train")} == {"city"}


def test_windows_across_chunks_are_those_of_the_array(tmp_path):
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(2, 3, CHUNK_PX + 37, 2 * CHUNK_PX + 5)).astype(np.float32)
    turned = volume.transpose(0, 3, 1, 2)[:, ::40]  # as CT is cut along another axis
    write_views(tmp_path / "v.zarr", [("ct", [volume, turned], 1.0)], {})
    [(condition, views, weight)] = Views(tmp_path / "v.zarr", 10**9).items()
    assert (condition, weight) == ("ct", 1.0)
    for view, array in zip(views, (volume, turned), strict=True):
        assert view.shape == array.shape
        h, w = array.shape[2:]
        for _ in range(30):
            y0, x0 = rng.integers(h - 1), rng.integers(w - 1)
            y1, x1 = rng.integers(y0 + 1, h + 1), rng.integers(x0 + 1, w + 1)
            z = rng.integers(array.shape[1])
            window = view[:, z, y0:y1, x0:x1]
            assert np.array_equal(window, array[:, z, y0:y1, x0:x1])


def test_the_cache_holds_no_more_than_its_bound_and_forgets_what_was_used_longest_ago():
    cache = ChunkCache(3 * 800)
    for key in (1, 2, 3):
        cache.get(key, lambda: np.zeros(100))
    cache.get(1, lambda: pytest.fail("it was held"))
    cache.get(4, lambda: np.zeros(100))
    assert cache.held_bytes == 3 * 800
    cache.get(1, lambda: pytest.fail("it was held"))
    before = cache.num_reads
    cache.get(2, lambda: np.zeros(100))
    assert cache.num_reads == before + 1
    cache.get(5, lambda: np.zeros(1000))  # larger than the bound: given, not held
    assert cache.held_bytes <= 3 * 800


def test_a_patch_reads_the_chunks_that_it_touches_and_no_other():
    asked = []

    def chunk(at):
        asked.append(at)
        return np.zeros((1, 1, CHUNK_PX, CHUNK_PX), np.float32)

    view = StoredView((1, 4, 3 * CHUNK_PX, 3 * CHUNK_PX), chunk)
    view[:, 2, CHUNK_PX - 32 : CHUNK_PX, 10:42]
    assert asked == [(0, 2, 0, 0)]
    asked.clear()
    view[:, 2, CHUNK_PX - 31 : CHUNK_PX + 1, CHUNK_PX - 1 : CHUNK_PX + 31]
    assert sorted(asked) == [(0, 2, y, x) for y in (0, 1) for x in (0, 1)]


def test_a_run_that_reads_from_zarr_takes_the_steps_of_one_in_memory(dataset, tmp_path):
    a = train(settings(dataset, tmp_path / "a", num_steps=3))
    b = train(settings(dataset, tmp_path / "b", num_steps=3, data_memory_gb=1e-6))
    ends = [
        (tmp_path / x / "small/checkpoints/step-000000003/module.safetensors").read_bytes()
        for x in "ab"
    ]
    assert ends[0] == ends[1]
    assert a.metrics == b.metrics
    assert not (tmp_path / "b" / "small" / "views.zarr").exists()  # done with


def test_views_of_other_data_are_made_anew_and_whole_ones_are_kept(dataset, tmp_path, monkeypatch):
    asked = settings(dataset, tmp_path, data_memory_gb=1e-9)
    path = prepare_views(asked, tmp_path)
    made = (path / "manifest.json").stat().st_mtime_ns
    assert prepare_views(asked, tmp_path) == path
    assert (path / "manifest.json").stat().st_mtime_ns == made
    other = dataset_of(tmp_path / "other.zarr", (0, 1, 3))
    prepare_views(asked.model_copy(update={"data": [other]}), tmp_path)
    assert (path / "manifest.json").stat().st_mtime_ns != made
    assert prepare_views(asked.model_copy(update={"data_memory_gb": 1.0}), tmp_path) is None

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "large_views", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_views(asked, tmp_path)
    monkeypatch.undo()
    assert len(list(Views(prepare_views(asked, tmp_path), 0).items())) == 3


def test_the_views_size_is_foretold(dataset, tmp_path):
    asked = settings(dataset, tmp_path)
    in_memory = sum(v.nbytes for _, views in data.load_windows(asked, "train") for v in views)
    assert view_bytes(asked) == pytest.approx(in_memory, rel=0.01)
    assert views_fit(asked, 10**6)
    bound = asked.model_copy(update={"data_memory_gb": 1e-3})
    assert views_fit(bound, 10**6)
    assert not views_fit(bound, 10**6 + 1)


def test_views_that_share_memory_count_once(dataset, tmp_path, monkeypatch):
    class Cut:
        """An item's pixels along two axes, and at half the size."""

        def training_windows(self, item):
            volume = item.pixels.astype(np.float32)
            return {"city": [volume, volume.transpose(0, 2, 1, 3), volume[..., ::2].copy()]}

    monkeypatch.setattr(sources, "load_domain", lambda _name: Cut())
    asked = settings(dataset, tmp_path)
    monkeypatch.setattr(data, "_sources", lambda _settings: {"city"})
    assert view_bytes(asked) == 3 * (3 * 64 * 64 * 4) * 3 // 2


def test_a_damaged_chunk_of_views_is_said(dataset, tmp_path):
    asked = settings(dataset, tmp_path, data_memory_gb=1e-9)
    path = prepare_views(asked, tmp_path)
    for chunk in path.rglob("c/**/*"):
        if chunk.is_file():
            chunk.write_bytes(b"damaged")
    with pytest.raises(BadInputError, match=r"a chunk of views/\d/0 is damaged"):
        patch_source(asked, path, 10**6).batch(0, 4)
