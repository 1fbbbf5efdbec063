"""Denoiser calls of several lanes in batches of one shape: who shares a batch changes no bit."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_kit import make_store, published, same, tiny_plan
from starter_kit import SIZE, STARTER, WAYS, make_photographs, photograph_plan

from diffusion_core.model import Model
from flows.config import ComputeSettings, MethodSettings
from flows.engine.batches import BATCH_SIZES, Batcher, batch_size
from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor, make_executor
from flows.engine.plan import content_of

PLANE = SIZE[0] * SIZE[1]
FOREVER = float("inf")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("in") / "m.zarr")


def noisy(count: int, size: tuple[int, int] = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and a noise level for each, all different."""
    values = torch.linspace(-1.5, 1.5, count * 3 * size[0] * size[1])
    return torch.sin(40 * values).reshape(count, 3, *size), torch.logspace(-1.5, 0.5, count)


class Scaling:
    """D(x; sigma) = sigma x, which remembers the shapes that it was called with."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, x, sigma):
        self.batches.append(tuple(x.shape))
        return sigma[:, None, None, None] * x


def in_lanes(batcher: Batcher, calls: list) -> list:
    """Results of one call a lane, all lanes there before the first calls."""
    ready = threading.Barrier(len(calls))

    def lane(call):
        with batcher.lane():
            ready.wait(30)
            return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(lane, calls))


# --- what a batch must not change ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [n for n in BATCH_SIZES if n > 1])
def test_in_a_batch_of_fixed_shape_place_and_neighbours_change_no_bit(dtype, size):
    denoise = Model.load(STARTER, dtype=dtype).denoiser("city")
    x, sigma = noisy(16)
    chance, seen = random.Random(1), {}
    with torch.no_grad():
        for _ in range(4):
            order = chance.choices(range(16), k=size)
            for index, D_x in zip(order, denoise(x[order], sigma[order]), strict=True):
                assert torch.equal(seen.setdefault(index, D_x), D_x)


@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
def test_every_fill_of_a_batch_makes_the_bits_of_a_window_that_is_alone(lanes):
    network = Model.load(STARTER).denoiser("city")
    x, sigma = noisy(16)
    alone = Batcher().denoiser("D", network, 16 * PLANE)
    expected = torch.cat([alone(x[i : i + 1], sigma[i : i + 1]) for i in range(16)])
    batcher = Batcher(FOREVER)
    shared = batcher.denoiser("D", network, 16 * PLANE)
    for fill in (1, 2, 3, 5, 16):
        parts = [range(n, fill, lanes) for n in range(min(lanes, fill))]
        calls = [lambda part=part: shared(x[list(part)], sigma[list(part)]) for part in parts]
        for part, D_x in zip(parts, in_lanes(batcher, calls), strict=True):
            assert torch.equal(D_x, expected[list(part)])


@pytest.mark.parametrize(("per_batch", "numbers"), [(4, (2, 3, 4)), (16, (4,))])
def test_lanes_and_order_change_no_byte_of_what_the_starter_restores(
    store, tmp_path, per_batch, numbers
):
    settings = {"batch_px": per_batch * PLANE}
    run_plan(photograph_plan(store, tmp_path / "one", **settings), InlineExecutor())
    expected = published(tmp_path / "one")
    assert len(expected) == 5 * len(WAYS)
    for lanes in numbers:
        plan = photograph_plan(store, tmp_path / f"lanes-{lanes}", **settings)
        items = random.Random(lanes).sample(plan.items, len(plan.items))
        run_plan(replace(plan, items=tuple(items)), InlineExecutor(lanes))
        assert same(published(tmp_path / f"lanes-{lanes}"), expected)


def test_gradients_stay_in_their_lane_and_change_no_byte_either(store, tmp_path):
    way = MethodSettings(name="pigdm", num_levels=2, options={"start": "noise"})
    for lanes in (1, 3):
        plan = photograph_plan(store, tmp_path / str(lanes), way, batch_px=4 * PLANE)
        assert run_plan(plan, InlineExecutor(lanes)).quarantined == ()
    assert same(published(tmp_path / "1"), published(tmp_path / "3"))


def test_lanes_change_no_byte_where_blocks_have_batches_of_their_own(store, tmp_path):
    run_plan(photograph_plan(store, tmp_path / "one", WAYS[0]), InlineExecutor())
    run_plan(photograph_plan(store, tmp_path / "two", WAYS[0]), InlineExecutor(3))
    assert same(published(tmp_path / "one"), published(tmp_path / "two"))
    tiny = make_store(tmp_path / "m.zarr")
    run_plan(tiny_plan(tiny, tmp_path / "three"), InlineExecutor())
    run_plan(tiny_plan(tiny, tmp_path / "four"), InlineExecutor(4))
    assert same(published(tmp_path / "three"), published(tmp_path / "four"))


def test_a_plane_in_tiles_is_shared_too_and_its_tiles_fill_a_batch(store, tmp_path, monkeypatch):
    monkeypatch.setattr("flows.engine.block.DENOISER_PLANE_PX", 100)
    monkeypatch.setattr("flows.engine.block.DENOISER_TILE_PX", 8)
    monkeypatch.setattr("flows.engine.block.HALO_PX", 0)
    for lanes in (1, 3):
        plan = photograph_plan(store, tmp_path / str(lanes), WAYS[1], batch_px=8 * 64)
        run_plan(plan, InlineExecutor(lanes))
    assert same(published(tmp_path / "1"), published(tmp_path / "3"))


# --- how batches come together -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_px", "size"), [(1, 1), (3 * PLANE, 1), (4 * PLANE, 4), (15 * PLANE, 8), (10**9, 16)]
)
def test_a_batch_has_as_many_windows_as_fit_but_never_two_or_three(batch_px, size):
    assert batch_size(PLANE, batch_px) == size


def test_windows_of_all_lanes_make_one_batch_and_every_lane_gets_its_own_back():
    scaling, batcher = Scaling(), Batcher(FOREVER)
    denoise = batcher.denoiser("D", scaling, 16 * PLANE)
    x, sigma = noisy(15)
    parts = [slice(0, 4), slice(4, 9), slice(9, 15)]
    results = in_lanes(batcher, [lambda p=part: denoise(x[p], sigma[p]) for part in parts])
    assert torch.equal(torch.cat(results), sigma[:, None, None, None] * x)
    assert scaling.batches == [(16, 3, *SIZE)], "one batch, filled up with a copy"


def test_windows_beyond_a_batch_wait_for_the_next_one():
    scaling, batcher = Scaling(), Batcher(FOREVER)
    denoise = batcher.denoiser("D", scaling, 4 * PLANE)
    x, sigma = noisy(9)
    halves = [slice(0, 5), slice(5, 9)]
    results = in_lanes(batcher, [lambda p=part: denoise(x[p], sigma[p]) for part in halves])
    assert torch.equal(torch.cat(results), sigma[:, None, None, None] * x)
    assert scaling.batches == [(4, 3, *SIZE)] * 3


def test_other_shapes_and_other_networks_never_share_a_batch():
    one, other, batcher = Scaling(), Scaling(), Batcher(FOREVER)
    calls = [
        lambda: batcher.denoiser("one", one, 16 * PLANE)(*noisy(2)),
        lambda: batcher.denoiser("other", other, 16 * PLANE)(*noisy(2)),
        lambda: batcher.denoiser("one", one, 16 * PLANE)(*noisy(2, (8, 16))),
    ]
    in_lanes(batcher, calls)
    assert sorted(one.batches) == [(16, 3, 8, 16), (16, 3, *SIZE)]
    assert other.batches == [(16, 3, *SIZE)]


def test_a_lane_that_ends_is_waited_for_no_more():
    scaling, batcher = Scaling(), Batcher(FOREVER)
    denoise = batcher.denoiser("D", scaling, 4 * PLANE)
    with ThreadPoolExecutor(1) as thread, batcher.lane():
        with batcher.lane():
            waiting = thread.submit(denoise, *noisy(2))
            assert not waiting.done(), "this lane might still add to the batch"
            denoise(*noisy(2))
        assert waiting.result(30).shape == (2, 3, *SIZE)
        assert len(scaling.batches) == 1


def test_others_are_not_waited_for_longer_than_a_batch_takes():
    scaling, batcher = Scaling(), Batcher()
    with batcher.lane(), batcher.lane():  # the second one never calls
        denoise = batcher.denoiser("D", scaling, 4 * PLANE)
        for _ in range(3):
            denoise(*noisy(2))
    assert len(scaling.batches) == 3


def test_what_goes_wrong_in_a_batch_is_told_to_every_lane_in_it_and_to_no_other():
    broke = []

    def broken(x, sigma):
        broke.append(len(x))
        raise RuntimeError("out of memory on the device")

    batcher = Batcher(FOREVER)
    bad, good = (batcher.denoiser(n, d, 4 * PLANE) for n, d in (("x", broken), ("D", Scaling())))

    def attempt(denoise, count):
        try:
            return denoise(*noisy(count)).shape[0]
        except RuntimeError as error:
            return str(error)

    calls = [lambda: attempt(bad, 6), lambda: attempt(bad, 1), lambda: attempt(good, 2)]
    told = in_lanes(batcher, calls)
    assert told == ["out of memory on the device"] * 2 + [2]
    assert attempt(good, 3) == 3, "and the batcher goes on"
    broke.clear()
    assert attempt(bad, 6) == "out of memory on the device"
    assert attempt(good, 1) == 1
    assert broke == [4], "what is left of a call that failed is not run"


# --- in plans ------------------------------------------------------------------------------------


def test_the_shape_of_batches_names_a_campaign_and_the_number_of_lanes_does_not(store):
    own, shared = (photograph_plan(store, Path("out"), batch_px=n) for n in (0, 4 * PLANE))
    lanes = photograph_plan(store, Path("out"), batch_px=4 * PLANE, num_lanes=3)
    assert own.campaign != shared.campaign == lanes.campaign
    assert own.campaign == photograph_plan(store, Path("out")).campaign, "a CPU's default"
    assert "batch_px" not in content_of(own.items[0]), "as campaigns were named before"
    assert lanes.to_json()["predicted"]["num_lanes"] == 3
    assert own.predicted_peak_bytes < lanes.predicted_peak_bytes
    on_gpu = photograph_plan(store, Path("out"), device_class="cuda")
    assert content_of(on_gpu.items[0])["batch_px"] == 2**22


def test_classical_methods_know_no_batches(tmp_path):
    store = make_store(tmp_path / "m.zarr")
    plan, other = (tiny_plan(store, tmp_path, batch_px=n) for n in (0, 4096))
    assert plan.campaign == other.campaign


def test_a_gpu_has_several_lanes_unless_told_otherwise():
    assert ComputeSettings(num_gpus_per_worker=0).lanes == 1
    assert ComputeSettings(num_gpus_per_worker=0.5).lanes == 4
    settings = ComputeSettings(executor="inline", num_gpus_per_worker=1, num_lanes=2)
    assert make_executor(settings)._lanes == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", BATCH_SIZES[1:])
def test_on_a_gpu_place_and_neighbours_change_no_bit_either(dtype, size):
    denoise = Model.load(STARTER, dtype=dtype, device="cuda").denoiser("city")
    x, sigma = (part.cuda() for part in noisy(16, (64, 72)))
    chance, seen = random.Random(1), {}
    with torch.no_grad():
        for _ in range(8):
            order = chance.choices(range(16), k=size)
            for index, D_x in zip(order, denoise(x[order], sigma[order]), strict=True):
                assert torch.equal(seen.setdefault(index, D_x), D_x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_lanes_and_order_change_no_byte_of_what_is_restored(store, tmp_path):
    settings = {"device_class": "cuda", "batch_px": 16 * PLANE, "dtype": "bfloat16"}
    for lanes in (1, 4):
        plan = photograph_plan(store, tmp_path / str(lanes), **settings)
        run_plan(replace(plan, items=plan.items[::lanes]), InlineExecutor(lanes))
    one, other = (published(tmp_path / name) for name in ("1", "4"))
    assert same({key: one[key] for key in other}, other)
