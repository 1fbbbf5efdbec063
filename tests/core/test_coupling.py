"""Stacks restored jointly: against dense linear algebra, closed forms and a general minimiser."""

import numpy as np
import pytest
import torch
from dense import GaussianPrior, flat, level_covariance, matrix_of
from scipy.optimize import minimize

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import Fourier, Mask
from diffusion_core.posterior import covprox, make_solver
from diffusion_core.posterior.coupling import (
    LEAST,
    couple,
    difference_precision,
    differences,
    differences_adjoint,
)
from diffusion_core.posterior.gaussian import white_covariance

SIZE = (7, 6)
EXACT = {"tolerance": 1e-13, "max_steps": 2000}
DRAWS = KeyedDraws(0, "coupling")


def normal(*shape, stream=0):
    return DRAWS.normal(0, torch.empty(shape, dtype=torch.float64), stream)


def stack(num_slices=4, channels=3, *, local=True):
    """Estimates of a stack, the Sigma of each, and a precision of their differences."""
    mu = normal(num_slices, channels, *SIZE)
    covariance = level_covariance(SIZE, channels, local=local).on(mu)
    precision = 40.0 * normal(num_slices - 1, 1, *SIZE, stream=1).square()
    precision[0, :, 2:4] = 0.0  # pixels of which nothing is known
    return mu, covariance, precision


def dense_sigma(covariance, num_slices, channels):
    """Sigma of the whole stack, one block a slice."""

    def of(i):
        std = None if covariance.std is None else covariance.std[i : i + 1]
        one = type(covariance)(covariance.spectrum, covariance.basis, std, covariance.canvas)
        return matrix_of(one.apply, (channels, *SIZE))

    return torch.block_diag(*(of(i) for i in range(num_slices)))


def dense_posterior(mu, Sigma, precision, stride=1):
    """(Sigma^-1 + D' W D)^-1 Sigma^-1 mu."""
    n, pairs = mu[0].numel(), len(precision)
    D = torch.zeros(pairs * n, mu.numel(), dtype=torch.float64)
    for i in range(pairs):
        rows = torch.arange(i * n, (i + 1) * n)
        D[rows, rows] = -1.0
        D[rows, rows + stride * n] = 1.0
    W = torch.diag(precision.expand(-1, mu.shape[1], -1, -1).flatten())
    P = torch.linalg.inv(Sigma)
    return torch.linalg.solve(P + D.T @ W @ D, P @ mu.flatten()).reshape(mu.shape)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_estimates_become_those_of_a_dense_solve(channels, local):
    mu, covariance, precision = stack(channels=channels, local=local)
    expected = dense_posterior(mu, dense_sigma(covariance, 4, channels), precision)
    found, solved = couple(mu, covariance, precision, **EXACT)
    assert solved.num_steps > 3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_no_energy_is_lower_in_the_eyes_of_a_general_minimiser():
    mu, covariance, precision = stack(3, 1)
    P = torch.linalg.inv(dense_sigma(covariance, 3, 1)).numpy()
    W, flat_mu = precision.expand(-1, 1, -1, -1).numpy(), mu.flatten().numpy()

    def energy(x):
        d = np.diff(x.reshape(mu.shape), axis=0)
        r = x - flat_mu
        slope = np.zeros(mu.shape)
        slope[1:] += W * d
        slope[:-1] -= W * d
        return 0.5 * r @ P @ r + 0.5 * (W * d**2).sum(), P @ r + slope.ravel()

    found = couple(mu, covariance, precision, **EXACT)[0].flatten().numpy()
    best = minimize(energy, flat_mu, jac=True, method="L-BFGS-B", options={"maxiter": 5000})
    assert energy(flat_mu)[0] > 1.2 * best.fun
    assert energy(found)[0] <= best.fun * (1 + 1e-6)


def test_the_differences_have_their_adjoint():
    x, d = normal(5, 2, *SIZE), normal(3, 2, *SIZE, stream=1)
    left, right = (differences(x, 2) * d).sum(), (x * differences_adjoint(d, 2)).sum()
    torch.testing.assert_close(left, right)


def test_equal_slices_of_independent_errors_become_their_mean():
    mu = normal(6, 1, *SIZE)
    white = white_covariance(0.01, mu)
    found, _ = couple(mu, white, torch.full((5, 1, *SIZE), 1e7, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(found, mu.mean(dim=0, keepdim=True).expand_as(mu), rtol=0, atol=1e-3)


def test_a_dual_that_is_carried_on_saves_steps_and_changes_nothing():
    mu, covariance, precision = stack()
    cold, first = couple(mu, covariance, precision, tolerance=1e-10, max_steps=500)
    warm, again = couple(mu, covariance, precision, start=first.x, tolerance=1e-10, max_steps=500)
    assert again.num_steps < 0.1 * first.num_steps
    torch.testing.assert_close(warm, cold, rtol=0, atol=1e-7)


def test_a_stack_read_backwards_gives_the_same_backwards():
    mu, covariance, precision = stack()
    turned = type(covariance)(
        covariance.spectrum, covariance.basis, covariance.std.flip(0), covariance.canvas
    )
    forwards = couple(mu, covariance, precision, **EXACT)[0]
    backwards = couple(mu.flip(0), turned, precision.flip(0), **EXACT)[0]
    torch.testing.assert_close(backwards.flip(0), forwards, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        difference_precision(mu.flip(0), turned, 0.3).flip(0),
        difference_precision(mu, covariance, 0.3),
    )


def test_bands_that_lie_between_slices_are_stacks_of_their_own():
    mu, covariance, precision = stack(6, 1)
    precision = precision[:4]

    def of(part):
        std = covariance.std[part::2]
        one = type(covariance)(covariance.spectrum, covariance.basis, std, covariance.canvas)
        return couple(mu[part::2], one, precision[part::2], **EXACT)[0]

    found = couple(mu, covariance, precision, stride=2, **EXACT)[0]
    for part in (0, 1):
        torch.testing.assert_close(found[part::2], of(part), rtol=0, atol=1e-10)


def test_the_precision_is_high_where_the_scene_is_still_and_low_where_it_moves():
    """Independent errors of variance s: mean d^2 is 2 s, and 2 s + 4 where a step went by."""
    s, side = 0.04, 64
    still = torch.zeros(2, 1, side, side, dtype=torch.float64)
    still[1, :, :, 32:] = 2.0
    mu = still + s**0.5 * normal(2, 1, side, side)
    W = difference_precision(mu, white_covariance(s, mu), 0.3)[0, 0]
    # Windows of 25 means scatter; on average no more is left than their scatter.
    assert 0.5 < float((1 / W[:, :28]).median()) * 0.3 / (LEAST * 2 * s) < 4.0
    moved = 0.3 / float(W[:, 36:].mean())
    assert abs(moved - 4.0) < 0.4
    twice = difference_precision(mu, white_covariance(s, mu), 0.6)[0, 0]
    torch.testing.assert_close(twice, 2 * W)


# In the chain

PRIOR = GaussianPrior((12, 10))
SIGMAS = power_sigmas(6, 1.0, 0.05, 3.0)
RUN = {"start": "noise", "local": False}


def restored(operator, y, sigma_y=0.1, **options):
    solver = make_solver("covprox", PRIOR.table(SIGMAS), {**RUN, **options})
    return solver(PRIOR.denoise, operator, y, GaussianNoise(sigma_y), SIGMAS, DRAWS)


def measured(num_slices, *, sigma_y=0.1):
    """One scene in every slice, each seen through a mask of its own, in noise of its own."""
    basis = normal(1, 1, 12, 10, stream=5)
    P = PRIOR.grid_power().sqrt()
    truth = PRIOR.mean + torch.fft.irfft2(torch.fft.rfft2(basis) * P, s=PRIOR.size)
    truth = truth.expand(num_slices, -1, -1, -1)
    mask = normal(num_slices, 1, 12, 10, stream=6) > 0.3
    operator = Mask(mask)
    noise = sigma_y * normal(num_slices, 1, 12, 10, stream=7)
    return truth, operator, operator.A(truth + noise)


def test_slices_of_one_scene_help_each_other():
    truth, operator, y = measured(8)
    alone = (restored(operator, y).x - truth).square().mean()
    jointly = (restored(operator, y, z_coupling=1.0).x - truth).square().mean()
    assert float(jointly) < 0.7 * float(alone)


def test_without_coupling_or_without_a_neighbour_no_bit_changes():
    _, operator, y = measured(4)
    plain = restored(operator, y)
    assert torch.equal(restored(operator, y, z_coupling=0.0).x, plain.x)
    single = Mask(operator.mask[:1])
    torch.testing.assert_close(
        restored(single, y[:1], z_coupling=1.0).x, restored(single, y[:1]).x, rtol=0, atol=0
    )
    pairs = restored(operator, y, z_coupling=1.0, z_stride=4)
    assert torch.equal(pairs.x, plain.x), "four bands of one slice are no stack"


def test_the_coupling_costs_no_call_of_network_or_operator():
    _, operator, y = measured(4)
    plain, jointly = restored(operator, y), restored(operator, y, z_coupling=1.0)
    assert jointly.num_denoiser_calls == plain.num_denoiser_calls
    assert jointly.num_operator_calls <= 1.5 * plain.num_operator_calls


def test_the_dual_goes_from_level_to_level(monkeypatch):
    _, operator, y = measured(4)
    starts = []

    def watched(*args, **options):
        starts.append(args[4])
        coupled, solved = couple(*args, **options)
        duals.append(solved.x)
        return coupled, solved

    duals: list = []
    monkeypatch.setattr(covprox, "couple", watched)
    restored(operator, y, z_coupling=1.0)
    assert starts[0] is None
    assert len(starts) == len(SIGMAS)
    assert all(start is dual for start, dual in zip(starts[1:], duals[:-1], strict=True))


def test_what_the_data_say_exactly_is_not_given_up_for_the_neighbours():
    rows = (torch.arange(12) % 3 == 0)[None, None, :, None].expand(3, 1, 12, 10).contiguous()
    operator = Fourier(rows, 1)
    y = operator.A(PRIOR.mean + 0.5 * normal(3, 1, 12, 10, stream=8))
    found = restored(operator, y, sigma_y=0.0, z_coupling=1.0, tolerance=1e-10)
    assert float(flat(operator.A(found.x) - y).abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"z_coupling": -1.0}, "z_coupling must be 0 or more"),
        ({"z_coupling": float("nan")}, "z_coupling must be 0 or more"),
        ({"z_inflation": 0.0}, "z_inflation more than 0"),
        ({"z_coupling": 1.0, "mode": "sample"}, "mean mode alone"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_solver("covprox", PRIOR.table(SIGMAS), options)
