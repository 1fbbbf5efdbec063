"""Forward processes: closed forms against Euler-Maruyama paths and against their own definition."""

import math

import numpy as np
import pytest
import torch

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.processes import (
    EDM,
    VE,
    VP,
    CosineVP,
    Integrated,
    Multiplicative,
    RectifiedFlow,
    euler_maruyama,
    predict_x0,
)

PROCESSES = {
    "edm": (EDM(2.0), 1.0),
    "ve": (VE(0.05, 3.0), 1.0),
    "vp": (VP(0.1, 8.0), 1.0),
    "cosine": (CosineVP(), 0.8),
    "flow": (RectifiedFlow(), 0.8),
    "integrated": (Integrated(lambda t: -1.0 + t, lambda t: 0.5 + t**2), 1.0),
}
NUM_PATHS, NUM_STEPS = 20_000, 200


@pytest.mark.parametrize("name", PROCESSES)
def test_paths_have_the_closed_form_mean_and_variance(name):
    process, t_end = PROCESSES[name]
    noise = KeyedDraws(0, name).normal(0, torch.empty(NUM_STEPS, NUM_PATHS, dtype=torch.float64))
    X = euler_maruyama(process, torch.full((NUM_PATHS,), 0.7, dtype=torch.float64), noise, t_end)
    std = process.scale(t_end) * process.sigma(t_end)
    assert abs(X.mean() - 0.7 * process.scale(t_end)) < 4 * std / math.sqrt(NUM_PATHS) + 0.005 * std
    assert X.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * NUM_PATHS) + 0.01)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("t", [0.2, 0.5, 0.75])
def test_scale_and_sigma_solve_their_differential_equations(name, t):
    process, _ = PROCESSES[name]
    h = 1e-5
    ds = (process.scale(t + h) - process.scale(t - h)) / (2 * h)
    dv = (process.sigma(t + h) ** 2 - process.sigma(t - h) ** 2) / (2 * h)
    assert ds == pytest.approx(process.drift(t) * process.scale(t), rel=1e-6, abs=1e-9)
    assert process.scale(t) ** 2 * dv == pytest.approx(process.diffusion(t) ** 2, rel=1e-6)


def test_an_integrated_process_agrees_with_its_closed_form():
    vp = VP()
    numeric = Integrated(vp.drift, vp.diffusion)
    for t in (0.1, 0.5, 1.0):
        assert numeric.scale(t) == pytest.approx(vp.scale(t), rel=1e-10)
        assert numeric.sigma(t) == pytest.approx(vp.sigma(t), rel=1e-6)


def test_multiplicative_noise_is_geometric_brownian_motion():
    process = Multiplicative(lambda t: 0.3 * t, lambda t: 0.4 + 0.2 * t)
    noise = KeyedDraws(0, "gbm").normal(0, torch.empty(NUM_STEPS, NUM_PATHS, dtype=torch.float64))
    X = torch.full((NUM_PATHS,), 2.0, dtype=torch.float64)
    dt = 1.0 / NUM_STEPS
    for i, eps in enumerate(noise):
        t = (i + 0.5) * dt
        X = X * (1 + process.drift(t) * dt + process.diffusion(t) * math.sqrt(dt) * eps)
    logs = (X / 2.0).log()
    std = process.sigma(1.0)
    assert abs(logs.mean() - process.log_shift(1.0)) < 4 * std / math.sqrt(NUM_PATHS)
    assert logs.std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("name", PROCESSES)
def test_one_denoiser_serves_every_process(name):
    # x0 ~ N(0, P): E[x0 | X_t] = P s X_t / (s^2 (P + sigma^2)), by hand from the joint Gaussian.
    process, t = PROCESSES[name]
    P = 0.25
    X_t = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 1, 3, 4)
    x0 = predict_x0(lambda x, s: P / (P + s.view(-1, 1, 1, 1) ** 2) * x, process, X_t, t)
    s, variance = process.scale(t), (process.scale(t) * process.sigma(t)) ** 2
    np.testing.assert_allclose(x0, P * s / (s**2 * P + variance) * X_t, rtol=1e-12)
