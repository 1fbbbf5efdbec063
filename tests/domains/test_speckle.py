"""Speckled pictures: gamma statistics, an unbiased logarithm, folded bands, log patches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import special

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.posterior import make_solver
from diffusion_core.posterior.covariance import fit_covariance
from diffusion_core.testing import DomainContract
from domains.base import BadInputError, Item, ItemRecord
from domains.city.domain import City
from domains.city.speckle import FLOOR, NATS_PER_UNIT
from domains.city.training import augment, training_windows
from flows.config import load_method, load_task

TASK = load_task("despeckle-l4")
CITY = City()


def item(channels=1, depth=1, side=(64, 72), value=None, value_range=(0.0, 255.0)):
    """Steps of grey with a smooth texture, or one grey level."""
    y, x = np.mgrid[: side[0], : side[1]]
    plane = 90 + 60 * np.sin(x / 9) * np.cos(y / 7) + 40 * (x > side[1] // 2)
    pixels = np.broadcast_to(plane, (channels, depth, *side)).astype(np.uint8).copy()
    if value is not None:
        pixels[:] = value
    record = ItemRecord(
        item_id="street", domain="city", shape=pixels.shape, dtype="uint8", units="intensity",
        source_digest="d" * 64, source_format="png", meta={"value_range": list(value_range)},
    )  # fmt: skip
    return Item(pixels, record)


class TestSpeckledGrey(DomainContract):
    def make_domain(self):
        return City()

    def make_tasks(self):
        return [TASK]

    def make_item(self):
        return item(1, depth=2)


class TestSpeckledColour(TestSpeckledGrey):
    def make_item(self):
        return item(3, depth=2)


def test_speckle_has_mean_one_and_variance_one_over_the_looks():
    flat = item(side=(200, 200), value=128)
    measurement = CITY.simulate(flat, TASK, 0)
    ratio = measurement.y / (128 / 255)
    assert ratio.mean() == pytest.approx(1, abs=4 * 0.5 / 200)
    assert ratio.var() == pytest.approx(1 / 4, rel=0.05)
    assert (measurement.y > 0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_data_are_the_log_image_with_unbiased_noise_of_the_stated_variance(channels):
    clean = item(channels, side=(160, 160))
    measurement = CITY.simulate(clean, TASK, 1)
    problem = CITY.problem(measurement)
    truth = CITY.truth_signal(clean, measurement)
    assert problem.condition == "city-log"
    assert problem.shape == tuple(truth.shape) == (channels, 1, 160, 160)
    noise = (problem.y - truth).double()
    variance = special.polygamma(1, 4) / NATS_PER_UNIT**2
    assert float(problem.noise.variance(problem.y)) == pytest.approx(variance, rel=1e-6)
    assert noise.mean().item() == pytest.approx(0, abs=4 * np.sqrt(variance / noise.numel()))
    assert noise.var().item() == pytest.approx(variance, rel=0.05)


def test_network_units_are_even_in_the_logarithm_and_go_back():
    levels = item(side=(1, 3))
    levels.pixels[0, 0, 0] = (1, 16, 255)
    measurement = CITY.simulate(levels, TASK, 0)
    x = CITY.truth_signal(levels, measurement)
    expected = 1 - 2 * np.log([1 / 255, 16 / 255, 1]) / np.log(1 / 255)
    np.testing.assert_allclose(x.numpy().ravel(), expected, atol=1e-6)
    back = CITY.problem(measurement).to_source(x)
    np.testing.assert_allclose(back.numpy().ravel(), (1, 16, 255), rtol=1e-5)


def test_black_is_lifted_to_one_grey_level():
    black = item(value=0)
    x = CITY.truth_signal(black, CITY.simulate(black, TASK, 0))
    np.testing.assert_allclose(x.numpy(), -1, atol=1e-6)


def test_bands_come_back_in_their_places():
    clean = item(4, depth=3)
    clean.pixels[2, 1] //= 2
    measurement = CITY.simulate(clean, TASK, 0)
    restored = CITY.problem(measurement).to_source(CITY.truth_signal(clean, measurement))
    assert restored.shape == (3, 4, 64, 72)
    np.testing.assert_allclose(
        restored.numpy().swapaxes(0, 1), np.maximum(clean.pixels, 1), rtol=1e-4
    )


@pytest.mark.parametrize("method", ["nlm", "tv"])
def test_the_baselines_work_on_logarithms(method):
    clean = item(side=(96, 96))
    measurement = CITY.simulate(clean, TASK, 0)
    problem = CITY.problem(measurement)
    x = CITY.baselines()[method](measurement, problem, {})
    truth = CITY.truth_signal(clean, measurement)
    before, after = ((t - truth).square().mean().item() for t in (problem.y, x))
    assert after < 0.35 * before


def test_the_preset_is_the_denoiser_at_the_level_of_the_speckle():
    # Under white noise on every pixel E[x0 | y] = D(y; sigma_y): the solver adds nothing to it.
    def shrink(x, sigma):
        return 0.2 / (0.2 + sigma.view(-1, 1, 1, 1) ** 2) * x

    measurement = CITY.simulate(item(side=(48, 56)), TASK, 0)
    problem, method = CITY.problem(measurement), load_method("despeckle-l4")
    sigma_y = float(problem.noise.variance(problem.y)) ** 0.5
    assert method.sigma_min == pytest.approx(sigma_y, rel=1e-4)
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.standard_normal((1, 1, 48, 56)))
    prior = fit_covariance(shrink, [image], sigmas=(0.1, 0.3))
    sigmas = power_sigmas(method.num_levels, method.sigma_max, method.sigma_min, method.rho)
    solver = make_solver(method.name, prior, method.options)
    draws = KeyedDraws(0, "speckle")
    x = solver(shrink, problem.operator, problem.y, problem.noise, sigmas, draws).x
    torch.testing.assert_close(x, shrink(problem.y, torch.tensor([sigma_y])), rtol=0, atol=1e-3)


def test_what_is_no_speckle_is_refused():
    with pytest.raises(BadInputError, match="num_looks"):
        CITY.simulate(item(), replace(TASK, noise={"kind": "speckle", "num_looks": 0}), 0)
    with pytest.raises(BadInputError, match="identity"):
        CITY.simulate(item(), replace(TASK, operator="blur"), 0)
    with pytest.raises(BadInputError, match="below 0"):
        CITY.simulate(item(value_range=(-255.0, 255.0)), TASK, 0)


def test_log_views_are_logs_of_the_grey_ones():
    windows = training_windows(item(side=(300, 300)))
    assert set(windows) == {"city-grey", "city-log"}
    for grey, log in zip(windows["city-grey"], windows["city-log"], strict=True):
        intensity = np.maximum((grey + 1) / 2, FLOOR)
        np.testing.assert_allclose(log, 1 + np.log(intensity) / NATS_PER_UNIT, atol=1e-5)
    assert set(training_windows(item(3))) == {"city"}


def test_log_patches_from_colour_and_from_logs_have_the_same_scale():
    grey = training_windows(item())["city-grey"][0][:, 0]
    log = training_windows(item())["city-log"][0][:, 0]
    colour = np.repeat(grey, 3, axis=0)  # grey as colour: the luma and every band are the grey
    for seed in range(6):
        # The mix takes draws of its own, so compare exposure by exposure.
        made = augment("city-log", colour, np.random.default_rng(seed))
        shift = np.median(made - log)
        np.testing.assert_allclose(made, np.maximum(log + shift, -1), atol=2e-3)
        own = augment("city-log", log, np.random.default_rng(seed))
        assert own.shape == made.shape == (1, 64, 72)
        assert own.dtype == made.dtype == np.float32
        step = np.median(own - log)
        assert np.log(0.25) / NATS_PER_UNIT - 1e-5 < step < np.log(1.1) / NATS_PER_UNIT + 1e-5
        assert min(own.min(), made.min()) >= -1 - 1e-6
