"""Nonlinear operators: gradients, JPEG against Pillow, and DAPS against each one's baseline."""

import io

import numpy as np
import pytest
import skimage.data
import torch
from dense import GaussianPrior
from PIL import Image
from solver_kit import DRAWS, normal, run

from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import JPEG, PhaseRetrieval, Saturation
from diffusion_core.posterior import make_solver
from diffusion_core.posterior.conditional import misfit_gradient
from diffusion_core.posterior.run import Counted
from diffusion_core.protocols import LinearOperator, NonlinearOperator, UnsuitedError

SIZE = (24, 24)
OPERATORS = {
    "saturation": Saturation(gain=2.5, low=-0.9, high=0.7),
    "phase": PhaseRetrieval(SIZE),
    "jpeg": JPEG(quality=10),
}


class SmoothPrior(GaussianPrior):
    """Gaussian images with structure over several pixels, std about .4."""

    def power(self, log_f):
        f = log_f.exp()
        return torch.stack([26.0 / (1.0 + (f / 0.06) ** 2) ** 3 + 2e-4] * self.channels)


def images(num, channels=1, stream=1, size=SIZE):
    prior = SmoothPrior(size, channels, mean=0.0)
    white = normal(num, channels, *size, stream=stream)
    root = torch.fft.rfft2(white) * prior.grid_power()[0].sqrt()
    return prior, torch.fft.irfft2(root, s=size)


def gradient_gap(operator, x, y):
    """Largest relative gap between the gradient and central differences along five directions."""
    noise, calls = GaussianNoise(0.5), Counted(lambda x, s: x, operator)
    gradient = misfit_gradient(calls, x, y, noise)
    assert calls.num_operator_calls == 2

    def misfit(at):
        return float((y - operator.A(at)).abs().square().sum() / (2 * 0.5**2))

    gaps = []
    for stream in range(20, 25):
        u = normal(*x.shape, stream=stream)
        h = 1e-6
        slope = (misfit(x + h * u) - misfit(x - h * u)) / (2 * h)
        gaps.append(abs(slope - float((gradient * u).sum())) / abs(slope))
    return max(gaps)


@pytest.mark.parametrize("name", OPERATORS)
def test_they_are_nonlinear_operators(name):
    assert isinstance(OPERATORS[name], NonlinearOperator)
    assert not isinstance(OPERATORS[name], LinearOperator)


@pytest.mark.parametrize("name", ["saturation", "phase"])
def test_the_gradient_is_that_of_the_misfit(name):
    operator = OPERATORS[name]
    x = 0.4 * normal(2, 1, *SIZE)
    y = operator.A(0.4 * normal(2, 1, *SIZE, stream=1))
    if name == "saturation":  # beyond the limits only data that are clipped as well
        Ax = operator.A(x)
        beyond = (Ax >= operator.high) | (Ax <= operator.low)
        assert float(beyond.double().mean()) > 0.1
        y = torch.where(beyond, Ax, y)
    assert gradient_gap(operator, x, y) < 1e-6


def test_beyond_its_limits_saturation_leads_back_to_data_within_them():
    operator = Saturation(gain=2.0, low=-0.9, high=0.7)
    x = torch.tensor([0.8, -0.8, 0.8, -0.8], dtype=torch.float64).reshape(1, 1, 2, 2)
    y = torch.tensor([0.1, -0.1, 0.7, -0.9], dtype=torch.float64).reshape(1, 1, 2, 2)
    calls = Counted(lambda x, s: x, operator)
    gradient = misfit_gradient(calls, x, y, GaussianNoise(1.0)).flatten().tolist()
    assert gradient == pytest.approx([2 * 0.6, -2 * 0.8, 0.0, 0.0])


def test_jpegs_gradient_is_that_of_its_linear_part():
    # Straight through the rounding: J is the identity on images within range.
    operator, x = JPEG(quality=20), 0.2 * normal(2, 3, 20, 13)
    y = operator.A(0.2 * normal(2, 3, 20, 13, stream=1))
    calls = Counted(lambda x, s: x, operator)
    gradient = misfit_gradient(calls, x, y, GaussianNoise(1.0))
    torch.testing.assert_close(gradient, operator.A(x) - y, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("quality", [5, 10, 50, 90])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_is_what_pillow_codes_and_decodes(mode, quality):
    # Stated tolerance, grey levels of 255: mean .4, and 95% of pixels within 2. libjpeg's DCT works
    # in integers, so that a coefficient near half a step may go the other way: a whole block then
    # differs, by up to half a step.
    picture = Image.fromarray(skimage.data.astronaut()[101:230, 180:301]).convert(mode)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=0)
    expected = np.atleast_3d(np.asarray(Image.open(file), dtype=np.float64))
    pixels = torch.from_numpy(np.atleast_3d(np.asarray(picture, dtype=np.float64)))
    x = pixels.permute(2, 0, 1)[None] / 127.5 - 1.0
    got = (127.5 * (JPEG(quality).A(x)[0].permute(1, 2, 0) + 1.0)).numpy()
    gap = np.abs(got - expected)
    lost = np.abs(expected - pixels.numpy()).mean()
    assert gap.mean() < min(0.4, 0.2 * lost)
    assert np.quantile(gap, 0.95) <= 2.0


def test_jpeg_quantises_by_pillows_tables():
    for quality in (1, 30, 50, 75, 100):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality, subsampling=0)
        ours = JPEG(quality).tables(3).numpy()
        for table, expected in Image.open(file).quantization.items():
            np.testing.assert_array_equal(ours[table].ravel(), expected)


def test_phase_retrieval_is_the_modulus_of_the_padded_transform():
    x = normal(1, 2, 5, 7)
    field = np.zeros((2, 15, 21))
    field[:, :5, :7] = x[0].numpy() + 0.3
    expected = np.abs(np.fft.fft2(field)) / np.sqrt(15 * 21)
    got = PhaseRetrieval((5, 7), oversampling=3, offset=0.3).A(x)
    np.testing.assert_allclose(got[0], expected, rtol=1e-10, atol=1e-12)
    # Its start has the right mean, though not the phases.
    operator = PhaseRetrieval((5, 7))
    start = operator.initial(operator.A(0.1 * x))
    torch.testing.assert_close(start.mean(dim=(2, 3)), 0.1 * x.mean(dim=(2, 3)))


def test_bad_parameters_are_refused():
    for make in (
        lambda: Saturation(gain=0.0),
        lambda: Saturation(low=1.0, high=0.0),
        lambda: PhaseRetrieval((4, 4), oversampling=0),
        lambda: JPEG(quality=0),
        lambda: JPEG(10).A(torch.zeros(1, 2, 8, 8)),
        lambda: PhaseRetrieval((4, 4)).A(torch.zeros(1, 1, 8, 8)),
    ):
        with pytest.raises(ValueError, match=r"must be|needs|takes|applied"):
            make()


def psnr(x, truth):
    return float((10 * (4.0 / (x - truth).square().mean(dim=(1, 2, 3))).log10()).mean())


def error_reduction(y, operator, num_steps):
    """Gerchberg-Saxton / Fienup 1978: the classical baseline of phase retrieval, from noise."""
    h, w = operator.shape
    field = normal(*y.shape, stream=5).abs()
    for _ in range(num_steps):
        spectrum = torch.fft.fft2(field, norm="ortho")
        image = torch.fft.ifft2(y * torch.exp(1j * spectrum.angle()), norm="ortho").real
        field = torch.zeros_like(image)
        field[..., :h, :w] = image[..., :h, :w].clamp_min(0.0)
    return field[..., :h, :w] - operator.offset


DRAWS_PER_IMAGE = 8


def measured(name, sigma_y):
    """One image, and its data once a draw."""
    operator = OPERATORS[name]
    prior, truth = images(1, stream=2)
    Ax = operator.A(truth)
    noise = sigma_y * DRAWS.normal(0, Ax, 11)
    if name == "saturation":
        y = operator.A(truth + noise / operator.gain)
    else:
        y = Ax if name == "jpeg" else Ax + noise
    return operator, prior, truth, y.expand(DRAWS_PER_IMAGE, -1, -1, -1)


def settled(x, operator, y):
    """Mean of the half of the runs with the least misfit, half turns turned to the best of them."""
    order = (operator.A(x) - y).square().sum(dim=(1, 2, 3)).argsort()
    best = x[order[0]]
    turned = [min((r, r.flip((-2, -1))), key=lambda r: float((r - best).norm())) for r in x[order]]
    return torch.stack(turned[: len(x) // 2]).mean(dim=0, keepdim=True)


def either_way(x, truth):
    """PSNR of an image or of its half turn, which has the same modulus."""
    return max(psnr(x, truth), psnr(x.flip((-2, -1)), truth))


@pytest.mark.parametrize("name", OPERATORS)
def test_daps_restores_better_than_the_baseline(name):
    sigma_y = 0.03
    operator, prior, truth, y = measured(name, sigma_y)
    sigmas, options = power_sigmas(25, 1.0, 0.03, 3.0), {"num_ode_steps": 1}
    options |= {"spread": "posterior", "sigma_data": 0.4, "langevin_steps": 30}
    got = run("daps", prior.denoise, operator, y, GaussianNoise(sigma_y), sigmas, **options)
    assert got.num_denoiser_calls == 25
    if name == "phase":
        reduced = error_reduction(y, operator, 200)
        baseline = either_way(settled(reduced, operator, y), truth)
        restored = either_way(settled(got.x, operator, y), truth)
    else:
        baseline = psnr(operator.initial(y[:1]), truth)
        restored = psnr(got.x.mean(dim=0, keepdim=True), truth)
    gain = {"saturation": 1.5, "phase": 4.0, "jpeg": 0.5}  # decibels
    assert restored > baseline + gain[name], f"{restored:.1f} dB, baseline {baseline:.1f} dB"


@pytest.mark.parametrize("solver", ["split-gibbs", "red-diff", "dps"])
def test_the_other_solvers_for_nonlinear_operators_take_them(solver):
    for name, operator in OPERATORS.items():
        prior, truth = images(2)
        y, sigmas = operator.A(truth), power_sigmas(4, 0.5, 0.05, 3.0)
        options = {"langevin_steps": 5} if solver == "split-gibbs" else {}
        made = make_solver(solver, None, options)
        got = made(prior.denoise, operator, y, GaussianNoise(0.05), sigmas, DRAWS)
        assert got.x.shape == truth.shape, name
        assert bool(got.x.isfinite().all()), name
        assert got.num_operator_calls > 0


@pytest.mark.parametrize("solver", ["diffpir", "dds", "kriging", "ddrm", "ddnm", "pigdm"])
def test_solvers_for_linear_operators_refuse_others_in_a_sentence(solver):
    prior, truth = images(1)
    sigmas = power_sigmas(2, 0.5, 0.05, 3.0)
    made = make_solver(solver, prior.table(sigmas), {})
    operator = Saturation()
    with pytest.raises(UnsuitedError, match=r"Saturation has no adjoint.*for\s+covprox"):
        made(prior.denoise, operator, operator.A(truth), GaussianNoise(0.1), sigmas, DRAWS)
    exact = make_solver("daps", None, {"data_draw": "exact"})
    with pytest.raises(UnsuitedError, match="no adjoint"):
        exact(prior.denoise, operator, operator.A(truth), GaussianNoise(0.1), sigmas, DRAWS)
