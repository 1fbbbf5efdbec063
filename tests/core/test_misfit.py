"""The factor on Sigma that data tell of, against its formula with dense matrices."""

from dataclasses import replace

import pytest
import torch

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.posterior.gaussian import Covariance, white_covariance
from diffusion_core.posterior.misfit import WINDOW_RADIUS_PX, misfit_ratio


def normal(*shape, stream=0):
    return KeyedDraws(0, "misfit").normal(0, torch.empty(shape, dtype=torch.float64), stream)


def heard(R):
    """K r for A = 1, Sigma = 1 times a factor, and the noise R."""
    return lambda factor, r: factor / (factor + R) * r


def ratio_of(residual, foreseen, noise, R=0.0, *, is_local=True):
    """The ratio for A = 1 and Sigma = 1."""
    return misfit_ratio(
        heard(R),
        white_covariance(1.0, residual),
        residual,
        foreseen,
        noise,
        is_local=is_local,
    )


def test_the_form_is_that_of_the_score():
    h, w, m = 6, 5, 17
    spectrum = torch.exp(normal(1, 1, h, w, stream=1)[0])
    spectrum = torch.fft.rfft2(torch.fft.irfft2(spectrum[..., : w // 2 + 1], s=(h, w))).real
    spectrum = spectrum - spectrum.min() + 0.3
    std = torch.exp(0.5 * normal(2, 1, h, w, stream=2))
    covariance = Covariance(spectrum, torch.eye(1, dtype=torch.float64), std, (h, w))
    A, R = normal(m, h * w, stream=3), torch.linspace(0.5, 2.0, m, dtype=torch.float64)
    units = torch.eye(h * w, dtype=torch.float64).reshape(h * w, 1, 1, h, w)
    Sigma = torch.stack([covariance.apply(u.expand(2, 1, h, w)) for u in units], dim=1)
    Sigma = Sigma.reshape(2, h * w, h * w)
    residual, foreseen, noise = (normal(2, m, stream=k) for k in (4, 5, 6))

    def update(factor, r):
        scaled = factor[:, 0] * Sigma
        W = torch.linalg.inv(A @ scaled @ A.T + torch.diag(R))
        return (scaled @ A.T @ (W @ r[..., None])).reshape(2, 1, h, w)

    found = misfit_ratio(update, covariance, residual, foreseen, noise, is_local=False)
    for b in range(2):
        c = 1.0
        for _ in range(2):
            W = torch.linalg.inv(c * A @ Sigma[b] @ A.T + torch.diag(R))
            score = c**2 * W @ A @ Sigma[b] @ A.T @ W
            q, of_sigma, of_noise = (
                float(v[b] @ score @ v[b]) for v in (residual, foreseen, noise)
            )
            doubt = 10 * (of_sigma + of_noise) / of_sigma
            c = min(max((q - of_noise + doubt) / (of_sigma + doubt), 0.1), 20.0)
        assert float(found[b]) == pytest.approx(c, rel=1e-9)


def two_sided(width):
    """(residual, foreseen): exact data with the misfit 1 on the left, 9 on the right."""
    amplitude = torch.ones(width, dtype=torch.float64)
    amplitude[width // 2 :] = 3.0
    return normal(1, 2, 64, width) * amplitude, normal(1, 2, 64, width, stream=1)


def test_places_differ_where_it_is_local():
    residual, foreseen = two_sided(256)
    ratio = ratio_of(residual, foreseen, 0 * residual)
    assert ratio.shape == (1, 1, 64, 256)
    far = WINDOW_RADIUS_PX + 1
    assert float(ratio[..., : 128 - far].mean()) == pytest.approx(1.0, rel=0.1)
    assert float(ratio[..., 128 + far :].mean()) == pytest.approx(9.0, rel=0.1)
    whole = ratio_of(residual, foreseen, 0 * residual, is_local=False)
    assert whole.shape == (1, 1, 1, 1)
    assert float(whole) == pytest.approx(5.0, rel=0.1)


def test_a_tile_finds_what_the_whole_image_finds():
    residual, foreseen = two_sided(256)
    whole = ratio_of(residual, foreseen, 0 * residual)
    tile = ratio_of(residual[..., 48:208], foreseen[..., 48:208], 0 * residual[..., 48:208])
    inner = slice(48 + WINDOW_RADIUS_PX, 208 - WINDOW_RADIUS_PX)
    torch.testing.assert_close(tile[..., WINDOW_RADIUS_PX:-WINDOW_RADIUS_PX], whole[..., inner])


def test_without_evidence_it_is_1_and_it_is_bounded():
    residual, foreseen = two_sided(256)
    nothing = 0 * residual
    torch.testing.assert_close(
        ratio_of(nothing, nothing, nothing), torch.ones(1, 1, 64, 256, dtype=torch.float64)
    )
    # Nor do data tell that are far noisier than A e is large.
    noise = [100 * normal(1, 2, 64, 256, stream=k) for k in (2, 3)]
    drowned = ratio_of(noise[0] + foreseen, foreseen, noise[1], 1e4)
    assert 0.9 < float(drowned.min()) <= float(drowned.max()) < 1.1
    blind = ratio_of(noise[0], nothing, noise[1], 1e4)
    torch.testing.assert_close(blind, torch.ones_like(blind), rtol=1e-3, atol=0)
    assert float(ratio_of(100 * residual, foreseen, nothing).max()) == 20
    assert float(ratio_of(nothing, foreseen, nothing).min()) == pytest.approx(0.1)


def test_every_direction_counts_by_what_the_data_tell_of_it():
    # One pixel in 64 has 99% of the energy: alone it could not tell the factor.
    std = torch.ones(200, 1, 8, 8, dtype=torch.float64)
    std[..., 0, 0] = 80.0
    covariance = replace(white_covariance(1.0, std), std=std)
    residual, e, noise = (normal(200, 1, 8, 8, stream=k) for k in range(3))

    def update(factor, r):
        return factor * std**2 / (factor * std**2 + 0.01) * r

    residual, foreseen = 2.0 * std * residual + 0.1 * normal(200, 1, 8, 8, stream=3), std * e
    ratio = misfit_ratio(update, covariance, residual, foreseen, 0.1 * noise, is_local=False)
    # Two sums of 64 squares: their ratio has the standard deviation (2/64 + 2/64)^(1/2) of itself.
    assert float(ratio.log().std()) < 0.27
    energy = residual.square().sum(dim=(1, 2, 3)) / foreseen.square().sum(dim=(1, 2, 3))
    assert float(energy.log().std()) > 1.5


def test_elements_of_a_batch_are_apart():
    residual, foreseen, noise = (normal(3, 1, 40, 40, stream=k) for k in range(3))
    residual = residual * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)[:, None, None, None]
    for is_local in (True, False):
        together = ratio_of(residual, foreseen, noise, 1.0, is_local=is_local)
        for b in range(3):
            one = slice(b, b + 1)
            alone = ratio_of(residual[one], foreseen[one], noise[one], 1.0, is_local=is_local)
            torch.testing.assert_close(together[one], alone, rtol=1e-12, atol=0)
