"""Rician noise: its moments, its stabiliser, and the way back, against draws and closed forms."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from test_mri_physics import phantom_item

from diffusion_core.testing import DomainContract
from domains.base import BadInputError
from domains.mri import rician
from domains.mri.domain import MRI
from flows.config import load_task

TASK = load_task("denoise-rician")
AMPLITUDES = np.array([0.0, 0.5, 1.0, 2.0, 3.0, 6.0, 20.0])


def draws(amplitude, count=200_000, seed=0):
    n = np.random.default_rng(seed).standard_normal((2, count))
    return np.hypot(amplitude + n[0], n[1])


def test_moments_are_those_of_the_distribution():
    mean, spread = rician.moments(AMPLITUDES)
    assert np.allclose(mean, [stats.rice.mean(a) for a in AMPLITUDES], rtol=1e-9)
    assert np.allclose(spread, [stats.rice.std(a) for a in AMPLITUDES], rtol=1e-6)
    assert mean[0] == pytest.approx(np.sqrt(np.pi / 2))


def test_the_noise_is_of_one_strength_where_there_is_signal_and_hardly_less_where_there_is_none():
    spreads = {a: rician.stabilise(draws(a)).std() for a in AMPLITUDES}
    assert all(0.88 < s < 1.07 for s in spreads.values())
    assert all(abs(s - 1) < 0.01 for a, s in spreads.items() if a >= 6)


def test_the_stabiliser_rises_and_leaves_strong_signals_alone():
    m = np.linspace(0, 60, 3001)
    assert (np.diff(rician.stabilise(m)) > 0).all()
    assert np.allclose(rician.stabilise(m)[m > 10], m[m > 10], atol=0.03)


@pytest.mark.parametrize("amplitude", [0.0, 0.5, 1.0, 2.0, 3.0, 6.0, 20.0, 50.0])
def test_the_mean_of_many_draws_leads_back_to_the_amplitude(amplitude):
    mean = rician.stabilise(draws(amplitude)).mean()
    assert rician.expected(np.array(amplitude)) == pytest.approx(mean, abs=0.012)
    assert rician.unbiased(mean) == pytest.approx(amplitude, abs=0.015 if amplitude else 0.1)


def test_the_inverse_undoes_the_expectation_and_ends_at_black():
    a = np.linspace(0, 80, 500)
    assert np.abs(rician.unbiased(rician.expected(a)) - a).max() < 1e-3
    assert (rician.unbiased(np.array([-3.0, 0.0])) == 0).all()


def test_simulated_noise_is_rician_at_the_strength_that_the_task_says():
    item = phantom_item(depth=1)
    item = replace(item, pixels=np.full_like(item.pixels, 100.0))
    found = MRI().simulate(item, TASK, seed=0)
    assert found.noise["sigma"] == pytest.approx(9.0)
    expected = stats.rice(100 / 9, scale=9)
    assert found.y.mean() == pytest.approx(expected.mean(), rel=0.005)
    assert found.y.std() == pytest.approx(expected.std(), rel=0.03)
    again = MRI().simulate(item, TASK, seed=0)
    assert np.array_equal(found.y, again.y)
    assert not np.array_equal(found.y, MRI().simulate(item, TASK, seed=1).y)


def test_the_scale_is_read_from_the_noisy_image():
    item = phantom_item()
    found = MRI().simulate(item, TASK, seed=0)
    q = np.percentile(item.pixels, 99.9)
    assert found.params["scale_q"] == pytest.approx(q, rel=0.15)
    assert found.noise["sigma_y"] == pytest.approx(
        2 * found.noise["sigma"] / found.params["scale_q"]
    )


def test_black_comes_back_black():
    """The air round a head: its mean is 1.25 sigma as measured, and 0 in truth."""
    item, domain = phantom_item(), MRI()
    found = domain.simulate(item, TASK, seed=0)
    problem = domain.problem(found)
    air = item.pixels[0] == 0
    assert air.mean() > 0.05
    sigma = found.noise["sigma"]
    assert found.y[:, 0][air].mean() == pytest.approx(np.sqrt(np.pi / 2) * sigma, rel=0.02)
    truth = domain.truth_signal(item, found)
    back = problem.to_source(truth)[:, 0].numpy()
    assert np.abs(back - item.pixels[0]).max() < 0.01 * sigma
    mean = problem.y[:, 0][torch.from_numpy(air)].mean()
    level = problem.to_source(mean.reshape(1, 1, 1, 1))
    assert float(level) < 0.35 * sigma  # g is flat at 0: what noise the mean has is seen


def test_a_users_noisy_volume_is_taken_with_the_noise_that_it_is_said_to_have():
    domain, clean = MRI(), phantom_item()
    noisy = domain.simulate(clean, TASK, seed=0)
    item = replace(clean, pixels=np.moveaxis(noisy.y, 0, 1))
    q = np.percentile(noisy.y, 99.9)
    found = domain.given_noisy(item, noise="rician", sigma_y=2 * noisy.noise["sigma"] / q)
    assert found.noise["sigma"] == pytest.approx(noisy.noise["sigma"], rel=1e-4)
    assert np.array_equal(found.y, noisy.y)
    with pytest.raises(BadInputError, match="have no salt noise"):
        domain.given_noisy(item, noise="salt", sigma_y=0.1)
    with pytest.raises(BadInputError, match="above 0"):
        domain.given_noisy(item, noise="rician", sigma_y=0.0)


def test_other_operators_have_no_rician_noise():
    with pytest.raises(BadInputError, match="goes with the operator identity"):
        MRI().simulate(phantom_item(), replace(TASK, operator="pool"), seed=0)


class TestRicianContract(DomainContract):
    # In air the stabilised noise has 4/5 of its variance.
    chi2_bounds = (0.75, 1.15)

    def make_domain(self):
        return MRI()

    def make_item(self):
        return phantom_item(size=(64, 80))

    def make_tasks(self):
        return [TASK, load_task("mri-sr-x2")]
