"""The factor on Sigma that data tell of, against its formula with dense matrices."""

from dataclasses import replace

import pytest
import torch

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.posterior.gaussian import Covariance, white_covariance
from diffusion_core.posterior.misfit import WINDOW_RADIUS_PX, misfit_by_place, misfit_of_image


def normal(*shape, stream=0):
    return KeyedDraws(0, "misfit").normal(0, torch.empty(shape, dtype=torch.float64), stream)


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

    found = misfit_of_image(update, covariance, residual, foreseen, noise)
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


def test_every_direction_counts_by_what_the_data_tell_of_it():
    # One pixel in 64 has 99% of the energy: alone it could not tell the factor.
    std = torch.ones(200, 1, 8, 8, dtype=torch.float64)
    std[..., 0, 0] = 80.0
    covariance = replace(white_covariance(1.0, std), std=std)
    residual, e, noise = (normal(200, 1, 8, 8, stream=k) for k in range(3))

    def update(factor, r):
        return factor * std**2 / (factor * std**2 + 0.01) * r

    residual, foreseen = 2.0 * std * residual + 0.1 * normal(200, 1, 8, 8, stream=3), std * e
    ratio = misfit_of_image(update, covariance, residual, foreseen, 0.1 * noise)
    # Two sums of 64 squares: their ratio has the standard deviation (2/64 + 2/64)^(1/2) of itself.
    assert float(ratio.log().std()) < 0.27
    energy = residual.square().sum(dim=(1, 2, 3)) / foreseen.square().sum(dim=(1, 2, 3))
    assert float(energy.log().std()) > 1.5


def heard(R):
    """K r for A = 1, Sigma = 1 times a factor, and the noise R."""
    return lambda factor, r: factor / (factor + R) * r


def of_image(residual, foreseen, noise, R):
    """The factor of images for A = 1 and Sigma = 1."""
    return misfit_of_image(heard(R), white_covariance(1.0, residual), residual, foreseen, noise)


def test_an_image_without_evidence_has_1_and_it_is_bounded():
    residual, foreseen = (normal(1, 2, 64, 64, stream=k) for k in range(2))
    nothing = 0 * residual
    assert float(of_image(nothing, nothing, nothing, 0.0)) == pytest.approx(1.0)
    # Nor do data tell that are far noisier than A e is large.
    noise = [100 * normal(1, 2, 64, 64, stream=k) for k in (2, 3)]
    assert float(of_image(noise[0] + foreseen, foreseen, noise[1], 1e4)) == pytest.approx(
        1, abs=0.1
    )
    assert float(of_image(noise[0], nothing, noise[1], 1e4)) == pytest.approx(1.0, abs=1e-3)
    assert float(of_image(100 * residual, foreseen, nothing, 0.0)) == 20
    assert float(of_image(nothing, foreseen, nothing, 0.0)) == pytest.approx(0.1)


def test_images_of_a_batch_are_apart():
    residual, foreseen, noise = (normal(3, 1, 40, 40, stream=k) for k in range(3))
    residual = residual * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)[:, None, None, None]
    together = of_image(residual, foreseen, noise, 1.0)
    for b in range(3):
        one = slice(b, b + 1)
        alone = of_image(residual[one], foreseen[one], noise[one], 1.0)
        torch.testing.assert_close(together[one], alone, rtol=1e-12, atol=0)


def two_sided(width, factor=1):
    """(residual, foreseen, R): noise-free misfit 1 on the left, 9 on the right, of data."""
    side = (64 // factor, width // factor)
    amplitude = torch.ones(side[1], dtype=torch.float64)
    amplitude[side[1] // 2 :] = 3.0
    return normal(1, 2, *side) * amplitude, normal(1, 2, *side, stream=1), torch.zeros(1)


@pytest.mark.parametrize("factor", [1, 4])
def test_places_have_their_own_misfit(factor):
    residual, foreseen, R = two_sided(256, factor)
    ratio = misfit_by_place(residual, foreseen, R, (64, 256))
    assert ratio.shape == (1, 1, 64, 256)
    far = WINDOW_RADIUS_PX + factor
    assert float(ratio[..., : 128 - far].mean()) == pytest.approx(1.0, rel=0.1)
    assert float(ratio[..., 128 + far :].mean()) == pytest.approx(9.0, rel=0.1)


def test_a_tile_finds_the_misfit_of_the_whole_image():
    residual, foreseen, R = two_sided(256)
    whole = misfit_by_place(residual, foreseen, R, (64, 256))
    tile = misfit_by_place(residual[..., 48:208], foreseen[..., 48:208], R, (64, 160))
    inner = slice(48 + WINDOW_RADIUS_PX, 208 - WINDOW_RADIUS_PX)
    torch.testing.assert_close(tile[..., WINDOW_RADIUS_PX:-WINDOW_RADIUS_PX], whole[..., inner])


def test_a_place_without_evidence_has_1_and_it_is_bounded():
    residual, foreseen, exact = two_sided(256)
    nothing = misfit_by_place(residual, 0 * foreseen, exact, (64, 256))
    torch.testing.assert_close(nothing, torch.ones_like(nothing))
    # Noise of 100 times the size of A e hides it.
    noise = 100 * normal(1, 2, 64, 256, stream=2)
    drowned = misfit_by_place(noise + foreseen, foreseen, torch.tensor([1e4]), (64, 256))
    assert 0.1 <= float(drowned.min()) < 1 < float(drowned.max()) < 3
    assert float(misfit_by_place(100 * residual, foreseen, exact, (64, 256)).max()) == 20
    least = misfit_by_place(0 * residual, foreseen, exact, (64, 256)).min()
    assert float(least) == pytest.approx(0.1)


def test_an_exact_element_leaves_the_ratio_of_a_noisy_one_alone():
    residual, foreseen = normal(2, 1, 16, 16), 0.5 * normal(2, 1, 16, 16, stream=1)
    R = torch.tensor([0.0, 0.09], dtype=torch.float64).reshape(2, 1, 1, 1)
    both = misfit_by_place(residual, foreseen, R, (16, 16))
    for b in range(2):
        one = slice(b, b + 1)
        alone = misfit_by_place(residual[one], foreseen[one], R[one], (16, 16))
        torch.testing.assert_close(both[one], alone, rtol=1e-12, atol=0)
    # Noise of complex data has twice the energy: |n|^2 has the mean 2 R and the variance 4 R^2.
    data = torch.complex(normal(1, 1, 9, 9), normal(1, 1, 9, 9, stream=1))
    told = misfit_by_place(data, 0.5 * data, torch.tensor(0.09), (9, 9))
    energy, doubt = data.abs().square().sum() / 0.09, 2 * (2 * 2 * 81) ** 0.5
    expected = (energy - 2 * 81 + doubt) / (0.25 * energy + doubt)
    torch.testing.assert_close(told, expected.expand_as(told))


@pytest.mark.parametrize("size", [(16, 16), (17, 15), (8, 8), (31, 33)])
def test_windows_have_the_size_of_the_image(size):
    data = normal(1, 1, 16, 16)
    ratio = misfit_by_place(data, data, torch.tensor(0.0), size)
    torch.testing.assert_close(ratio, torch.ones(1, 1, *size, dtype=torch.float64))
