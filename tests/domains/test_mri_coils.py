"""Coils and their estimates, against the definition and against scans of which all is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_mri_physics import phantom_item

from diffusion_core.operators import MultiCoil
from diffusion_core.testing import DomainContract
from domains.base import BadInputError
from domains.mri import coils
from domains.mri.domain import MRI, maps_of
from flows.config import load_task


def task_of(name: str = "kspace-x4-8coil", snr_db: float = 30.0, **params):
    task = load_task(name)
    params = {**task.operator_params, **params}
    return replace(task, operator_params=params, noise={"kind": "snr", "snr_db": snr_db})


def agreement(estimate, truth):
    """|<t, s>| of unit sensitivities at every pixel: 1 where they differ by a phase only."""
    return np.abs((estimate.conj() * truth).sum(axis=-3))


class TestEightCoils(DomainContract):
    # Sensitivities are estimated from a few lines: the model's own error adds to the noise.
    chi2_bounds = (0.9, 1.6)

    def make_domain(self):
        return MRI()

    def make_item(self):
        return phantom_item(size=(64, 80))

    def make_tasks(self):
        return [task_of(centre_share=0.2)]


def test_simulated_coils_are_unit_smooth_and_apart():
    maps = coils.coil_maps(65, 80, 8, np.random.default_rng(0))
    assert maps.shape == (8, 65, 80)
    assert np.allclose((np.abs(maps) ** 2).sum(axis=0), 1, atol=1e-6)
    assert np.abs(np.diff(maps, axis=-1)).max() < 0.1
    assert np.abs(np.diff(maps, axis=-2)).max() < 0.1
    overlap = np.abs(np.einsum("iyx,jyx->ij", maps.conj(), maps)) / (65 * 80)
    assert (overlap.diagonal() > 1.5 * (overlap.sum(axis=1) - overlap.diagonal()) / 7).all()


def test_coils_are_keyed_by_digest_and_seed():
    record = phantom_item().record
    first = coils.simulated_maps(record, 8, 0)
    assert np.array_equal(first, coils.simulated_maps(record, 8, 0))
    assert not np.allclose(first, coils.simulated_maps(record, 8, 1))
    other = replace(record, source_digest="c" * 64)
    assert not np.allclose(first, coils.simulated_maps(other, 8, 0))


@pytest.mark.parametrize("width", [64, 65])
@pytest.mark.parametrize(("missing", "expected"), [((10,), 19), ((-3,), 5), ((1,), 1), ((), None)])
def test_lines_are_counted_to_the_first_gap_on_either_side(width, missing, expected):
    lines = np.ones(width, bool)
    lines[list(missing)] = False
    assert coils.centre_lines(lines) == (expected or width - 1 + width % 2)


def test_sensitivities_that_do_not_vary_are_found_exactly():
    """Every block of k-space is then the same coil vector times a number: rank one."""
    weights = np.array([1.0, 0.5 - 0.2j, -0.3j])
    weights = weights / np.linalg.norm(weights)
    image = np.random.default_rng(0).standard_normal((32, 48))
    y = np.fft.fft2(weights[:, None, None] * image, norm="ortho")[None]
    lines = np.abs(np.fft.fftfreq(48, 1 / 48)) <= 6
    estimate = coils.estimated_maps(y, lines[None, None, None], 0.0)
    assert np.abs(agreement(estimate, weights[None, :, None, None]) - 1).max() < 1e-5


def test_noise_takes_no_part_in_the_space_of_blocks():
    """A white image by constant coils fills 3 x 3 of the 27 directions; weak noise adds none."""
    rng = np.random.default_rng(0)
    image, *noise = rng.standard_normal((7, 40, 40)) + 1j * rng.standard_normal((7, 40, 40))
    weights = np.array([1.0, 0.5 - 0.2j, -0.3j])[:, None, None]
    noisy = weights * image + 0.1 * np.stack(noise[:3])
    assert round(np.trace(coils._block_projector(noisy, (3, 3), 0.1)).real) == 9
    only = 0.1 * np.stack(noise[:3])
    assert round(np.trace(coils._block_projector(only, (3, 3), 0.1)).real) <= 3


def test_the_scale_of_several_coils_is_that_of_the_image():
    item = phantom_item(size=(64, 80))
    measurement = MRI().simulate(item, task_of(acceleration=1, snr_db=60.0), seed=0)
    assert np.isclose(measurement.params["scale_q"], np.percentile(item.pixels, 99.9), rtol=0.01)


@pytest.mark.parametrize(("snr_db", "least"), [(60.0, 0.9997), (30.0, 0.999)])
def test_sensitivities_are_found_where_there_is_signal(snr_db, least):
    item = phantom_item(depth=1, size=(96, 128))
    measurement = MRI().simulate(item, task_of(snr_db=snr_db, centre_share=0.12), seed=0)
    estimate, truth = maps_of(measurement), coils.simulated_maps(item.record, 8, 0)
    assert np.allclose((np.abs(estimate) ** 2).sum(axis=1), 1, atol=1e-4)
    body = item.pixels[0] > 200
    assert agreement(estimate, truth)[body].mean() > least
    # The free phase that is left varies slowly: no pixel turns against its neighbour.
    phase = np.exp(1j * np.angle((estimate.conj() * truth).sum(axis=1)))[0]
    both = body[0, :, 1:] & body[0, :, :-1]
    assert np.abs(np.diff(phase, axis=-1))[both].max() < 0.3


def test_maps_are_continued_where_two_edges_of_the_image_meet():
    """A head at the top edge: the periodic transform puts it beside the air at the bottom."""
    item = phantom_item(depth=1, size=(96, 128))
    head = item.pixels[0, 0]
    first = int(np.flatnonzero((head > 200).any(axis=1))[0])
    pixels = np.pad(head[first:], ((0, first), (0, 0)))[None, None]
    # A vessel at the other edge, seen by quite other coils.
    pixels[0, 0, -4:, 40:88] = 0.5 * pixels.max()
    item = replace(item, pixels=pixels)
    measurement = MRI().simulate(item, task_of(centre_share=0.15), seed=0)
    estimate, truth = maps_of(measurement), coils.simulated_maps(item.record, 8, 0)
    found = agreement(estimate, truth)[0]
    assert found.min() > 0.95
    assert np.quantile(found, 0.01) > 0.98


def test_more_centre_lines_leave_less_error():
    item, errors = phantom_item(depth=1, size=(64, 96)), []
    truth = coils.simulated_maps(item.record, 8, 0)
    for share in (0.03, 0.06, 0.12):
        measurement = MRI().simulate(item, task_of(snr_db=60.0, centre_share=share), seed=0)
        found = agreement(maps_of(measurement).astype(complex), truth.astype(complex))
        errors.append(1 - found[item.pixels[0] > 200].mean())
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2


def test_noise_is_30_db_below_the_signal_over_all_coils():
    item, domain = phantom_item(), MRI()
    measurement = domain.simulate(item, task_of(acceleration=1), seed=0)
    maps = coils.simulated_maps(item.record, 8, 0)
    coil_images = maps * domain_image(item, measurement)
    k = np.fft.fft2(coil_images, norm="ortho")
    n = measurement.y - k
    assert abs(10 * np.log10(np.mean(np.abs(k) ** 2) / np.mean(np.abs(n) ** 2)) - 30) < 0.1
    assert np.allclose(n.std(axis=(0, 2, 3)) / n.std(), 1, atol=0.05)


def domain_image(item, measurement):
    """The true complex image, in source units: (z 1 h w)."""
    from domains.mri.degradations import image_phase

    phase = image_phase(item, measurement.params["phase"], measurement.seed)
    return np.moveaxis(item.pixels, 0, 1) * np.exp(1j * phase)


def test_a_fully_sampled_scan_gives_the_image_back():
    item, domain = phantom_item(size=(64, 96)), MRI()
    measurement = domain.simulate(item, task_of(acceleration=1, snr_db=90.0), seed=0)
    problem = domain.problem(measurement)
    assert isinstance(problem.operator, MultiCoil)
    assert (problem.condition, problem.shape) == ("mri-complex", (2, 2, 64, 96))
    image = problem.to_source(problem.operator.A_adjoint(problem.y))[:, 0].numpy()
    body = item.pixels[0] > 200
    assert np.abs(image - item.pixels[0])[body].max() < 0.02 * item.pixels.max()


def test_coils_beat_one_coil_at_the_same_lines():
    """What parallel imaging is for: L1-wavelet with 8 coils against the same with one."""
    item, domain = phantom_item(depth=1, size=(96, 128)), MRI()
    errors = []
    for name in ("kspace-x4", "kspace-x4-8coil"):
        measurement = domain.simulate(item, load_task(name), seed=0)
        problem = domain.problem(measurement)
        x = domain.baselines()["wavelet"](measurement, problem, {})
        gap = problem.to_source(x)[:, 0].numpy() - item.pixels[0]
        errors.append(float(np.sqrt((gap**2).mean())))
    assert errors[1] < 0.7 * errors[0]


def test_one_coil_is_no_array():
    with pytest.raises(BadInputError, match="no array"):
        MRI().simulate(phantom_item(), task_of(num_coils=1), seed=0)


def test_the_true_maps_make_the_data_of_the_problem():
    """With all lines and hardly any noise, A truth is y: the phase of the maps is accounted for."""
    item, domain = phantom_item(size=(64, 96)), MRI()
    measurement = domain.simulate(item, task_of(acceleration=1, snr_db=90.0), seed=0)
    problem = domain.problem(measurement)
    Ax = problem.operator.A(domain.truth_signal(item, measurement))
    assert float((problem.y - Ax).abs().square().sum() / problem.y.abs().square().sum()) < 1e-4
    assert torch.isfinite(problem.y.abs()).all()
