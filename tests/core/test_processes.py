"""Forward processes: closed forms against Euler-Maruyama paths and against their own definition."""

import math

import numpy as np
import pytest
import torch

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.integrated import Integrated
from diffusion_core.noise.processes import (
    EDM,
    VE,
    VP,
    CosineVP,
    RectifiedFlow,
    SubVP,
    euler_maruyama,
    predict_x0,
)

PROCESSES = {
    "edm": (EDM(2.0), 1.0),
    "ve": (VE(0.05, 3.0), 1.0),
    "vp": (VP(0.1, 8.0), 1.0),
    "sub-vp": (SubVP(0.1, 8.0), 1.0),
    "cosine": (CosineVP(), 0.8),
    "flow": (RectifiedFlow(), 0.8),
    "integrated": (Integrated(lambda t: -1.0 + t, lambda t: 0.5 + t**2), 1.0),
}
NUM_PATHS, NUM_STEPS = 10_000, 200


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


@pytest.mark.parametrize("closed", [VP(), SubVP(), CosineVP(), RectifiedFlow()])
def test_a_process_of_given_coefficients_reproduces_the_closed_form(closed):
    numeric = Integrated(closed.drift, closed.diffusion, t_last=0.999)
    for t in (0.001, 0.03, 0.2, 0.5, 0.8, 0.95, 0.999):
        assert numeric.scale(t) == pytest.approx(closed.scale(t), rel=1e-8)
        assert numeric.sigma(t) == pytest.approx(closed.sigma(t), rel=1e-6)


def test_a_burst_of_noise_is_not_stepped_over():
    # b^2 = 1 on [0.4, 0.4 + d] only: sigma^2 = d afterwards, and no drift.
    for lasting in (0.01, 0.0015):
        process = Integrated(lambda t: 0.0, lambda t, d=lasting: float(0.4 <= t <= 0.4 + d))
        assert process.sigma(0.39) == 0.0
        assert process.sigma(1.0) ** 2 == pytest.approx(lasting, rel=1e-3)


def test_coefficients_that_are_infinite_or_times_out_of_range_are_refused():
    with pytest.raises(ValueError, match="finite up to t_last"):
        Integrated(lambda t: -math.inf if t == 1.0 else 0.0, abs).scale(0.5)
    with pytest.raises(ValueError, match="times from 0"):
        Integrated(abs, abs, 0.5).sigma(0.6)
    for t_last in (0.0, 1.5):
        with pytest.raises(ValueError, match="t_last"):
            Integrated(abs, abs, t_last)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("t", [1e-4, 0.3, 0.79])
def test_time_inverts_sigma(name, t):
    process, _ = PROCESSES[name]
    assert process.time(process.sigma(t)) == pytest.approx(t, rel=1e-8)
    with pytest.raises(ValueError, match="never through"):
        process.time(-0.1)


@pytest.mark.parametrize("name", PROCESSES)
def test_one_denoiser_serves_every_process(name):
    # x0 ~ N(0, P): E[x0 | X_t] = P s X_t / (s^2 (P + sigma^2)), by hand from the joint Gaussian.
    process, t = PROCESSES[name]
    P = 0.25
    X_t = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 1, 3, 4)
    x0 = predict_x0(lambda x, s: P / (P + s.view(-1, 1, 1, 1) ** 2) * x, process, X_t, t)
    s, variance = process.scale(t), (process.scale(t) * process.sigma(t)) ** 2
    np.testing.assert_allclose(x0, P * s / (s**2 * P + variance) * X_t, rtol=1e-12)


@pytest.mark.parametrize("t", [1.0, -0.1, float("nan")])
def test_no_estimate_where_no_signal_is_left(t):
    with pytest.raises(ValueError, match="no signal is left"):
        predict_x0(lambda x, s: x, RectifiedFlow(), torch.zeros(1, 1, 2, 2), t)
