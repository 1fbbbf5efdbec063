"""DiffPIR and DDS against re-implementations in dense algebra, written from the papers."""

import numpy as np
import pytest
import torch
from dense import GaussianPrior, flat, matrix_of

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import Blur, Fourier, Mask, Pool
from diffusion_core.posterior import make_solver

SIZE = (12, 10)
SIGMAS = power_sigmas(6, 0.7, 0.05, 3.0)
DRAWS = KeyedDraws(0, "baseline-solvers")


def normal(*shape, stream=0):
    return DRAWS.normal(0, torch.empty(shape, dtype=torch.float64), stream)


def lines():
    return (torch.arange(SIZE[0]) % 3 == 0)[None, None, :, None].expand(1, 1, *SIZE).contiguous()


class Dense:
    def __init__(self):
        self.matrix = normal(40, SIZE[0] * SIZE[1], stream=3) / 5.0

    def A(self, x):
        return x.flatten(1) @ self.matrix.T

    def A_adjoint(self, y):
        return (y @ self.matrix).reshape(-1, 1, *SIZE)


OPERATORS = {
    "mask": (lambda: Mask(normal(1, 1, *SIZE, stream=9) > 0.2), 3),
    "blur": (lambda: Blur(torch.full((3, 3), 1.0 / 9.0, dtype=torch.float64), SIZE), 1),
    "pool": (lambda: Pool(2), 1),
    "fourier": (lambda: Fourier(lines(), 1), 1),
    "dense": (Dense, 1),
}


def setting(name, sigma_y):
    """Operator, prior, data (two slices), and A and y as numpy arrays."""
    make, channels = OPERATORS[name]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    truth = prior.mean + 0.4 * normal(2, channels, *SIZE, stream=1)
    y = operator.A(truth + sigma_y * normal(2, channels, *SIZE, stream=2))
    return operator, prior, y, matrix_of(operator.A, truth.shape[1:]).numpy(), flat(y).numpy()


def eps(level, prior):
    return DRAWS.normal(level, torch.empty(2, prior.channels, *SIZE, dtype=torch.float64))


def denoised(prior, x, sigma):
    shaped = torch.from_numpy(x).reshape(2, prior.channels, *SIZE)
    return prior.denoise(shaped, torch.full((2,), sigma, dtype=torch.float64)).flatten(1).numpy()


@pytest.mark.parametrize(("lam", "zeta"), [(1.0, 0.5), (0.3, 1.0), (7.0, 0.0)])
@pytest.mark.parametrize("name", OPERATORS)
def test_diffpir_is_algorithm_1_of_zhu_et_al(name, lam, zeta):
    sigma_y = 0.1
    operator, prior, y, A, y_flat = setting(name, sigma_y)
    options = {"lam": lam, "zeta": zeta, "start": "adjoint", "tolerance": 1e-12, "max_steps": 999}
    solver = make_solver("diffpir", None, options)
    got = solver(prior.denoise, operator, y, GaussianNoise(sigma_y), SIGMAS, DRAWS)

    levels = SIGMAS.tolist()
    x = y_flat @ A + levels[0] * eps(0, prior).flatten(1).numpy()
    for i, sigma in enumerate(levels):
        z = denoised(prior, x, sigma)
        rho = lam * sigma_y**2 / sigma**2
        normal_matrix = A.T @ A + rho * np.eye(A.shape[1])
        x0 = np.linalg.solve(normal_matrix, A.T @ y_flat.T + rho * z.T).T
        if i + 1 < len(levels):
            eps_hat = (x - x0) / sigma
            fresh = eps(i + 1, prior).flatten(1).numpy()
            x = x0 + levels[i + 1] * (np.sqrt(1 - zeta) * eps_hat + np.sqrt(zeta) * fresh)
    np.testing.assert_allclose(got.x.flatten(1), x0, rtol=1e-5, atol=1e-8)
    assert got.num_denoiser_calls == len(levels)


def textbook_cg(matrix, b, num_steps):
    """Hestenes and Stiefel 1952, from zero."""
    x, r = np.zeros_like(b), b.copy()
    p = r.copy()
    for _ in range(num_steps):
        Ap = matrix @ p
        alpha = (r @ r) / (p @ Ap)
        x = x + alpha * p
        r_next = r - alpha * Ap
        p = r_next + (r_next @ r_next) / (r @ r) * p
        r = r_next
    return x


@pytest.mark.parametrize(("gamma", "eta"), [(0.02, 0.85), (0.5, 0.0), (0.02, 1.0)])
@pytest.mark.parametrize("name", OPERATORS)
def test_dds_is_algorithm_3_of_chung_et_al(name, gamma, eta):
    sigma_y, num_steps = 0.1, 4
    operator, prior, y, A, y_flat = setting(name, sigma_y)
    options = {"gamma": gamma, "eta": eta, "num_cg_steps": num_steps, "start": "adjoint"}
    solver = make_solver("dds", None, options)
    got = solver(prior.denoise, operator, y, GaussianNoise(sigma_y), SIGMAS, DRAWS)

    levels = SIGMAS.tolist()
    normal_matrix = np.eye(A.shape[1]) / gamma + A.T @ A / sigma_y**2
    x = y_flat @ A + levels[0] * eps(0, prior).flatten(1).numpy()
    for i, sigma in enumerate(levels):
        mu = denoised(prior, x, sigma)
        rhs = mu / gamma + y_flat @ A / sigma_y**2
        corrections = [
            textbook_cg(normal_matrix, b - normal_matrix @ m, num_steps)
            for b, m in zip(rhs, mu, strict=True)
        ]
        x0 = mu + np.stack(corrections)
        if i + 1 < len(levels):
            eps_hat = (x - mu) / sigma
            # DDPM's posterior std of x' given x and x0, for variance-exploding noise.
            beta = levels[i + 1] * np.sqrt(1 - levels[i + 1] ** 2 / sigma**2)
            deterministic = np.sqrt(levels[i + 1] ** 2 - eta**2 * beta**2)
            fresh = eps(i + 1, prior).flatten(1).numpy()
            x = x0 + deterministic * eps_hat + eta * beta * fresh
    np.testing.assert_allclose(got.x.flatten(1), x0, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["mask", "pool", "dense"])
def test_exact_data_are_met(name):
    operator, prior, y, _, _ = setting(name, 0.0)
    for solver, options in (
        ("diffpir", {"tolerance": 1e-12, "max_steps": 999}),
        ("dds", {"num_cg_steps": 200}),
    ):
        made = make_solver(solver, None, options)
        got = made(prior.denoise, operator, y, GaussianNoise(0.0), SIGMAS, DRAWS)
        torch.testing.assert_close(
            operator.A(got.x), operator.A(operator.A_adjoint(y) * 0) + y, rtol=0, atol=1e-5
        )


def test_the_start_is_kriging_where_there_is_a_table():
    operator, prior, y, _, _ = setting("blur", 0.1)
    table = prior.table(SIGMAS)
    for solver in ("diffpir", "dds"):
        run = [
            make_solver(solver, p, {"start": s})(
                prior.denoise, operator, y, GaussianNoise(0.1), SIGMAS, DRAWS
            ).x
            for p, s in (
                (table, "kriging"),
                (None, "kriging"),
                (table, "scaled-adjoint"),
                (None, "noise"),
            )
        ]
        assert not torch.equal(run[0], run[1])
        assert torch.equal(run[1], run[2])
        assert not torch.equal(run[2], run[3])
