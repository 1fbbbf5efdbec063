"""V/B of exact posterior samples is 1, of others what theory says; blocks where both vary agree."""

import math

import pytest
import torch

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.uncertainty import (
    Spread,
    block_log_correlation,
    block_logs,
    correlation,
    spread,
)

DRAWS = KeyedDraws(0, "uncertainty")


def normal(*shape, stream=0):
    return DRAWS.normal(0, torch.empty(shape, dtype=torch.float64), stream)


def exchangeable(num_samples, scale=1.0, std=1.0, size=64):
    """(samples, truth): x0 and the samples from one N(0, std^2), the samples `scale` times."""
    truth = std * normal(2, 3, size, size, stream=1)
    samples = scale * std * normal(num_samples, 2, 3, size, size, stream=2)
    return samples, truth


@pytest.mark.parametrize("num_samples", [2, 3, 8])
def test_samples_of_the_posterior_have_ratio_one_for_any_number(num_samples):
    samples, truth = exchangeable(num_samples)
    assert spread(samples, truth).ratio == pytest.approx(1.0, abs=0.04)


def test_narrow_samples_fall_short_by_a_known_factor():
    # V = (1 + 1/M) s^2, B = 1 + s^2 / M.
    samples, truth = exchangeable(4, scale=0.5)
    assert spread(samples, truth).ratio == pytest.approx(1.25 * 0.25 / (1 + 0.25 / 4), rel=0.03)


def test_pixels_that_are_known_do_not_count():
    samples, truth = exchangeable(8)
    unknown = torch.zeros_like(truth, dtype=torch.bool)
    unknown[..., :32] = True
    samples[..., 32:] = 100.0  # no spread there, and a great error
    assert spread(samples, truth, unknown).ratio == pytest.approx(1.0, abs=0.05)
    assert spread(samples, truth).ratio < 0.01
    samples[..., 32:] = 100.0 * normal(8, 2, 3, 64, 32, stream=8)  # and a great spread
    assert spread(samples, truth, unknown).ratio == pytest.approx(1.0, abs=0.05)


def test_pooling_adds_sums_not_ratios():
    assert (Spread(1.0, 2.0) + Spread(3.0, 2.0)).ratio == 1.0
    samples, truth = exchangeable(5)
    halves = spread(samples[..., :32], truth[..., :32]) + spread(samples[..., 32:], truth[..., 32:])
    assert halves.ratio == pytest.approx(spread(samples, truth).ratio, rel=1e-12)


def test_an_exact_mean_has_an_infinite_ratio_and_one_sample_no_spread():
    samples = torch.stack([torch.ones(1, 1, 4, 4), -torch.ones(1, 1, 4, 4)])
    assert spread(samples, torch.zeros(1, 1, 4, 4)).ratio == float("inf")
    with pytest.raises(ValueError, match="two samples or more, not 1"):
        spread(samples[:1], torch.zeros(1, 1, 4, 4))


def varying_blocks(num=12):
    """Standard deviation of every 16^2 block, over two decades."""
    std = torch.logspace(-2, 0, num * num, dtype=torch.float64).reshape(1, 1, num, num)
    return std.repeat_interleave(16, -1).repeat_interleave(16, -2)


def test_blocks_whose_error_is_as_their_spread_correlate():
    std = varying_blocks()
    samples = std * normal(8, 1, 1, 192, 192, stream=3)
    truth = std * normal(1, 1, 192, 192, stream=4)
    assert block_log_correlation(samples, truth) > 0.98
    # ... and a spread that is large where the error is small has the other sign.
    assert block_log_correlation(samples.flip(-1, -2), truth) < -0.5
    even = normal(8, 1, 1, 192, 192, stream=5)
    assert abs(block_log_correlation(even, truth)) < 0.3


def test_block_correlation_is_that_of_numpy_on_the_blocks_that_count():
    import numpy as np

    std = varying_blocks(3)
    samples, truth = std * normal(4, 1, 1, 48, 48, stream=6), normal(1, 1, 48, 48, stream=7)
    unknown = torch.ones_like(truth, dtype=torch.bool)
    unknown[..., :16, :16] = False
    variance = samples.numpy().var(axis=0, ddof=1)[0, 0]
    error = (truth.numpy() - samples.numpy().mean(axis=0))[0, 0] ** 2
    blocks = [
        np.log([part[r : r + 16, c : c + 16].mean() for r in (0, 16, 32) for c in (0, 16, 32)][1:])
        for part in (variance, error)
    ]
    expected = np.corrcoef(blocks)[0, 1]
    assert block_log_correlation(samples, truth, unknown) == pytest.approx(expected, rel=1e-9)


def test_blocks_of_several_images_can_be_joined():
    std = varying_blocks()
    samples, truth = std * normal(4, 1, 1, 192, 192, stream=9), std * normal(1, 1, 192, 192)
    halves = [block_logs(samples[..., part, :], truth[..., part, :]) for part in HALVES]
    joined = correlation(torch.cat(halves, dim=1))
    assert joined == pytest.approx(block_log_correlation(samples, truth), rel=1e-9)


HALVES = (slice(0, 96), slice(96, 192))


def test_a_correlation_of_nothing_is_nan():
    samples, truth = exchangeable(3, size=16)
    value = block_log_correlation(samples[:, :1], truth[:1])
    assert value != value


def test_no_pixels_have_no_ratio():
    samples, truth = exchangeable(3, size=4)
    none = torch.zeros_like(truth, dtype=torch.bool)
    assert math.isnan(spread(samples, truth, none).ratio)
    assert math.isnan(Spread().ratio)
