"""CovProx on nonlinear operators: its descent against gains and scipy, and as a whole chain."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from dense import matrix_of
from scipy.optimize import minimize
from solver_kit import DRAWS, kernel, normal
from test_nonlinear import OPERATORS, images, measured, psnr

from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import JPEG, Blur, Saturation
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


def three(operator, easy, hard, seed):
    """Centres and data of one element that is solved as it stands, a plain and a hard one."""
    centre = torch.cat([normal(1, 1, *SIZE, stream=s) for s in (seed, seed + 1, seed + 2)])
    centre = torch.tensor([easy, 0.5, hard], dtype=torch.float64)[:, None, None, None] * centre
    y = operator.A(0.5 * normal(3, 1, *SIZE, stream=seed + 3)) + 0.05 * normal(3, 1, *SIZE)
    y[0] = operator.A(centre[:1])[0]
    return centre, y


@pytest.mark.parametrize("operator", [Bent(), JPEG(quality=30), Saturation(2.0, -0.8, 0.7)])
@pytest.mark.parametrize("accuracy", [Accuracy(1e-2, 40), Accuracy(1e-7, 25)])
def test_batch_elements_do_not_hear_of_one_another(operator, accuracy):
    centre, y = three(operator, 0.5, 3.0, seed=30)
    noise, Sigma = GaussianNoise(0.05), covariance(3)
    probe = Sigma.apply_root(normal(3, 1, *SIZE, stream=8), SIZE)
    # As on the levels of a chain whose images differ, one has a hundredth of the others' Sigma.
    scale = torch.tensor([1.0, 0.1, 1.0], dtype=torch.float64)[:, None, None, None]
    Sigma, probe = replace(Sigma, std=scale * Sigma.std), scale * probe

    def solve(chosen):
        calls = Counted(lambda x, s: x, operator)
        alone = replace(Sigma, std=Sigma.std[chosen])
        return descend(calls, alone, noise, y[chosen], centre[chosen], probe[chosen], accuracy)

    both, apart = solve(slice(0, 3)), [solve(slice(n, n + 1)) for n in range(3)]
    torch.testing.assert_close(
        both.delta, torch.cat([one.delta for one in apart]), rtol=1e-9, atol=1e-11
    )
    assert apart[0].num_steps == 0 < apart[1].num_steps
    assert both.num_steps == max(one.num_steps for one in apart)
    assert both.relative_residual == pytest.approx(max(one.relative_residual for one in apart))
    if isinstance(operator, Bent) and accuracy.max_steps == 40:
        assert apart[1].num_steps < apart[2].num_steps  # it is frozen while the hard one goes on


def energy(operator, Sigma, sigma_y, y, centre, delta):
    """U at centre + delta, of one element, by the textbook: Sigma as a matrix."""
    matrix = matrix_of(Sigma.apply, centre.shape[1:])
    gap = y - operator.A(centre + delta)
    pull = (delta.flatten() * torch.linalg.solve(matrix, delta.flatten())).sum()
    return float(gap.square().sum() / (2 * sigma_y**2) + pull / 2)


@pytest.mark.parametrize("quality", [3, 10, 40])
@pytest.mark.parametrize("sigma_y", [0.01, 0.1])
@pytest.mark.parametrize("max_steps", [1, 40])
def test_a_point_of_more_energy_than_the_starts_is_never_returned(quality, sigma_y, max_steps):
    operator, Sigma = JPEG(quality), covariance()
    moved = 0
    for seed in range(40, 46):
        y = operator.A(0.3 * normal(1, 1, *SIZE, stream=seed))
        centre = 0.3 * normal(1, 1, *SIZE, stream=seed) + 0.1 * normal(1, 1, *SIZE, stream=seed + 9)
        got = way(operator, Sigma, GaussianNoise(sigma_y), y, centre, Accuracy(1e-2, max_steps))
        after, before = (
            energy(operator, Sigma, sigma_y, y, centre, d) for d in (got.delta, 0 * got.delta)
        )
        assert after <= before * (1 + 1e-12)
        moved += bool(got.delta.any())
    assert moved or max_steps == 1


class Uphill:
    """A(x) = x, whose gradient points the wrong way."""

    def A(self, x):
        return 2 * x.detach() - x

    def initial(self, y):
        return y


def test_where_the_gradient_leads_up_the_start_is_returned_and_said_to_be_no_solution():
    centre, y = normal(1, 1, *SIZE), normal(1, 1, *SIZE, stream=1)
    got = way(Uphill(), covariance(), GaussianNoise(0.3), y, centre, Accuracy(1e-3, 20))
    assert not bool(got.delta.any())
    assert got.num_steps == 20
    assert got.relative_residual == float("inf")


@pytest.mark.parametrize("max_steps", [1, 3, 30, 400])
def test_steps_and_the_slope_that_is_left_are_those_of_the_point_returned(max_steps):
    centre, y, Sigma = 0.5 * normal(1, 1, *SIZE), normal(1, 1, *SIZE, stream=1), covariance()
    calls, accuracy = Counted(lambda x, s: x, Bent()), Accuracy(1e-6, max_steps)
    probe = Sigma.apply_root(normal(1, 1, *SIZE, stream=8), SIZE)
    got = descend(calls, Sigma, GaussianNoise(0.1), y, centre, probe, accuracy)
    assert got.num_steps == max_steps or got.relative_residual <= 1e-6
    # Beside the steps: seven slopes for the curvature, the start's slope, and A of the start.
    assert calls.num_operator_calls == 2 * (got.num_steps + 8) + 1
    matrix, x = matrix_of(Sigma.apply, (1, *SIZE)), centre + got.delta
    w = torch.linalg.solve(matrix, got.delta.flatten())
    misfit = (1 + x.cos() / 2) * (x + x.sin() / 2 - y) / 0.1**2
    slope = misfit.flatten() + w
    left = (slope @ matrix @ slope / (w @ matrix @ w)).sqrt()
    assert got.relative_residual == pytest.approx(float(left), rel=1e-5, abs=1e-8)


class Counts:
    """R = .1 A x: of counts in units of ten."""

    def variance(self, Ax):
        return 0.1 * Ax


class Rates:
    """A(x) = exp(x)."""

    def A(self, x):
        return x.exp()

    def initial(self, y):
        return y.log()


def test_noise_that_follows_the_estimate_enters_by_its_quasi_likelihood():
    centre, r = 0.5 * normal(1, 1, *SIZE), 0.3
    y = (centre + 0.5 * normal(1, 1, *SIZE, stream=1)).exp()
    Sigma = white_covariance(r**2, centre)
    got = centre + way(Rates(), Sigma, Counts(), y, centre).delta
    # The quasi-likelihood of variances in proportion to the mean is Poisson's: (y log t - t) / .1
    mu, data = centre.flatten().numpy(), y.flatten().numpy()

    def poisson(x):
        value = ((np.exp(x) - data * x) / 0.1 + (x - mu) ** 2 / (2 * r**2)).sum()
        return value, (np.exp(x) - data) / 0.1 + (x - mu) / r**2

    expected = minimize(
        poisson, mu, jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}
    )
    np.testing.assert_allclose(got.flatten(), expected.x, atol=1e-4)


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
