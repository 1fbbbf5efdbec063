"""The covariance table: what it measures on priors that are known, and on any canvas."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from dense import GaussianPrior, level_covariance, matrix_of

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.posterior.covariance import (
    DEFAULT_SIGMAS,
    ENERGY_FLOOR,
    CovarianceTable,
    fit_covariance,
)
from diffusion_core.posterior.spectra import (
    fast_size,
    gradient_energy,
    interpolate,
    opponent_basis,
    radial_frequency,
    radial_spectrum,
    short_sighted,
)

SIGMAS = (0.05, 0.2, 0.8)


def draws_for(index):
    return KeyedDraws(0, f"image-{index}")


def gaussian_images(prior, sizes, count=1):
    """Draws of N(mean, P) on canvases of several sizes (the prior's spectrum on each)."""
    for index, size in enumerate(sizes):
        on_size = GaussianPrior(size, prior.channels, prior.mean)
        white = KeyedDraws(7, f"field-{index}").normal(
            0, torch.empty(count, prior.channels, *size, dtype=torch.float64)
        )
        modes = torch.fft.rfft2(white) * on_size.grid_power().sqrt()
        opponent = torch.fft.irfft2(modes, s=size)
        yield prior.mean + torch.einsum("kc,bkhw->bchw", opponent_basis(prior.channels), opponent)


def stationary_denoiser(channels):
    def denoise(x, sigma):
        return GaussianPrior(tuple(x.shape[-2:]), channels).denoise(x, sigma)

    return denoise


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_stationary_gaussian_prior_is_recovered(channels):
    prior = GaussianPrior((96, 80), channels)
    images = list(gaussian_images(prior, [(96, 80), (64, 128), (90, 100)], count=3))
    table = fit_covariance(stationary_denoiser(channels), images, draws_for, SIGMAS)
    torch.testing.assert_close(
        table.prior_mean, torch.full((channels,), 0.3).double(), rtol=0, atol=0.08
    )
    for sigma in SIGMAS:
        level = table.at(sigma)
        inner = (level.log_frequencies > np.log(0.03)) & (level.log_frequencies < np.log(0.6))
        P = prior.power(level.log_frequencies[inner])
        exact = P * sigma**2 / (P + sigma**2)
        # S is not constant by chance alone: 15% of scatter, no bias.
        ratio = level.log_spectrum[:, inner].exp() / exact
        assert float(ratio.log().abs().max()) < 0.35
        assert float(ratio.log().mean()) == pytest.approx(0.0, abs=0.05)
        assert float(level.log_variance.exp().mean()) == pytest.approx(1.0, abs=0.02)


def test_the_spectrum_serves_any_canvas():
    # One level, canvases of different size: the same correlation function, and variance.
    level = level_covariance((64, 64), 1, local=False)
    lags = []
    for size in ((64, 64), (128, 96), (65, 63)):
        covariance = level.on(torch.zeros(1, 1, *size, dtype=torch.float64))
        point = torch.zeros(1, 1, *size, dtype=torch.float64)
        point[..., 0, 0] = 1.0
        lags.append(covariance.apply(point)[0, 0, :4, :4])
    for other in lags[1:]:
        torch.testing.assert_close(other, lags[0], rtol=0.02, atol=1e-4)


def test_a_padded_canvas_does_not_wrap_round():
    level = level_covariance((32, 32), 1, local=False)
    mu = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    corner = torch.zeros_like(mu)
    corner[..., 0, 0] = 1.0
    wrapped, padded = (level.on(mu, 1.0, p).apply(corner) for p in (0, 32))
    assert float(wrapped[..., -1, 0]) > 0.5 * float(wrapped[..., 1, 0])
    assert float(padded[..., -1, 0]) < 0.01 * float(padded[..., 1, 0])


def test_sigma_is_symmetric_positive_and_has_its_root():
    level = level_covariance((8, 10), 3, local=True)
    mu = torch.linspace(-1, 1, 240, dtype=torch.float64).reshape(1, 3, 8, 10).sin()
    covariance = level.on(mu, 2.0, padding=5)
    Sigma = matrix_of(covariance.apply, (3, 8, 10))
    torch.testing.assert_close(Sigma, Sigma.T, rtol=1e-12, atol=1e-14)
    assert float(torch.linalg.eigvalsh(Sigma).min()) > 0
    H, W = covariance.canvas
    root = matrix_of(lambda xi: covariance.apply_root(xi, (8, 10)), (3, H, W))
    torch.testing.assert_close(root @ root.T, Sigma, rtol=1e-9, atol=1e-12)
    doubled = level.on(mu, 4.0, padding=5)
    torch.testing.assert_close(matrix_of(doubled.apply, (3, 8, 10)), 2.0 * Sigma)


def test_local_variance_is_found_at_edges():
    # A "denoiser" whose error is 5 times as large beside an edge as in the flat parts.
    size = (64, 64)
    clean = torch.zeros(12, 1, *size, dtype=torch.float64)
    clean[..., 32:] = 1.0
    near = ((torch.arange(64) - 31.5).abs() < 4).double().expand(1, 1, *size)
    std = 0.02 + 0.08 * near

    def denoise(x, sigma):
        error = KeyedDraws(3, "error").normal(0, x) * std
        return clean + torch.nn.functional.avg_pool2d(error, 3, 1, 1) * 3.0

    table = fit_covariance(denoise, [clean], draws_for, (0.1,))
    level = table.at(0.1)
    mu = denoise(clean, 0.1)
    S = level.local_std(mu).square().mean(dim=(0, 1, 2)).sqrt()
    assert float(S[31:33].mean() / S[:16].mean()) == pytest.approx(5.0, rel=0.15)
    # Sigma's diagonal is the variance of the residual, near and far.
    stationary = level.on(mu, local=False)
    diagonal = level.local_std(mu).square().mean(dim=(0, 1)) * stationary.spectrum.mean()
    for columns in (slice(31, 33), slice(2, 16)):
        expected = float(std[..., columns].square().mean())
        assert float(diagonal[2:-2, columns].mean()) == pytest.approx(expected, rel=0.2)


def test_levels_are_interpolated_in_log_sigma_and_held_beyond():
    table = GaussianPrior((16, 16)).table([0.1, 0.4])
    between = table.at(0.2)  # half way in log sigma
    expected = 0.5 * (table.log_spectrum[0] + table.log_spectrum[1])
    torch.testing.assert_close(between.log_spectrum, expected)
    torch.testing.assert_close(table.at(9.0).log_spectrum, table.log_spectrum[1])
    torch.testing.assert_close(table.at(0.001).log_spectrum, table.log_spectrum[0])


def test_a_table_survives_the_disk(tmp_path):
    images = [KeyedDraws(1, "disk").normal(0, torch.empty(1, 3, 32, 24))]
    table = fit_covariance(stationary_denoiser(3), images, draws_for, SIGMAS)
    table.save(tmp_path / "covariance-city.safetensors")
    loaded = CovarianceTable.load(tmp_path / "covariance-city.safetensors")
    measured = {name: value for name, value in vars(table).items() if name != "reach"}
    assert all(torch.equal(getattr(loaded, name), value) for name, value in measured.items())
    assert loaded.reach is None


def test_another_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a covariance table"):
        CovarianceTable.load(tmp_path / "other.safetensors")


def test_fitting_needs_images_and_increasing_levels():
    with pytest.raises(ValueError, match="at least one image"):
        fit_covariance(stationary_denoiser(1), [])
    with pytest.raises(ValueError, match="increasing"):
        fit_covariance(stationary_denoiser(1), [torch.zeros(1, 1, 32, 32)], draws_for, (0.2, 0.1))
    assert len(DEFAULT_SIGMAS) == 14


def test_flat_images_give_a_usable_table():
    table = fit_covariance(lambda x, s: torch.zeros_like(x), [torch.zeros(1, 1, 32, 32)])
    for value in vars(table).values():
        assert value is None or bool(torch.isfinite(value).all())
    assert bool((table.log_energy.diff(dim=1) > 0).all())


def test_white_noise_has_a_flat_spectrum():
    knots = torch.linspace(np.log(0.01), np.log(0.7), 12, dtype=torch.float64)
    fields = [
        0.3 * KeyedDraws(i, "white").normal(0, torch.empty(16, 3, *size))
        for i, size in enumerate([(64, 80), (51, 33)])
    ]
    spectrum = radial_spectrum(fields, opponent_basis(3), knots)
    torch.testing.assert_close(
        spectrum[:, 3:], torch.full((3, 9), 0.09).double(), rtol=0.15, atol=0
    )


def test_opponent_channels_are_orthonormal_with_luminance_first():
    basis = opponent_basis(3)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    assert basis[0].tolist() == pytest.approx([3**-0.5] * 3)
    assert torch.equal(opponent_basis(2), torch.eye(2, dtype=torch.float64))


def test_gradient_energy_of_a_ramp_is_its_slope_squared():
    ramp = 0.1 * torch.arange(40, dtype=torch.float64).expand(1, 1, 30, 40)
    energy = gradient_energy(ramp + 0.2 * torch.arange(30, dtype=torch.float64)[:, None])
    torch.testing.assert_close(
        energy[..., 12:-12, 12:-12], torch.full((1, 1, 6, 16), 0.05).double()
    )


def test_interpolation_agrees_with_numpy():
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    knots, values = torch.tensor([-1.0, 0.0, 0.7, 2.0]), torch.tensor([[1.0, 3.0, -1.0, 5.0]])
    expected = np.interp(x.numpy(), knots.numpy(), values[0].numpy())
    got = interpolate(x, knots.double(), values.double())[0]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_radial_frequency_is_that_of_numpy():
    expected = np.hypot(np.fft.fftfreq(7)[:, None], np.fft.rfftfreq(10)[None])
    np.testing.assert_allclose(radial_frequency(7, 10), expected, rtol=1e-12)


@pytest.mark.parametrize(("size", "fast"), [(1, 2), (7, 8), (233, 240), (512, 512), (541, 576)])
def test_fast_sizes_have_small_factors(size, fast):
    assert fast_size(size) == fast


SIDE, REACH = 48, 10


def steep_spectrum():
    """f^-2.6, as of images: C^-1 has a tail of some power, and screens nothing for good."""
    f = radial_frequency(SIDE, SIDE).clamp_min(1.0 / 64.0)
    return (1e-4 * f**-2.6)[None]


def filled_hole(spectrum, known):
    """E[x | x outside a 6 x 6 hole in the middle], from the blocks of C^-1 themselves."""
    kernel = torch.fft.irfft2(1.0 / spectrum, s=(SIDE, SIDE))[0]
    rows, columns = (
        part.flatten() for part in torch.meshgrid(*2 * [torch.arange(SIDE)], indexing="ij")
    )
    precision = kernel[
        (rows[:, None] - rows) % SIDE,
        (columns[:, None] - columns) % SIDE,
    ]
    hole = ((rows - 24).abs() < 3) & ((columns - 24).abs() < 3)
    right = precision[hole][:, ~hole] @ known.flatten()[~hole]
    return -torch.linalg.solve(precision[hole][:, hole], right)


def test_a_short_sighted_covariance_sees_nothing_beyond_its_reach():
    near = KeyedDraws(0, "near").normal(0, torch.empty(1, 1, SIDE, SIDE, dtype=torch.float64))[0, 0]
    far = near.clone()
    outside = (torch.arange(SIDE) - 24).abs() > 3 + REACH
    far[outside[:, None] | outside] += 5.0
    tapered = short_sighted(steep_spectrum(), REACH, SIDE)
    for spectrum, moved in ((tapered, False), (steep_spectrum(), True)):
        change = (filled_hole(spectrum, near) - filled_hole(spectrum, far)).abs().max()
        assert (change > 1e-2) == moved
        assert moved or change < 1e-9


def test_a_short_sighted_covariance_keeps_the_fine_scales_and_is_positive():
    spectrum = steep_spectrum()
    tapered = short_sighted(spectrum, REACH, SIDE)
    assert tapered.min() > 0
    assert tapered.max() <= spectrum.max() * (1 + 1e-12)
    fine = radial_frequency(SIDE, SIDE) > 2.0 / REACH
    assert (tapered / spectrum)[0, fine].log().abs().max() < 0.3
    # A taper without end changes nothing.
    torch.testing.assert_close(short_sighted(spectrum, 10**7, SIDE), spectrum, rtol=1e-4, atol=0.0)


def test_a_table_passes_its_reach_on_to_every_level_and_to_the_prior():
    table = replace(GaussianPrior((16, 16)).table([0.1, 0.4]), reach=6)
    for level in (table.at(0.2), table.prior()):
        plain = replace(level, reach=None).spectrum(16, 18)
        torch.testing.assert_close(level.spectrum(16, 18), short_sighted(plain, 6, 18))
        assert not torch.allclose(level.spectrum(16, 18), plain)
        mu = torch.zeros(1, 1, 16, 18)
        assert level.on(mu).canvas == (16, 18)
        assert level.on(mu, padding=2).canvas == (30, 30), "opposite borders are 12 apart"


@pytest.mark.parametrize(("channels", "image"), [(1, 3), (3, 1), (2, 1)])
def test_images_of_other_channels_are_refused(channels, image):
    table = GaussianPrior((8, 8), channels).table([0.1])
    mu = torch.zeros(1, image, 8, 8)
    for ask in (lambda: table.at(0.1).on(mu), lambda: table.mean_like(mu)):
        with pytest.raises(ValueError, match=f"of {channels} channels does not fit images of"):
            ask()


def test_knots_that_meet_in_single_precision_still_interpolate():
    # Flat images: several bins at one energy, apart by less than float32 tells.
    level = level_covariance((8, 8), 1, local=True)
    flat = float(np.log(ENERGY_FLOOR))
    knots = flat + 1e-7 * torch.arange(5, dtype=torch.float64)
    mended = replace(level, log_energy=knots)
    mu = torch.zeros(1, 1, 8, 8)
    S = mended.local_std(mu)
    assert bool(S.isfinite().all())
    torch.testing.assert_close(S.double(), mended.local_std(mu.double()), rtol=1e-6, atol=0)
