"""Every operator keeps the contract, and equals an independent computation of the same map."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, signal
from scipy.fft import dctn
from scipy.sparse import random_array

from diffusion_core.operators import (
    JPEG,
    ROUNDING_STD,
    Blur,
    Compose,
    CroppedBlur,
    Downsample,
    Fourier,
    Identity,
    JPEGBlocks,
    JPEGCoefficients,
    Mask,
    Mosaic,
    MultiCoil,
    Operator,
    PhaseRetrieval,
    Pool,
    Saturation,
    Sparse,
    Stack,
    VaryingBlur,
    bicubic_kernel,
    inner,
)
from diffusion_core.operators.sparse import _torch_csr
from diffusion_core.testing import LinearOperatorContract, adjoint_gap

ODD = (2, 3, 17, 23)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def coin(*shape: int, share: float = 0.4) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).random(shape) < share)


def lopsided_kernel(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normal(4, 7, seed=9, dtype=dtype).abs()


def sparse(scale: float = 1.0, shape: tuple[int, int] = (17, 23)) -> Sparse:
    rng = np.random.default_rng(4)
    size = (5 * 6, shape[0] * shape[1])
    matrix = random_array(size, density=0.2, format="csr", rng=rng, dtype=np.float32)
    return Sparse(matrix, matrix.T.tocsr(), shape, (5, 6), scale)


def coil_maps(batch: int = 1, coils: int = 3, size=(17, 23)) -> torch.Tensor:
    shape = (batch, coils, *size)
    return torch.complex(normal(*shape, seed=12), normal(*shape, seed=13))


def node_kernels(dtype: torch.dtype = torch.float64, grid=(2, 3)) -> torch.Tensor:
    return normal(*grid, 4, 7, seed=11, dtype=dtype).abs()


class TestIdentity(LinearOperatorContract):
    def make(self, dtype):
        return Identity(), ODD


class TestMask(LinearOperatorContract):
    def make(self, dtype):
        return Mask(coin(2, 1, 17, 23)), ODD


class TestMaskPerChannel(LinearOperatorContract):
    def make(self, dtype):
        return Mask(coin(1, 3, 17, 23)), ODD


class TestBlur(LinearOperatorContract):
    def make(self, dtype):
        return Blur(lopsided_kernel(dtype), (17, 23)), ODD


class TestBlurWiderThanTheImage(LinearOperatorContract):
    def make(self, dtype):
        return Blur(lopsided_kernel(dtype), (3, 5)), (2, 1, 3, 5)


class TestCroppedBlur(LinearOperatorContract):
    def make(self, dtype):
        return CroppedBlur(lopsided_kernel(dtype), (9, 14), (2, 5), (17, 23)), ODD


class TestPool(LinearOperatorContract):
    def make(self, dtype):
        return Pool(3), (2, 3, 15, 21)


class TestVaryingBlur(LinearOperatorContract):
    def make(self, dtype):
        return VaryingBlur(node_kernels(dtype), (17, 23)), ODD


class TestVaryingBlurOfOneRow(LinearOperatorContract):
    def make(self, dtype):
        return VaryingBlur(node_kernels(dtype, grid=(1, 4)), (5, 9)), (2, 1, 5, 9)


class TestBicubicByThree(LinearOperatorContract):
    def make(self, dtype):
        return Downsample.bicubic(3, (15, 21)), (2, 3, 15, 21)


class TestBicubicByFour(LinearOperatorContract):
    def make(self, dtype):
        return Downsample.bicubic(4, (20, 28)), (2, 3, 20, 28)


class TestJPEGCoefficients(LinearOperatorContract):
    def make(self, dtype):
        return JPEGCoefficients(30, (16, 24)), (2, 3, 16, 24)


class TestJPEGCoefficientsOfGrey(LinearOperatorContract):
    def make(self, dtype):
        return JPEGCoefficients(10, (24, 8)), (2, 1, 24, 8)


def tables(count, dtype=torch.float64):
    """Steps that differ from place to place, and from component to component."""
    return [1.0 + k + torch.arange(64, dtype=dtype).reshape(8, 8) / 3 for k in range(count)]


class TestJPEGBlocksOfHalfTheColours(LinearOperatorContract):
    def make(self, dtype):
        return JPEGBlocks(tables(3), [(1, 1), (2, 2), (2, 2)], (19, 29)), (2, 3, 19, 29)


class TestJPEGBlocksOfRGB(LinearOperatorContract):
    def make(self, dtype):
        factors = [(1, 1), (1, 2), (2, 1)]
        return JPEGBlocks(tables(3), factors, (17, 16), is_ycc=False), (2, 3, 17, 16)


class TestJPEGBlocksOfGrey(LinearOperatorContract):
    def make(self, dtype):
        return JPEGBlocks(tables(1), [(1, 1)], (9, 24)), (2, 1, 9, 24)


class TestMosaic(LinearOperatorContract):
    def make(self, dtype):
        return Mosaic(), ODD


class TestMultiCoil(LinearOperatorContract):
    def make(self, dtype):
        return MultiCoil(coin(2, 1, 1, 23), coil_maps()), (2, 2, 17, 23)


class TestMultiCoilWithMapsOfEachSlice(LinearOperatorContract):
    def make(self, dtype):
        return MultiCoil(coin(1, 1, 17, 23), coil_maps(2)), (2, 2, 17, 23)


class TestFourierReal(LinearOperatorContract):
    def make(self, dtype):
        return Fourier(coin(2, 1, 1, 23), channels=1), (2, 1, 17, 23)


class TestFourierRealEvenSize(LinearOperatorContract):
    def make(self, dtype):
        return Fourier(coin(1, 1, 16, 24), channels=1), (2, 1, 16, 24)


class TestFourierComplex(LinearOperatorContract):
    def make(self, dtype):
        return Fourier(coin(2, 1, 1, 23), channels=2), (2, 2, 17, 23)


class TestSparse(LinearOperatorContract):
    def make(self, dtype):
        return sparse(scale=0.03), ODD


class TestSparseThroughTorch(LinearOperatorContract):
    """The product that a GPU takes, run by torch on the CPU."""

    def make(self, dtype):
        operator = sparse(scale=0.03)
        matrices = (operator.matrix, operator.transpose)
        operator._on_device = tuple(_torch_csr(m, "cpu") for m in matrices)
        return operator, ODD


class TestCompose(LinearOperatorContract):
    def make(self, dtype):
        blur = Blur(lopsided_kernel(dtype), (15, 21))
        return Compose(Pool(3), blur), (2, 3, 15, 21)


class TestStack(LinearOperatorContract):
    def make(self, dtype):
        blur = Blur(lopsided_kernel(dtype), (15, 21))
        return Stack([Pool(3), blur], (3, 15, 21)), (2, 3, 15, 21)


class TestStackOfComplexData(LinearOperatorContract):
    def make(self, dtype):
        masks = coin(1, 1, 17, 23), coin(1, 1, 1, 23, share=0.7)
        return Stack([Fourier(m, channels=2) for m in masks], (2, 17, 23)), (2, 2, 17, 23)


class Mixing(Operator):
    """Adds the batch mean: linear, self-adjoint, but batch elements mix."""

    kind: ClassVar[str] = "mixing"

    def A(self, x):
        return x + x.mean(dim=0, keepdim=True)

    def A_adjoint(self, y):
        return self.A(y)


class Affine(Operator):
    kind: ClassVar[str] = "affine"

    def A(self, x):
        return x + 1

    def A_adjoint(self, y):
        return y


class Transposed(Operator):
    """The Fourier adjoint with the conjugation forgotten."""

    kind: ClassVar[str] = "transposed"

    def A(self, x):
        return Fourier(coin(1, 1, 1, 23), channels=2).A(x)

    def A_adjoint(self, y):
        return Fourier(coin(1, 1, 1, 23), channels=2).A_adjoint(y.conj())


@pytest.mark.parametrize(
    ("wrong", "test"),
    [
        (Mixing(), "test_batch_elements_do_not_mix"),
        (Affine(), "test_it_is_real_linear"),
        (Transposed(), "test_adjoint_is_the_adjoint_in_float64"),
    ],
)
def test_the_contract_fails_a_wrong_operator(wrong, test):
    class Case(LinearOperatorContract):
        def make(self, dtype):
            return wrong, (2, 2, 17, 23)

    with pytest.raises(AssertionError):
        getattr(Case(), test)()


def test_inner_product_is_real_and_per_batch_element():
    a = torch.complex(normal(2, 3), normal(2, 3, seed=1))
    b = torch.complex(normal(2, 3, seed=2), normal(2, 3, seed=3))
    expected = [np.vdot(a[i].numpy(), b[i].numpy()).real for i in range(2)]
    assert torch.allclose(inner(a, b), torch.tensor(expected, dtype=torch.float64), rtol=1e-14)


def test_blur_is_the_periodic_convolution_of_scipy():
    kernel, x = normal(5, 7, seed=9), normal(*ODD)
    y = Blur(kernel, (17, 23)).A(x)
    expected = ndimage.convolve(x[1, 2].numpy(), kernel.numpy(), mode="wrap")
    assert np.allclose(y[1, 2].numpy(), expected, rtol=1e-12)


def test_blur_of_a_point_is_the_kernel_round_it():
    kernel, x = lopsided_kernel(), torch.zeros(1, 1, 17, 23, dtype=torch.float64)
    x[0, 0, 8, 10] = 1.0
    y = Blur(kernel, (17, 23)).A(x)
    assert torch.allclose(y[0, 0, 8 - 2 : 8 + 2, 10 - 3 : 10 + 4], kernel, atol=1e-14)


def test_pool_is_the_mean_of_blocks_and_its_rows_are_orthogonal():
    x = normal(2, 3, 15, 21)
    pool = Pool(3)
    expected = x.numpy().reshape(2, 3, 5, 3, 7, 3).mean(axis=(3, 5))
    assert np.allclose(pool.A(x).numpy(), expected, rtol=1e-12)
    y = normal(2, 3, 5, 7)
    assert torch.allclose(pool.A(pool.A_adjoint(y)), y / 9, rtol=1e-12)


def test_pool_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="15 x 22 pixels do not divide by 3"):
        Pool(3).A(normal(1, 1, 15, 22))


def test_a_varying_blur_of_a_point_gathers_from_each_pixels_own_kernel():
    """The definition, term by term: y(p) = k_p(p - q) at the point q, k_p bilinear in p."""
    h, w, (row, column) = 17, 23, (8, 10)
    kernels, x = node_kernels(), torch.zeros(1, 1, h, w, dtype=torch.float64)
    x[0, 0, row, column] = 1.0
    y = VaryingBlur(kernels, (h, w)).A(x)[0, 0].numpy()
    expected = np.zeros((h, w))
    for i in range(4):
        for j in range(7):
            at = row + i - 2, column + j - 3
            u, v = at[0] / (h - 1) * 1, at[1] / (w - 1) * 2  # place on the 2 x 3 grid of nodes
            a, b = min(int(u), 0), min(int(v), 1)
            corner = kernels[a : a + 2, b : b + 2, i, j].numpy()
            mixed = (1 - (u - a)) * corner[0] + (u - a) * corner[1]
            expected[at] = (1 - (v - b)) * mixed[0] + (v - b) * mixed[1]
    assert np.allclose(y, expected, atol=1e-14)


def test_a_varying_blur_of_equal_kernels_is_a_blur():
    kernel, x = lopsided_kernel(), normal(*ODD)
    varying = VaryingBlur(kernel.expand(3, 2, 4, 7), (17, 23))
    assert torch.allclose(varying.A(x), Blur(kernel, (17, 23)).A(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_bicubic_is_pillows_away_from_the_border(factor):
    """PIL's BICUBIC reducing filter in 32-bit floats: an independent implementation."""
    h, w = 12 * factor, 15 * factor
    x = normal(1, 1, h, w, dtype=torch.float32)
    small = Image.fromarray(x[0, 0].numpy()).resize((15, 12), Image.Resampling.BICUBIC)
    y = Downsample.bicubic(factor, (h, w)).A(x.double())[0, 0].numpy()
    assert np.abs(y - np.asarray(small))[2:-2, 2:-2].max() < 2e-6


def test_bicubic_keeps_what_is_constant_and_shares_its_corners():
    """Its kernel sums to 1, and a ramp stays a ramp through the centres of coarse pixels."""
    fine = torch.arange(60, dtype=torch.float64).expand(1, 1, 60, 60)
    y = Downsample.bicubic(4, (60, 60)).A(fine)[0, 0, 7]
    centres = torch.arange(15, dtype=torch.float64) * 4 + 1.5
    assert torch.allclose(y[2:-2], centres[2:-2], atol=1e-12)
    assert abs(float(bicubic_kernel(3).sum()) - 1) < 1e-15


def test_downsampling_by_a_box_is_pooling():
    x, box = normal(2, 3, 15, 21), torch.full((3, 3), 1 / 9, dtype=torch.float64)
    assert torch.allclose(Downsample(box, 3, (15, 21)).A(x), Pool(3).A(x), rtol=1e-12)


def test_jpegs_blocks_are_its_coefficients_where_nothing_is_shared_or_filled_up():
    quality, x = JPEGCoefficients(30, (16, 24)), normal(2, 3, 16, 24)
    blocks = JPEGBlocks(list(quality.steps(x)[:, 0, 0]), [(1, 1)] * 3, (16, 24))
    assert torch.allclose(blocks.A(x), quality.A(x).flatten(1))
    integers = torch.randint(-9, 9, blocks.A(x).shape).double()
    decoded = blocks.decoded(blocks.data_of(integers))
    assert decoded.shape == x.shape
    with pytest.raises(ValueError, match="1 or 3 components"):
        JPEGBlocks(tables(2), [(1, 1)] * 2, (16, 24))
    with pytest.raises(ValueError, match="above 0"):
        JPEGBlocks([torch.zeros(8, 8)], [(1, 1)], (16, 24))
    with pytest.raises(ValueError, match="applied to"):
        blocks.A(x[:, :1])


def test_jpegs_coefficients_are_scipys_transform_in_steps():
    x = normal(1, 1, 16, 8)
    y = JPEGCoefficients(50, (16, 8)).A(x)
    for row in range(2):
        block = 127.5 * x[0, 0, 8 * row : 8 * row + 8].numpy()
        # At quality 50 the luminance table is the standard's own: 16, 11, 10, 16 ...
        expected = dctn(block, norm="ortho")[0, :4] / [16, 11, 10, 16]
        np.testing.assert_allclose(y[0, 0, row, 0, 0, :4], expected, rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpegs_coefficients_of_a_decoded_image_are_the_files_and_miss_by_half_a_step(channels):
    truth = (0.25 * normal(1, channels, 40, 24)).clamp(-1, 1)
    decoded, operator = JPEG(70).A(truth), JPEGCoefficients(70, (40, 24))
    y = operator.data_of(decoded)
    missed = (y - operator.A(truth)).abs()
    # Coding rounds pixels to 8 bits and colours again, which moves a coefficient by a little.
    assert float((missed < 0.6).double().mean()) > 0.995
    # Coefficients of many steps err evenly within one.
    assert float(missed.square().mean().sqrt()) == pytest.approx(ROUNDING_STD, rel=0.05)
    torch.testing.assert_close(operator.data_of(JPEG(70).A(decoded)), y)
    # A file holds whole numbers; JPEG's 0 is grey level 128, network 0 is 127.5.
    step = float(JPEG(70).tables(1)[0, 0, 0])
    in_file = y[:, 0, ..., 0, 0] - 8 * 0.5 / step
    torch.testing.assert_close(in_file, in_file.round(), atol=1e-9, rtol=0)


def test_a_mosaic_is_bayers():
    x = normal(*ODD)
    y = Mosaic().A(x)
    assert y.shape == (2, 1, 17, 23)
    assert torch.equal(y[:, 0, 0::2, 0::2], x[:, 0, 0::2, 0::2])
    assert torch.equal(y[:, 0, 0::2, 1::2], x[:, 1, 0::2, 1::2])
    assert torch.equal(y[:, 0, 1::2, 0::2], x[:, 1, 1::2, 0::2])
    assert torch.equal(y[:, 0, 1::2, 1::2], x[:, 2, 1::2, 1::2])
    assert torch.equal(Mosaic().A(Mosaic().A_adjoint(y)), y)


def test_a_mosaics_letters_run_row_by_row():
    x, y = normal(1, 3, 4, 4), Mosaic("GRBG").A(normal(1, 3, 4, 4))
    assert torch.equal(y[:, 0, 0::2, 1::2], x[:, 0, 0::2, 1::2])
    assert torch.equal(y[:, 0, 1::2, 0::2], x[:, 2, 1::2, 0::2])


def test_each_coil_is_a_fourier_measurement_of_what_it_sees():
    mask, maps, x = coin(2, 1, 1, 23), coil_maps(), normal(2, 2, 17, 23)
    y = MultiCoil(mask, maps).A(x)
    image = x[:, 0].numpy() + 1j * x[:, 1].numpy()
    for j in range(3):
        expected = np.fft.fft2(maps[0, j].numpy() * image, norm="ortho") * mask[:, 0].numpy()
        assert np.allclose(y[:, j].numpy(), expected, rtol=1e-12)


def test_one_coil_of_sensitivity_one_is_the_single_coil_operator():
    mask, x = coin(2, 1, 1, 23), normal(2, 2, 17, 23)
    alone = Fourier(mask, channels=2)
    coil = MultiCoil(mask, torch.ones(1, 1, 17, 23, dtype=torch.complex64))
    assert torch.allclose(coil.A(x), alone.A(x), rtol=1e-13)
    assert torch.allclose(coil.A_adjoint(coil.A(x)), alone.normal(x), rtol=1e-13)


def test_fourier_is_numpys_unitary_transform_masked():
    mask, x = coin(2, 1, 1, 23), normal(2, 2, 17, 23)
    y = Fourier(mask, channels=2).A(x)
    image = x[:, 0].numpy() + 1j * x[:, 1].numpy()
    expected = np.fft.fft2(image, norm="ortho") * mask[:, 0].numpy()
    assert np.allclose(y[:, 0].numpy(), expected, rtol=1e-12)


def test_fourier_of_a_real_image_is_its_complex_self_with_no_imaginary_part():
    mask, x = coin(2, 1, 1, 23), normal(2, 1, 17, 23)
    both = torch.cat([x, torch.zeros_like(x)], dim=1)
    real, complex_ = Fourier(mask, channels=1), Fourier(mask, channels=2)
    assert torch.allclose(real.A(x), complex_.A(both), rtol=1e-13)
    y = complex_.A(normal(2, 2, 17, 23, seed=8))
    assert torch.allclose(real.A_adjoint(y), complex_.A_adjoint(y)[:, :1], rtol=1e-13)


def test_full_fourier_keeps_energy():
    x = normal(2, 2, 17, 23)
    y = Fourier(torch.ones(1, 1, 1, 1, dtype=torch.bool), channels=2).A(x)
    assert torch.allclose(inner(y, y), inner(x, x), rtol=1e-13)


def test_mask_keeps_what_it_measures_and_zeroes_the_rest():
    mask, x = Mask(coin(2, 1, 17, 23)), normal(*ODD)
    assert np.array_equal(mask.A(x).numpy(), np.where(mask.mask.numpy(), x.numpy(), 0.0))


def test_sparse_is_the_dense_product():
    operator, x = sparse(scale=0.03), normal(*ODD)
    dense = torch.from_numpy(operator.matrix.toarray()).double()
    expected = 0.03 * (x.reshape(6, -1) @ dense.T).reshape(2, 3, 5, 6)
    assert torch.allclose(operator.A(x), expected, rtol=1e-12)


def test_sparse_takes_read_only_memory_mapped_arrays(tmp_path):
    operator = sparse()
    mapped = []
    for side, matrix in enumerate((operator.matrix, operator.transpose)):
        for name in ("data", "indices", "indptr"):
            np.save(tmp_path / f"{name}{side}.npy", getattr(matrix, name))
        parts = [
            np.load(tmp_path / f"{n}{side}.npy", mmap_mode="r")
            for n in ("data", "indices", "indptr")
        ]
        mapped.append(type(matrix)(tuple(parts), shape=matrix.shape, copy=False))
    again = Sparse(mapped[0], mapped[1], (17, 23), (5, 6))
    x = normal(*ODD, dtype=torch.float32)
    assert torch.equal(again.A(x), operator.A(x))
    assert np.shares_memory(again.matrix.data, mapped[0].data)


def test_stack_splits_into_its_parts():
    x = normal(2, 3, 15, 21)
    pool, blur = Pool(3), Blur(lopsided_kernel(), (15, 21))
    stack = Stack([pool, blur], (3, 15, 21))
    first, second = stack.split(stack.A(x))
    assert torch.equal(first, pool.A(x))
    assert torch.equal(second, blur.A(x))


def test_stack_refuses_real_beside_complex_data():
    with pytest.raises(ValueError, match="not both"):
        Stack([Identity(), Fourier(coin(1, 1, 17, 23), channels=1)], (1, 17, 23))


def test_compose_is_one_after_the_other():
    x, blur = normal(2, 3, 15, 21), Blur(lopsided_kernel(), (15, 21))
    assert torch.equal(Compose(Pool(3), blur).A(x), Pool(3).A(blur.A(x)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask(torch.ones(1, 1, 4, 4)), "boolean"),
        (lambda: Fourier(coin(1, 1, 4, 4), channels=3), "1 .real. or 2"),
        (lambda: Fourier(coin(1, 1, 4, 4), channels=2).A(normal(1, 1, 4, 4)), "expected 2"),
        (lambda: Blur(lopsided_kernel(), (4, 4)).A(normal(1, 1, 4, 5)), "built for"),
        (lambda: Pool(0), "factor"),
        (lambda: VaryingBlur(lopsided_kernel(), (4, 4)), "kernels must be real"),
        (lambda: VaryingBlur(node_kernels(), (4, 4)).A(normal(1, 1, 4, 5)), "built for"),
        (lambda: Downsample.bicubic(3, (15, 22)), "15 x 22 pixels do not divide by 3"),
        (lambda: Downsample(bicubic_kernel(3), 4, (16, 16)), "give even sides"),
        (lambda: JPEGCoefficients(0, (8, 8)), "quality"),
        (lambda: JPEGCoefficients(9, (8, 9)), "do not divide"),
        (lambda: JPEGCoefficients(9, (8, 8)).A(normal(1, 2, 8, 8)), "applied to"),
        (lambda: JPEGCoefficients(9, (8, 8)).A(normal(1, 3, 8, 16)), "applied to"),
        (lambda: Mosaic("RGBX"), "four letters"),
        (lambda: Mosaic().A(normal(1, 1, 4, 4)), "expected 3"),
        (lambda: MultiCoil(torch.ones(1, 1, 4, 4), coil_maps()), "boolean"),
        (lambda: MultiCoil(coin(1, 1, 4, 4), coil_maps().real), "must be complex"),
        (lambda: MultiCoil(coin(1, 1, 17, 23), coil_maps()).A(normal(*ODD)), "expected 2"),
        (lambda: sparse().A(normal(1, 1, 17, 24)), "expected"),
        (lambda: Sparse(sparse().matrix, sparse().matrix, (17, 23), (5, 6)), "do not map"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_cropped_blur_is_what_scipy_convolves_of_the_larger_scene():
    """Off-centre in the canvas, a kernel of an even and an odd side: nothing wraps round."""
    scene, kernel = normal(1, 1, 17, 23), lopsided_kernel()
    operator = CroppedBlur(kernel, (13, 16), (1, 4), (17, 23))
    blurred = signal.convolve2d(scene[0, 0].numpy(), kernel.numpy(), mode="full")
    # The kernel's centre, (2, 3), is at the pixel: rows 1 .. 13 of the scene are 3 .. 15 of that.
    expected = torch.from_numpy(blurred[1 + 2 : 14 + 2, 4 + 3 : 20 + 3])
    torch.testing.assert_close(operator.A(scene)[0, 0], expected)
    assert torch.equal(operator.crop(operator.grow(expected)), expected)


@pytest.mark.parametrize(
    ("shape", "margin"),
    [((14, 16), (1, 4)), ((13, 17), (1, 4)), ((13, 16), (0, 4)), ((13, 16), (1, 2))],
)
def test_a_canvas_round_which_a_datum_would_see_is_refused(shape, margin):
    # Rows: 1 before, 2 behind; columns: 3 and 3.
    with pytest.raises(ValueError, match="leaves less than"):
        CroppedBlur(lopsided_kernel(), shape, margin, (16, 22))
    CroppedBlur(lopsided_kernel(), (13, 16), (1, 3), (16, 22))


def test_pictures_of_another_size_are_refused():
    operator = CroppedBlur(lopsided_kernel(), (13, 16), (1, 3), (16, 22))
    with pytest.raises(ValueError, match="pictures of"):
        operator.A_adjoint(normal(1, 1, 12, 16))


def test_moving_to_a_device_reaches_nested_operators():
    mask = Mask(coin(2, 1, 15, 21))
    moved = Compose(mask, Blur(lopsided_kernel(), (15, 21))).to("meta")
    assert moved.outer.mask.device.type == moved.inner.transfer.device.type == "meta"
    assert mask.mask.device.type == "cpu"


DEVICES = [
    "meta",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
ON_DEVICES = {
    "identity": (Identity, (2, 3, 16, 24)),
    "mask": (lambda: Mask(coin(2, 1, 16, 24)), (2, 3, 16, 24)),
    "mosaic": (Mosaic, (2, 3, 16, 24)),
    "blur": (lambda: Blur(lopsided_kernel(), (16, 24)), (2, 3, 16, 24)),
    "cropped-blur": (
        lambda: CroppedBlur(lopsided_kernel(), (11, 13), (2, 5), (16, 24)),
        (2, 3, 16, 24),
    ),
    "varying-blur": (lambda: VaryingBlur(node_kernels(), (16, 24)), (2, 3, 16, 24)),
    "pool": (lambda: Pool(4), (2, 3, 16, 24)),
    "jpeg-coefficients": (lambda: JPEGCoefficients(10, (16, 24)), (2, 3, 16, 24)),
    "downsample": (lambda: Downsample.bicubic(4, (16, 24)), (2, 3, 16, 24)),
    "fourier": (lambda: Fourier(coin(2, 1, 1, 24), channels=2), (2, 2, 16, 24)),
    "multi-coil": (
        lambda: MultiCoil(coin(2, 1, 1, 24), coil_maps(size=(16, 24))),
        (2, 2, 16, 24),
    ),
    "compose": (
        lambda: Compose(Pool(4), Blur(lopsided_kernel(), (16, 24))),
        (2, 3, 16, 24),
    ),
    "sparse": (lambda: sparse(shape=(16, 24)), (2, 3, 16, 24)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ON_DEVICES)
def test_operators_stay_on_the_device_and_in_the_precision_of_their_argument(name, device):
    if device == "meta" and name == "sparse":
        pytest.skip("torch has no sparse product without values")
    make, shape = ON_DEVICES[name]
    operator, x = make(), normal(*shape, dtype=torch.float32)
    y, moved = operator.A(x), operator.to(device)
    y_there = moved.A(x.to(device))
    back = moved.A_adjoint(y.to(device))
    assert (y_there.device.type, y_there.dtype, y_there.shape) == (device, y.dtype, y.shape)
    assert (back.device.type, back.dtype, back.shape) == (device, x.dtype, x.shape)
    if device == "cuda":
        torch.testing.assert_close(y_there.cpu(), y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(back.cpu(), operator.A_adjoint(y), rtol=1e-4, atol=1e-5)


def test_adjoint_gap_sums_in_double_precision():
    x = normal(1, 1, 64, 64, dtype=torch.float32)
    assert adjoint_gap(Identity(), x, x) < 1e-14


def test_operators_without_tensors_move_as_they_are():
    for operator in (JPEG(30), Saturation(), PhaseRetrieval((4, 4))):
        assert operator.to("meta") is operator


class Module(torch.nn.Module):
    """A foreign operator, as deepinv's physics are."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.full((1,), 2.0))

    def A(self, x):
        return self.gain * x

    def A_adjoint(self, y):
        return self.gain * y


def test_foreign_modules_move_with_the_operator_that_holds_them():
    foreign = Module()
    for whole in (Compose(Pool(2), foreign), Stack([foreign, Pool(2)], (1, 4, 4))):
        moved = whole.to("meta")
        part = moved.inner if isinstance(moved, Compose) else moved.operators[0]
        assert part.gain.device.type == "meta"
        assert foreign.gain.device.type == "cpu"
        assert moved.A(torch.zeros(1, 1, 4, 4, device="meta")).device.type == "meta"


@pytest.mark.parametrize("device", DEVICES)
def test_operators_on_a_device_are_stacked_there(device):
    rows = [Compose(Mask(coin(1, 1, 4, 6)).to(device), Pool(1)), Module().to(device)]
    for operators in (rows, rows[1:]):
        stack = Stack(operators, (1, 4, 6))
        assert stack.shapes == ((1, 4, 6),) * len(operators)
        assert stack.A(torch.zeros(1, 1, 4, 6, device=device)).device.type == device


MEASURED = {
    "mask": (lambda: Mask(coin(2, 1, 6, 8)), (2, 3, 6, 8)),
    "fourier": (lambda: Fourier(coin(2, 1, 1, 8), channels=2), (2, 2, 6, 8)),
    "multi-coil": (lambda: MultiCoil(coin(2, 1, 1, 8), coil_maps(size=(6, 8))), (2, 2, 6, 8)),
    "compose": (lambda: Compose(Mask(coin(2, 1, 3, 4)), Pool(2)), (2, 3, 6, 8)),
    "stack": (lambda: Stack([Pool(2), Mask(coin(1, 1, 6, 8))], (3, 6, 8)), (2, 3, 6, 8)),
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_not_measured_may_be_anything(name):
    make, shape = MEASURED[name]
    operator, x = make(), normal(*shape)
    y = operator.A(x)
    missing = operator.measured(torch.ones_like(y)) == 0
    assert 0 < int(missing.sum()) < missing.numel()
    assert not bool(y[missing].abs().any())
    broken = y.masked_fill(missing, float("nan"))
    assert torch.equal(operator.measured(broken), y)
    assert torch.equal(operator.A_adjoint(broken), operator.A_adjoint(y))
