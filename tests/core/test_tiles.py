"""Tiles: every pixel written once, windows in phase, tiles equal to the whole."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.tiles import spans, tiled_denoiser

STRIDE = 4


@given(
    length=st.integers(1, 200),
    tile=st.integers(1, 10).map(lambda n: n * STRIDE),
    halo=st.integers(0, 30),
    origin=st.integers(-20, 20).map(lambda n: n * STRIDE),
)
def test_spans_cover_the_canvas_once_in_phase(length, tile, halo, origin):
    cut = spans(length, tile, halo, STRIDE, origin)
    assert [i for s in cut for i in range(s.start, s.stop)] == list(range(length))
    for s in cut:
        assert (s.read_start + origin) % STRIDE == 0
        assert s.read_start == 0 or s.start - s.read_start >= halo
        assert s.read_stop == length or s.read_stop - s.stop >= halo
        assert s.start == 0 or (s.start + origin) % tile == 0


@pytest.mark.parametrize(
    "bad", [(0, 8, 1, 4, 0), (9, 6, 1, 4, 0), (9, 8, 1, 4, 2), (9, 8, -1, 4, 0)]
)
def test_tiles_out_of_phase_are_refused(bad):
    with pytest.raises(ValueError, match="multiples of the stride"):
        spans(*bad)


def strided(x, sigma):
    """Depends on the phase of 4x4 cells and on 8 pixels around, as a strided network does."""
    h, w = x.shape[-2:]
    padded = F.pad(x, (0, -w % STRIDE, 0, -h % STRIDE), mode="replicate")
    coarse = F.max_pool2d(padded, STRIDE)
    coarse = F.avg_pool2d(coarse, 3, 1, 1, count_include_pad=False)
    fine = coarse.repeat_interleave(STRIDE, -2).repeat_interleave(STRIDE, -1)[..., :h, :w]
    return (fine + x) * sigma.view(-1, 1, 1, 1)


@pytest.mark.parametrize("size", [(37, 50), (16, 16), (5, 70), (64, 33)])
@pytest.mark.parametrize("max_batch", [1, 3])
def test_tiles_equal_the_whole(size, max_batch):
    x = KeyedDraws(0, "tiles").normal(0, torch.empty(2, 3, *size, dtype=torch.float64))
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    tiled = tiled_denoiser(strided, tile=16, halo=8, stride=STRIDE, max_batch=max_batch)
    assert torch.equal(tiled(x, sigma), strided(x, sigma))


def test_a_halo_that_is_too_small_is_seen():
    # The test above would be vacuous if any halo passed it.
    x = KeyedDraws(0, "tiles").normal(0, torch.empty(1, 1, 64, 64, dtype=torch.float64))
    sigma = torch.ones(1, dtype=torch.float64)
    tiled = tiled_denoiser(strided, tile=16, halo=0, stride=STRIDE, max_batch=4)
    assert not torch.equal(tiled(x, sigma), strided(x, sigma))


def test_a_part_of_the_canvas_keeps_its_tiles():
    x = KeyedDraws(0, "tiles").normal(0, torch.empty(1, 1, 64, 64, dtype=torch.float64))
    sigma = torch.ones(1, dtype=torch.float64)
    part = tiled_denoiser(strided, 16, 8, STRIDE, max_batch=4, origin_yx=(8, 12))
    inner = (slice(None), slice(None), slice(16, 40), slice(16, 40))
    # Pixels farther than the reach from the part's border agree with the whole.
    got = part(x[..., 8:, 12:], sigma)[..., 8:32, 4:28]
    assert torch.equal(got, strided(x, sigma)[inner])


def test_windows_are_batched():
    calls = []

    def counting(x, sigma):
        calls.append(x.shape)
        return strided(x, sigma)

    x = torch.zeros(1, 1, 64, 64)
    tiled_denoiser(counting, 16, 8, STRIDE, max_batch=2)(x, torch.ones(1))
    assert len(calls) == 8
    assert max(shape[0] for shape in calls) == 2
