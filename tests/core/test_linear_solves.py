"""Every data step against a dense solve: c != 1, S != 1, real and complex, exact and noisy data."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from dense import dense_gain, flat, level_covariance, matrix_of
from scipy.sparse import csr_array

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.operators import (
    Blur,
    Compose,
    CroppedBlur,
    Downsample,
    Fourier,
    Identity,
    Mask,
    Mosaic,
    MultiCoil,
    Pool,
    Sparse,
    Stack,
    VaryingBlur,
)
from diffusion_core.posterior.cg import conjugate_gradient
from diffusion_core.posterior.gaussian import white_covariance
from diffusion_core.posterior.linear import Accuracy, data_step
from diffusion_core.posterior.linear.base import LEAST_BLUR_VARIANCE
from diffusion_core.posterior.linear.multi_coil import coil_symbol

SIZE = (32, 32)
EXACTLY = Accuracy(tolerance=1e-10, max_steps=4000)
DRAWS = KeyedDraws(0, "linear")


def normal(*shape, stream=0):
    return DRAWS.normal(0, torch.empty(shape, dtype=torch.float64), stream)


def smooth_image(batch, channels, size):
    """Images with flat parts and edges, different in each batch element, so that S varies."""
    rows, columns = (torch.linspace(0, 1, n, dtype=torch.float64) for n in size)
    image = torch.stack(
        [
            torch.tanh(30 * (rows[:, None] - 0.3 - 0.2 * b)) * torch.sin(7 * columns) ** (1 + c)
            for b in range(batch)
            for c in range(channels)
        ]
    )
    return image.reshape(batch, channels, *size)


def projector(size, num_views):
    """Parallel rays by linear interpolation: a few views, enough for the algebra."""
    h, w = size
    num_bins = int(np.ceil(np.hypot(h, w))) + 2
    x, y = np.meshgrid(np.arange(w) - (w - 1) / 2, np.arange(h) - (h - 1) / 2)
    rows, columns, values = [], [], []
    for view in range(num_views):
        theta = np.pi * view / num_views
        s = (x * np.cos(theta) + y * np.sin(theta)).ravel() + (num_bins - 1) / 2
        low = np.floor(s).astype(int)
        for bins, weight in ((low, low + 1 - s), (low + 1, s - low)):
            rows.append(view * num_bins + bins)
            columns.append(np.arange(h * w))
            values.append(weight)
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    matrix = csr_array(entries, shape=(num_views * num_bins, h * w))
    return Sparse(matrix, csr_array(matrix.T), size, (num_views, num_bins), scale=0.05)


def random_mask(*shape, share=0.4, stream=5):
    return normal(*shape, stream=stream) < torch.distributions.Normal(0.0, 1.0).icdf(
        torch.tensor(share)
    )


def kernel():
    taps = torch.exp(-0.5 * (torch.arange(-4, 5, dtype=torch.float64) / 1.5) ** 2)
    skewed = torch.outer(taps, taps.roll(1))
    return skewed / skewed.sum()


def lines_mask(size):
    return random_mask(1, 1, size[0], 1).expand(1, 1, *size).contiguous()


def varying_blur(size):
    """Narrow kernels on the left, wide and skewed ones on the right."""
    kernels = torch.zeros(2, 3, 9, 9, dtype=torch.float64)
    kernels[:, 0, 4, 4] = 1.0
    kernels[:, 1], kernels[:, 2] = kernel(), kernel().roll(2, 0)
    return VaryingBlur(kernels, size)


def coils(size, num_coils=4):
    """Smooth sensitivities of coils round the image, and every other line or so."""
    rows, columns = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in size)
    turns = torch.arange(num_coils) * 2 * torch.pi / num_coils
    y, x = torch.sin(turns)[:, None, None], torch.cos(turns)[:, None, None]
    distance = (rows[:, None] - y) ** 2 + (columns - x) ** 2
    maps = torch.polar(torch.exp(-0.7 * distance), distance + turns[:, None, None])
    return MultiCoil(lines_mask(size), maps[None])


def cropped_blur(size):
    """A picture not in the middle of its canvas."""
    h, w = size
    return CroppedBlur(kernel(), (h - 9, w - 8), (5, 4), size)


OPERATORS = {
    "identity": (lambda size: Identity(), 3),
    "mask": (lambda size: Mask(random_mask(2, 1, *size)), 3),
    "mask-by-channel": (lambda size: Mask(random_mask(1, 3, *size)), 3),
    "blur": (lambda size: Blur(kernel(), size), 3),
    "pool": (lambda size: Pool(4), 3),
    "fourier-real": (lambda size: Fourier(lines_mask(size), 1), 1),
    "fourier-complex": (lambda size: Fourier(lines_mask(size), 2), 2),
    "projector": (lambda size: projector(size, 7), 1),
    "mosaic": (lambda size: Mosaic(), 3),
    "cropped-blur": (cropped_blur, 3),
    "varying-blur": (varying_blur, 1),
    "bicubic": (lambda size: Downsample.bicubic(4, size), 3),
    "multi-coil": (coils, 2),
    "stacked": (
        lambda size: Stack([Pool(4), Mask(random_mask(1, 1, *size, share=0.1))], (1, *size)),
        1,
    ),
    "composed": (lambda size: Compose(Pool(4), Blur(kernel(), size)), 1),
}


SMALLER = {"multi-coil": (16, 16)}  # several data a pixel: a dense solve of 32^2 takes too long


def run_step(name, variance, local, size=SIZE, inflation=3.0, accuracy=EXACTLY):
    """K r by the data step, for a batch of two slices whose S differ."""
    make, channels = OPERATORS[name]
    if channels == 3:
        size = (size[0] // 2, size[1] // 2)
    elif size == SIZE:
        size = SMALLER.get(name, size)
    operator = make(size)
    mu = smooth_image(2, channels, size)
    step = data_step(operator)
    covariance = level_covariance(size, channels, local=local).on(
        mu, inflation, step.padding, local=local
    )
    residual = operator.A(mu + normal(2, channels, *size, stream=1))
    if torch.is_tensor(variance) and variance.ndim == 4:
        rows, columns = residual.shape[-2:]
        variance = variance[..., :rows, :columns].expand(residual.shape)
    update = step(covariance, torch.as_tensor(variance, dtype=torch.float64), residual, accuracy)
    return update, operator, covariance, residual


def update_and_oracle(name, variance, *, local, size=SIZE, inflation=3.0):
    """K r by the data step and by dense algebra, for a batch of two, and the Update."""
    update, operator, covariance, residual = run_step(name, variance, local, size, inflation)
    channels, size = update.delta.shape[1], update.delta.shape[2:]
    A = matrix_of(operator.A, (channels, *size)) if name != "mask" else None
    full = torch.as_tensor(variance, dtype=torch.float64).expand(residual.real.shape)
    expected = []
    for b in range(2):
        std = None if covariance.std is None else covariance.std[b : b + 1]
        one = type(covariance)(covariance.spectrum, covariance.basis, std, covariance.canvas)
        Sigma = matrix_of(one.apply, (channels, *size))
        if name == "mask":
            A = torch.diag(operator.mask[b].expand(channels, -1, -1).flatten().double())
        R = full[b].flatten()
        R = torch.cat([R, R]) if residual.is_complex() else R
        expected.append(dense_gain(A, Sigma, R, flat(residual)[b][:, None])[:, 0])
    return update.delta.flatten(1), torch.stack(expected), update


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_noisy_data_agree_with_a_dense_solve(name, local):
    got, expected, _ = update_and_oracle(name, 0.04**2, local=local)
    assert relative(got, expected) < 1e-6


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize(
    "name", ["mask", "mask-by-channel", "mosaic", "pool", "bicubic", "fourier-real"]
)
def test_exact_data_agree_with_a_dense_solve(name, local):
    got, expected, _ = update_and_oracle(name, 0.0, local=local, size=(24, 24))
    assert relative(got, expected) < 1e-6


@pytest.mark.parametrize("name", ["blur", "pool", "bicubic", "fourier-real", "fourier-complex"])
def test_stationary_priors_are_solved_in_closed_form(name):
    assert run_step(name, 0.04**2, local=False)[0].num_steps == 0


EACH_SLICE = ["mask", "mosaic", "blur", "varying-blur", "pool", "bicubic"]
EACH_SLICE += ["fourier-real", "multi-coil", "projector", "cropped-blur"]


@pytest.mark.parametrize("name", EACH_SLICE)
def test_each_slice_may_have_its_own_noise(name):
    variance = torch.tensor([0.03, 0.2], dtype=torch.float64).reshape(2, 1, 1, 1) ** 2
    got, expected, _ = update_and_oracle(name, variance, local=True)
    assert relative(got, expected) < 1e-6


EACH_DATUM = ["mask", "mosaic", "projector", "blur", "varying-blur", "bicubic", "fourier-complex"]
EACH_DATUM += ["multi-coil", "cropped-blur"]


@pytest.mark.parametrize("name", EACH_DATUM)
def test_each_datum_may_have_its_own_noise(name):
    make, channels = OPERATORS[name]
    size = (16, 16) if channels == 3 else SMALLER.get(name, SIZE)
    like = make(size).A(torch.zeros(2, channels, *size, dtype=torch.float64)).real
    variance = 0.05**2 * torch.exp(0.7 * DRAWS.normal(0, like, 8))
    got, expected, _ = update_and_oracle(name, variance, local=True)
    assert relative(got, expected) < 1e-6


ODD = [(name, (21, 27)) for name in ("blur", "varying-blur", "fourier-real", "fourier-complex")]
ODD += [
    ("cropped-blur", (21, 27)),
    ("projector", (21, 27)),
    ("mosaic", (22, 26)),
    ("multi-coil", (13, 15)),
]


@pytest.mark.parametrize(("name", "size"), ODD)
def test_odd_sizes(name, size):
    got, expected, _ = update_and_oracle(name, 0.04**2, local=True, size=size)
    assert relative(got, expected) < 1e-6


@pytest.mark.parametrize("name", ["identity", "mask", "pool", "blur", "fourier-complex"])
@pytest.mark.parametrize("sigma_y", [0.0, 0.05])
def test_white_covariances_are_solved_in_closed_form(name, sigma_y):
    if name == "blur" and sigma_y == 0:
        sigma_y = 0.01  # deblurring exact data is ill-posed
    make, channels = OPERATORS[name]
    operator = make((16, 16))
    residual = operator.A(normal(2, channels, 16, 16))
    white = white_covariance(0.09, torch.zeros(1, channels, 16, 16, dtype=torch.float64))
    variance = torch.tensor(sigma_y**2, dtype=torch.float64)
    update = data_step(operator)(white, variance, residual, EXACTLY)
    assert update.num_steps == 0
    # argmin |r - A z|^2 / sigma_y^2 + |z|^2 / .09 is a zero of its gradient (exact data: A z = r).
    gap = residual - operator.A(update.delta)
    if sigma_y == 0:
        assert float(gap.abs().max()) < 1e-12
    else:
        gradient = operator.A_adjoint(gap) / sigma_y**2 - update.delta / 0.09
        assert float(gradient.abs().max()) < 1e-9


@pytest.mark.parametrize("name", ["mask", "fourier-real", "projector"])
def test_the_result_does_not_depend_on_the_rest_of_the_batch(name):
    make, channels = OPERATORS[name]
    operator = make(SIZE)
    mu = smooth_image(2, channels, SIZE)
    if name == "mask":
        operator = Mask(operator.mask[:1])
    residual = operator.A(normal(2, channels, *SIZE))
    residual[1] *= 100.0
    step, level = data_step(operator), level_covariance(SIZE, channels, local=True)

    def run(part):
        covariance = level.on(mu[part], 1.0, step.padding)
        return step(covariance, torch.tensor(0.01), residual[part], Accuracy(1e-3, 60)).delta

    torch.testing.assert_close(run(slice(0, 2))[:1], run(slice(0, 1)), rtol=1e-10, atol=1e-12)


def test_a_loose_tolerance_is_reported():
    loose = Accuracy(tolerance=1e-12, max_steps=3)
    update, *_ = run_step("projector", 0.04**2, local=True, accuracy=loose)
    assert update.num_steps == 3
    assert update.relative_residual > 1e-3


def test_solves_converge_in_few_steps():
    # What the defaults rely on; a broken preconditioner still converges, but slowly.
    most = {"projector": 20, "fourier-real": 7, "blur": 6, "pool": 6, "mask": 20}
    most |= {"mosaic": 20, "varying-blur": 22, "bicubic": 6, "multi-coil": 20, "cropped-blur": 60}
    for name, steps in most.items():
        update, *_ = run_step(name, 0.04**2, local=True, accuracy=Accuracy(1e-3, 500))
        assert update.num_steps <= steps, name


def test_a_cropped_blur_takes_as_few_steps_whether_the_scale_is_in_s_or_in_c():
    """43 steps; plain CG takes 155, a preconditioner for R itself 61, for a hundred R 54."""
    size = (64, 72)
    operator = CroppedBlur(kernel(), (56, 64), (4, 4), size)
    mu = smooth_image(2, 1, size)
    one = level_covariance(size, 1, local=True).on(mu, 3.0)
    other = replace(one, std=10 * one.std, spectrum=one.spectrum / 100)
    residual = operator.A(mu + normal(2, 1, *size, stream=1))
    solved = [
        data_step(operator)(c, torch.tensor(0.02**2), residual, Accuracy(1e-3, 500))
        for c in (one, other)
    ]
    assert all(update.num_steps <= 46 for update in solved)
    assert relative(solved[1].delta, solved[0].delta) < 1e-2  # of a solve to 1e-3


def test_the_coils_circulant_has_the_diagonal_of_the_normal_matrix_in_fourier():
    """T. Chan's: e(k)' A' A e(k) at every mode k, column by column of the matrix."""
    h, w = 5, 6
    maps = torch.complex(normal(1, 3, h, w, stream=2), normal(1, 3, h, w, stream=3))
    operator = MultiCoil(random_mask(1, 1, 1, w, share=0.5, stream=4), maps)
    modes = torch.fft.ifft2(torch.eye(h * w).reshape(-1, 1, h, w).to(maps.dtype), norm="ortho")
    seen = operator.A(torch.cat([modes.real, modes.imag], dim=1))
    expected = seen.abs().square().flatten(1).sum(dim=1).reshape(1, 1, h, w)
    torch.testing.assert_close(coil_symbol(operator), expected, rtol=1e-12, atol=1e-12)


def test_the_preconditioner_of_a_blur_that_does_not_vary_is_nearly_its_inverse():
    # Mixed by their shares instead of the shares' roots, the inverses take 7 steps.
    mu = smooth_image(1, 3, (20, 24))
    operator = VaryingBlur(kernel().expand(2, 3, 9, 9), (20, 24))
    covariance = level_covariance((20, 24), 3, local=False).on(mu, 2.0, local=False)
    variance = torch.tensor(0.04**2, dtype=torch.float64)
    update = data_step(operator)(covariance, variance, operator.A(mu), Accuracy(1e-2, 50))
    assert update.num_steps <= 5


# Conjugate gradients -----------------------------------------------------------------------------


def spd(n, stream):
    root = normal(n, n, stream=stream)
    return root @ root.T + 0.5 * torch.eye(n, dtype=torch.float64)


def test_cg_solves_a_batch_of_systems_each_with_its_own_scalars():
    matrices = torch.stack([spd(12, 1), 1e4 * spd(12, 2)])
    b = normal(2, 12)
    result = conjugate_gradient(
        lambda v: torch.einsum("bij,bj->bi", matrices, v), b, tolerance=1e-12, max_steps=60
    )
    torch.testing.assert_close(result.x, torch.linalg.solve(matrices, b), rtol=1e-8, atol=1e-12)
    assert result.relative_residual <= 1e-12


def test_cg_takes_complex_vectors_and_preconditioners():
    root = torch.complex(normal(9, 9), normal(9, 9, stream=1))
    H = root @ root.mH + torch.eye(9)
    b = torch.complex(normal(1, 9), normal(1, 9, stream=2))
    diagonal = H.diagonal().real
    result = conjugate_gradient(
        lambda v: v @ H.T, b, lambda v: v / diagonal, tolerance=1e-12, max_steps=100
    )
    torch.testing.assert_close(result.x[0], torch.linalg.solve(H, b[0]), rtol=1e-8, atol=1e-10)


def test_cg_ends_after_as_many_steps_as_there_are_eigenvalues():
    values = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64).repeat(5)
    result = conjugate_gradient(lambda v: values * v, normal(1, 15), tolerance=1e-10, max_steps=50)
    assert result.num_steps == 3


def test_cg_starts_where_it_is_told():
    H, b = spd(8, 3), normal(1, 8)
    solution = torch.linalg.solve(H, b[0])[None]
    result = conjugate_gradient(lambda v: v @ H.T, b, tolerance=1e-8, max_steps=50, start=solution)
    assert result.num_steps == 0
    zero = conjugate_gradient(lambda v: v @ H.T, torch.zeros_like(b), tolerance=0.1, max_steps=5)
    assert zero.num_steps == 0
    assert torch.equal(zero.x, torch.zeros_like(b))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_cg_never_takes_what_is_not_a_number_for_solved(bad):
    b = normal(2, 8)
    b[1, 3] = bad
    H = spd(8, 3)
    result = conjugate_gradient(lambda v: v @ H.T, b, tolerance=1e-10, max_steps=50)
    torch.testing.assert_close(result.x[0], torch.linalg.solve(H, b[0]), rtol=1e-8, atol=1e-10)
    assert bool(result.x[1].isnan().any())
    assert np.isnan(result.relative_residual)
    alone = conjugate_gradient(lambda v: v @ H.T, b[1:], tolerance=1e-10, max_steps=50)
    assert bool(alone.x.isnan().any())


# Exact data beside noisy ones ---------------------------------------------------------------------

EXACT_BESIDE = ["identity", "mask", "mosaic", "pool", "bicubic", "fourier-real"]


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", EXACT_BESIDE)
def test_exact_slices_stand_beside_noisy_ones(name, local):
    variance = torch.tensor([0.0, 0.05], dtype=torch.float64).reshape(2, 1, 1, 1) ** 2
    size = SMALLER.get(name, (24, 24))
    got, expected, update = update_and_oracle(name, variance, local=local, size=size)
    assert update.delta.isfinite().all()
    assert relative(got[0], expected[0]) < 1e-6
    assert relative(got[1], expected[1]) < 1e-6


@pytest.mark.parametrize("name", ["mask", "mosaic", "blur", "varying-blur", "cropped-blur"])
def test_exact_data_beside_noisy_ones_of_the_same_slice_have_the_least_variance(name):
    variance = torch.full((1, 1, 16, 16), 0.05**2, dtype=torch.float64)
    variance[..., :7] = 0.0
    size = (32, 32) if OPERATORS[name][1] == 3 else (16, 16)
    got, *_ = run_step(name, variance, True, size=size)
    floored, *_ = run_step(name, variance.clamp_min(LEAST_BLUR_VARIANCE), True, size=size)
    assert bool(got.delta.isfinite().all())
    assert relative(got.delta, floored.delta) < 1e-6


def test_a_smooth_filter_before_downsampling_does_not_blow_up_exact_data():
    taps = torch.exp(-0.5 * ((torch.arange(16) - 7.5) / 2.5) ** 2)
    operator = Downsample((kernel := torch.outer(taps, taps)) / kernel.sum(), 2, (32, 32))
    truth = smooth_image(1, 1, (32, 32)).float()
    residual = operator.A(truth)
    for local in (False, True):
        covariance = level_covariance((32, 32), 1, local=local).on(truth, 1.0, local=local)
        delta = data_step(operator)(covariance, torch.zeros(()), residual, EXACTLY).delta
        assert float(delta.abs().max()) < 2.0 * float(truth.abs().max())
        assert float((operator.A(delta) - residual).abs().max()) < 0.02


@pytest.mark.parametrize("name", ["blur", "pool", "bicubic", "fourier-real"])
def test_a_constant_variance_of_every_datum_is_one_variance(name):
    make, channels = OPERATORS[name]
    size = (16, 16) if channels == 3 else SIZE
    like = make(size).A(torch.zeros(2, channels, *size, dtype=torch.float64)).real
    each, one = (run_step(name, R, False)[0] for R in (torch.full_like(like, 0.01), 0.01))
    assert each.num_steps == 0
    assert torch.equal(each.delta, one.delta)


def test_the_coils_preconditioner_of_a_slice_knows_no_other_slice():
    # Modes that are hardly measured count as a thousandth of the slice's own best, .78 against 1.
    rows = torch.linspace(-1, 1, 16, dtype=torch.float64)[:, None]
    sensitivities = torch.exp(-2 * rows**2).expand(1, 1, 16, 16).to(torch.complex128)
    one = MultiCoil((torch.arange(16)[:, None] == 0).expand(1, 1, 16, 16), sensitivities)
    both = MultiCoil(torch.cat([one.mask, torch.ones_like(one.mask)]), sensitivities)
    mu, u = smooth_image(2, 2, (16, 16)), normal(2, 2, 16, 16)
    level, weight = (
        level_covariance((16, 16), 2, local=True),
        torch.full((1, 1, 1, 1), 1e5).double(),
    )
    alone = data_step(one)._preconditioner(level.on(mu[:1]), weight)(u[:1])
    beside = data_step(both)._preconditioner(level.on(mu), weight)(u)
    torch.testing.assert_close(beside[:1], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("sigma_y", [0.0, 0.05])
@pytest.mark.parametrize("name", sorted(set(OPERATORS) - {"projector"}))
def test_data_steps_run_where_their_tensors_are(name, sigma_y):
    make, channels = OPERATORS[name]
    operator, mu = make((16, 16)), smooth_image(2, channels, (16, 16)).float()
    residual = operator.A(mu + normal(2, channels, 16, 16, stream=1).float())
    level, found = level_covariance((16, 16), channels, local=True), []
    for device in ("cpu", "cuda"):
        step = data_step(operator.to(device))
        covariance = level.on(mu.to(device), 1.0, step.padding)
        R = torch.tensor(sigma_y**2, device=device)
        update = step(covariance, R, residual.to(device), Accuracy(1e-4, 30))
        assert update.delta.device.type == device
        found.append(update.delta.cpu())
    if sigma_y:
        torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("local", [False, True])
def test_a_mask_under_a_short_sighted_covariance_equals_a_dense_solve_in_fewer_steps(local):
    size, r = (24, 24), normal(1, 1, 24, 24, stream=2)
    mask = torch.ones(1, 1, *size)
    mask[..., 6:17, 6:17] = 0.0
    step = data_step(Mask(mask > 0))
    mu = smooth_image(1, 1, size)
    level = replace(level_covariance(size, 1, local=local), reach=12)
    covariance = level.on(mu, 3.0, step.padding, local=local)
    update = step(covariance, torch.tensor(0.05**2), mask * r, EXACTLY)
    Sigma = matrix_of(covariance.apply, (1, *size))
    A = torch.diag(mask.flatten().double())
    expected = dense_gain(A, Sigma, torch.full((24 * 24,), 0.05**2), (mask * r).reshape(-1, 1))
    assert relative(update.delta.flatten(), expected[:, 0]) < 1e-5
    single = step(replace(covariance, reach=None), torch.tensor(0.05**2), mask * r, EXACTLY)
    assert update.num_steps < single.num_steps
    beside = data_step(Mask(torch.cat([0.0 * mask, mask]) > 0))
    both = beside(covariance, torch.tensor(0.05**2), torch.cat([r, r]), EXACTLY).delta
    assert not both[0].any(), "nothing was measured there"
    torch.testing.assert_close(both[1:], update.delta)
