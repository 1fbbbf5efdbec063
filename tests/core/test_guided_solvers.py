"""PiGDM, DPS and RED-diff against re-implementations in dense algebra, written from the papers."""

import numpy as np
import pytest
import torch
from dense import GaussianPrior, flat, matrix_of
from solver_kit import DRAWS, OPERATORS, SIZE, WhitePrior, normal, run

from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.schedules import power_sigmas

SIGMA_Y = 0.1
SIGMAS = power_sigmas(6, 0.9, 0.05, 3.0)
NAMES = ["mask", "blur", "pool", "fourier", "dense"]
# The test's own R has one value for both parts of a complex datum, so Fourier data are alike.
CASES = [(n, varying) for n in NAMES for varying in (False, True) if n != "fourier" or not varying]


class VaryingNoise:
    """R differs from datum to datum and follows the estimate, as Poisson noise does."""

    def variance(self, Ax):
        return 0.01 * (1.5 + torch.tanh(Ax.real if Ax.is_complex() else Ax))


def setting(name, batch=2):
    make, channels = OPERATORS[name]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    truth = prior.mean + 0.4 * normal(batch, channels, *SIZE, stream=1)
    y = operator.A(truth + SIGMA_Y * normal(batch, channels, *SIZE, stream=2))
    A = matrix_of(operator.A, truth.shape[1:]).numpy()
    eye = torch.eye(A.shape[1], dtype=torch.float64).reshape(-1, *truth.shape[1:])

    def jacobian(sigma):
        """dD/dx: D is affine."""
        level = torch.full((len(eye),), sigma, dtype=torch.float64)
        offset = prior.denoise(torch.zeros_like(eye), level)
        return (prior.denoise(eye, level) - offset).flatten(1).numpy().T

    def D(x, sigma):
        shaped = torch.from_numpy(x).reshape(batch, channels, *SIZE)
        level = torch.full((batch,), sigma, dtype=torch.float64)
        return prior.denoise(shaped, level).flatten(1).numpy()

    def eps(level):
        like = torch.empty(batch, channels, *SIZE, dtype=torch.float64)
        return DRAWS.normal(level, like).flatten(1).numpy()

    return operator, prior, y, A, flat(y).numpy(), D, jacobian, eps


@pytest.mark.parametrize(("adaptive", "eta"), [(True, 1.0), (False, 0.3)])
@pytest.mark.parametrize(("name", "varying"), CASES)
def test_pigdm_is_algorithm_1_of_song_et_al(name, adaptive, eta, varying):
    operator, prior, y, A, y_flat, D, jacobian, eps = setting(name)
    noise = VaryingNoise() if varying else GaussianNoise(SIGMA_Y)
    options = {"adaptive": adaptive, "eta": eta, "sigma_data": 0.4, "tolerance": 1e-12}
    got = run("pigdm", prior.denoise, operator, y, noise, SIGMAS, **options, max_steps=999)

    levels = SIGMAS.tolist()
    x = levels[0] * eps(0)
    for i, sigma in enumerate(levels):
        mu, J = D(x, sigma), jacobian(sigma)
        r2 = sigma**2 * 0.4**2 / (sigma**2 + 0.4**2)
        R = noise.variance(torch.from_numpy(mu @ A.T)).expand(2, len(A)).numpy()
        inverse = [np.linalg.inv(r2 * A @ A.T + np.diag(row)) for row in R]
        pairs = zip(inverse, y_flat - mu @ A.T, strict=True)
        gradient = np.stack([J.T @ A.T @ G @ residual for G, residual in pairs])
        x0 = mu + (r2 if adaptive else sigma**2) * gradient
        if i + 1 < len(levels):
            c1 = eta * levels[i + 1] * np.sqrt(1 - levels[i + 1] ** 2 / sigma**2)
            c2 = np.sqrt(levels[i + 1] ** 2 - c1**2)
            x = x0 + c1 * eps(i + 1) + c2 * (x - mu) / sigma
    np.testing.assert_allclose(flat(got.x), x0, rtol=1e-5, atol=1e-8)
    assert got.num_denoiser_calls == 3 * len(levels)


def test_pigdm_with_tweedies_weight_is_the_posterior_mean_of_white_images():
    make, channels = OPERATORS["mask"]
    operator, prior = make(), WhitePrior()
    y = operator.A(prior.mean + 0.5 * normal(1, channels, *SIZE, stream=1))
    # One level: x0 = E[x0 | x, y], where x is the first noise.
    sigma = 0.8
    got = run(
        "pigdm",
        prior.denoise,
        operator,
        y,
        GaussianNoise(SIGMA_Y),
        torch.tensor([sigma]),
        adaptive=False,
    )
    x = sigma * DRAWS.normal(0, got.x)
    seen = operator.mask.double()
    precision = 1 / 0.25 + 1 / sigma**2 + seen / SIGMA_Y**2
    expected = (prior.mean / 0.25 + x / sigma**2 + seen * y / SIGMA_Y**2) / precision
    torch.testing.assert_close(got.x, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "varying"), CASES)
def test_dps_is_algorithm_1_of_chung_et_al(name, varying):
    operator, prior, y, A, y_flat, D, jacobian, eps = setting(name)
    noise = VaryingNoise() if varying else GaussianNoise(SIGMA_Y)
    zeta = 0.7
    got = run("dps", prior.denoise, operator, y, noise, SIGMAS, zeta=zeta)

    # As the paper has it: x_t = sqrt(alpha_bar) (x0 + sigma eps), alpha_bar = 1 / (1 + sigma^2).
    levels = [*SIGMAS.tolist(), 0.0]
    alpha_bars = [1 / (1 + s**2) for s in levels]
    x_t = np.sqrt(alpha_bars[0]) * levels[0] * eps(0)
    for i, sigma in enumerate(levels[:-1]):
        before, after = alpha_bars[i], alpha_bars[i + 1]
        x = x_t / np.sqrt(before)
        mu = D(x, sigma)
        J_t = jacobian(sigma) / np.sqrt(before)
        alpha, beta = before / after, 1 - before / after
        mean = np.sqrt(alpha) * (1 - after) / (1 - before) * x_t
        mean = mean + np.sqrt(after) * beta / (1 - before) * mu
        std = np.sqrt(beta * (1 - after) / (1 - before))
        R = noise.variance(torch.from_numpy(mu @ A.T)).expand(2, len(A)).numpy()
        W = R.mean(axis=1, keepdims=True) / R
        r = y_flat - mu @ A.T
        norm = np.sqrt((W * r**2).sum(axis=1, keepdims=True))
        squared_gradient = -2 * (W * r) @ A @ J_t
        x_t = mean + std * eps(i + 1) - zeta / norm * squared_gradient
    np.testing.assert_allclose(flat(got.x), x_t, rtol=1e-5, atol=1e-8)
    assert got.num_denoiser_calls == 3 * (len(levels) - 1)


@pytest.mark.parametrize(("name", "varying"), CASES)
def test_red_diff_is_adam_on_its_loss(name, varying):
    operator, prior, y, A, y_flat, D, _, eps = setting(name)
    noise = VaryingNoise() if varying else GaussianNoise(SIGMA_Y)
    options = {"lam": 0.4, "learning_rate": 0.05, "beta1": 0.8, "beta2": 0.95}
    got = run("red-diff", prior.denoise, operator, y, noise, SIGMAS, **options)

    v = np.zeros((2, A.shape[1]))
    shaped = torch.nn.Parameter(torch.from_numpy(v.copy()))
    adam = torch.optim.Adam([shaped], lr=0.05, betas=(0.8, 0.95), eps=1e-8)
    A_t, y_t = torch.from_numpy(A), torch.from_numpy(y_flat)
    for i, sigma in enumerate(SIGMAS.tolist()):
        v = shaped.detach().numpy()
        eps_hat = (v + sigma * eps(i) - D(v + sigma * eps(i), sigma)) / sigma
        R = noise.variance(shaped.detach() @ A_t.T).expand(2, len(A))
        W = R.mean(dim=1, keepdim=True) / R
        misfit = 0.5 * (W * (y_t - shaped @ A_t.T) ** 2).sum()
        pull = torch.from_numpy(eps_hat - eps(i))
        loss = misfit + 0.4 * sigma * (pull * shaped).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    np.testing.assert_allclose(flat(got.x), shaped.detach(), rtol=1e-5, atol=1e-8)
    assert got.num_denoiser_calls == len(SIGMAS)


def test_red_diff_settles_where_misfit_and_denoiser_balance():
    operator, prior, y, A, y_flat, _, jacobian, _ = setting("dense")

    class Silent:
        def normal(self, level, like, stream=0):
            return torch.zeros_like(like)

    # Without noise the pull is lam (I - J) (v - mean): a linear system.
    sigmas = torch.linspace(0.5001, 0.5, 1500, dtype=torch.float64)
    options = {"lam": 2.0, "learning_rate": 0.005}
    got = run(
        "red-diff", prior.denoise, operator, y, GaussianNoise(0.1), sigmas, Silent(), **options
    )
    Q = 2.0 * (np.eye(A.shape[1]) - jacobian(0.5))
    rhs = y_flat @ A + prior.mean * Q.sum(axis=1)
    expected = np.linalg.solve(A.T @ A + Q, rhs.T).T
    np.testing.assert_allclose(flat(got.x), expected, rtol=0, atol=5e-3)
    # ... and that is not where it started.
    assert np.abs(expected).max() > 0.3
