"""Multiplicative noise: geometric Brownian motion against paths, speckle against scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.multiplicative import (
    LogSpeckle,
    Multiplicative,
    from_log,
    log_speckle_mean,
    log_speckle_variance,
    to_log,
)

NUM_PATHS, NUM_STEPS = 10_000, 200
PROCESS = Multiplicative(lambda t: 0.3 * t - 0.1, lambda t: 0.4 + 0.2 * t)


def paths():
    """Euler-Maruyama paths of dX = a X dt + b X dW from X = 2, midpoint in time."""
    noise = KeyedDraws(0, "gbm").normal(0, torch.empty(NUM_STEPS, NUM_PATHS, dtype=torch.float64))
    X = torch.full((NUM_PATHS,), 2.0, dtype=torch.float64)
    dt = 1.0 / NUM_STEPS
    for i, eps in enumerate(noise):
        t = (i + 0.5) * dt
        X = X * (1 + PROCESS.drift(t) * dt + PROCESS.diffusion(t) * math.sqrt(dt) * eps)
    return X


def test_paths_have_the_closed_form_log_mean_and_log_variance():
    logs, std = (paths() / 2.0).log(), PROCESS.sigma(1.0)
    assert abs(logs.mean() - PROCESS.log_shift(1.0)) < 4 * std / math.sqrt(NUM_PATHS)
    assert logs.std().item() == pytest.approx(std, rel=0.03)


def test_paths_have_the_closed_form_mean_and_variance():
    X, x0 = paths(), torch.tensor(2.0, dtype=torch.float64)
    std = PROCESS.variance(x0, 1.0).sqrt()
    assert abs(X.mean() - PROCESS.mean(x0, 1.0)) < 4 * std / math.sqrt(NUM_PATHS)
    assert X.std().item() == pytest.approx(float(std), rel=0.06)


def test_the_moments_are_those_of_the_log_normal_distribution():
    x0 = torch.tensor(2.0, dtype=torch.float64)
    median = 2.0 * math.exp(PROCESS.log_shift(1.0))
    law = stats.lognorm(PROCESS.sigma(1.0), scale=median)
    assert PROCESS.mean(x0, 1.0).item() == pytest.approx(law.mean(), rel=1e-7)
    assert PROCESS.variance(x0, 1.0).item() == pytest.approx(law.var(), rel=1e-7)


def test_the_integrals_are_exact():
    # int (0.3 t - 0.1) = 0.15 t^2 - 0.1 t; int (0.4 + 0.2 t)^2 = ((0.4 + 0.2 t)^3 - 0.4^3) / 0.6.
    for t in (0.2, 1.0):
        variance = ((0.4 + 0.2 * t) ** 3 - 0.4**3) / 0.6
        assert PROCESS.sigma(t) ** 2 == pytest.approx(variance, rel=1e-9)
        shift = 0.15 * t**2 - 0.1 * t - 0.5 * variance
        assert PROCESS.log_shift(t) == pytest.approx(shift, rel=1e-8)
        assert PROCESS.time(PROCESS.sigma(t)) == pytest.approx(t, rel=1e-9)


@pytest.mark.parametrize("looks", [1, 4, 2.5, 16])
def test_log_moments_are_those_of_the_gamma_distribution(looks):
    gamma = stats.gamma(looks, scale=1 / looks)
    mean = gamma.expect(np.log)
    assert log_speckle_mean(looks) == pytest.approx(mean, rel=1e-6)
    variance = gamma.expect(lambda s: (np.log(s) - mean) ** 2)
    assert log_speckle_variance(looks) == pytest.approx(variance, rel=1e-6)


def test_the_way_to_logs_takes_the_bias_off_and_back():
    rng = np.random.Generator(np.random.Philox(key=3))
    clean = torch.tensor([0.05, 0.3, 0.9], dtype=torch.float64).reshape(1, 3, 1, 1)
    speckle = torch.from_numpy(rng.gamma(4, 1 / 4, (1, 3, 200, 200)))
    logs = to_log(clean * speckle, 4)
    error = (logs - clean.log()).mean(dim=(0, 2, 3)).abs().max()
    assert error < 4 * math.sqrt(special.polygamma(1, 4) / 200**2)
    torch.testing.assert_close(from_log(clean.log()), clean)


def test_the_mean_of_a_log_normal_needs_its_variance():
    logs = 0.6 * KeyedDraws(0, "log").normal(0, torch.empty(1, 1, 300, 300, dtype=torch.float64))
    mean = from_log(torch.zeros(1, dtype=torch.float64), 0.36)
    assert logs.exp().mean().item() == pytest.approx(mean.item(), rel=0.01)


@pytest.mark.parametrize("nats", [1.0, 2.77])
def test_the_likelihood_is_a_density_with_the_right_moments(nats):
    noise = LogSpeckle(4, nats_per_unit=nats)
    y = torch.linspace(-6, 6, 20001, dtype=torch.float64)[None]
    density = noise.log_likelihood(y, torch.full_like(y, 0.2)).exp()
    dy = 12 / 20000
    assert (density.sum() * dy).item() == pytest.approx(1.0, rel=1e-6)
    mean = (density * y).sum() * dy
    assert mean.item() == pytest.approx(0.2, abs=1e-6)
    variance = (density * (y - mean) ** 2).sum() * dy
    assert variance.item() == pytest.approx(noise.variance(y).item(), rel=1e-6)


def test_the_likelihood_agrees_with_scipy():
    x, s = 0.4, torch.tensor([[0.2, 1.0, 2.5]], dtype=torch.float64)
    y = to_log(math.exp(x) * s, 3)
    ours = LogSpeckle(3).log_likelihood(y, torch.full_like(y, x))
    # A change of variables to the logarithm: p(log s) = s p(s).
    theirs = stats.gamma(3, scale=1 / 3).logpdf(s.numpy()) + np.log(s.numpy())
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-10)


@pytest.mark.parametrize("looks", [0, -1, math.nan])
def test_speckle_without_looks_is_refused(looks):
    with pytest.raises(ValueError, match="looks"):
        LogSpeckle(looks)
    with pytest.raises(ValueError, match="looks"):
        log_speckle_mean(looks)
