"""Nonlinear solvers against brute force: quadrature, scipy's minimiser, finite differences.

Pixels that neither the prior nor the operator ties together have posteriors of their own, in one
dimension: a grid knows their mean, their variance and their mode.
"""

import numpy as np
import pytest
import torch
from dense import GaussianPrior, matrix_of
from scipy.optimize import minimize
from solver_kit import DRAWS, WhitePrior, normal, run

from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import JPEG, JPEGCoefficients, PhaseRetrieval, Saturation
from diffusion_core.posterior import make_solver
from diffusion_core.posterior.conditional import DataDraws
from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.descent import descend
from diffusion_core.posterior.gaussian import white_covariance
from diffusion_core.posterior.linear import Accuracy
from diffusion_core.posterior.run import DATA_RE, STATE, Counted

PRIOR = WhitePrior(mean=0.1, std=0.5)
GRID = np.linspace(-4.0, 4.0, 16001)
CLIP = Saturation(gain=1.5, low=-0.9, high=0.9)
SIGMA_Y = 0.15
CLIPPED = (-0.9, -0.3, 0.2, 0.9)
"""Data at either limit, and so far within that no pixel beyond a limit explains them."""


class Bent:
    """A(x) = x + .4 sin(2 x): one to one, with slopes from .2 to 1.8."""

    def A(self, x):
        return x + 0.4 * (2 * x).sin()

    def initial(self, y):
        return y


def table(sigmas):
    """Sigma of WhitePrior at every level."""
    levels = torch.tensor(sorted(float(s) for s in sigmas), dtype=torch.float64)
    none = torch.zeros(len(levels), 0, dtype=torch.float64)
    variance = PRIOR.std**2 * levels**2 / (PRIOR.std**2 + levels**2)
    return CovarianceTable(
        ln_sigmas=levels.log(),
        basis=torch.eye(1, dtype=torch.float64),
        log_frequencies=torch.tensor([-3.0, -0.3], dtype=torch.float64),
        log_spectrum=variance.log()[:, None, None].expand(-1, 1, 2).contiguous(),
        log_energy=none,
        log_variance=none,
        prior_mean=torch.tensor([PRIOR.mean], dtype=torch.float64),
        prior_log_spectrum=torch.full((1, 2), PRIOR.std**2, dtype=torch.float64).log(),
    )


def seen(operator):
    """A on the grid."""
    return operator.A(torch.from_numpy(GRID)[:, None, None, None]).flatten().numpy()


def likelihood(operator, y, sigma_y):
    return np.exp(-((y - seen(operator)) ** 2) / (2 * sigma_y**2))


def gauss(x, mean, std):
    return np.exp(-((x - mean) ** 2) / (2 * std**2))


def assert_drawn_from(samples, density, slack=0.02):
    """Mean, variance and distribution function, to four standard errors and a slack.

    Args:
        samples: (n,) independent.
        density: on GRID, in any units.
        slack: what a step of finite length may err by, standard deviations.
    """
    density = density / density.sum()
    mean = (density * GRID).sum()
    std = np.sqrt((density * (GRID - mean) ** 2).sum())
    n = len(samples)
    assert samples.mean() == pytest.approx(mean, abs=(4 / np.sqrt(n) + slack) * std)
    kurtosis = (density * (GRID - mean) ** 4).sum() / std**4
    wide = 2 * np.sqrt((kurtosis - 1) / n) + slack
    assert samples.std() == pytest.approx(std, rel=wide + slack)
    below = np.interp(np.sort(samples), GRID, np.cumsum(density))
    gap = np.abs(below - (np.arange(n) + 0.5) / n).max()
    assert gap < 1.95 / np.sqrt(n) + slack  # Kolmogorov and Smirnov, 99.9%


# --- Langevin draws, DAPS and split Gibbs ---------------------------------------------------------

SIDE = (20, 20)
NUM = 10
"""Elements of a batch; with the pixels of each, 4000 draws."""


def data_of(values):
    """The same value in all elements of a row: rows take turns."""
    rows = torch.tensor(values, dtype=torch.float64).repeat(SIDE[0] // len(values))
    return rows[None, None, :, None].expand(NUM, 1, *SIDE).contiguous()


def drawn(x, values, index):
    return x[:, 0, index :: len(values)].flatten().numpy()


@pytest.mark.parametrize("sigma_y", [0.15, 0.5])
def test_langevin_draws_of_a_bent_operator_have_the_law_that_quadrature_gives(sigma_y):
    values, r, centre = (-0.5, 0.4, 1.2, 2.0), 0.4, 0.3
    how = DataDraws(data_draw="langevin", langevin_steps=80, langevin_step=0.3)
    y, calls = data_of(values), Counted(lambda x, s: x, Bent())
    at, noise = torch.full_like(y, centre), GaussianNoise(sigma_y)
    got = how.draw(calls, None, at, r, y, noise, DRAWS, 2)
    for i, value in enumerate(values):
        density = likelihood(Bent(), value, sigma_y) * gauss(GRID, centre, r)
        assert_drawn_from(drawn(got, values, i), density)


@pytest.mark.parametrize(("operator", "values"), [(Bent(), (-0.5, 0.1, 0.5, 1.0)), (CLIP, CLIPPED)])
def test_daps_draws_the_posterior_that_quadrature_gives(operator, values):
    # One ODE step and the posterior's spread are exact on white images: Gibbs on (x0, x).
    y, sigmas = data_of(values), power_sigmas(8, 3.0, 0.2, 3.0)
    options = {"num_ode_steps": 1, "spread": "posterior", "sigma_data": PRIOR.std}
    options |= {"langevin_steps": 60, "langevin_step": 0.3}
    got = run("daps", PRIOR.denoise, operator, y, GaussianNoise(SIGMA_Y), sigmas, **options)
    for i, value in enumerate(values):
        density = likelihood(operator, value, SIGMA_Y) * gauss(GRID, PRIOR.mean, PRIOR.std)
        assert_drawn_from(drawn(got.x, values, i), density, slack=0.03)


@pytest.mark.parametrize(("operator", "values"), [(Bent(), (-0.5, 0.1, 0.5, 1.0)), (CLIP, CLIPPED)])
def test_split_gibbs_draws_the_posterior_blurred_by_its_coupling(operator, values):
    # At a fixed level p(y | x0) is the likelihood of z averaged over z ~ N(x0, sigma^2).
    sigma = 0.4
    sigmas = torch.linspace(sigma + 1e-3, sigma, 10, dtype=torch.float64)
    options = {"num_prior_steps": 1, "prior": table(sigmas)}
    options |= {"langevin_steps": 60, "langevin_step": 0.3}
    y = data_of(values)
    got = run("split-gibbs", PRIOR.denoise, operator, y, GaussianNoise(SIGMA_Y), sigmas, **options)
    for i, value in enumerate(values):
        kernel = gauss(GRID, 0.0, sigma)
        blurred = np.convolve(likelihood(operator, value, SIGMA_Y), kernel / kernel.sum(), "same")
        density = blurred * gauss(GRID, PRIOR.mean, PRIOR.std)
        assert_drawn_from(drawn(got.x, values, i), density, slack=0.03)


def test_daps_finds_both_modes_of_one_pixels_phase():
    # |x + 1| = .12 says x = -.88 or x = -1.12, and the prior how likely each is. Where the modulus
    # has its kink no curvature is measured: steps must find it on their way, or run off.
    operator, num, modulus, sigma_y = PhaseRetrieval((1, 1), oversampling=1), 4000, 0.12, 0.06
    y = torch.full((num, 1, 1, 1), modulus, dtype=torch.float64)
    sigmas = power_sigmas(8, 3.0, 0.3, 3.0)
    options = {"num_ode_steps": 1, "spread": "posterior", "sigma_data": PRIOR.std}
    options |= {"langevin_steps": 100, "langevin_step": 0.3}
    got = run("daps", PRIOR.denoise, operator, y, GaussianNoise(sigma_y), sigmas, **options)
    density = gauss(np.abs(GRID + 1), modulus, sigma_y) * gauss(GRID, PRIOR.mean, PRIOR.std)
    upper = density[GRID > -1].sum() / density.sum()
    x = got.x.flatten().numpy()
    assert 0.6 < upper < 0.9  # both count
    assert (x > -1).mean() == pytest.approx(upper, abs=0.03)
    for side in (GRID > -1, GRID < -1):
        mine = x[(x > -1) == side[-1]]
        assert_drawn_from(mine, density * side, slack=0.05)


# --- CovProx --------------------------------------------------------------------------------------


def clipped_mode(centre, y, r, sigma_y):
    """argmin of (y - A x)^2 / 2 sigma_y^2 + (x - centre)^2 / 2 r^2 for CLIP, in closed form."""
    g = CLIP.gain
    within = (centre / r**2 + g * y / sigma_y**2) / (1 / r**2 + g**2 / sigma_y**2)
    choices = [within.clip(CLIP.low / g, CLIP.high / g)]
    choices += [centre.clip(CLIP.high / g, None), centre.clip(None, CLIP.low / g)]

    def energy(x):
        gap = y - (g * x).clip(CLIP.low, CLIP.high)
        return gap**2 / (2 * sigma_y**2) + (x - centre) ** 2 / (2 * r**2)

    energies = np.stack([energy(x) for x in choices])
    return np.choose(energies.argmin(axis=0), choices)


@pytest.mark.parametrize("sigma", [0.4, 1.5])
@pytest.mark.parametrize("mode", ["mean", "sample"])
def test_covprox_ends_a_level_at_the_mode_of_clipped_pixels(sigma, mode):
    # In sample mode the mode about a draw, of data with noise drawn on them.
    y, sigmas = data_of(CLIPPED), torch.tensor([sigma], dtype=torch.float64)
    options = {"mode": mode, "inflation": 1.7, "start": "noise"}
    options |= {"tolerance": 1e-8, "max_steps": 400}
    solver = make_solver("covprox", table([sigma / 2, sigma, 2 * sigma]), options)
    got = solver(PRIOR.denoise, CLIP, y, GaussianNoise(SIGMA_Y), sigmas, DRAWS).x
    centre = PRIOR.denoise(sigma * DRAWS.normal(0, y), sigmas)
    r = np.sqrt(1.7) * PRIOR.std * sigma / np.hypot(PRIOR.std, sigma)
    data = y
    if mode == "sample":
        centre = centre + r * DRAWS.normal(0, y, STATE)
        data = y - SIGMA_Y * DRAWS.normal(0, y, DATA_RE)
    expected = clipped_mode(centre.numpy(), data.numpy(), r, SIGMA_Y)
    # Beyond a limit the gradient leads back where the energy is flat: data there are left out, and
    # so are modes on the limit itself, a corner about which gradients hover.
    beyond = (CLIP.gain * centre).abs() > 0.9
    led_back = beyond & ((data - CLIP.A(centre)) * centre.sign() < 0)
    plain = ~led_back.numpy() & (np.abs(np.abs(expected) - 0.9 / CLIP.gain) > 1e-9)
    assert plain.mean() > 0.5
    gap = np.abs(got.numpy() - expected)[plain]
    assert np.quantile(gap, 0.9) < 1e-3
    assert gap.max() < (2e-4 if mode == "mean" else 0.1)  # pixels that hover hold up the others


def brute(operator, P, sigma_y, y, centre):
    """The minimum that scipy descends to from the centre, of the energy in dense algebra."""
    precision = torch.linalg.inv(P)

    def energy(values):
        with torch.enable_grad():
            x = torch.from_numpy(values).requires_grad_()
            gap = y - operator.A(x.reshape(centre.shape))
            away = x - centre.flatten()
            total = gap.square().sum() / (2 * sigma_y**2) + away @ precision @ away / 2
            (slope,) = torch.autograd.grad(total, x)
        return total.item(), slope.numpy()

    settings = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 2000}
    got = minimize(energy, centre.flatten().numpy(), jac=True, method="L-BFGS-B", options=settings)
    return got.x, got.fun


@pytest.mark.parametrize("sigma_y", [0.05, 0.2])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_covprox_ends_at_the_local_mode_of_phase_retrieval(sigma_y, seed):
    # Near the truth: the mode that a general minimiser finds from the same centre.
    size, sigma = (5, 6), 0.3
    prior, operator = GaussianPrior(size), PhaseRetrieval(size)
    truth = 0.3 + 0.4 * normal(1, 1, *size, stream=seed)
    y = (operator.A(truth) + sigma_y * normal(1, 1, 10, 12, stream=seed + 10)).clamp_min(0.0)
    centre = truth + 0.1 * normal(1, 1, *size, stream=seed + 20)
    Sigma = prior.table([sigma]).at(sigma).on(centre)
    probe = Sigma.apply_root(normal(1, 1, *size, stream=8), size)
    calls, accuracy = Counted(lambda x, s: x, operator), Accuracy(1e-7, 2000)
    got = descend(calls, Sigma, GaussianNoise(sigma_y), y, centre, probe, accuracy)
    P = matrix_of(Sigma.apply, (1, *size))
    expected, _ = brute(operator, P, sigma_y, y, centre)
    assert float(got.delta.abs().max()) > 0.05
    np.testing.assert_allclose((centre + got.delta).flatten(), expected, atol=2e-4)


def test_covprox_takes_jpegs_coefficients_for_intervals():
    # Exact about its file, an image lies in the box of what rounds to the same coefficients.
    size, quality, r = (16, 16), 20, 0.15
    operator, coefficients = JPEG(quality), JPEGCoefficients(quality, size)
    truth = torch.cat([0.3 * normal(1, 1, *size, stream=seed) for seed in range(50, 56)])
    centre = truth + r * torch.cat([normal(1, 1, *size, stream=seed) for seed in range(59, 65)])
    y, calls = operator.A(truth), Counted(lambda x, s: x, operator)
    probe = r * normal(6, 1, *size, stream=8)
    Sigma, noise = white_covariance(r**2, centre), GaussianNoise(0.05)
    got = descend(calls, Sigma, noise, y, centre, probe, Accuracy(1e-2, 40))
    x, q = centre + got.delta, coefficients.data_of(y)

    def outside(image):
        return float(((coefficients.A(image) - q).abs() > 0.55).double().mean())

    assert outside(centre) > 0.08
    assert outside(x) < 0.005
    # The nearest points of the box: it may not be overshot by much, nor the truth be left.
    seen = coefficients.A(centre)
    short = (seen.clamp(q - 0.5, q + 0.5) - seen) * coefficients.steps(centre) / 127.5
    assert float(short.norm()) < float(got.delta.norm()) < 2.5 * float(short.norm())
    assert float((x - truth).norm()) < 0.97 * float((centre - truth).norm())


# --- solvers that go through a Jacobian -----------------------------------------------------------

SMALL = (3, 4)


def jacobian(operator, x):
    """By central differences: (data, pixels)."""
    columns = []
    for k in range(x.numel()):
        step = torch.zeros_like(x).flatten()
        step[k] = 1e-6
        step = step.reshape(x.shape)
        columns.append((operator.A(x + step) - operator.A(x - step)).flatten() / 2e-6)
    return torch.stack(columns, dim=1)


class Coupled:
    """A(x) = tanh(M x): seven data of twelve pixels."""

    matrix = 0.5 * normal(7, 12, stream=15)

    def A(self, x):
        return (x.flatten(1) @ self.matrix.T).tanh()

    def initial(self, y):
        return y.new_zeros(len(y), 1, *SMALL)


NONLINEAR = {"bent": Bent(), "coupled": Coupled()}


@pytest.mark.parametrize("name", [*NONLINEAR, "phase"])
def test_dps_steps_down_the_norm_by_the_operators_jacobian(name):
    operator = NONLINEAR.get(name, PhaseRetrieval(SMALL))
    sigma, zeta = 0.6, 0.3
    y = operator.A(PRIOR.mean + 0.5 * normal(1, 1, *SMALL, stream=1))
    sigmas = torch.tensor([sigma], dtype=torch.float64)
    got = run("dps", PRIOR.denoise, operator, y, GaussianNoise(0.1), sigmas, zeta=zeta).x
    mu = PRIOR.denoise(sigma * DRAWS.normal(0, got), sigmas)
    gap = (operator.A(mu) - y).flatten()
    gain = PRIOR.std**2 / (PRIOR.std**2 + sigma**2)  # of D
    slope = gain * jacobian(operator, mu).T @ gap / gap.norm()
    expected = mu - 2 * zeta * np.sqrt(1 + sigma**2) * slope.reshape(mu.shape)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NONLINEAR)
def test_red_diff_descends_by_the_operators_jacobian(name):
    # Adam written anew, three steps of it.
    operator, lam, rate = NONLINEAR[name], 0.7, 0.05
    y = operator.A(PRIOR.mean + 0.5 * normal(1, 1, *SMALL, stream=1))
    sigmas = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    options = {"lam": lam, "learning_rate": rate}
    got = run("red-diff", PRIOR.denoise, operator, y, GaussianNoise(0.1), sigmas, **options).x
    v, first, second = (torch.zeros_like(got) for _ in range(3))
    for k, sigma in enumerate(sigmas):
        pull = v - PRIOR.denoise(v + sigma * DRAWS.normal(k, v), sigma[None])
        slope = jacobian(operator, v).T @ (operator.A(v) - y).flatten()
        gradient = slope.reshape(v.shape) + lam * pull
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        scaled = first / (1 - 0.9 ** (k + 1)) / ((second / (1 - 0.99 ** (k + 1))).sqrt() + 1e-8)
        v = v - rate * scaled
    torch.testing.assert_close(got, v, rtol=1e-5, atol=1e-6)
