"""Averages of the weights of any length, from a few snapshots of two: against direct sums."""

import math

import numpy as np
import pytest
import torch

from diffusion_core.networks.local_unet import LocalUNet
from diffusion_core.networks.precond import Preconditioned
from diffusion_core.noise.streams import training_noise
from diffusion_core.training.power import (
    LENGTHS,
    LONGEST,
    PowerAverage,
    combination,
    exponent_of,
    length_of,
    reconstruct,
    save_snapshot,
    snapshot_steps,
)


def profile(num_steps: int, exponent: float) -> np.ndarray:
    """What the recursion gives each step's weights, summed out by hand."""
    t = np.arange(1, num_steps + 1)
    kept = (1 - 1 / t) ** (exponent + 1)
    return (1 - kept) * np.append(np.cumprod(kept[::-1])[::-1][1:], 1.0)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, LONGEST])
def test_an_average_s_length_is_the_spread_of_its_weights_over_time(length):
    exponent = exponent_of(length)
    assert length_of(exponent) == pytest.approx(length, rel=1e-9)
    num_steps = 20_000
    weights = profile(num_steps, exponent)
    time = (np.arange(num_steps) + 0.5) / num_steps
    assert weights.sum() == pytest.approx(1.0)
    mean = (weights * time).sum()
    spread = math.sqrt((weights * (time - mean) ** 2).sum())
    assert spread == pytest.approx(length, rel=0.01)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.3, float("nan")])
def test_there_is_no_average_longer_than_the_training(length):
    with pytest.raises(ValueError, match="at most"):
        exponent_of(length)


def test_the_average_is_the_sum_that_its_profile_says():
    module = Preconditioned(LocalUNet(1, (8,), (1,), num_features=8))
    average = PowerAverage(module, 0.1)
    seen = []
    for step in range(1, 31):
        with torch.no_grad():
            module.log_variance.bias.fill_(math.sin(step))
        seen.append(math.sin(step))
        average.update(module, step)
    expected = (profile(30, exponent_of(0.1)) * np.array(seen)).sum()
    assert average.module.log_variance.bias.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [0.03, 0.05, 0.07, 0.1, 0.15, 0.2])
def test_any_length_comes_from_snapshots_of_two(length):
    """The weights over time of the combination, against those wanted: within 4% of their norm."""
    num_steps = 6400
    kept = [(s, exponent_of(one)) for s in snapshot_steps(num_steps, 16) for one in LENGTHS]
    factors = combination(kept, (num_steps, exponent_of(length)))
    built = np.zeros(num_steps)
    for factor, (step, exponent) in zip(factors, kept, strict=True):
        built[:step] += factor * profile(step, exponent)
    wanted = profile(num_steps, exponent_of(length))
    assert np.linalg.norm(built - wanted) < 0.04 * np.linalg.norm(wanted)
    assert np.abs(factors).sum() < 12  # what rounding of the snapshots can be magnified by


def test_snapshots_on_disk_give_back_an_average_of_another_length(tmp_path):
    """Weights that wander like those of a training: the error is small beside their wandering."""
    num_steps, num_snapshots = 192, 12
    module = Preconditioned(LocalUNet(1, (8,), (1,), num_features=8))
    family = [PowerAverage(module, length) for length in LENGTHS]
    direct = PowerAverage(module, 0.07)
    steps = training_noise(0, 0, torch.empty(num_steps, 8))
    after = set(snapshot_steps(num_steps, num_snapshots))
    for step in range(1, num_steps + 1):
        with torch.no_grad():
            module.log_variance.weight.add_(steps[step - 1])
        for average in (*family, direct):
            average.update(module, step)
        if step in after:
            save_snapshot(tmp_path, step, family)
    wanted = direct.module.log_variance.weight
    built = reconstruct(tmp_path, 0.07, num_steps)["log_variance.weight"]
    last = module.log_variance.weight.detach()
    assert (built - wanted).norm() < 0.02 * (last - wanted).norm()
    own = reconstruct(tmp_path, LENGTHS[0], num_steps)["log_variance.weight"]
    torch.testing.assert_close(own, family[0].module.log_variance.weight, rtol=1e-4, atol=1e-4)
    assert len(list(tmp_path.iterdir())) == num_snapshots
    with pytest.raises(FileNotFoundError, match="no snapshot of step 191"):
        reconstruct(tmp_path, 0.07, 191)


def test_snapshots_are_spread_evenly_and_end_with_the_last_step():
    assert snapshot_steps(1000, 4) == [250, 500, 750, 1000]
    assert snapshot_steps(3, 8) == [1, 2, 3]
    assert snapshot_steps(10, 0) == []
