"""DDRM and DDNM+ against their own law, direction by direction, on priors diagonal in V."""

import numpy as np
import pytest
import torch
from dense import GaussianPrior, flat
from solver_kit import OPERATORS, SIZE, Dense, WhitePrior, normal, run

from diffusion_core.noise.likelihood import GaussianNoise, PoissonTransmission
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import Fourier, Mask, Pool
from diffusion_core.protocols import HasSpectralForm, UnsuitedError

SPECTRAL = [name for name in OPERATORS if name != "dense"]
SIGMA_Y = 0.3
SIGMAS = power_sigmas(6, 4.0, 0.1, 3.0)


def relative(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", [*SPECTRAL, "fourier-uneven", "pool-one"])
def test_the_spectral_form_is_a_singular_value_decomposition(name):
    uneven = Fourier(normal(1, 1, *SIZE, stream=9) > 0.3, 1)
    extra = {"fourier-uneven": (lambda: uneven, 1), "pool-one": (lambda: Pool(1), 1)}
    make, channels = (OPERATORS | extra)[name]
    operator, x = make(), normal(2, channels, *SIZE)
    assert isinstance(operator, HasSpectralForm)
    form = operator.spectral_form(x)
    z, Ax, s = form.coefficients(x), operator.A(x), form.singular_values
    y = Ax + operator.A(normal(2, channels, *SIZE, stream=1)) + 0.3 * torch.ones_like(Ax)
    assert relative(form.image(z), x) < 1e-12  # V V' = I
    assert relative(form.image(s * z), form.image(s * form.coefficients(form.image(z)))) < 1e-12
    assert relative(s * form.data(Ax), s**2 * z) < 1e-12  # U' A = S V'
    assert relative(form.image(s * form.data(y)), operator.A_adjoint(y)) < 1e-12  # A' = V S U'
    assert relative(form.image(s**2 * z), operator.A_adjoint(Ax)) < 1e-12


@pytest.mark.parametrize("name", SPECTRAL)
def test_white_noise_has_variance_one_in_every_direction(name):
    make, channels = OPERATORS[name]
    noise = normal(400, channels, *SIZE, stream=7)
    z = make().spectral_form(noise).coefficients(noise)
    parts = 2 if name == "fourier-complex" else 1  # a complex image is white in both parts
    spread = z.abs().square().mean(dim=0) / parts
    assert float((spread - 1.0).abs().max()) < 6 * np.sqrt(2 / 400)
    assert float(spread.mean()) == pytest.approx(1.0, abs=0.02)


def problem(name, sigma_y=SIGMA_Y):
    """Operator, prior, y, and per direction: s, prior variance P, prior mean, U' y / s."""
    make, channels = OPERATORS[name]
    operator = make()
    truth = 0.3 + 0.5 * normal(1, channels, *SIZE, stream=1)
    noise = normal(1, channels, *SIZE, stream=2)
    Ax = operator.A(truth)
    y = Ax + sigma_y * operator.A(noise)
    form = operator.spectral_form(truth)
    in_fourier = name in {"blur", "fourier", "fourier-complex"}
    prior = GaussianPrior(SIZE, channels) if in_fourier else WhitePrior()
    mean = form.coefficients(torch.full_like(truth, prior.mean))
    s = form.singular_values.expand(mean.shape).double()
    P = torch.full(mean.shape, 0.25, dtype=torch.float64)
    if in_fourier:
        half = prior.grid_power()[0]
        full = torch.fft.fft2(torch.fft.irfft2(half, s=SIZE)).real
        P = (half if name == "blur" else full).expand(mean.shape)
    y_bar = torch.where(s > 0, form.data(y) / s.clamp_min(1e-12), 0.0)
    return operator, prior, y, form, s, P, mean, y_bar


def ddrm_law(s, P, mean, y_bar, levels, sigma_y, eta, eta_b):
    """Mean and variance of the chain, from Equations 7 and 8 of Kawar et al. by hand."""
    tau = np.where(s > 0, sigma_y / np.maximum(s, 1e-12), np.inf)
    used = tau <= levels[0]
    m = np.where(used, y_bar, 0.0)
    v = np.where(used, levels[0] ** 2 - np.minimum(tau, levels[0]) ** 2, levels[0] ** 2)
    for sigma, after in zip(levels, [*levels[1:], 0.0], strict=True):
        g = P / (P + sigma**2)
        k = np.sqrt(1 - eta**2) * after / np.where(np.isinf(tau), sigma, np.maximum(tau, 1e-12))
        blind = np.isinf(tau)
        noisier = ~blind & (after < tau)
        cleaner = ~blind & ~noisier
        D = g * m + (1 - g) * mean
        new_m = np.where(blind, D + k * (m - D), D + k * (y_bar - D))
        slope = np.where(blind, (1 - k) * g + k, (1 - k) * g)
        added = np.full(v.shape, (eta * after) ** 2)
        new_m = np.where(cleaner, D + eta_b * (y_bar - D), new_m)
        slope = np.where(cleaner, (1 - eta_b) * g, slope)
        added = np.where(cleaner, after**2 - (eta_b * np.where(cleaner, tau, 0.0)) ** 2, added)
        m, v = new_m, slope**2 * v + added
    return m, v


def ddnm_law(s, P, mean, y_bar, levels, sigma_y):
    """The same of DDNM+, Equations 17 to 19 of Wang et al. in the variance-exploding scale."""
    tau = np.where(s > 0, sigma_y / np.maximum(s, 1e-12), np.inf)
    m, v = np.zeros_like(y_bar), np.full(P.shape, levels[0] ** 2)
    for sigma, after in zip(levels, [*levels[1:], 0.0], strict=True):
        g, a = P / (P + sigma**2), 1 - after**2 / sigma**2
        q = after**2 * a
        with np.errstate(divide="ignore", invalid="ignore"):
            lam = np.where(q >= (a * tau) ** 2, 1.0, np.sqrt(q) / (a * tau))
            phi = np.where(q >= (a * tau) ** 2, q - (a * tau) ** 2, 0.0)
        lam, phi = np.where(np.isinf(tau), 0.0, lam), np.where(np.isinf(tau), q, phi)
        x0 = (1 - lam) * (g * m + (1 - g) * mean) + lam * y_bar
        m, v = a * x0 + (1 - a) * m, (a * (1 - lam) * g + 1 - a) ** 2 * v + phi
    return m, v


ONE_LEVEL = torch.tensor([0.8], dtype=torch.float64)  # what the first draw is shows here alone
CASES = [
    ("ddrm", {"eta": 0.85, "eta_b": 1.0}, SIGMAS),
    ("ddrm", {"eta": 0.4, "eta_b": 0.6}, SIGMAS),
    ("ddrm", {"eta": 0.85, "eta_b": 1.0}, ONE_LEVEL),
    ("ddnm", {}, SIGMAS),
]


@pytest.mark.parametrize(("solver", "options", "sigmas"), CASES)
@pytest.mark.parametrize("name", SPECTRAL)
def test_each_direction_has_the_mean_and_variance_of_the_algorithm(name, solver, options, sigmas):
    batch, levels = 300, sigmas.tolist()
    operator, prior, y, form, s, P, mean, y_bar = problem(name)
    y = y.expand(batch, *y.shape[1:])
    law = ddrm_law if solver == "ddrm" else ddnm_law
    arrays = [t.numpy() for t in (s, P, mean, y_bar)]
    expected_mean, expected_variance = law(*arrays, levels, SIGMA_Y, **options)
    got = run(solver, prior.denoise, operator, y, GaussianNoise(SIGMA_Y), sigmas, **options)
    z = form.coefficients(got.x).numpy()
    drift = np.abs(z.mean(axis=0) - expected_mean[0])
    spread = np.sqrt(expected_variance[0])
    assert np.all(drift <= 5 * spread / np.sqrt(batch) + 1e-9)
    parts = 2 if name == "fourier-complex" else 1
    variance = (np.abs(z - expected_mean) ** 2).mean(axis=0) / parts
    seen = expected_variance[0] > 1e-12
    assert np.all(variance[~seen] < 1e-10)
    ratio = variance[seen] / expected_variance[0][seen]
    assert ratio.mean() == pytest.approx(1.0, abs=4 * np.sqrt(2 / (batch * ratio.size)) + 0.01)
    assert np.abs(ratio - 1).max() < 6 * np.sqrt(2 / batch)
    assert got.num_denoiser_calls == len(levels)


def test_the_law_is_not_met_by_another_eta():
    arrays = [t.numpy() for t in problem("blur")[4:]]
    one, other = (ddrm_law(*arrays, SIGMAS.tolist(), SIGMA_Y, e, 1.0)[1] for e in (0.85, 0.6))
    assert np.abs(other.mean() / one.mean() - 1) > 0.2


@pytest.mark.parametrize("solver", ["ddrm", "ddnm"])
@pytest.mark.parametrize("name", ["identity", "mask", "pool", "fourier", "fourier-complex"])
def test_exact_data_are_met(name, solver):
    operator, prior, y, *_ = problem(name, sigma_y=0.0)
    got = run(solver, prior.denoise, operator, y, GaussianNoise(0.0), SIGMAS)
    torch.testing.assert_close(operator.A(got.x), y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", ["ddrm", "ddnm"])
def test_what_does_not_suit_is_refused_in_a_sentence(solver):
    prior, noise = WhitePrior(), GaussianNoise(0.1)
    dense = Dense()
    y = dense.A(normal(1, 1, *SIZE))
    with pytest.raises(UnsuitedError, match=r"needs the singular values.*Dense"):
        run(solver, prior.denoise, dense, y, noise, SIGMAS)
    mask = Mask(torch.ones(1, 1, *SIZE, dtype=torch.bool))
    image = normal(1, 1, *SIZE).abs()
    with pytest.raises(UnsuitedError, match="the same noise on every datum"):
        run(solver, prior.denoise, mask, image, PoissonTransmission(1e3), SIGMAS)


def test_each_element_may_have_its_own_noise_level():
    operator, prior, y, *_ = problem("mask")
    y, levels = y.expand(2, -1, -1, -1), torch.tensor([0.05, 0.5], dtype=torch.float64)
    both = run("ddrm", prior.denoise, operator, y, GaussianNoise(levels), SIGMAS).x
    first = run("ddrm", prior.denoise, operator, y[:1], GaussianNoise(0.05), SIGMAS).x
    torch.testing.assert_close(both[:1], first)
    second = run("ddrm", prior.denoise, operator, y, GaussianNoise(0.5), SIGMAS).x[1:]
    torch.testing.assert_close(both[1:], second)


def test_float32_agrees_with_float64_though_the_blur_hides_frequencies():
    operator, prior, y, *_ = problem("blur")
    noise = GaussianNoise(SIGMA_Y)
    double = run("ddrm", prior.denoise, operator, y, noise, SIGMAS).x
    single = run("ddrm", prior.denoise, operator, y.float(), noise, SIGMAS).x
    assert single.dtype == torch.float32
    torch.testing.assert_close(flat(single.double()), flat(double), rtol=0, atol=1e-4)
