"""Keyed noise: equal to the bit by counter, whatever the order, window or batch."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from diffusion_core.noise.draws import KeyedDraws, box_muller, generator, key_of, philox4x32
from diffusion_core.noise.schedules import power_sigmas

# Random123 1.09, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor(c) for c in counter), tuple(key))
    assert [int(word) for word in words] == expected


def test_philox_is_the_same_on_a_vector_of_counters():
    columns = [torch.tensor([answer[0][i] for answer in KNOWN_ANSWERS[:2]]) for i in range(4)]
    both = philox4x32(tuple(columns), (0, 0))
    alone = philox4x32(tuple(column[1] for column in columns), (0, 0))
    assert [int(word[1]) for word in both] == [int(word) for word in alone]
    assert [int(word[0]) for word in both] == KNOWN_ANSWERS[0][2]


def test_box_muller_is_the_textbook_formula():
    words = tuple(torch.tensor([w], dtype=torch.int64) for w in (5, 2**31, 2**32 - 1, 2**30))
    u = [(int(w) + 0.5) / 2**32 for w in words]
    radius = [np.sqrt(-2 * np.log(u[0])), np.sqrt(-2 * np.log(u[2]))]
    expected = [
        radius[0] * np.cos(2 * np.pi * u[1]),
        radius[0] * np.sin(2 * np.pi * u[1]),
        radius[1] * np.cos(2 * np.pi * u[3]),
        radius[1] * np.sin(2 * np.pi * u[3]),
    ]
    np.testing.assert_allclose(box_muller(words)[0].numpy(), expected, rtol=1e-12)


def test_noise_is_standard_normal_and_uncorrelated():
    noise = KeyedDraws(0, "abc").normal(2, torch.empty(1, 1, 512, 512, dtype=torch.float64))
    assert scipy.stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    bound = 4 / np.sqrt(noise.numel())
    for shift in ((0, 1), (0, 2), (0, 3), (1, 0), (3, 1)):
        assert abs((noise * noise.roll(shift, (-2, -1))).mean()) < bound


@pytest.mark.parametrize("x0", [-3, 0, 1, 2, 3, 4, 101])
def test_a_window_sees_the_noise_of_the_whole(x0):
    whole = KeyedDraws(1, "abc", (10, -2, -3)).normal(3, torch.empty(4, 2, 13, 131))
    window = KeyedDraws(1, "abc", (11, 3, x0)).normal(3, torch.empty(2, 2, 7, 9))
    assert torch.equal(window, whole[1:3, :, 5:12, x0 + 3 : x0 + 12])


def test_seed_digest_level_and_stream_each_change_the_noise():
    like = torch.empty(1, 1, 8, 8)
    draws = [
        KeyedDraws(0, "a").normal(0, like),
        KeyedDraws(1, "a").normal(0, like),
        KeyedDraws(0, "b").normal(0, like),
        KeyedDraws(0, "a").normal(1, like),
        KeyedDraws(0, "a").normal(0, like, stream=1),
        KeyedDraws(0, "a").normal(1, like, stream=-1),
    ]
    for i, one in enumerate(draws):
        for other in draws[i + 1 :]:
            assert (one != other).all()


def test_channels_and_slices_have_noise_of_their_own():
    noise = KeyedDraws(0, "a").normal(0, torch.empty(3, 2, 8, 8)).reshape(6, -1)
    assert (torch.corrcoef(noise) - torch.eye(6)).abs().max() < 0.6
    assert len({float(row[0]) for row in noise}) == 6


def correlation(one, other):
    return float((one * other).mean() / (one.square().mean() * other.square().mean()).sqrt())


def test_noise_along_z_is_alike_over_its_length_and_normal_in_each_slice():
    length, shape = 3.0, torch.empty(12, 1, 96, 96, dtype=torch.float64)
    noise = KeyedDraws(1, "along", length_z=length).normal(2, shape, 3)
    error = 4 / 96  # four standard errors of a correlation of 96^2 pixels
    for lag in (1, 2, 3, 6, 9):
        expected = math.exp(-(lag**2) / (2 * length**2))
        assert abs(correlation(noise[0], noise[lag]) - expected) < error
        assert abs(correlation(noise[2], noise[2 + lag]) - expected) < error
    assert abs(float(noise.mean())) < 4 / 96
    assert all(abs(float(slab.std()) - 1) < 4 / 96 for slab in noise)


def test_a_part_of_a_stack_has_the_alike_noise_of_the_whole():
    whole = KeyedDraws(1, "along", length_z=2.5)
    like = torch.empty(9, 2, 5, 7, dtype=torch.float64)
    part = whole.at((4, 2, 3)).normal(0, like[4:7, :, 2:, 3:])
    torch.testing.assert_close(part, whole.normal(0, like)[4:7, :, 2:, 3:], rtol=0, atol=1e-14)


def test_noise_of_endless_length_is_one_slice_s_for_all():
    like = torch.empty(3, 1, 4, 5)
    one = KeyedDraws(1, "along").normal(0, like[:1])
    for origin in ((0, 0, 0), (7, 0, 0)):
        shared = KeyedDraws(1, "along", origin, length_z=math.inf).normal(0, like)
        assert torch.equal(shared, one.expand_as(like))


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 5), (3, 2, 4, 5), (3, 2, 2, 4, 5)])
def test_any_shape_can_be_drawn(shape):
    noise = KeyedDraws(0, "a").normal(0, torch.empty(shape))
    assert noise.shape == shape
    assert len(set(noise.flatten().tolist())) == noise.numel()


def test_the_noise_of_this_version_is_frozen():
    # A change here changes every restored pixel: bump the engine's ALGORITHM_VERSION with it.
    assert key_of(7, "abc", 0, 2) == 6344351390822321141
    noise = KeyedDraws(7, "abc", (1, 2, 3)).normal(2, torch.empty(1, 1, 1, 3, dtype=torch.float64))
    expected = [-1.3155006408703107, -1.1408951835010919, -0.05529521881584077]
    np.testing.assert_allclose(noise.flatten().numpy(), expected, rtol=1e-12)


def test_integer_noise_is_refused():
    with pytest.raises(TypeError, match="floating"):
        KeyedDraws(0, "a").normal(0, torch.empty(1, 1, 2, 2, dtype=torch.int64))


def test_generators_are_keyed():
    one, same, other = (
        torch.rand(4, generator=generator(*k)) for k in ((0, "a"), (0, "a"), (0, "b"))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_power_sigmas_are_even_in_the_root():
    sigmas = power_sigmas(5, 0.5, 0.05, 3.0)
    roots = sigmas.numpy() ** (1 / 3)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-12)
    np.testing.assert_allclose(sigmas[[0, -1]].numpy(), [0.5, 0.05], rtol=1e-12)
    assert power_sigmas(1, 0.5, 0.05, 3.0).tolist() == [0.5]


@pytest.mark.parametrize("bad", [(0, 1, 0.1, 3), (3, 0.1, 1, 3), (3, 1, 0, 3), (3, 1, 0.1, 0)])
def test_absurd_schedules_are_refused(bad):
    with pytest.raises(ValueError, match="levels need"):
        power_sigmas(*bad)
