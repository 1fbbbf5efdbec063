"""Haze, little light, and the noise level that both are told by, against draws and closed forms."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.exposure import equalize_adapthist
from test_city_physics import picture

from diffusion_core.testing import DomainContract
from domains.base import BadInputError
from domains.city import brightening, haze, low_light
from domains.city.domain import City
from domains.classical import TVSettings
from domains.noise_level import NoiseLevel, noise_level
from flows.config import load_task

DOMAIN = City()
DARK, HAZY, KNOWN = (load_task(name) for name in ("low-light", "dehaze", "dehaze-known"))
LARGE = (192, 256)


def smooth_fields(seed=0, count=3, size=LARGE):
    fields = ndimage.gaussian_filter(
        np.random.default_rng(seed).standard_normal((count, *size)), (0, 9, 9)
    )
    return (fields - fields.min()) / np.ptp(fields)


# --- the noise level -----------------------------------------------------------------------------


@pytest.mark.parametrize(("slope", "floor"), [(1e-3, 4e-6), (5e-3, 1e-4), (0.0, 4e-4)])
def test_the_noise_level_is_that_of_the_draws(slope, floor):
    clean = 0.1 + 0.6 * smooth_fields()
    rng = np.random.default_rng(1)
    noisy = clean + np.sqrt(floor + slope * clean) * rng.standard_normal(clean.shape)
    found = noise_level(noisy)
    for brightness in (0.15, 0.4, 0.6):
        assert found.variance(brightness) == pytest.approx(floor + slope * brightness, rel=0.07)


def test_edges_hardly_move_the_noise_level():
    clean = np.where(smooth_fields(size=(256, 256)) > 0.5, 0.8, 0.2)
    noisy = clean + 0.02 * np.random.default_rng(0).standard_normal(clean.shape)
    assert noise_level(noisy).variance(0.5) == pytest.approx(4e-4, rel=0.15)


def test_an_image_without_noise_has_next_to_none():
    found = noise_level(np.zeros((1, 32, 32)))
    assert 0 < found.variance(0.0) <= 1e-8


# --- low light -----------------------------------------------------------------------------------


def test_a_dark_picture_has_the_mean_and_the_variance_of_photons():
    item = picture(3, depth=1, size=LARGE)
    item = replace(item, pixels=np.full_like(item.pixels, 153))
    found = DOMAIN.simulate(item, DARK, seed=0)
    assert found.y.mean() == pytest.approx(0.06, rel=0.01)  # a tenth of 3/5
    assert found.y.var() == pytest.approx(60 / 1000**2 + (2 / 1000) ** 2, rel=0.03)
    assert found.params["exposure"] == 0.1


def test_its_noise_is_found_in_the_picture():
    item = picture(3, depth=1, size=LARGE)
    found = DOMAIN.simulate(item, DARK, seed=0)
    level = low_light.level_of(found.noise)
    assert level.variance(0.05) == pytest.approx(0.05 / 1000 + 4e-6, rel=0.08)


def test_an_exposure_is_estimated_and_must_be_one():
    item = picture(3, depth=1, size=LARGE)
    dark = replace(item, pixels=(item.pixels // 8).astype(np.uint8))
    found = DOMAIN.given_spoilt(dark, None, damage="low-light", exposure=None)
    top = np.percentile(ndimage.gaussian_filter(dark.pixels / 255.0, (0, 0, 2, 2)).max(0), 99.5)
    assert found.params["exposure"] == pytest.approx(top / 0.9)
    told = DOMAIN.given_spoilt(dark, None, damage="low-light", exposure=0.2)
    assert told.params["exposure"] == 0.2
    bright = DOMAIN.problem(told).y
    assert torch.allclose((bright + 1) / 2, torch.tensor(dark.pixels[:, 0] / 255 / 0.2).float())
    black = replace(item, pixels=np.zeros_like(item.pixels))
    with pytest.raises(BadInputError, match="black all over"):
        DOMAIN.given_spoilt(black, None, damage="low-light", exposure=None)


@pytest.mark.parametrize("counts", [0.5, 2.0, 10.0, 60.0])
def test_anscombes_transform_has_a_variance_of_one_and_leads_back(counts):
    level = NoiseLevel(1 / 1000, (2 / 1000) ** 2)
    rng = np.random.default_rng(0)
    z = (rng.poisson(counts, 400_000) + 2 * rng.standard_normal(400_000)) / 1000
    stable = brightening.stabilise(z, level)
    assert stable.std() == pytest.approx(1, abs=0.06 if counts > 1 else 0.2)
    mean = brightening.unbiased(np.array(stable.mean()), level)
    assert mean * 1000 == pytest.approx(counts, abs=0.09 if counts > 1 else 0.15)


def test_without_photons_the_transform_is_a_division():
    level = NoiseLevel(0.0, 0.01)
    z = np.linspace(0, 1, 7)
    assert np.allclose(brightening.stabilise(z, level), 10 * z)
    assert np.allclose(brightening.unbiased(10 * z, level), z)


def test_curves_and_equalising_keep_to_their_formulas():
    item = picture(1, depth=1, size=LARGE)
    measurement = DOMAIN.simulate(item, DARK, seed=0)
    problem = DOMAIN.problem(measurement)
    z = np.clip(measurement.y, 0, 1)
    made = brightening.gamma(measurement, problem, {"gamma": 0.5})
    assert np.allclose((made.numpy() + 1) / 2, np.sqrt(z), atol=1e-6)
    made = brightening.clahe(measurement, problem, {"clip_limit": 0.03, "num_tiles": 4})
    expected = equalize_adapthist(z[0, 0].astype(float), (48, 64), clip_limit=0.03)
    lit = z[0, 0] > 1e-3
    assert np.allclose(((made[0, 0].numpy() + 1) / 2)[lit], expected[lit], atol=1e-5)
    clean = DOMAIN.simulate(item, load_task("denoise-25"), 0)
    with pytest.raises(BadInputError, match="choose another method"):
        brightening.clahe(clean, DOMAIN.problem(clean), {})


# --- haze ----------------------------------------------------------------------------------------


def test_the_guided_filter_is_a_regression_in_every_window():
    """By brute force: lines fitted by numpy in every square, then their mean."""
    rng = np.random.default_rng(0)
    guide, values = rng.random((13, 11)), rng.random((13, 11))
    radius, smoothness = 2, 0.01
    pad = 2 * radius
    g, v = (np.pad(a, pad, mode="symmetric") for a in (guide, values))
    slopes, offsets = np.zeros(g.shape), np.zeros(g.shape)
    for y in range(radius, g.shape[0] - radius):
        for x in range(radius, g.shape[1] - radius):
            box = np.s_[y - radius : y + radius + 1, x - radius : x + radius + 1]
            cov = np.cov(g[box].ravel(), v[box].ravel(), bias=True)
            slopes[y, x] = cov[0, 1] / (cov[0, 0] + smoothness)
            offsets[y, x] = v[box].mean() - slopes[y, x] * g[box].mean()
    expected = np.zeros(guide.shape)
    for y in range(13):
        for x in range(11):
            box = np.s_[y + pad - radius : y + pad + radius + 1,
                        x + pad - radius : x + pad + radius + 1]  # fmt: skip
            expected[y, x] = slopes[box].mean() * guide[y, x] + offsets[box].mean()
    assert np.allclose(haze.guided_filter(guide, values, radius, smoothness), expected)


def test_the_dark_channel_is_the_least_of_all_colours_nearby():
    image = np.random.default_rng(0).random((3, 40, 50)).astype(np.float32)
    expected = ndimage.minimum_filter(image.min(axis=0), haze.PATCH_PX, mode="nearest")
    assert np.allclose(haze.dark_channel(image), expected)


def street(size=LARGE):
    """A scene as the prior wants it: saturated colours everywhere, some black nearby."""
    rng = np.random.default_rng(4)
    image = ndimage.zoom(rng.random((3, size[0] // 4, size[1] // 4)), (1, 4, 4), order=0)
    image[rng.integers(0, 3, size), np.arange(size[0])[:, None], np.arange(size[1])] = 0.0
    item = picture(3, depth=1, size=size)
    return replace(item, pixels=np.rint(255 * image[:, None]).astype(np.uint8))


def test_haze_of_a_scene_with_dark_colours_is_estimated_as_it_is():
    task = replace(HAZY, operator_params={**HAZY.operator_params, "far": 0.15, "near": 0.8})
    known = replace(task, operator_params={**task.operator_params, "estimate": "known"})
    found, truth = (DOMAIN.simulate(street(), t, 0) for t in (task, known))
    assert np.array_equal(found.y, truth.y)
    t, true_t = found.arrays["transmission"], truth.arrays["transmission"]
    assert np.abs(t - true_t).mean() < 0.08
    assert np.corrcoef(t.ravel(), true_t.ravel())[0, 1] > 0.97
    assert np.abs(found.arrays["airlight"] - 0.9).max() < 0.1


def test_depth_grows_upwards_between_near_and_far():
    t = haze.ramp(120, 160, 0.2, 0.9, np.random.default_rng(0))
    assert 0.2 <= t.min() < t.max() <= 0.9
    middle = np.sqrt(0.2 * 0.9)  # depth is linear in height: the middle is the geometric mean
    assert t[55:65].mean() == pytest.approx(middle, rel=0.15)
    assert t[:10].mean() < 0.3 < 0.7 < t[-10:].mean()


def test_known_haze_is_undone_exactly_and_its_noise_grows_by_it():
    item = picture(3, depth=2)
    quiet = replace(KNOWN, noise={"kind": "haze", "sigma_y": 0.0})
    problem = DOMAIN.problem(DOMAIN.simulate(item, quiet, 0))
    truth = DOMAIN.truth_signal(item, DOMAIN.simulate(item, quiet, 0))
    assert float((problem.y - truth).abs().max()) < 1e-5
    measurement = DOMAIN.simulate(item, KNOWN, 0)
    noisy = DOMAIN.problem(measurement)
    t = torch.from_numpy(measurement.arrays["transmission"])
    std = noisy.noise.variance(noisy.y).sqrt()
    assert torch.allclose(std, (0.04 / t).expand(std.shape), rtol=1e-5)
    shown = noisy.facts["measured"]
    assert torch.allclose(shown, torch.from_numpy(measurement.y), atol=1e-6)


def test_classical_methods_make_the_pictures_better():
    item = picture(3, depth=1, size=LARGE)
    for task, better in ((KNOWN, "tv"), (DARK, "tv"), (DARK, "anscombe-nlm")):
        measurement = DOMAIN.simulate(item, task, 0)
        problem, truth = DOMAIN.problem(measurement), DOMAIN.truth_signal(item, measurement)
        params = {"strength": TVSettings().strength} if better == "tv" else {}
        errors = [
            float((DOMAIN.baselines()[name](measurement, problem, p) - truth).square().mean())
            for name, p in (("inversion", {}), (better, params))
        ]
        assert errors[1] < 0.5 * errors[0], task.name


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        (DARK, {"operator": "pool"}, "goes with the operator identity"),
        (HAZY, {"operator": "pool"}, "goes with the operator identity"),
        (HAZY, {"operator_params": {**HAZY.operator_params, "far": 0.0}}, "0 < far"),
        (HAZY, {"operator_params": {**HAZY.operator_params, "estimate": "lidar"}}, "not 'lidar'"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(task, changes, words):
    with pytest.raises(BadInputError, match=words):
        DOMAIN.simulate(picture(), replace(task, **changes), 0)


class TestKnownHaze(DomainContract):
    round_trip_tolerance = 1e-4

    def make_domain(self):
        return City()

    def make_item(self):
        return picture(3)

    def make_tasks(self):
        return [KNOWN]


class TestLowLight(DomainContract):
    # The noise is estimated: its level errs by a few hundredths on so small an image.
    chi2_bounds = (0.85, 1.15)

    def make_domain(self):
        return City()

    def make_item(self):
        return picture(4, dtype="uint16", size=(96, 120))

    def make_tasks(self):
        return [DARK]
