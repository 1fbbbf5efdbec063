"""Distillation: it learns what is best for Gaussian images, and goes on after a kill."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from dense import GaussianPrior

from diffusion_core.networks.local_unet import LocalUNet
from diffusion_core.networks.precond import Preconditioned
from diffusion_core.networks.student import StudentDenoiser, student_of
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.streams import seeded_initialisation
from diffusion_core.operators import Fourier, Mask
from diffusion_core.posterior.distilled import DataTerm, Distilled
from diffusion_core.posterior.run import Counted
from diffusion_core.training.distil import DistillationLoss, Measured, MeasuredPatches
from diffusion_core.training.loop import Callbacks, Recipe, train
from diffusion_core.training.patches import Batch

SIZE = (16, 16)
PRIOR = GaussianPrior(SIZE)
LEVELS = (0.4, 0.2)


class GaussianImages:
    """A patch source: draws of the prior, by number."""

    def __init__(self, names=("gaussian",)):
        self.conditions = list(names)

    def batch(self, first, count):
        images = [self.image(n) for n in range(first, first + count)]
        x0 = torch.cat([torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 2)) for x in images])
        condition = torch.arange(first, first + count) % len(self.conditions)
        return Batch(x0, condition, torch.tensor([[1.0, 0.0, 0.0]]).repeat(count, 1))

    def image(self, number):
        like = torch.zeros(1, 1, *SIZE, dtype=torch.float64)
        xi = KeyedDraws(1, f"image-{number}").normal(0, like)
        root = PRIOR.grid_power().sqrt()
        return (PRIOR.mean + torch.fft.irfft2(torch.fft.rfft2(xi) * root, s=SIZE)).float()


def measure(_condition, x0, rng):
    """Half of k-space, or half of the pixels, in turn by chance."""
    if rng.random() < 0.5:
        operator = Mask(torch.from_numpy(rng.random((1, 1, *SIZE)) < 0.5))
    else:
        lines = torch.from_numpy(rng.random(SIZE[1]) < 0.5)
        operator = Fourier(lines.expand(1, 1, *SIZE).contiguous(), 1)
    clean = operator.A(x0)
    noise = torch.from_numpy(rng.standard_normal((2, *clean.shape))).float()
    n = torch.complex(noise[0], noise[1]) if clean.is_complex() else noise[0]
    return operator, operator.measured(clean + 0.1 * n), GaussianNoise(0.1)


def solver_of(**options):
    return Distilled(PRIOR.table(LEVELS), LEVELS, 1.0, **options)


def source(*names, **options):
    names = names or ("gaussian",)
    solvers = [solver_of(**options) for _ in names]
    return MeasuredPatches(GaussianImages(names), measure, solvers, seed=3)


def small_student(num_conditions=1):
    with seeded_initialisation(3):
        return student_of(Preconditioned(LocalUNet(num_conditions, (24, 32), (1, 1), 16)))


def run(folder, *, num_steps, objective, patches, callbacks=None, **changes):
    recipe = Recipe(
        num_steps=num_steps, batch_size=8, warmup_steps=5, bfloat16=False, seed=5, ema_decay=0.98,
        decay_share=0.7, log_every_steps=1, checkpoint_every_s=0.0, learning_rate=5e-3, **changes,
    )  # fmt: skip
    return train(small_student(), patches, recipe, folder, callbacks, objective=objective)


def mean_square(error):
    return float(error.double().square().mean())


@pytest.fixture(scope="module")
def regressor(tmp_path_factory):
    """A one-pass regressor from the data as an image, and the losses on its way."""
    losses = []
    told = Callbacks(on_log=lambda _step, metrics, _model: losses.append(metrics["weighted_error"]))
    state = run(
        tmp_path_factory.mktemp("regressor"), num_steps=250,
        objective=DistillationLoss(LEVELS[:1]), patches=source(start="scaled-adjoint"),
        callbacks=told,
    )  # fmt: skip
    return state.ema.module, losses


def test_a_one_pass_regressor_comes_near_the_posterior_mean_of_gaussian_images(regressor):
    module, losses = regressor
    # In units of the posterior's variance: below 1 nobody gets.
    assert np.mean(losses[:10]) > 2.0
    assert np.mean(losses[-40:]) < 1.4
    solver = solver_of(start="scaled-adjoint", final_data_step=False)
    sums = np.zeros(4)
    for number in range(10_000, 10_040):
        x0 = GaussianImages().image(number)
        operator, y, noise = measure("", x0, np.random.default_rng(number))
        R = torch.full((y.numel() * (2 if y.is_complex() else 1),), 0.01, dtype=torch.float64)
        best, _ = PRIOR.posterior(operator, y.to(torch.complex128 if y.is_complex() else float), R)
        denoise, draws = StudentDenoiser(module, 0, 1), KeyedDraws(0, "test")
        args = operator, y, noise, torch.tensor(LEVELS[:1]), draws
        with torch.no_grad():
            found = solver(denoise, *args).x
        start = DataTerm(solver, Counted(None, operator), y, noise, draws).start
        sums += [mean_square(v - x0) for v in (start, best, found)] + [mean_square(found - best)]
    start, best, found, apart = sums
    assert best < 0.5 * start, "there is something to learn"
    assert best < found < 1.25 * best
    assert apart < 0.3 * best
    # Whoever estimates x0 from y errs as the posterior mean does and, apart from it, more.
    assert found == pytest.approx(best + apart, rel=0.1)


def test_the_first_level_s_error_is_that_which_the_draws_foretell():
    """The start is the posterior mean: no network is better, and the unit of the loss is right."""
    ratios = []
    for first in range(0, 400, 40):
        batch = source().batch(first, 40)
        errors = (batch.start - batch.x0)[:, :1].square().mean(dim=(1, 2, 3))
        ratios.append(float(errors.sum() / batch.variance.sum()))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.1)


def test_a_sample_is_the_same_whoever_draws_it_and_conditions_have_their_own_solver():
    patches = source("a", "b")
    whole, parts = patches.batch(4, 4), [patches.batch(4, 3), patches.batch(7, 1)]
    for name in ("x0", "condition", "channels", "start", "inputs", "variance", "scale"):
        drawn = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(whole, name), drawn), name
    assert not torch.equal(whole.start[0], whole.start[1])
    part = whole.part(slice(1, 3))
    assert torch.equal(part.start, whole.start[1:3])
    assert list(part.terms) == list(whole.terms[1:3])
    assert torch.equal(whole.to("cpu").inputs, whole.inputs)


class Answers(torch.nn.Module):
    """A student with an answer for each level, and u = ln 2."""

    def __init__(self, answers):
        super().__init__()
        self.answers = torch.nn.ParameterList([torch.nn.Parameter(a) for a in answers])
        self.seen = []

    def forward(self, x, sigma, condition, inputs):
        self.seen.append(x.detach().clone())
        assert inputs.shape[1] == 4
        return self.answers[len(self.seen) - 1]

    def uncertainty(self, sigma, condition):
        return torch.full_like(sigma, np.log(2.0))


@pytest.mark.parametrize("consistency", [0.0, 0.5])
def test_the_loss_is_the_one_written_down(consistency):
    batch = source().batch(0, 3)
    generator = torch.Generator().manual_seed(1)
    answers = [torch.randn(batch.x0.shape, generator=generator) for _ in LEVELS]
    model = Answers(answers)
    loss, error = DistillationLoss(LEVELS, consistency)(model, batch, None, None)

    def after(level):
        steps = [
            term.update(level, answers[level][i : i + 1, :1]).delta
            for i, term in enumerate(batch.terms)
        ]
        return answers[level][:, :1] + torch.cat(steps)

    def units(a, b):
        return (a[:, :1] - b[:, :1]).square().mean(dim=(1, 2, 3)) / batch.variance

    assert torch.allclose(model.seen[0], batch.start)
    assert torch.allclose(model.seen[1][:, :1], after(0), atol=1e-5)
    first = units(answers[0], batch.x0) + consistency * units(answers[0], after(1))
    second = units(answers[1], batch.x0)
    expected = ((first + second) / 2 + 2 * np.log(2.0)).mean() / 2
    assert loss.item() == pytest.approx(float(expected), rel=1e-4)
    assert torch.allclose(error, second, rtol=1e-4)
    loss.backward()
    for answer in model.answers:  # unused channels are not asked for
        assert answer.grad[:, :1].abs().sum() > 0
        assert answer.grad[:, 1:].abs().sum() == 0


def test_a_batch_that_was_not_measured_is_refused():
    with pytest.raises(TypeError, match="measured patches"):
        DistillationLoss(LEVELS)(small_student(), GaussianImages().batch(0, 2), None, None)


class Killed(Exception):
    pass


def test_a_killed_distillation_goes_on_to_the_same_curve_and_weights(tmp_path):
    def distilled(folder, kill_at=None):
        losses = {}

        def on_checkpoint(step, _path):
            if step == kill_at:
                raise Killed

        told = Callbacks(lambda step, m, _: losses.__setitem__(step, m["loss"]), on_checkpoint)
        objective = DistillationLoss(LEVELS, 0.2)
        state = run(folder, num_steps=6, objective=objective, patches=source(), callbacks=told)
        return losses, state

    undisturbed, state = distilled(tmp_path / "a")
    with pytest.raises(Killed):
        distilled(tmp_path / "b", kill_at=3)
    resumed, resumed_state = distilled(tmp_path / "b")
    assert list(resumed) == [4, 5, 6]
    assert all(resumed[step] == undisturbed[step] for step in resumed)
    pairs = zip(state.ema.module.parameters(), resumed_state.ema.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_distillation_computes_in_bfloat16_but_its_data_steps_do_not(tmp_path):
    batch = source().batch(0, 2)
    model = small_student()
    with torch.no_grad():
        model.network.head.weight.normal_(std=0.05)
        plain, _ = DistillationLoss(LEVELS)(model, batch, None, None)
        seen = []
        update = DataTerm.update

        def watched(term, level, mu):
            found = update(term, level, mu)
            seen.append((mu.dtype, torch.is_autocast_enabled("cpu"), found.delta.dtype))
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DataTerm, "update", watched)
            with torch.autocast("cpu", torch.bfloat16):
                lower, _ = DistillationLoss(LEVELS)(model, batch, None, None)
    assert seen == [(torch.float32, False, torch.float32)] * 2
    assert lower.item() == pytest.approx(plain.item(), rel=0.02)
    assert lower.item() != plain.item()


def test_more_levels_are_no_worse_on_validation_images_they_all_learn_from(tmp_path):
    """Both levels are asked for x0, and both fall."""
    patches = source(start="scaled-adjoint")
    before, after = (_errors(m, patches) for m in _trained(tmp_path, patches))
    assert all(late < 0.6 * early for early, late in zip(before, after, strict=True))
    assert all(b < 1.05 * a for a, b in pairwise(after))


def _trained(folder, patches):
    objective = DistillationLoss(LEVELS, 0.1)
    yield small_student().eval()
    yield run(folder, num_steps=60, objective=objective, patches=patches).ema.module


@torch.no_grad()
def _errors(module, patches):
    """Error of each level on samples that were not trained on, in units of the start's."""
    batch = patches.batch(50_000, 40)
    assert isinstance(batch, Measured)
    return [
        float(DistillationLoss(LEVELS[: k + 1])(module, batch, None, None)[1].mean())
        for k in range(len(LEVELS))
    ]
