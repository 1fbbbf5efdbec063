"""What the prior invented, the film, steadiness: against closed forms and dense matrices."""

import math
from itertools import pairwise

import pytest
import torch
from dense import GaussianPrior, dense_gain, flat, matrix_of
from solver_kit import DRAWS, OPERATORS, SIZE, Dense, kernel, lines, normal, pixels, run

from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import CroppedBlur, Fourier, Identity, Mask, Pool, Saturation
from diffusion_core.operators.fourier import to_complex
from diffusion_core.posterior import SOLVERS
from diffusion_core.posterior.linear import Accuracy
from diffusion_core.posterior.null_space import undetermined
from diffusion_core.posterior.steadiness import (
    image_change,
    linear_response,
    noise_change,
    rms,
    seed_spread,
)
from diffusion_core.posterior.trajectory import Recorder, spread_levels
from diffusion_core.protocols import UnsuitedError

EXACT = GaussianNoise(0.0)
NOISY = GaussianNoise(0.3)
EXACTLY = Accuracy(tolerance=1e-12, max_steps=2000)
SIGMAS = power_sigmas(3, 0.5, 0.05, 3.0)


def image(channels=1, batch=1):
    """Noise about another mean in every channel."""
    means = 0.2 + torch.arange(channels, dtype=torch.float64).reshape(1, -1, 1, 1)
    return means + 0.7 * normal(batch, channels, *SIZE, stream=11)


def centred(x):
    return x - x.mean(dim=(-2, -1), keepdim=True)


def test_a_mask_leaves_open_exactly_the_missing_pixels():
    x, mask = image(3), pixels()
    found = undetermined(Mask(mask), x, EXACT)
    open_part = torch.where(mask, 0.0, centred(x))
    assert torch.equal(found.part, open_part)
    expected = open_part.square().sum() / centred(x).square().sum()
    assert found.share == pytest.approx(float(expected), rel=1e-12)
    assert bool((found.amplitude[mask[0, 0]] == 0).all())
    assert bool((found.amplitude[~mask[0, 0]] > 0).all())


def test_noise_on_every_pixel_leaves_the_share_that_shrinkage_takes():
    x = image()
    variance = float(centred(x).square().mean())
    found = undetermined(Identity(), x, NOISY)
    kept = 0.09 / (variance + 0.09)
    torch.testing.assert_close(found.part, kept * centred(x), rtol=1e-12, atol=0)
    assert found.share == pytest.approx(kept**2, rel=1e-12)
    assert found.std == pytest.approx(math.sqrt(variance), rel=1e-12)


def test_pooling_leaves_open_what_differs_from_the_mean_of_its_square():
    x = image()
    blocks = centred(x).reshape(1, 1, SIZE[0] // 2, 2, SIZE[1] // 2, 2)
    expected = (blocks - blocks.mean(dim=(3, 5), keepdim=True)).reshape(x.shape)
    found = undetermined(Pool(2), x, EXACT)
    torch.testing.assert_close(found.part, expected, rtol=0, atol=1e-12)


def test_fourier_lines_leave_open_the_modes_that_were_not_measured():
    x = image(2)
    modes = torch.fft.fft2(to_complex(centred(x)))
    modes = torch.where(lines(), 0, modes)
    found = undetermined(Fourier(lines(), 2), x, EXACT)
    torch.testing.assert_close(to_complex(found.part), torch.fft.ifft2(modes), rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise", [EXACT, NOISY])
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_leaves_open_what_a_dense_solve_does(name, noise):
    if name == "blur" and noise is EXACT:
        return  # exact blurred data are given a noise of half a step
    make, channels = OPERATORS[name]
    operator, x = make(), image(channels)
    A = matrix_of(operator.A, (channels, *SIZE))
    variance = centred(x).square().mean()
    white = variance * torch.eye(x.numel(), dtype=torch.float64)
    R = torch.full((len(A),), noise.sigma_y**2, dtype=torch.float64)
    known = dense_gain(A, white, R, A @ flat(centred(x)).T).T.reshape(x.shape)
    found = undetermined(operator, x, noise, EXACTLY)
    torch.testing.assert_close(found.part, centred(x) - known, rtol=0, atol=1e-9)
    squared = found.amplitude.square().mean()
    assert found.share == pytest.approx(float(squared), rel=1e-9)
    assert 0 <= found.share <= 1


@pytest.mark.parametrize("name", ["dense", "mask", "pool"])
def test_beyond_the_linear_estimate_is_what_kriging_of_the_same_data_leaves(name):
    make, channels = OPERATORS[name]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    x, table = image(channels), prior.table(SIGMAS)
    found = undetermined(operator, x, NOISY, EXACTLY, table)
    way = "kriging", prior.denoise, (operator, operator.A(x), NOISY, SIGMAS, DRAWS, table)
    torch.testing.assert_close(found.part, x - run_as(*way, SURE).x, rtol=0, atol=1e-9)
    energy = centred(x).square().sum()
    assert found.share == pytest.approx(float(found.part.square().sum() / energy), rel=1e-9)


def test_the_share_does_not_know_units():
    x = image()
    one = undetermined(Pool(2), x, EXACT)
    other = undetermined(Pool(2), 40.0 * x - 1000.0, EXACT)
    assert other.share == pytest.approx(one.share, rel=1e-9)
    assert other.std == pytest.approx(40.0 * one.std, rel=1e-9)


def test_a_picture_out_of_a_scene_is_judged_by_itself():
    canvas, shape = (20, 18), (12, 10)
    operator = CroppedBlur(kernel(), shape, (4, 4), canvas)
    x = 0.5 * normal(1, 1, *canvas, stream=12)
    found = undetermined(operator, x, NOISY, EXACTLY)
    beyond = x.clone()
    beyond[..., :2, :] += 50.0  # no datum sees it
    assert found.amplitude.shape == shape
    assert undetermined(operator, beyond, NOISY, EXACTLY).share == pytest.approx(found.share)


def test_a_flat_image_holds_nothing_invented():
    found = undetermined(Mask(pixels()), torch.full((1, 1, *SIZE), 0.3, dtype=torch.float64), NOISY)
    assert found.share == 0.0
    assert not bool(found.part.any())


def test_a_nonlinear_measurement_has_no_gain():
    with pytest.raises(UnsuitedError, match="Saturation is nonlinear"):
        undetermined(Saturation(gain=1.0), image(), NOISY)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "kriging"])
def test_every_solver_has_a_film_and_the_same_pixels_with_it(solver):
    prior = GaussianPrior(SIZE)
    operator = Mask(pixels())
    y = operator.A(image())
    recorder = Recorder(prior.denoise, [float(s) for s in SIGMAS], lambda s, mu: (s, mu.clone()))
    given = (operator, y, NOISY, SIGMAS, DRAWS, prior.table(SIGMAS))
    options = {} if solver in START_FREE else {"start": "noise"}
    seen, unseen = (run_as(solver, d, given, options) for d in (recorder, prior.denoise))
    assert torch.equal(seen.x, unseen.x)
    assert list(recorder.seen) == [float(s) for s in SIGMAS]
    assert all(sigma == level for level, (sigma, _) in recorder.seen.items())
    assert all(mu.shape == y.shape for _, mu in recorder.seen.values())


def run_as(solver, denoise, given, options):
    from diffusion_core.posterior import make_solver

    operator, y, noise, sigmas, draws, table = given
    return make_solver(solver, table, options)(denoise, operator, y, noise, sigmas, draws)


START_FREE = {"repaint"}


def test_a_film_shows_what_the_denoiser_said_last_and_leaves_other_levels_out():
    answers = iter([1.0, 2.0, 3.0])
    recorder = Recorder(lambda x, sigma: x + next(answers), [0.5], lambda _, mu: float(mu.mean()))
    x = torch.zeros(2, 1, 4, 4)
    for level in (0.5, 0.5, 0.25):
        recorder(x, torch.full((2,), level))
    assert recorder.seen == {0.5: 2.0}


def test_levels_are_thinned_evenly_from_the_first_to_the_last():
    levels = [float(s) for s in power_sigmas(100, 1.0, 0.01, 3.0)]
    few = spread_levels(levels, 12)
    assert len(few) == 12
    assert (few[0], few[-1]) == (levels[0], levels[-1])
    steps = [levels.index(b) - levels.index(a) for a, b in pairwise(few)]
    assert set(steps) == {9}
    assert spread_levels(levels[:5], 12) == levels[:5]
    with pytest.raises(ValueError, match="two"):
        spread_levels(levels, 1)


@pytest.mark.parametrize("mode", ["mean", "sample"])
def test_covprox_tells_how_far_the_data_moved_it(mode):
    prior, operator = GaussianPrior(SIZE), Identity()
    y = image()
    recorder = Recorder(prior.denoise, [0.5], lambda _, mu: mu)
    options = {"mode": mode, "inflation": 1.0}
    found = run(
        "covprox", recorder, operator, y, NOISY, torch.tensor([0.5]), prior=prior.table([0.5]),
        **options,
    )  # fmt: skip
    (level,) = found.trace["levels"]
    assert level["sigma"] == 0.5
    if mode == "mean":
        moved = (found.x - recorder.seen[0.5]).square().mean().sqrt()
        assert level["moved"] == pytest.approx(float(moved), rel=1e-6)
    assert level["moved"] > 0.05
    assert level["steps"] >= 0
    assert level["left"] < 0.1


def test_a_spread_is_the_unbiased_standard_deviation_over_seeds():
    one = torch.zeros(1, 1, 3, 4)
    two = torch.tensor([0.0, 2.0]).repeat(6).reshape(1, 1, 3, 4)
    # Half the pixels differ by 2: variance 2 there, 0 elsewhere.
    assert seed_spread([one, two]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="two seeds"):
        seed_spread([one])


def test_changes_of_the_data_have_the_size_asked_for_and_spare_what_was_not_measured():
    x = torch.zeros(1, 1, 200, 200, dtype=torch.float64)
    mask = torch.arange(200)[None, None, :, None].expand(1, 1, 200, 200) % 2 == 0
    operator = Mask(mask)
    of_noise = noise_change(operator, x, NOISY, 0.01, DRAWS)
    of_image = image_change(operator, x, 2e-3, DRAWS)
    assert rms(of_noise[mask]) == pytest.approx(0.003, rel=0.02)
    assert rms(of_image[mask]) == pytest.approx(0.002, rel=0.02)
    assert not bool(of_noise[~mask].any())
    assert not bool(of_image[~mask].any())
    assert noise_change(operator, x, EXACT, 0.01, DRAWS) is None


def test_a_nonlinear_measurement_is_changed_through_the_image():
    x = torch.full((1, 1, 50, 50), 0.99, dtype=torch.float64)
    change = image_change(Saturation(gain=1.0), x, 0.1, DRAWS)
    assert float(change.max()) == pytest.approx(0.01)  # all beyond 1 is clipped
    assert float(change.min()) < -0.2


def test_the_minimum_norm_response_to_exact_pooled_data_repeats_them():
    change = normal(1, 1, SIZE[0] // 2, SIZE[1] // 2, stream=13)
    response = linear_response(Pool(2), image(), EXACT, change, None)
    expected = change.repeat_interleave(2, -2).repeat_interleave(2, -1)
    torch.testing.assert_close(response, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["dense", "mask", "fourier"])
def test_the_linear_estimate_answers_with_a_gain_of_one(name):
    make, channels = OPERATORS[name]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    x = image(channels)
    y, table = operator.A(x), prior.table(SIGMAS)
    change = noise_change(operator, x, NOISY, 0.01, DRAWS)
    before, after = (
        run_as("kriging", prior.denoise, (operator, data, NOISY, SIGMAS, DRAWS, table), SURE).x
        for data in (y, y + change)
    )
    response = linear_response(operator, x, NOISY, change, table, EXACTLY)
    torch.testing.assert_close(after - before, response, rtol=0, atol=1e-9)


SURE = {"tolerance": 1e-13, "max_steps": 2000}


def test_where_the_prior_is_gaussian_covprox_is_as_steady_as_the_linear_estimate():
    operator, prior = Dense(), GaussianPrior(SIZE)
    x = image()
    sigmas = power_sigmas(12, 2.0, 0.02, 3.0)
    y, table = operator.A(x), prior.table(sigmas)
    change = image_change(operator, x, 2e-3, DRAWS)
    options = {"inflation": 1.0, "zeta": 0.0, "start": "noise", **SURE}
    before, after = (
        run_as("covprox", prior.denoise, (operator, data, NOISY, sigmas, DRAWS, table), options).x
        for data in (y, y + change)
    )
    response = linear_response(operator, x, NOISY, change, table, EXACTLY)
    assert rms(after - before) / rms(response) == pytest.approx(1.0, abs=0.05)
