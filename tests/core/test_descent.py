"""CovProx on nonlinear operators: its descent against gains and scipy, and as a whole chain."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from solver_kit import DRAWS, kernel, normal
from test_nonlinear import OPERATORS, images, measured, psnr

from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import Blur, Saturation
from diffusion_core.posterior import make_solver
from diffusion_core.posterior.descent import NOISE_FLOOR, descend
from diffusion_core.posterior.gaussian import Covariance, white_covariance
from diffusion_core.posterior.linear import Accuracy, DualStep
from diffusion_core.posterior.run import Counted
from diffusion_core.protocols import NonlinearOperator

SIZE = (12, 10)
EXACT = Accuracy(1e-7, 400)


class Seen:
    """A linear operator that does not say so: A, and something to start from."""

    def __init__(self, operator):
        self.A = operator.A
        self.initial = operator.A_adjoint


class Bent:
    """A(x) = x + sin(x) / 2, one to one."""

    def A(self, x):
        return x + x.sin() / 2

    def initial(self, y):
        return 0 * y


def covariance(num=1):
    """Smooth, with an S of its own at every pixel."""
    f = torch.fft.fftfreq(SIZE[0], dtype=torch.float64)[:, None].square()
    f = f + torch.fft.rfftfreq(SIZE[1], dtype=torch.float64).square()
    std = 0.5 + normal(num, 1, *SIZE, stream=4).abs()
    return Covariance(0.3 / (1 + 40 * f)[None], torch.eye(1).double(), std, SIZE)


def way(operator, Sigma, noise, y, centre, accuracy=EXACT):
    probe = Sigma.apply_root(normal(*centre.shape, stream=8), SIZE)
    calls = Counted(lambda x, s: x, operator)
    return descend(calls, Sigma, noise, y, centre, probe, accuracy)


def test_for_a_linear_operator_the_descent_ends_at_the_gain():
    operator, noise = Blur(kernel(), SIZE), GaussianNoise(0.1)
    centre, y, Sigma = normal(2, 1, *SIZE), normal(2, 1, *SIZE, stream=1), covariance(2)
    assert isinstance(Seen(operator), NonlinearOperator)
    got = way(Seen(operator), Sigma, noise, y, centre)
    exact = DualStep(operator)(
        Sigma, noise.variance(y), y - operator.A(centre), Accuracy(1e-10, 500)
    )
    torch.testing.assert_close(got.delta, exact.delta, rtol=1e-5, atol=1e-6)
    assert 0 < got.num_steps < EXACT.max_steps


@pytest.mark.parametrize("sigma_y", [0.02, 0.3])
def test_for_a_nonlinear_operator_it_ends_where_scipys_minimiser_does(sigma_y):
    centre, y, r = 0.5 * normal(1, 1, *SIZE), normal(1, 1, *SIZE, stream=1), 0.7
    Sigma = white_covariance(r**2, centre)
    got = centre + way(Bent(), Sigma, GaussianNoise(sigma_y), y, centre).delta
    mu, data = centre.flatten().numpy(), y.flatten().numpy()

    def energy(x):
        gap = x + np.sin(x) / 2 - data
        slope = (1 + np.cos(x) / 2) * gap / sigma_y**2 + (x - mu) / r**2
        return (gap**2).sum() / (2 * sigma_y**2) + ((x - mu) ** 2).sum() / (2 * r**2), slope

    expected = minimize(
        energy, mu, jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}
    )
    np.testing.assert_allclose(got.flatten(), expected.x, atol=1e-4)


def test_batch_elements_do_not_hear_of_one_another():
    Sigma, noise = white_covariance(0.5, torch.zeros(1, 1, *SIZE).double()), GaussianNoise(0.05)
    centre = torch.cat([normal(1, 1, *SIZE), 3 * normal(1, 1, *SIZE, stream=2)])
    y = normal(2, 1, *SIZE, stream=1)
    both = way(Bent(), Sigma, noise, y, centre).delta
    for n in range(2):
        one = way(Bent(), Sigma, noise, y[n : n + 1], centre[n : n + 1]).delta
        torch.testing.assert_close(both[n : n + 1], one, rtol=1e-3, atol=1e-3)


class Steep:
    """A(x) = sinh(x): gentle where the descent starts, steep where it goes."""

    def A(self, x):
        return x.sinh()


def test_where_the_operator_bends_more_than_was_measured_the_step_is_cut():
    centre = torch.zeros(1, 1, *SIZE, dtype=torch.float64)
    Sigma, noise, y = white_covariance(1.0, centre), GaussianNoise(0.1), torch.full_like(centre, 20)
    calls = Counted(lambda x, s: x, Steep())
    delta = descend(calls, Sigma, noise, y, centre, 0.01 + centre, Accuracy(1e-6, 400)).delta
    # The data are sharp: |x|^2 / 2 pulls by a thousandth.
    torch.testing.assert_close(delta, y.asinh(), atol=2e-3, rtol=0)


def test_exact_data_weigh_as_if_they_had_the_floors_noise():
    centre, y = normal(1, 1, *SIZE), normal(1, 1, *SIZE, stream=1)
    Sigma = white_covariance(1.0, centre)
    exact, floor = (
        way(Bent(), Sigma, GaussianNoise(s), y, centre).delta for s in (0.0, NOISE_FLOOR)
    )
    assert torch.equal(exact, floor)


@pytest.mark.parametrize("mode", ["mean", "sample"])
def test_a_chain_on_a_linear_operator_is_the_same_by_descent_as_by_its_gain(mode):
    prior, truth = images(1)
    operator, sigmas = Blur(kernel(), truth.shape[-2:]), power_sigmas(4, 0.5, 0.05, 3.0)
    y, noise = operator.A(truth) + 0.05 * normal(*truth.shape, stream=6), GaussianNoise(0.05)
    options = {"mode": mode, "start": "adjoint", "tolerance": 1e-6, "max_steps": 400}
    solver = make_solver("covprox", prior.table(sigmas), options)
    by_gain = solver(prior.denoise, operator, y, noise, sigmas, DRAWS)
    by_descent = solver(prior.denoise, Seen(operator), y, noise, sigmas, DRAWS)
    torch.testing.assert_close(by_descent.x, by_gain.x, rtol=1e-4, atol=1e-4)
    assert by_descent.num_denoiser_calls == by_gain.num_denoiser_calls == 4


def test_covprox_restores_clipped_images_better_than_daps_in_as_many_evaluations():
    operator, prior, truth, y = measured("saturation", 0.03)
    sigmas, noise = power_sigmas(8, 1.0, 0.05, 3.0), GaussianNoise(0.03)
    ours = make_solver("covprox", prior.table(sigmas), {"inflation": 1.0})
    got = ours(prior.denoise, operator, y[:1], noise, sigmas, DRAWS)
    daps = make_solver("daps", None, {"num_ode_steps": 1, "langevin_steps": 30})
    theirs = daps(prior.denoise, operator, y, noise, sigmas, DRAWS).x.mean(dim=0, keepdim=True)
    baseline = psnr(operator.initial(y[:1]), truth)
    assert psnr(got.x, truth) > max(psnr(theirs, truth), baseline) + 1.0


@pytest.mark.parametrize("name", OPERATORS)
def test_every_nonlinear_operator_is_taken_in_either_mode(name):
    prior, truth = images(2)
    operator, sigmas = OPERATORS[name], power_sigmas(4, 0.5, 0.05, 3.0)
    for mode in ("mean", "sample"):
        solver = make_solver("covprox", prior.table(sigmas), {"mode": mode, "max_steps": 5})
        got = solver(prior.denoise, operator, operator.A(truth), GaussianNoise(0.05), sigmas, DRAWS)
        assert bool(got.x.isfinite().all())


def test_where_nothing_is_clipped_saturation_is_denoising():
    prior, truth = images(1)
    operator, sigmas = Saturation(gain=1.0, low=-9.0, high=9.0), power_sigmas(2, 0.5, 0.1, 3.0)
    options = {"start": "adjoint", "tolerance": 1e-7, "max_steps": 300}
    solver, noise = make_solver("covprox", prior.table(sigmas), options), GaussianNoise(0.1)
    y = truth + 0.1 * normal(*truth.shape, stream=6)
    clipped = solver(prior.denoise, operator, y, noise, sigmas, DRAWS).x
    blur = Blur(torch.ones(1, 1, dtype=torch.float64), truth.shape[-2:])
    plain = solver(prior.denoise, blur, y, noise, sigmas, DRAWS).x
    torch.testing.assert_close(clipped, plain, rtol=1e-4, atol=1e-4)
