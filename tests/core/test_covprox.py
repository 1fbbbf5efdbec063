"""CovProx on a Gaussian prior, where D, Sigma and the posterior are known exactly (c = 1, S = 1).

Chains start from pure noise N(0, sigma_max^2), never from kriging, which is the answer there.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from dense import GaussianPrior, flat, matrix_of

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.likelihood import GaussianNoise, PoissonTransmission
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import Blur, Fourier, Mask, Pool
from diffusion_core.posterior import STANDARD, make_solver
from diffusion_core.posterior.linear.mask import MaskStep
from diffusion_core.posterior.run import measurement_noise
from diffusion_core.protocols import Restoration

SIZE = (12, 10)
SIGMA_Y = 0.1
DRAWS = KeyedDraws(0, "covprox")
ORACLE = {"inflation": 1.0, "start": "noise", "local": False, "tolerance": 1e-10, "max_steps": 2000}


def normal(*shape, stream=0):
    return DRAWS.normal(0, torch.empty(shape, dtype=torch.float64), stream)


class Dense:
    """A random matrix: no solver has a closed form for it."""

    def __init__(self, size, num_data):
        self.size = size
        self.matrix = normal(num_data, size[0] * size[1], stream=3) / 5.0

    def A(self, x):
        return x.flatten(1) @ self.matrix.T

    def A_adjoint(self, y):
        return (y @ self.matrix).reshape(-1, 1, *self.size)


def lines(size):
    return (torch.arange(size[0]) % 3 == 0)[None, None, :, None].expand(1, 1, *size).contiguous()


def kernel():
    taps = torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64)
    return torch.outer(taps, taps) / 25.0


OPERATORS = {
    "mask": (lambda: Mask(normal(1, 1, *SIZE, stream=9) > 0.2), 3),
    "blur": (lambda: Blur(kernel(), SIZE), 3),
    "pool": (lambda: Pool(2), 1),
    "fourier": (lambda: Fourier(lines(SIZE), 1), 1),
    "fourier-complex": (lambda: Fourier(lines(SIZE), 2), 2),
    "dense": (lambda: Dense(SIZE, 40), 1),
}


@pytest.fixture(autouse=True)
def _periodic_masks(monkeypatch):
    # The oracle's prior is periodic on the image itself.
    monkeypatch.setattr(MaskStep, "padding", 0)


def problem(name, batch=1):
    """(operator, prior, y repeated `batch` times, posterior mean, posterior covariance)."""
    make, channels = OPERATORS[name]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    truth = prior.mean + 0.4 * normal(1, channels, *SIZE, stream=1)
    y = operator.A(truth)
    y = y + SIGMA_Y * operator.A(normal(1, channels, *SIZE, stream=2))
    R = torch.full_like(flat(y)[0], SIGMA_Y**2)
    mean, covariance = prior.posterior(operator, y, R)
    return operator, prior, y.expand(batch, *y.shape[1:]), mean, covariance


def solve(name, sigmas, batch=1, solver="covprox", draws=DRAWS, **options):
    operator, prior, y, mean, covariance = problem(name, batch)
    options = ORACLE | options
    made = make_solver(solver, prior.table(sigmas), options)
    result = made(prior.denoise, operator, y, GaussianNoise(SIGMA_Y), sigmas, draws)
    return result, mean, covariance


def distance_to_mean(x, mean, covariance):
    """Root mean square deviation in units of the posterior standard deviation."""
    return float(((x - mean).square().mean() / covariance.diagonal().mean()).sqrt())


LONG = power_sigmas(40, 20.0, 0.3, 3.0)


@pytest.mark.parametrize("name", OPERATORS)
def test_without_renoising_the_chain_reaches_the_posterior_mean(name):
    result, mean, covariance = solve(name, LONG, zeta=0.0)
    assert distance_to_mean(result.x, mean, covariance) < 1e-4
    assert result.num_denoiser_calls == len(LONG)


def test_the_oracle_is_not_met_by_a_solver_that_returns_its_start():
    operator, _, y, mean, covariance = problem("blur")

    def lazy(denoise, operator, y, noise, sigmas, draws):
        return Restoration(operator.A_adjoint(y), 0, 1)

    x = lazy(None, operator, y, None, LONG, DRAWS).x
    assert distance_to_mean(x, mean, covariance) > 0.5


def test_inflation_moves_the_oracle_off_the_mean():
    # c = 1 is what is right here; the test above would be vacuous if any c passed it.
    result, mean, covariance = solve("blur", LONG, zeta=0.0, inflation=4.0)
    assert distance_to_mean(result.x, mean, covariance) > 0.05


def eigen_spread(x, mean, covariance):
    """Variance over the batch along each posterior eigen-direction, and the eigenvalues."""
    values, vectors = torch.linalg.eigh(covariance)
    coordinates = flat(x - mean) @ vectors
    return coordinates.square().mean(dim=0), values


@pytest.mark.parametrize("zeta", [1.0, 0.5])
@pytest.mark.parametrize("name", ["blur", "dense"])
def test_fresh_noise_follows_its_variance_law(name, zeta):
    sigmas, batch = power_sigmas(8, 20.0, 0.2, 3.0), 400
    result, mean, covariance = solve(name, sigmas, batch, zeta=zeta)
    variance, P = eigen_spread(result.x, mean, covariance)
    law = torch.zeros_like(P)
    for i, sigma in enumerate(sigmas.tolist()):
        g = P / (P + sigma**2)
        law = g**2 * (law + ((1.0 if i == 0 else zeta) * sigma) ** 2)
    ratio = float((variance / law).mean())
    assert ratio == pytest.approx(1.0, abs=4 * np.sqrt(2 / (batch * len(P))) + 0.01)
    # ... and its average over draws is the posterior mean.
    drift = (result.x.mean(dim=0) - mean[0]).square().mean() / (law.mean() / batch)
    assert float(drift) == pytest.approx(1.0, abs=4 * np.sqrt(2 / len(P)) + 0.05)


@pytest.mark.parametrize("name", ["mask", "blur", "fourier", "fourier-complex", "dense"])
def test_sample_mode_reaches_the_posterior_covariance(name):
    batch = 300
    result, mean, covariance = solve(name, power_sigmas(6, 20.0, 0.3, 3.0), batch, mode="sample")
    variance, P = eigen_spread(result.x, mean, covariance)
    bound = 4 * np.sqrt(2 / batch)
    assert float((variance / P).mean()) == pytest.approx(1.0, abs=bound / np.sqrt(len(P)) + 0.02)
    # Direction by direction too: five groups of eigenvalues, from the least certain to the most.
    for group in torch.tensor_split(variance / P, 5):
        assert float(group.mean()) == pytest.approx(1.0, abs=bound / np.sqrt(len(group)) + 0.03)


def test_the_deterministic_chain_tends_to_a_posterior_sample():
    batch = 300
    sigmas = power_sigmas(120, 20.0, 0.02, 5.0)
    result, mean, covariance = solve("blur", sigmas, batch, renoise="deterministic")
    variance, P = eigen_spread(result.x, mean, covariance)
    assert float((variance / P).mean()) == pytest.approx(1.0, abs=0.08)


def test_zeta_of_each_level_enters_the_variance_law():
    # One value a level: that of level i scales the noise that level i starts from.
    sigmas, batch, zeta = power_sigmas(4, 5.0, 0.3, 3.0), 500, (0.3, 1.0, 0.2, 0.7)
    result, mean, covariance = solve("dense", sigmas, batch, zeta=zeta)
    variance, P = eigen_spread(result.x, mean, covariance)
    law = torch.zeros_like(P)
    for i, sigma in enumerate(sigmas.tolist()):
        scale = 1.0 if i == 0 else zeta[i]
        law = (P / (P + sigma**2)) ** 2 * (law + (scale * sigma) ** 2)
    assert float((variance / law).mean()) == pytest.approx(1.0, abs=0.03)


def test_inflation_of_each_level_enters_that_levels_gain():
    # zeta = 0 and c along the levels: the error of an eigen-direction has a closed form, with
    # Sigma = P_prior sigma^2 / (P_prior + sigma^2) and K of c Sigma, matrix by matrix.
    sigmas, inflation = power_sigmas(4, 5.0, 0.3, 3.0), (0.5, 3.0, 1.0, 8.0)
    result, _, _ = solve("dense", sigmas, zeta=0.0, inflation=inflation)
    operator, prior, y, _, _ = problem("dense")
    A, P, eye = operator.matrix, prior.matrix(), torch.eye(120, dtype=torch.float64)
    x = flat(sigmas[0] * DRAWS.normal(0, torch.zeros(1, 1, *SIZE, dtype=torch.float64)))[0]
    for sigma, c in zip(sigmas, inflation, strict=True):
        D = P @ torch.linalg.inv(P + sigma**2 * eye)
        mu = prior.mean + D @ (x - prior.mean)
        Sigma = c * sigma**2 * D
        G = A @ Sigma @ A.T + SIGMA_Y**2 * torch.eye(len(A), dtype=torch.float64)
        x = mu + Sigma @ A.T @ torch.linalg.solve(G, y[0] - A @ mu)
    torch.testing.assert_close(flat(result.x)[0], x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("ramp", "places", "linear", "geometric"),
    [
        (3.0, (0.0, 0.4, 1.0), (3.0, 3.0, 3.0), (3.0, 3.0, 3.0)),
        ((1.0, 4.0), (0.0, 0.5, 1.0), (1.0, 2.5, 4.0), (1.0, 2.0, 4.0)),
        ((1.0, 4.0, 1.0), (0.0, 0.25, 0.5, 1.0), (1.0, 2.5, 4.0, 1.0), (1.0, 2.0, 4.0, 1.0)),
        ((7.0,), (0.0, 1.0), (7.0, 7.0), (7.0, 7.0)),
        ((1.0, 2.0, 8.0, 4.0), (1 / 3, 2 / 3, 5 / 6), (2.0, 8.0, 6.0), (2.0, 8.0, 32**0.5)),
    ],
)
def test_a_sequence_is_interpolated_along_the_chain(ramp, places, linear, geometric):
    solver = make_solver(
        "covprox",
        GaussianPrior(SIZE).table([0.1]),
        {"zeta": ramp, "momentum": ramp, "inflation": ramp},
    )
    for place, value, root in zip(places, linear, geometric, strict=True):
        assert solver.zeta_at(place) == pytest.approx(value)
        assert solver.momentum_at(place) == pytest.approx(value)
        assert solver.inflation_at(place) == pytest.approx(root)


@pytest.mark.parametrize("momentum", [0.4, (0.0, 0.8), (0.0, 0.9, 0.1)])
def test_momentum_is_a_heavy_ball_in_every_eigen_direction(momentum):
    sigmas = power_sigmas(7, 5.0, 0.3, 3.0)
    result, mean, covariance = solve("dense", sigmas, zeta=0.0, momentum=momentum)
    P, vectors = torch.linalg.eigh(covariance)
    first = sigmas[0] * DRAWS.normal(0, mean)
    before, error = -flat(mean) @ vectors, None  # the chain starts at 0
    state = flat(first - mean) @ vectors
    for i, sigma in enumerate(sigmas):
        error = P / (P + sigma**2) * state
        values = np.atleast_1d(momentum)
        beta = np.interp((i + 1) / 6, np.linspace(0, 1, len(values)), values)
        state, before = error + beta * (error - before), error
    torch.testing.assert_close(flat(result.x - mean) @ vectors, error, rtol=1e-5, atol=1e-7)


def test_bad_options_are_refused_in_a_sentence():
    table = GaussianPrior(SIZE).table([0.1])
    with pytest.raises(ValueError, match="modes mean, sample and graded"):
        make_solver("covprox", table, {"mode": "median"})
    with pytest.raises(ValueError, match="one value or more"):
        make_solver("covprox", table, {"zeta": []})
    with pytest.raises(ValueError, match="inflation must be positive"):
        make_solver("covprox", table, {"inflation": [1.0, 0.0]})
    operator, prior, y, _, _ = problem("blur")
    solver = make_solver("covprox", table, {"start": "zero"})
    with pytest.raises(ValueError, match="starts from kriging, scaled-adjoint, adjoint or noise"):
        solver(prior.denoise, operator, y, GaussianNoise(0.1), torch.tensor([0.1]), DRAWS)


def test_kriging_is_the_posterior_mean_of_a_gaussian_prior():
    for name in OPERATORS:
        operator, prior, y, mean, covariance = problem(name)
        kriging = make_solver("kriging", prior.table(LONG), {"tolerance": 1e-10, "max_steps": 2000})
        result = kriging(prior.denoise, operator, y, GaussianNoise(SIGMA_Y), LONG, DRAWS)
        assert distance_to_mean(result.x, mean, covariance) < 1e-5, name
        assert result.num_denoiser_calls == 0


def test_exact_pixels_are_kept():
    operator, prior, _, _, _ = problem("mask")
    truth = prior.mean + 0.4 * normal(1, 3, *SIZE, stream=1)
    sigmas = power_sigmas(4, 0.5, 0.05, 3.0)
    solver = make_solver("covprox", prior.table(sigmas), {})
    result = solver(prior.denoise, operator, operator.A(truth), GaussianNoise(0.0), sigmas, DRAWS)
    torch.testing.assert_close(operator.A(result.x), operator.A(truth), rtol=0, atol=1e-12)


def test_poisson_weights_follow_the_estimate():
    seen = []

    class Watched(PoissonTransmission):
        def variance(self, Ax):
            seen.append(Ax.clone())
            return super().variance(Ax)

    operator, prior, y, _, _ = problem("dense")
    sigmas = power_sigmas(3, 0.5, 0.05, 3.0)
    solver = make_solver("covprox", prior.table(sigmas), {})
    solver(prior.denoise, operator, y, Watched(100.0, 0.5), sigmas, DRAWS)
    assert torch.equal(seen[0], y)  # the kriging start has nothing better
    assert len(seen) == 1 + len(sigmas)
    # Later weights come from estimates, which differ from the noisy data and move with the levels.
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


def test_poisson_variance_is_that_of_the_logarithm_of_counts():
    counts_per_ray, line_integral = 1e4, torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)
    counts = np.random.default_rng(0).poisson(
        counts_per_ray * np.exp(-line_integral.numpy()), (200_000, 3)
    )
    expected = np.var(-np.log(np.maximum(counts, 0.5) / counts_per_ray), axis=0)
    noise = PoissonTransmission(counts_per_ray, offset=0.5)
    np.testing.assert_allclose(noise.variance(line_integral - 0.5)[0], expected, rtol=0.02)
    with_readout = PoissonTransmission(counts_per_ray, 0.5, electronic_counts=10.0)
    share = with_readout.variance(line_integral - 0.5) / noise.variance(line_integral - 0.5)
    expected_share = 1 + 100 / (1e4 * torch.exp(-line_integral))
    torch.testing.assert_close(share, expected_share, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_measurement_noise_has_the_variance_of_the_likelihood(dtype):
    like = torch.zeros(1, 1, 200, 200, dtype=dtype)
    noise = measurement_noise(torch.tensor(0.09, dtype=torch.float64), DRAWS, 3, like)
    parts = [noise.real, noise.imag] if like.is_complex() else [noise]
    for part in parts:
        assert float(part.var()) == pytest.approx(0.09, rel=0.03)
    if like.is_complex():
        assert abs(float((noise.real * noise.imag).mean())) < 0.09 * 0.02


def test_gaussian_noise_broadcasts_one_level_a_slice():
    y = torch.zeros(2, 1, 3, 4, dtype=torch.complex128)
    assert GaussianNoise(0.2).variance(y) == pytest.approx(0.04)
    per_slice = GaussianNoise(torch.tensor([0.1, 0.2])).variance(y)
    assert per_slice.shape == (2, 1, 1, 1)
    assert not per_slice.is_complex()
    for bad in (lambda: GaussianNoise(-1.0), lambda: PoissonTransmission(0.0)):
        with pytest.raises(ValueError, match="must be"):
            bad()


def test_the_same_draws_give_the_same_result_and_others_another():
    sigmas = power_sigmas(4, 0.5, 0.05, 3.0)
    one, again = (solve("blur", sigmas)[0].x for _ in range(2))
    other = solve("blur", sigmas, draws=KeyedDraws(1, "covprox"))[0].x
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


class Tally:
    """Counts calls of an operator's and a denoiser's methods, from outside the solvers."""

    def __init__(self, monkeypatch, operator, denoise):
        self.operator_calls = self.denoiser_calls = 0
        self._denoise = denoise
        for name in ("A", "A_adjoint"):
            original = getattr(type(operator), name)

            def counted(operator, v, original=original):
                self.operator_calls += 1
                return original(operator, v)

            monkeypatch.setattr(type(operator), name, counted)

    def denoise(self, x, sigma):
        self.denoiser_calls += 1
        return self._denoise(x, sigma)


@pytest.mark.parametrize("solver", STANDARD)
@pytest.mark.parametrize("name", ["dense", "mask", "blur"])
def test_calls_are_counted(name, solver, monkeypatch):
    operator, prior, y, _, _ = problem(name)
    tally = Tally(monkeypatch, operator, prior.denoise)
    sigmas = power_sigmas(3, 0.5, 0.05, 3.0)
    made = make_solver(solver, prior.table(sigmas), {})
    result = made(tally.denoise, operator, y, GaussianNoise(SIGMA_Y), sigmas, DRAWS)
    assert result.num_denoiser_calls == tally.denoiser_calls == (0 if solver == "kriging" else 3)
    assert result.num_operator_calls == tally.operator_calls > 0


def test_a_last_level_of_zero_costs_nothing():
    sigmas = power_sigmas(3, 0.5, 0.05, 3.0)
    with_zero = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    a, b = (solve("blur", sigmas)[0], solve("blur", sigmas)[0])
    operator, prior, y, _, _ = problem("blur")
    solver = make_solver("covprox", prior.table(sigmas), ORACLE)
    b = solver(prior.denoise, operator, y, GaussianNoise(SIGMA_Y), with_zero, DRAWS)
    assert b.num_denoiser_calls == 3
    assert torch.equal(a.x, b.x)


@pytest.mark.parametrize("bad", [[0.1, 0.2], [0.2, 0.2], [0.2, -0.1], [0.0], []])
def test_levels_that_do_not_decrease_are_refused(bad):
    operator, prior, y, _, _ = problem("blur")
    for name in ("covprox", "diffpir", "dds"):
        solver = make_solver(name, prior.table([0.1]), {})
        with pytest.raises(ValueError, match="level"):
            solver(prior.denoise, operator, y, GaussianNoise(0.1), torch.tensor(bad), DRAWS)


def test_solvers_are_made_by_name_with_known_options_only():
    table = GaussianPrior(SIZE).table([0.1])
    assert make_solver("covprox", table, {"zeta": 0.3}).zeta == 0.3
    with pytest.raises(ValueError, match=r"unknown solver 'dpm'.*covprox"):
        make_solver("dpm", table, {})
    with pytest.raises(ValueError, match=r"no option 'zetta': it takes mode"):
        make_solver("covprox", table, {"zetta": 0.3})
    for name in ("covprox", "kriging"):
        with pytest.raises(ValueError, match="needs a covariance table"):
            make_solver(name, None, {})


def test_the_dense_oracle_is_a_posterior():
    # The oracle itself, against one draw of the joint Gaussian: E[x0 - mean | y] is uncorrelated.
    operator, prior, _, _, covariance = problem("dense")
    P, A = prior.matrix(), matrix_of(operator.A, (1, *SIZE))
    precision = torch.linalg.inv(P) + A.T @ A / SIGMA_Y**2
    torch.testing.assert_close(covariance, torch.linalg.inv(precision), rtol=1e-6, atol=1e-9)
