"""Classical methods against closed forms and independent libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import cv2
import numpy as np
import pytest
import pywt
import torch
from PIL import Image
from scipy.ndimage import convolve
from skimage.data import camera
from skimage.restoration import denoise_tv_chambolle, inpaint_biharmonic
from skimage.restoration import wiener as skimage_wiener
from torch import Tensor

from diffusion_core.noise.likelihood import GaussianNoise, PoissonTransmission
from diffusion_core.operators import (
    Blur,
    CroppedBlur,
    Fourier,
    Identity,
    Mask,
    Operator,
    Pool,
    to_complex,
)
from domains.base import Array, BadInputError, Measurement, Problem
from domains.city.baselines import BASELINES as CITY
from domains.classical import (
    TVSettings,
    circulant_eigenvalues,
    gradient,
    gradient_adjoint,
    inverse_variance,
    minimise_tv,
    minimise_tv_masked,
    operator_norm_squared,
    restore_tv,
    total_variation_of,
)
from domains.inpainting import biharmonic, smoothing_spline
from domains.mri.baselines import BASELINES as MRI
from domains.wavelets import WaveletSettings, minimise_wavelet

NOBODY = cast(Measurement, None)  # no classical method looks at the measurement itself


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """(1 1 64 64) float64 on [-1, 1]."""
    image = camera()[::8, ::8].astype(np.float64) / 127.5 - 1
    return torch.from_numpy(image)[None, None]


def noisy(x: Tensor, sigma: float, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return x + sigma * torch.from_numpy(rng.standard_normal(tuple(x.shape))).to(x.dtype)


def problem_of(operator: Operator, y: Tensor, sigma: float, condition: str = "city") -> Problem:
    shape = cast(tuple[int, int, int, int], tuple(operator.A_adjoint(y).shape))
    return Problem(operator, y, GaussianNoise(sigma), shape, "plane", condition, lambda x: x)


def two_halves(left: float, right: float) -> Tensor:
    x = torch.full((1, 1, 24, 32), left, dtype=torch.float64)
    x[..., 12:] = right
    return x


def test_gradient_and_its_adjoint_are_adjoint() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((2, 3, 7, 9)))
    g = torch.from_numpy(rng.standard_normal((2, 2, 3, 7, 9)))
    left, right = (gradient(x) * g).sum(), (x * gradient_adjoint(g)).sum()
    assert float(left) == pytest.approx(float(right), rel=1e-12)


def test_total_variation_is_isotropic_and_shared_by_channels() -> None:
    x = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    x[0, :, 1:, :] += 3
    x[0, :, :, 1:] += 4
    # At pixel (0, 0) both edges meet; two equal channels lengthen every gradient by sqrt 2.
    expected = math.sqrt(2) * (5 + 2 * 3 + 2 * 4)
    assert float(total_variation_of(x)) == pytest.approx(expected)


def test_tv_denoising_agrees_with_chambolles_in_scikit_image(photograph: Tensor) -> None:
    y = noisy(photograph, 0.1)
    expected = denoise_tv_chambolle(y[0, 0].numpy(), weight=0.1, eps=1e-9, max_num_iter=3000)
    weights = torch.ones_like(y)
    exact = TVSettings(strength=0.1, num_iterations=1000, tolerance=0, step=0.1)
    ours = minimise_tv_masked(weights.bool(), y, y, weights, exact)
    np.testing.assert_allclose(ours[0, 0].numpy(), expected, atol=2e-3)
    # The other minimiser, on the same problem as a general operator.
    admm = TVSettings(strength=0.1, num_iterations=400, tolerance=0, edge=0.05)
    ours = minimise_tv(Identity(), y, y, weights, admm)
    np.testing.assert_allclose(ours[0, 0].numpy(), expected, atol=2e-3)


def test_tv_of_three_equal_channels_is_grey_tv_of_a_weaker_strength(photograph: Tensor) -> None:
    y = noisy(photograph, 0.1)
    grey = TVSettings(strength=0.1, num_iterations=300, tolerance=0)
    colour = TVSettings(strength=0.1 * math.sqrt(3), num_iterations=300, tolerance=0)
    one = minimise_tv_masked(torch.ones_like(y).bool(), y, y, torch.ones_like(y), grey)
    three = y.expand(1, 3, 64, 64)
    ones = torch.ones_like(three)
    got = minimise_tv_masked(ones.bool(), three, three, ones, colour)
    torch.testing.assert_close(got, one.expand_as(got), atol=5e-3, rtol=0)


def test_tv_of_pooled_halves_moves_each_mean_by_the_closed_form() -> None:
    """Left mean a -> a + f^2 lambda / (w_left columns_left), right likewise: each by its weight."""
    operator = Pool(4)
    y = operator.A(two_halves(-0.5, 0.5))
    weights = torch.full_like(y, 100.0)
    weights[..., 3:] = 400.0
    settings = TVSettings(strength=2.0, num_iterations=400, tolerance=0, edge=0.1)
    x = minimise_tv(operator, y, torch.zeros(1, 1, 24, 32, dtype=torch.float64), weights, settings)
    expected = two_halves(-0.5 + 16 * 2.0 / (100 * 12), 0.5 - 16 * 2.0 / (400 * 20))
    torch.testing.assert_close(x, expected, atol=2e-3, rtol=0)


def test_tv_of_masked_halves_counts_the_measured_columns_only() -> None:
    """Left mean a -> a + lambda / (w columns measured on the left); what is missing is silent."""
    y = two_halves(-0.5, 0.5)
    known = torch.ones_like(y).bool()
    known[..., ::2] = False
    y = y * known
    settings = TVSettings(strength=2.0, num_iterations=500, tolerance=0, step=0.01)
    x = minimise_tv_masked(known, y, y, torch.full_like(y, 100.0), settings)
    expected = two_halves(-0.5 + 2.0 / (100 * 6), 0.5 - 2.0 / (100 * 10))
    torch.testing.assert_close(x[known], expected[known], atol=2e-4, rtol=0)


def test_tv_of_each_batch_element_is_its_own(photograph: Tensor) -> None:
    """Elements of other scale and weight beside it change nothing."""
    operator = Blur(torch.ones(3, 3, dtype=torch.float64) / 9, (64, 64))
    y = noisy(operator.A(photograph), 0.05)
    settings = TVSettings(strength=8.0, num_iterations=5, tolerance=0)
    weights = torch.full_like(y, 400.0)
    alone = minimise_tv(operator, y, y, weights, settings)
    pair, pair_weights = torch.cat([y, 5 * y.flip(-1)]), torch.cat([weights, weights / 50])
    together = minimise_tv(operator, pair, pair, pair_weights, settings)
    torch.testing.assert_close(together[:1], alone, atol=1e-3, rtol=0)


def test_exact_data_are_met_exactly_by_both_minimisers() -> None:
    truth = two_halves(-0.5, 0.5)
    known = torch.ones_like(truth).bool()
    known[..., 8:16] = False
    start = torch.where(known, truth, torch.zeros_like(truth))
    filled = minimise_tv_masked(known, start, start, None, TVSettings(num_iterations=500))
    assert bool((filled == truth)[known].all())
    # No fill between two flats has less variation than the step itself.
    assert float(total_variation_of(filled)) == pytest.approx(24.0, rel=1e-3)
    operator = Pool(4)
    y = operator.A(truth)
    settings = TVSettings(strength=8.0, num_iterations=200, edge=0.1)
    sharp = minimise_tv(operator, y, torch.zeros_like(truth), None, settings)
    torch.testing.assert_close(operator.A(sharp), y, atol=2e-3, rtol=0)
    assert float(total_variation_of(sharp)) == pytest.approx(24.0, rel=1e-2)


def test_tv_of_expanded_weights_is_finite() -> None:
    """GaussianNoise's variance has one element: its expansion once had a median of nan."""
    operator = Fourier(torch.rand(2, 1, 1, 16, generator=torch.Generator().manual_seed(0)) < 0.7, 2)
    y = operator.A(torch.ones(2, 2, 16, 16))
    problem = problem_of(operator, y, 0.1, "mri-complex")
    x = restore_tv(problem, torch.zeros(problem.shape), TVSettings(num_iterations=3))
    assert bool(torch.isfinite(x).all())


def test_circulant_eigenvalues_are_exact_where_the_operator_is_circulant() -> None:
    rng = np.random.default_rng(0)
    kernel = torch.from_numpy(rng.random((3, 5)))
    like = torch.zeros(2, 2, 15, 12, dtype=torch.float64)
    blur = Blur(kernel, (15, 12))
    symbol = torch.fft.fft2(blur.A(_impulse(15, 12))).abs().square()
    got = circulant_eigenvalues(blur, like)
    torch.testing.assert_close(got, symbol.expand_as(got))
    mask = torch.from_numpy(rng.random((2, 1, 15, 12)) < 0.5)
    got = circulant_eigenvalues(Fourier(mask, 2), like, complex_pair=True)
    torch.testing.assert_close(got, mask.double())


def _impulse(height: int, width: int) -> Tensor:
    x = torch.zeros(1, 1, height, width, dtype=torch.float64)
    x[..., 0, 0] = 1
    return x


def test_circulant_eigenvalues_of_a_mask_scatter_about_its_share() -> None:
    known = torch.from_numpy(np.random.default_rng(0).random((1, 1, 64, 64)) < 0.3)
    got = circulant_eigenvalues(Mask(known), torch.zeros(1, 1, 64, 64, dtype=torch.float64))
    assert float(got.mean()) == pytest.approx(0.3, abs=0.03)
    assert float(got.min()) >= 0


def test_operator_norm_of_pooling_is_the_inverse_area() -> None:
    norm = operator_norm_squared(Pool(4), torch.zeros(2, 3, 16, 16, dtype=torch.float64))
    assert norm == pytest.approx(1.02 / 16)


def test_inverse_variance_is_none_for_exact_data_and_per_ray_for_counts() -> None:
    y = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)
    assert inverse_variance(GaussianNoise(0.0), y) is None
    weights = inverse_variance(PoissonTransmission(1e4), y)
    assert weights is not None
    torch.testing.assert_close(weights.flatten(), 1e4 * torch.exp(-y.flatten()))


@pytest.mark.parametrize("shape", [(32, 48), (31, 45)])
def test_wavelets_of_an_image_itself_are_shrunk_once(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.standard_normal((2, 1, *shape)))
    settings = WaveletSettings(strength=3.0, wavelet="db2", num_levels=2, shift=False)
    got = minimise_wavelet(Identity(), y, torch.zeros_like(y), torch.tensor(10.0), settings)
    height, width = (math.ceil(n / 4) * 4 for n in shape)
    border = [(0, 0), (0, 0), (0, height - shape[0]), (0, width - shape[1])]
    bands = pywt.wavedec2(np.pad(y.numpy(), border, "symmetric"), "db2", "periodization", 2)
    shrunk = [bands[0]] + [tuple(pywt.threshold(b, 0.3, "soft") for b in lv) for lv in bands[1:]]
    expected = pywt.waverec2(shrunk, "db2", "periodization")[..., : shape[0], : shape[1]]
    # Padding makes an odd image's problem a slightly different one; an even one's is exact.
    atol = 1e-4 if shape == (height, width) else 0.15
    np.testing.assert_allclose(got.numpy(), expected, atol=atol)


def test_wavelets_of_complex_images_keep_their_phase() -> None:
    rng = np.random.default_rng(0)
    magnitude = torch.from_numpy(rng.random((1, 1, 32, 32)))
    real = minimise_wavelet(
        Identity(), magnitude, magnitude, torch.tensor(50.0), WaveletSettings(wavelet="haar")
    )
    turned = torch.cat([magnitude * math.cos(2.0), magnitude * math.sin(2.0)], dim=1)
    got = minimise_wavelet(
        Identity(),
        turned,
        turned,
        torch.tensor(50.0),
        WaveletSettings(wavelet="haar"),
        complex_pair=True,
    )
    torch.testing.assert_close(to_complex(got), real * np.exp(2j))


def test_missing_kspace_is_filled_better_than_with_zeros(photograph: Tensor) -> None:
    rng = np.random.default_rng(0)
    lines = rng.random((1, 1, 1, 64)) < 0.4
    lines[..., :5] = lines[..., -5:] = True
    operator = Fourier(torch.from_numpy(lines), 2)
    magnitude = (photograph.float() + 1) / 2
    truth = torch.cat([magnitude * 0.6, magnitude * 0.8], dim=1)
    y = operator.A(truth)
    y = y + 0.01 * operator.A(noisy(torch.zeros_like(truth), 1.0))
    problem = problem_of(operator, y, 0.01, "mri-complex")

    def error(method: str, params: dict[str, Any]) -> float:
        x = MRI[method](NOBODY, problem, params)
        return float((to_complex(x).abs() - magnitude).square().mean())

    zero_filled = error("zero-filled", {})
    assert error("tv", {"strength": 8.0, "num_iterations": 60, "edge": 0.1}) < 0.5 * zero_filled
    assert error("wavelet", {"strength": 4.0, "wavelet": "haar"}) < 0.6 * zero_filled


def test_zero_filled_real_image_is_black_where_nothing_is() -> None:
    """About black, not about grey: an image of -1 has no signal, and comes back as it is."""
    operator = Fourier(torch.arange(16).reshape(1, 1, 1, 16) % 3 == 1, 1)
    black = torch.full((1, 1, 16, 16), -1.0)
    x = MRI["zero-filled"](NOBODY, problem_of(operator, operator.A(black), 0.1, "mri"), {})
    torch.testing.assert_close(x, black)


@pytest.mark.parametrize("pattern", ["random", "corner"])
def test_biharmonic_fill_agrees_with_scikit_image(pattern: str) -> None:
    image = camera()[100:133, 200:241].astype(np.float64) / 255
    image = np.stack([image, image.T[:33, :33].mean() - image, image**2])
    missing = np.zeros(image.shape[1:], bool)
    if pattern == "random":
        missing[:] = np.random.default_rng(0).random(missing.shape) < 0.6
    else:
        missing[:7, :9] = True
        missing[20:28, 15:30] = True
    image[:, missing] = 7.0  # what missing pixels hold must not matter
    expected = inpaint_biharmonic(np.moveaxis(image, 0, -1), missing, channel_axis=-1)
    np.testing.assert_allclose(biharmonic(image, ~missing), np.moveaxis(expected, -1, 0), atol=1e-8)


def test_biharmonic_fill_leaves_a_whole_image_alone_and_refuses_an_empty_one() -> None:
    image = np.random.default_rng(0).random((1, 5, 6))
    np.testing.assert_array_equal(biharmonic(image, np.ones((5, 6), bool)), image)
    with pytest.raises(ValueError, match="no pixel is known"):
        biharmonic(image, np.zeros((5, 6), bool))


def test_smoothing_spline_agrees_with_a_dense_solve() -> None:
    rng = np.random.default_rng(0)
    known = rng.random((9, 11)) < 0.5
    image = rng.standard_normal((2, 9, 11))
    rows, columns = (_second_difference(n) for n in (9, 11))
    laplacian = np.kron(rows, np.eye(11)) + np.kron(np.eye(9), columns)
    system = np.diag(known.ravel().astype(float)) + 0.3 * laplacian.T @ laplacian
    expected = np.linalg.solve(system, (known * image).reshape(2, -1).T).T.reshape(image.shape)
    got = smoothing_spline(image, known, 0.3, tolerance=1e-10)
    np.testing.assert_allclose(got, expected, atol=1e-7)


def _second_difference(n: int) -> Array:
    """x[i+1] - 2 x[i] + x[i-1] with mirrored ends, from np.diff of a padded unit basis."""
    padded = np.pad(np.eye(n), ((1, 1), (0, 0)), mode="symmetric")
    return cast(Array, np.diff(padded, n=2, axis=0))


def test_wiener_agrees_with_scikit_image(photograph: Tensor) -> None:
    kernel = torch.tensor([[0.05, 0.1, 0.05], [0.1, 0.4, 0.1], [0.05, 0.1, 0.05]]).double()
    operator = Blur(kernel, (64, 64))
    y = operator.A(photograph)
    got = CITY["wiener"](NOBODY, problem_of(operator, y, 0.05), {"balance": 0.02})
    expected = skimage_wiener(y[0, 0].numpy(), kernel.numpy(), 0.02, clip=False)
    np.testing.assert_allclose(got[0, 0].numpy(), expected, atol=1e-4)


def test_richardson_lucy_raises_the_poisson_likelihood_and_keeps_the_light(
    photograph: Tensor,
) -> None:
    operator = Blur(torch.ones(5, 5, dtype=torch.float64) / 25, (64, 64))
    y = operator.A(photograph)
    data = (y + 1) / 2

    def likelihood(num_iterations: int) -> float:
        params = {"num_iterations": num_iterations}
        x = CITY["richardson-lucy"](NOBODY, problem_of(operator, y, 0.05), params)
        mean = operator.A((x + 1) / 2)
        assert float(mean.sum()) == pytest.approx(float(data.sum()), rel=1e-6)
        return float((data * mean.log() - mean).sum())

    values = [likelihood(n) for n in (1, 3, 9, 27)]
    assert values == sorted(values)
    assert values[0] < values[-1]


def test_bicubic_agrees_with_pillow() -> None:
    y = torch.from_numpy(np.random.default_rng(0).random((1, 1, 9, 7), dtype=np.float32))
    got = CITY["bicubic"](NOBODY, problem_of(Pool(4), y, 0.05), {})
    expected = np.asarray(
        Image.fromarray(y[0, 0].numpy()).resize((28, 36), Image.Resampling.BICUBIC)
    )
    np.testing.assert_allclose(got[0, 0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["telea", "navier-stokes"])
def test_marching_fills_agree_with_eight_bits_and_keep_known_pixels(
    method: str, photograph: Tensor
) -> None:
    known = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    known[..., 20:30, 10:40] = False
    y = photograph.float() * known
    problem = problem_of(Mask(known), y, 0.0)
    got = CITY[method](NOBODY, problem, {"radius_px": 3.0})
    assert bool((got == y)[known].all())
    bytes_in = np.round((y[0, 0].numpy() + 1) * 127.5).astype(np.uint8)
    flag = cv2.INPAINT_TELEA if method == "telea" else cv2.INPAINT_NS
    expected = cv2.inpaint(bytes_in, (~known[0, 0].numpy()).astype(np.uint8), 3.0, flag)
    grey_levels = np.abs((got[0, 0].numpy() + 1) * 127.5 - expected)
    assert grey_levels.mean() < 0.3


def test_nlm_takes_noise_away(photograph: Tensor) -> None:
    for clean in (photograph, photograph.expand(2, 3, 64, 64)):
        y = noisy(clean, 0.2).float()
        x = CITY["nlm"](NOBODY, problem_of(Identity(), y, 0.2), {})
        assert x.shape == y.shape
        assert (x - clean).square().mean() < 0.5 * (y - clean).square().mean()


def test_fills_use_each_images_and_each_channels_own_mask() -> None:
    rng = np.random.default_rng(0)
    columns = torch.linspace(-1, 1, 16, dtype=torch.float64).expand(2, 3, 16, 16)
    known = torch.from_numpy(rng.random((2, 3, 16, 16)) < 0.5)
    known[..., :2] = known[..., -2:] = True
    y = columns * known
    x = CITY["biharmonic"](NOBODY, problem_of(Mask(known), y, 0.0), {})
    # A ramp solves the equation but at the border rows; clipping cannot hide a wrong mask here.
    torch.testing.assert_close(x[..., 4:-4, :], columns[..., 4:-4, :], atol=0.12, rtol=0)


@pytest.mark.parametrize(
    ("method", "params", "sentence"),
    [
        ("tv", {"strenght": 3.0}, "tv has no parameter 'strenght'"),
        ("wiener", {}, "wiener needs a measurement of kind 'blur'"),
        ("biharmonic", {}, "a fill needs a measurement of kind 'mask'"),
    ],
)
def test_a_users_mistake_is_one_sentence(
    method: str, params: dict[str, Any], sentence: str
) -> None:
    y = torch.zeros(1, 1, 8, 8)
    with pytest.raises(BadInputError, match=sentence):
        CITY[method](NOBODY, problem_of(Identity(), y, 0.1), params)


@pytest.mark.parametrize(
    ("method", "params", "gain_db"),
    [
        ("wiener", {"balance": 0.01}, 1.0),
        ("richardson-lucy", {"num_iterations": 15}, 1.5),
        ("tv", {"strength": 15.0}, 2.0),
    ],
)
def test_deconvolution_of_a_photograph_does_not_ring_from_its_border(
    method: str, params: dict[str, Any], gain_db: float
) -> None:
    """A scene blurred by scipy and cut to 96^2: what no periodic model makes better at all."""
    scene = camera()[::2, ::2].astype(np.float64) / 127.5 - 1
    kernel = np.zeros((9, 13))
    kernel[4, :] = kernel[2:7, 6] = 1 / 17
    frame = np.s_[100:196, 20:116]
    blurred = torch.from_numpy(convolve(scene, kernel)[frame])[None, None].float()
    y = noisy(blurred, 0.02)
    k = torch.from_numpy(kernel).float()
    cropped, periodic = CroppedBlur(k, (96, 96), (8, 8), (112, 112)), Blur(k, (96, 96))
    truth = scene[frame]

    def psnr(x: Tensor) -> float:
        return -10 * math.log10(float(np.square(x[0, 0].numpy() - truth).mean()) / 4)

    x = CITY[method](NOBODY, problem_of(cropped, y, 0.02), params)
    assert tuple(x.shape) == (1, 1, 112, 112)
    wrong = CITY[method](NOBODY, problem_of(periodic, y, 0.02), params)
    got = psnr(cropped.crop(x))
    assert got > psnr(y) + gain_db
    assert got > psnr(wrong) + gain_db


def test_tv_starts_from_every_kind_of_photograph(photograph: Tensor) -> None:
    rng = np.random.default_rng(0)
    x = photograph.float()
    operators: list[tuple[Operator, Callable[[Tensor], Tensor]]] = [
        (Identity(), lambda y: y),
        (Mask(torch.from_numpy(rng.random((1, 1, 64, 64)) < 0.5)), lambda y: y),
        (Pool(4), lambda y: y.repeat_interleave(4, -1).repeat_interleave(4, -2)),
        (Blur(torch.ones(3, 3) / 9, (64, 64)), lambda y: y),
    ]
    for operator, naive in operators:
        y = operator.A(noisy(x, 0.1))
        restored = CITY["tv"](NOBODY, problem_of(operator, y, 0.1), {"strength": 3.0})
        assert restored.shape == x.shape
        error, before = ((z - x).square().mean() for z in (restored, naive(y)))
        assert error < before, operator.kind
