"""k-space of magnitude volumes: lines, phase, noise and scale, each against its definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from diffusion_core.testing import DomainContract
from domains.base import BadInputError, Item, ItemRecord
from domains.files import select
from domains.mri import degradations
from domains.mri.domain import MRI
from flows.config import load_task

TASKS = ("kspace-x4-real", "kspace-x4", "kspace-x8")


def phantom_item(depth: int = 2, size: tuple[int, int] = (49, 66)) -> Item:
    """A head: bright rim, textured inside, dark background."""
    h, w = size
    y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
    rng = np.random.default_rng(2)
    planes = []
    for z in range(depth):
        r = np.hypot(y, x * (1 + 0.1 * z))
        inside = 400 + 150 * ndimage.gaussian_filter(rng.standard_normal((h, w)), 2) * 6
        planes.append(np.where(r < 0.8, inside, 0) + np.where(abs(r - 0.8) < 0.06, 900, 0))
    pixels = np.clip(np.rint(np.stack(planes)), 0, 4000)[None].astype(np.uint16)
    record = ItemRecord(
        item_id="head", domain="mri", shape=pixels.shape, dtype="uint16", units="intensity",
        source_digest="b" * 64, source_format="nrrd", spacing_mm=(5.0, 1.0, 1.0),
    )  # fmt: skip
    return Item(pixels, record)


def task_of(name: str = "kspace-x4", **params):
    task = load_task(name)
    return replace(task, operator_params={**task.operator_params, **params})


class TestMRI(DomainContract):
    def make_domain(self):
        return MRI()

    def make_item(self):
        return phantom_item()

    def make_tasks(self):
        return [load_task(name) for name in TASKS]


@pytest.mark.parametrize("num_lines", [64, 65, 66, 256])
@pytest.mark.parametrize(("acceleration", "centre_share"), [(4, 0.08), (8, 0.04), (1, 0.08)])
def test_lines_are_counted_and_hold_the_centre(num_lines, acceleration, centre_share):
    rng = np.random.default_rng(0)
    lines = degradations.random_lines(num_lines, acceleration, centre_share, rng)
    assert lines.sum() == round(num_lines / acceleration)
    num_centre = max(round(centre_share * num_lines), 1)
    frequencies = np.fft.fftfreq(num_lines, 1 / num_lines)
    nearest = np.argsort(np.abs(frequencies), kind="stable")[: num_centre - 1 + num_centre % 2]
    assert lines[nearest].all()
    assert lines[0]


def test_lines_outside_the_centre_are_uniform():
    """Each is measured equally often: binomial counts over 2000 draws, 5 standard deviations."""
    rng = np.random.default_rng(0)
    hits = sum(degradations.random_lines(64, 4, 0.08, rng).astype(int) for _ in range(2000))
    others = hits[hits < 2000]
    share = (16 - 5) / (64 - 5)
    assert len(others) == 59
    assert np.abs(others - 2000 * share).max() < 5 * np.sqrt(2000 * share * (1 - share))


def test_each_slice_has_lines_and_phase_of_its_own():
    item = phantom_item()
    mask = MRI().simulate(item, load_task("kspace-x4"), seed=0).arrays["mask"]
    assert mask.shape == (2, 1, 1, 66)
    assert not np.array_equal(mask[0], mask[1])
    phase = degradations.image_phase(item, "smooth", 0)
    assert not np.allclose(phase[0], phase[1])


def test_noise_is_30_db_below_the_signal_over_all_of_kspace():
    """From the definition: 10 log10(mean |F m|^2 / E |n|^2), with every line measured."""
    item, domain = phantom_item(), MRI()
    measurement = domain.simulate(item, task_of(acceleration=1), seed=0)
    assert measurement.arrays["mask"].all()
    truth = domain.truth_signal(item, measurement).numpy() * measurement.params["scale_q"]
    k = np.fft.fft2(truth[:, 0] + 1j * truth[:, 1], norm="ortho")
    n = measurement.y[:, 0] - k
    snr_db = 10 * np.log10(np.mean(np.abs(k) ** 2) / np.mean(np.abs(n) ** 2))
    assert abs(snr_db - 30) < 0.25  # 6468 complex samples: 5 standard deviations
    assert abs(n.real.std() / measurement.noise["sigma_y"] - 1) < 0.05
    assert abs(n.imag.std() / measurement.noise["sigma_y"] - 1) < 0.05


def test_what_is_not_measured_is_zero():
    measurement = MRI().simulate(phantom_item(), load_task("kspace-x4"), seed=0)
    unseen = ~np.broadcast_to(measurement.arrays["mask"], measurement.y.shape)
    assert unseen.mean() > 0.7
    assert not measurement.y[unseen].any()
    assert measurement.y.dtype == np.complex64


def test_the_scale_comes_from_the_measurement_alone():
    """q is the percentile of the zero-filled image, so brighter data give a brighter scale."""
    measurement = MRI().simulate(phantom_item(), load_task("kspace-x4"), seed=0)
    zero_filled = np.abs(np.fft.ifft2(measurement.y, norm="ortho"))
    q = measurement.params["scale_q"]
    assert np.isclose(q, np.percentile(zero_filled, 99.9))
    assert np.isclose(degradations.scale_of(3 * measurement.y), 3 * q)
    assert np.isclose(q, np.percentile(phantom_item().pixels, 99.9), rtol=0.25)


def test_the_real_task_knows_that_the_image_is_real():
    item, domain = phantom_item(), MRI()
    real = domain.problem(domain.simulate(item, load_task("kspace-x4-real"), seed=0))
    complex_ = domain.problem(domain.simulate(item, load_task("kspace-x4"), seed=0))
    assert (real.condition, real.shape[1]) == ("mri", 1)
    assert (complex_.condition, complex_.shape[1]) == ("mri-complex", 2)


def test_background_is_minus_one_if_real_and_zero_if_complex():
    item, domain = phantom_item(), MRI()
    for name, background in (("kspace-x4-real", -1.0), ("kspace-x4", 0.0)):
        truth = domain.truth_signal(item, domain.simulate(item, load_task(name), seed=0))
        assert torch.all(truth[:, :, 0, 0] == background)


def test_an_image_of_real_data_is_restored_in_its_own_units():
    """With every line and hardly any noise, A' y is the image: units go through both problems."""
    item, domain = phantom_item(), MRI()
    for phase in ("zero", "smooth"):
        task = replace(task_of(acceleration=1, phase=phase), noise={"kind": "snr", "snr_db": 120})
        problem = domain.problem(domain.simulate(item, task, seed=0))
        image = problem.to_source(problem.operator.A_adjoint(problem.y))[:, 0].numpy()
        assert np.abs(image - item.pixels[0]).max() < 1e-4 * item.pixels.max()


def test_smooth_phases_are_smooth_and_about_a_radian():
    rng = np.random.default_rng(0)
    phases = np.stack([degradations.smooth_phase(128, 160, rng) for _ in range(60)])
    waves = phases - phases.mean(axis=(1, 2), keepdims=True)
    assert 0.5 < waves.std() < 1.2
    assert np.abs(np.diff(phases, axis=1)).max() < 0.15
    assert np.abs(np.diff(phases, axis=2)).max() < 0.15
    assert phases.mean(axis=(1, 2)).std() > 1.5  # any constant


def test_a_selected_slice_keeps_its_lines_and_phase():
    item, domain = phantom_item(depth=3), MRI()
    whole = domain.simulate(item, load_task("kspace-x4"), seed=5)
    part_item = select(item, slices=[2])
    part = domain.simulate(part_item, load_task("kspace-x4"), seed=5)
    assert np.array_equal(part.arrays["mask"][0], whole.arrays["mask"][2])
    phase = degradations.image_phase(item, "smooth", 5)
    assert np.array_equal(degradations.image_phase(part_item, "smooth", 5)[0], phase[2])


def test_metrics_take_the_true_percentile_as_white():
    item = phantom_item()
    offset, gain = MRI().unit_scale(item.pixels, item.record)
    assert offset == 0
    assert np.isclose(gain * np.percentile(item.pixels, 99.9), 1)
    assert MRI().unit_scale(np.zeros((1, 1, 4, 4)), item.record) == (0.0, 1.0)


def test_the_head_is_found():
    item = phantom_item()
    head = MRI().body_mask(item.pixels, item.record)
    y, x = np.mgrid[-1:1:49j, -1:1:66j]
    assert (head[0] == (np.hypot(y, x) < 0.86)).mean() > 0.98


def test_a_damaged_volume_is_a_measurement_too():
    item, domain = phantom_item(), MRI()
    missing = np.zeros((49, 66), bool)
    missing[10:20, 30:40] = True
    damaged = Item(np.where(missing, 60000, item.pixels).astype(np.uint16), item.record)
    measurement = domain.given(damaged, mask=missing, kernel=None, scale=None, sigma_y=0.0)
    assert measurement.params["scale_q"] < 5000  # the damage does not set the scale
    problem = domain.problem(measurement)
    assert problem.condition == "mri"
    back = problem.to_source(problem.y)[:, 0].numpy()
    assert np.abs(back - item.pixels[0])[:, ~missing].max() < 1e-2


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (task_of(acceleration=30), "leaves 2, and the centre takes 5"),
        (task_of(phase="rough"), "unknown phase 'rough'"),
        (replace(task_of(), noise={"kind": "poisson"}), "not for k-space"),
        (replace(task_of(), operator="mask"), "no operator 'mask'"),
    ],
)
def test_tasks_that_mri_cannot_do_are_refused(task, message):
    with pytest.raises(BadInputError, match=message):
        MRI().simulate(phantom_item(), task, seed=0)


def test_empty_and_many_channel_volumes_are_refused():
    item = phantom_item()
    empty = Item(np.zeros_like(item.pixels), item.record)
    with pytest.raises(BadInputError, match="empty"):
        MRI().simulate(empty, load_task("kspace-x4"), seed=0)
    twice = Item(item.pixels.repeat(2, axis=0), replace(item.record, shape=(2, 2, 49, 66)))
    with pytest.raises(BadInputError, match="2 channels"):
        MRI().simulate(twice, load_task("kspace-x4"), seed=0)
