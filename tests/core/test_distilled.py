"""The student's chain against dense algebra: start, inputs, data steps; its network, tiles."""

import pytest
import torch
from dense import GaussianPrior, dense_gain, flat, matrix_of
from solver_kit import DRAWS, OPERATORS, SIZE, Dense, normal, pixels

from diffusion_core.networks.local_unet import LocalUNet
from diffusion_core.networks.precond import ConditionedDenoiser, Preconditioned
from diffusion_core.networks.student import NUM_INPUTS, StudentDenoiser, student_of
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.streams import seeded_initialisation
from diffusion_core.operators import Fourier, Mask
from diffusion_core.posterior import make_solver
from diffusion_core.posterior.distilled import DataTerm, Distilled
from diffusion_core.posterior.linear import data_step
from diffusion_core.posterior.run import Counted
from diffusion_core.protocols import UnsuitedError
from diffusion_core.tiles import tiled_denoiser

LEVELS = (0.4, 0.2, 0.1)
EXACTLY = {"tolerance": 1e-11, "start_tolerance": 1e-11, "max_steps": 4000}
NOISE = 0.15
INFLATION = (3.0, 1.0, 0.5)


def problem(name, batch=2):
    """(prior, operator, A as a matrix, y, diagonal of R)."""
    make, channels = OPERATORS[name]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    y = operator.A(prior.mean + 0.5 * normal(batch, channels, *SIZE, stream=4))
    y = y + NOISE * normal(*y.shape, stream=5)
    A = matrix_of(operator.A, (channels, *SIZE))
    return prior, operator, A, y, torch.full((A.shape[0],), NOISE**2, dtype=torch.float64)


def term_of(prior, operator, y, draws=DRAWS, **options):
    solver = Distilled(prior.table(LEVELS), LEVELS, **{**EXACTLY, **options})
    return DataTerm(solver, Counted(None, operator), y, GaussianNoise(NOISE), draws)


def columns(x):
    return x.flatten(1).T


def matrix_on(level, operator, like, c=1.0):
    """Sigma as a matrix: of a mask that of a larger canvas, cut to the image."""
    covariance = level.on(like, c, data_step(operator).padding)
    return matrix_of(covariance.apply, like.shape[1:])


def posterior(prior, operator, A, y, R):
    """Mean (b c h w) and covariance of Gaussian images given y."""
    mean = torch.full((len(y), prior.channels, *SIZE), prior.mean, dtype=torch.float64)
    P = matrix_on(prior.table(LEVELS).prior(), operator, mean)
    m = columns(mean) + dense_gain(A, P, R, flat(y).T - A @ columns(mean))
    return m.T.reshape(mean.shape), P - dense_gain(A, P, R, A @ P)


class Fixed:
    """A student that says what it was told to, level by level, and remembers what it was shown."""

    def __init__(self, *answers):
        self.answers, self.shown = list(answers), []

    def __call__(self, x, sigma):
        self.shown.append((x.clone(), sigma.clone()))
        answer = self.answers[len(self.shown) - 1]
        return torch.cat([answer, x[:, answer.shape[1] :]], dim=1)


@pytest.mark.parametrize("name", OPERATORS)
def test_each_estimate_is_brought_to_the_data_as_a_dense_solve_does(name):
    prior, operator, A, y, R = problem(name)
    table = prior.table(LEVELS)
    mus = [normal(2, prior.channels, *SIZE, stream=20 + k) for k in range(3)]
    student = Fixed(*mus)
    of_last = 0.7
    solver = Distilled(table, LEVELS, INFLATION, of_last, **EXACTLY)
    expected = []
    found = solver(student, operator, y, GaussianNoise(NOISE), torch.tensor(LEVELS), DRAWS)
    for level, (mu, c) in enumerate(zip(mus, [*INFLATION[:-1], of_last], strict=True)):
        Sigma = matrix_on(table.at(LEVELS[level]), operator, mu, c)
        gain = dense_gain(A, Sigma, R, flat(y).T - A @ columns(mu))
        expected.append((columns(mu) + gain).T.reshape(mu.shape))
    c = prior.channels
    for level in (1, 2):  # what the second and third evaluation begin with
        assert torch.allclose(student.shown[level][0][:, :c], expected[level - 1], atol=1e-6)
    assert torch.allclose(found.x, expected[2], atol=1e-6)
    assert found.num_denoiser_calls == 3
    scale = term_of(prior, operator, y).scale
    for level, (_, told) in zip(LEVELS, student.shown, strict=True):
        assert torch.allclose(told, level * scale)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_chain_starts_at_the_posterior_mean_of_gaussian_images(name):
    prior, operator, A, y, R = problem(name)
    mean, _ = posterior(prior, operator, A, y, R)
    assert torch.allclose(term_of(prior, operator, y).start, mean, atol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_student_is_told_how_well_each_pixel_is_determined(name):
    prior, operator, A, y, R = problem(name)
    told = term_of(prior, operator, y).inputs[:, :1]
    like = torch.zeros(1, prior.channels, *SIZE, dtype=torch.float64)
    variance = matrix_on(prior.table(LEVELS).prior(), operator, like).diagonal().mean()
    answer = A.T @ ((A @ torch.ones(A.shape[1], dtype=torch.float64)) / R)
    g = variance * answer.reshape(prior.channels, *SIZE).mean(dim=0)
    assert torch.allclose(told, (g / (1 + g.abs())).expand_as(told), atol=1e-4)


def test_a_mask_is_told_pixel_by_pixel():
    prior, operator, _, y, _ = problem("mask")
    told = term_of(prior, operator, y).inputs[:, 0]
    known = pixels()[0, 0].expand_as(told)
    assert (told[known] > 0.7).all()
    assert (told[~known] == 0).all()


@pytest.mark.parametrize("name", ["mask", "blur", "fourier", "dense"])
def test_the_draw_that_a_student_is_shown_has_the_covariance_of_the_start_s_error(name):
    prior, operator, A, y, R = problem(name, batch=1)
    _, P = posterior(prior, operator, A, y, R)
    num = 400
    many = y.expand(num, *y.shape[1:]).contiguous()
    term = term_of(prior, operator, many, start_tolerance=1e-4, max_steps=100)
    errors = term.inputs[:, 1 : 1 + prior.channels].flatten(1)
    found = errors.T @ errors / num
    # Of Gaussian samples the error of the sample covariance, in the Frobenius norm squared, is
    # (|P|^2 + (tr P)^2) / num.
    expected = ((P.square().sum() + P.trace() ** 2) / num).sqrt()
    assert (found - P).norm() < 1.3 * expected
    # The mean variance is known better, to (2 tr P^2 / num)^(1/2): that of the noise in it counts.
    apart = float(found.trace() - P.trace())
    assert abs(apart) < 4 * float((2 * P.square().sum() / num).sqrt())
    assert errors.mean().abs() < 5 * (P.sum() / num).sqrt() / P.shape[0]


def test_levels_are_as_large_as_the_start_is_wrong():
    prior, operator = GaussianPrior(SIZE), Mask(pixels())
    solver = Distilled(prior.table(LEVELS), LEVELS, **EXACTLY)
    y = operator.A(normal(100, 1, *SIZE))
    scales = {}
    for sigma_y in (1e-3, 0.05, 10.0):
        noise = GaussianNoise(sigma_y)
        term = DataTerm(solver, Counted(None, operator), y, noise, DRAWS)
        P = prior.table(LEVELS).prior()
        P = matrix_on(P, operator, y)
        A = matrix_of(operator.A, (1, *SIZE))
        R = torch.full((A.shape[0],), sigma_y**2, dtype=torch.float64)
        expected = (P - dense_gain(A, P, R, A @ P)).diagonal().mean()
        assert term.variance.mean() == pytest.approx(float(expected), rel=0.1)
        assert torch.allclose(term.scale, (term.variance.sqrt() / 0.07).clamp(0.5, 2.5))
        scales[sigma_y] = float(term.scale.mean())
    assert scales[1e-3] < scales[0.05] < scales[10.0] == 2.5


def test_channels_that_an_image_lacks_are_shown_as_0():
    prior, operator, _, y, _ = problem("blur")
    inputs = term_of(prior, operator, y).inputs
    assert inputs.shape == (2, NUM_INPUTS, *SIZE)
    assert (inputs[:, 2:] == 0).all()
    assert (inputs[:, 1] != 0).all()


def test_fewer_evaluations_are_the_beginning_of_more_and_their_levels_are_the_student_s_own():
    prior, operator, _, y, _ = problem("mask")
    mus = [normal(2, prior.channels, *SIZE, stream=20 + k) for k in range(3)]

    def restored(sigmas, **options):
        student = Fixed(*mus)
        solver = Distilled(prior.table(LEVELS), LEVELS, **options, **EXACTLY)
        args = operator, y, GaussianNoise(NOISE), torch.tensor(sigmas), DRAWS
        return solver(student, *args), student

    three, longest = restored([3.0, 2.0, 1.0])
    two, student = restored([9.0, 5.0, 0.0])
    assert two.num_denoiser_calls == 2
    c = prior.channels
    for k, (shown, _) in enumerate(student.shown):
        assert torch.equal(shown, longest.shown[k][0])
    carried = longest.shown[2][0][:, :c]
    assert not torch.allclose(two.x, carried, atol=1e-3), "the last data step has its own c"
    assert torch.equal(restored([2.0, 1.0], final_inflation=4.0)[0].x, carried)
    told = [float(s[0]) for _, s in student.shown]
    assert told == pytest.approx([float(s[0]) for _, s in longest.shown[:2]])
    assert told[1] == pytest.approx(told[0] * LEVELS[1] / LEVELS[0])
    assert len(three.trace["levels"]) == 3
    with pytest.raises(UnsuitedError, match="3 evaluations at most, not 4"):
        restored([4.0, 3.0, 2.0, 1.0])


def test_a_regressor_s_own_estimate_is_returned():
    prior, operator, _, y, _ = problem("blur")
    mu = normal(2, 1, *SIZE, stream=20)
    solver = make_solver(
        "distilled", prior.table([0.4]), {"levels": [0.4], "final_data_step": False}
    )
    found = solver(Fixed(mu), operator, y, GaussianNoise(NOISE), torch.tensor([0.4]), DRAWS)
    assert torch.equal(found.x, mu)
    assert found.trace["levels"] == []


@pytest.mark.parametrize("name", OPERATORS)
def test_the_same_seed_gives_the_same_bits_and_batch_elements_are_apart(name):
    prior, operator, _, y, _ = problem(name)
    first, again = (term_of(prior, operator, y, tolerance=1e-3) for _ in range(2))
    assert torch.equal(first.inputs, again.inputs)
    other = term_of(prior, operator, y, KeyedDraws(1, "solver-kit"))
    assert not torch.equal(first.inputs, other.inputs)
    y[1] *= 50.0
    apart = term_of(prior, operator, y, tolerance=1e-3)
    assert torch.allclose(first.start[0], apart.start[0], atol=1e-9)
    assert torch.allclose(first.inputs[0], apart.inputs[0], atol=1e-9)


def test_what_makes_no_chain_is_refused():
    table = GaussianPrior(SIZE).table(LEVELS)
    with pytest.raises(ValueError, match="one level > 0"):
        Distilled(table, ())
    with pytest.raises(ValueError, match="final_inflation must be positive, not 0"):
        Distilled(table, LEVELS, final_inflation=0.0)
    with pytest.raises(ValueError, match="2 inflations do not fit 3 levels"):
        Distilled(table, LEVELS, (1.0, 2.0))
    with pytest.raises(ValueError, match="must be positive"):
        Distilled(table, LEVELS, 0.0)
    with pytest.raises(ValueError, match="distilled needs a covariance table"):
        make_solver("distilled", None, {})
    with pytest.raises(UnsuitedError, match="no adjoint"):
        term_of(GaussianPrior(SIZE), Nonlinear(), normal(1, 1, *SIZE))


class Nonlinear:
    def A(self, x):
        return x**3

    def initial(self, y):
        return y


def teacher():
    with seeded_initialisation(5):
        module = Preconditioned(LocalUNet(2, (16, 24), (1, 1), num_features=16))
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.15)
    return module.eval().requires_grad_(requires_grad=False)


def test_a_student_begins_as_its_teacher_whatever_it_is_shown():
    own = teacher()
    before = {k: v.clone() for k, v in own.state_dict().items()}
    student = student_of(own)
    x, inputs = normal(2, 2, 20, 16).float(), normal(2, NUM_INPUTS, 20, 16, stream=1).float()
    sigma = torch.tensor([0.1, 0.7])
    expected = ConditionedDenoiser(own, 1, 2)(x, sigma)
    found = StudentDenoiser(student, 1, 2)(torch.cat([x, inputs], dim=1), sigma)
    assert torch.allclose(found[:, :2], expected, atol=1e-5)
    assert torch.equal(found[:, 2:], inputs), "what is shown comes back"
    assert torch.allclose(ConditionedDenoiser(student, 1, 2)(x, sigma), expected, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in own.state_dict().items())
    assert (student.log_variance.weight == 0).all()
    with pytest.raises(ValueError, match="takes 4 inputs beside them, not 0"):
        StudentDenoiser(student, 1, 2)(x, sigma)


def trained_student():
    student = student_of(teacher())
    with torch.no_grad():
        student.network.stem.weight.normal_(std=0.1)
    return student


def test_what_a_student_is_shown_reaches_its_estimate():
    denoise = StudentDenoiser(trained_student(), 0, 1)
    x = normal(1, 1 + NUM_INPUTS, 16, 16).float()
    base = denoise(x, torch.tensor([0.2]))[:, :1]
    for channel in range(1, 1 + NUM_INPUTS):
        changed = x.clone()
        changed[:, channel] += 1.0
        assert (denoise(changed, torch.tensor([0.2]))[:, :1] - base).abs().max() > 1e-4


def test_every_border_of_a_canvas_is_the_border_of_a_window():
    """Padding would hide the bottom and the right one of a canvas of no multiple of the stride."""
    denoise, sigma = StudentDenoiser(trained_student(), 0, 1), torch.tensor([0.2])
    x = normal(1, 1 + NUM_INPUTS, 91, 86).float()
    assert denoise.stride == 4
    found = denoise(x, sigma)
    far = denoise(x[..., 3:, 2:], sigma)  # a multiple of the stride, with the same far corner
    near = denoise(x[..., :88, :84], sigma)
    assert torch.allclose(found[..., -8:, -8:], far[..., -8:, -8:], atol=1e-5)
    assert torch.allclose(found[..., :40, :40], near[..., :40, :40], atol=1e-5)
    tiny = x[..., :3, :5]  # less than a stride: there is no window, and it is padded
    assert denoise(tiny, sigma).shape == tiny.shape


def test_a_student_in_tiles_is_the_student_at_once():
    denoise = StudentDenoiser(trained_student(), 0, 1)
    x = normal(2, 1 + NUM_INPUTS, 90, 70).float()
    sigma = torch.tensor([0.2, 0.4])
    halo = -(-denoise.reach // 4) * 4
    tiles = tiled_denoiser(denoise, tile=32, halo=halo, stride=denoise.stride, max_batch=4)
    assert torch.allclose(tiles(x, sigma), denoise(x, sigma), atol=1e-4)


def test_exact_data_and_missing_ones_leave_finite_inputs():
    prior = GaussianPrior(SIZE)
    operator = Mask(pixels())
    y = operator.A(normal(1, 1, *SIZE))
    y = torch.where(pixels(), y, torch.nan)
    solver = Distilled(prior.table(LEVELS), LEVELS)
    term = DataTerm(solver, Counted(None, operator), y, GaussianNoise(0.0), DRAWS)
    assert term.inputs.isfinite().all()
    assert term.start.isfinite().all()
    held = term.inputs[0, 1][pixels()[0, 0]]
    assert held.abs().max() < 1e-3, "what is measured exactly has no error"


def test_lines_of_k_space_shape_the_draw():
    """Along the lines all is open or known; the error has no energy in what was measured."""
    operator, prior = Fourier(lines_of(), 1), GaussianPrior(SIZE)
    y = operator.A(normal(1, 1, *SIZE))
    term = DataTerm(
        Distilled(prior.table(LEVELS), LEVELS, **EXACTLY), Counted(None, operator), y,
        GaussianNoise(1e-3), DRAWS,
    )  # fmt: skip
    spectrum = torch.fft.fft2(term.inputs[:, 1:2], norm="ortho").abs()
    known = operator.mask.expand_as(spectrum)
    assert spectrum[known].max() < 0.02 * spectrum[~known].max()


def lines_of():
    rows = torch.arange(SIZE[0])
    kept = (rows % 3 == 0) | (rows % 3 == SIZE[0] % 3)
    return kept[None, None, :, None].expand(1, 1, *SIZE).contiguous()


def test_a_foreign_operator_will_do():
    prior, operator, _, y, _ = problem("dense")
    assert isinstance(operator, Dense)
    mu = normal(2, 1, *SIZE, stream=20)
    solver = Distilled(prior.table(LEVELS), LEVELS)
    found = solver(Fixed(mu), operator, y, GaussianNoise(NOISE), torch.tensor([0.4]), DRAWS)
    assert found.x.shape == (2, 1, *SIZE)
