"""Metal and lying detector elements: what is masked, found, and restored without it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion_core.operators import Compose, Mask
from diffusion_core.testing import LinearOperatorContract
from domains.base import BadInputError, Item
from domains.ct.baselines import filled_line_integrals
from domains.ct.domain import CT, geometry_of
from domains.ct.geometry import FanGeometry, ParallelGeometry
from domains.ct.operators import beam_of
from domains.ct.unmeasured import interpolated, lying_bins, ray_distance, spoil
from flows.config import load_task
from tests.benchmarks.linear_convergence import picture

TASKS = ("ct-metal", "ct-rings")
PARALLEL = ParallelGeometry(40, 44, (1.1, 0.9), 12, 180.0, 71, 1.0, offset_mm=0.4)
FAN = FanGeometry(40, 44, (1.1, 0.9), 12, 360.0, 91, 1.6, 90.0, 150.0, offset_mm=-0.7)


def slices(size=96):
    """Soft discs of several densities, none about the middle, as nobody lies in a scanner."""
    y, x = np.mgrid[:size, :size] * 128 / size
    hu = np.full((size, size), -1000.0)
    for row, column, radius, step in ((60, 70, 45, 1000), (45, 60, 12, -700), (75, 85, 9, 900)):
        hu += step / (1 + np.exp((np.hypot(x - column, y - row) - radius) / 1.5))
    record = picture("ct", 32).record
    shape, spacing = (1, 1, size, size), (2.0, 256 / size, 256 / size)
    return Item(hu.astype("f4")[None, None], replace(record, shape=shape, spacing_mm=spacing))


def case(name, seed=0):
    measurement = CT().simulate(slices(), load_task(name), seed)
    return measurement, CT().problem(measurement)


class TestMaskedScan(LinearOperatorContract):
    def make(self, dtype):
        mask = np.random.default_rng(0).random((2, 1, 12, 71)) < 0.8
        return Compose(Mask(torch.from_numpy(mask)), beam_of(PARALLEL, 0.03)), (2, 1, 40, 44)


@pytest.mark.parametrize("geometry", [PARALLEL, FAN], ids=["parallel", "fan"])
def test_the_trace_of_a_disc_is_what_the_projector_sees_of_it(geometry):
    y, x = np.mgrid[:40, :44]
    row, column, radius = 12, 30, 6.0
    inside = np.hypot((x - column) * 0.9, (y - row) * 1.1) <= radius
    image = torch.from_numpy(inside.astype(np.float32))[None, None]
    seen = beam_of(geometry).A(image)[0, 0].numpy() > 0.5
    distance = np.abs(ray_distance(geometry, (column - 21.5) * 0.9, (row - 19.5) * 1.1))
    assert seen[distance < radius - 1.5].all()
    assert not seen[distance > radius + 1.5].any()


@pytest.mark.parametrize("name", TASKS)
def test_what_is_not_known_moves_nothing(name):
    measurement, problem = case(name)
    known = measurement.arrays["mask"]
    assert 0.5 < known.mean() < 0.995
    assert not measurement.y[~known].any()
    x = torch.randn(problem.shape, generator=torch.Generator().manual_seed(1))
    assert not problem.operator.A(x)[torch.from_numpy(~known)].any()
    noisy = measurement.y + 99 * ~known
    other = CT().problem(replace(measurement, y=noisy.astype(np.float32)))
    assert torch.equal(other.y, problem.y)


@pytest.mark.parametrize("name", TASKS)
def test_the_known_part_is_that_of_a_scan_without_the_damage(name):
    """But for what lying elements add that is too little to be found."""
    measurement, _ = case(name)
    task = load_task(name)
    whole = {k: v for k, v in task.operator_params.items() if k in ("num_views", "arc_degrees")}
    clean = CT().simulate(slices(), replace(task, operator_params=whole), 0)
    difference = np.abs(measurement.y - clean.y)[measurement.arrays["mask"]]
    assert (difference < 1e-6).mean() > 0.97
    assert difference.max() < (1e-6 if name == "ct-metal" else 0.15)


@pytest.mark.parametrize("name", TASKS)
def test_damage_is_keyed_by_source_slice_and_seed(name):
    first, again, other = (case(name, seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(first.arrays["mask"], again.arrays["mask"])
    assert np.array_equal(first.y, again.y)
    assert not np.array_equal(first.arrays["mask"], other.arrays["mask"])


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("method", ["fbp", "sirt"])
def test_baselines_restore_nearly_what_they_do_of_a_whole_scan(name, method):
    task = load_task(name)
    whole = {k: v for k, v in task.operator_params.items() if k in ("num_views", "arc_degrees")}
    errors = []
    for params in (task.operator_params, whole):
        measurement = CT().simulate(slices(), replace(task, operator_params=params), 0)
        problem = CT().problem(measurement)
        restored = CT().baselines()[method](measurement, problem, {})
        truth = CT().truth_signal(slices(), measurement)
        errors.append(float((restored - truth).square().mean().sqrt()))
    assert errors[1] < errors[0] < 2.5 * errors[1] + 0.04


def test_elements_that_lie_are_found_and_others_are_not():
    rng = np.random.default_rng(0)
    t = np.linspace(-1, 1, 200) - 0.2 * np.cos(np.linspace(0, np.pi, 90))[:, None]
    clean = np.stack([4 * np.sqrt(np.maximum(0.5 - t**2, 0))] * 3)
    noisy = clean + 0.02 * rng.standard_normal(clean.shape)
    assert lying_bins(noisy).mean() < 0.03
    for place in (31, 100, 104, 160):
        noisy[1, :, place] += 0.1
    found = lying_bins(noisy)
    assert found[1, [31, 100, 104, 160]].all()
    assert found[[0, 2]].mean() < 0.03


def test_straight_lines_go_over_what_is_unknown():
    p = np.tile(np.arange(9.0) ** 2, (1, 1, 3, 1))
    known = np.ones_like(p, dtype=bool)
    known[..., 1, 3:6] = known[..., 2, :] = False
    filled = interpolated(np.where(known, p, 0), known)
    np.testing.assert_allclose(filled[0, 0, 1, 3:6], [12, 20, 28])
    np.testing.assert_array_equal(filled[0, 0, 0], p[0, 0, 0])
    assert not filled[0, 0, 2].any()


def test_unknown_line_integrals_are_filled_for_backprojection():
    measurement, problem = case("ct-metal")
    filled = filled_line_integrals(problem).numpy()
    known = measurement.arrays["mask"]
    np.testing.assert_allclose(filled[known], measurement.y[known], atol=1e-4)
    clean = CT().simulate(slices(), load_task("ct-sparse60"), 0)
    assert np.abs(filled[~known]).mean() > 0.1 * clean.y.mean()


def test_nan_in_a_users_scan_is_not_measured_and_liars_are_found_when_asked(tmp_path):
    measurement, _ = case("ct-metal")
    values = np.where(measurement.arrays["mask"], measurement.y, np.nan)[:, 0]
    geometry = geometry_of(measurement.record, measurement.params)
    np.save(tmp_path / "a.npy", values)
    text = {"beam": "parallel", "num_views": 180, "arc_degrees": 180.0, "bin_mm": geometry.bin_mm,
            "counts_per_ray": 1e5}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(text))
    given = CT().measured(tmp_path / "a.npy")
    np.testing.assert_array_equal(given.arrays["mask"], measurement.arrays["mask"])
    np.testing.assert_array_equal(given.y, measurement.y)
    values[:, :, 40] += 0.5
    np.save(tmp_path / "a.npy", values)
    (tmp_path / "a.json").write_text(json.dumps({**text, "find_lying_bins": True}))
    assert not CT().measured(tmp_path / "a.npy").arrays["mask"][:, :, :, 40].any()


def test_an_unknown_pattern_is_refused():
    with pytest.raises(BadInputError, match="no pattern 'hail'"):
        spoil(np.zeros((1, 2, 3)), slices(), PARALLEL, {"pattern": "hail"}, 0)
