"""Slices that moved: the simulation against numpy's own shifts, the signs on a real head."""

from dataclasses import replace

import numpy as np
import pytest
from sample_kit import sample_path

from diffusion_core.testing import DomainContract
from domains.base import BadInputError, Item
from domains.city.domain import City
from domains.imaging import slices_first
from domains.mri import motion
from domains.mri.domain import MRI
from flows.config import load_task
from tests.benchmarks.linear_convergence import picture

TASK = load_task("mri-motion")


def volume(z=13):
    base = picture("mri", 32)
    planes = np.concatenate([base.pixels] * z, axis=1)[:, :z]
    planes = planes * np.linspace(0.5, 1, z, dtype=np.float32)[:, None, None]
    return Item(planes, replace(base.record, shape=planes.shape, spacing_mm=(5.0, 2.0, 1.0)))


class TestMovedSlices(DomainContract):
    def make_domain(self):
        return MRI()

    def make_item(self):
        return volume()

    def make_tasks(self):
        return [TASK, load_task("mri-sr-z3")]

    def test_units_go_there_and_back(self):
        """Of the volume cut along y, which test_between_slices.py holds against the uncut one."""

    def test_slices_are_measured_apart(self):
        """Not these: what is measured apart is the slices along y."""


class _Drawn:
    """A generator that draws what a test says."""

    def __init__(self, first_lines, shifts):
        self.first_lines, self.shifts = first_lines, iter(shifts)

    def permutation(self, values):
        assert list(values) == list(range(1, 32))
        return np.array(self.first_lines)

    def standard_normal(self, size):
        return np.array(next(self.shifts), float)


def test_a_moved_slice_is_the_sum_of_heads_that_each_measured_part_of_the_lines(monkeypatch):
    """Lines 0-9 of a slice rolled by (3, -2) pixels, 10-20 at rest, 21-31 rolled by (-1, 4)."""
    item = volume(5)
    drawn = [_Drawn([21, 10], [(3 * 2.0, -2 * 1.0), (-1 * 2.0, 4 * 1.0)]) for _ in range(5)]
    monkeypatch.setattr(motion, "slice_rngs", lambda *_: drawn)
    pixels = motion.moved(item, [3], 0, num_moves=2, shift_mm=1.0)
    plane = item.pixels[0, 3].astype(np.float64)
    expected = np.zeros((32, 32), complex)
    for lines, roll in ((range(10), (3, -2)), (range(10, 21), (0, 0)), (range(21, 32), (-1, 4))):
        k = np.fft.fftshift(np.fft.fft2(np.roll(plane, roll, (0, 1))), axes=1)
        part = np.zeros_like(k)
        part[:, list(lines)] = k[:, list(lines)]
        expected += np.fft.ifft2(np.fft.ifftshift(part, axes=1))
    np.testing.assert_allclose(pixels[0, 3], np.abs(expected), atol=1e-4 * plane.max())
    others = [0, 1, 2, 4]
    np.testing.assert_array_equal(pixels[0, others], item.pixels[0, others])


def test_of_every_few_slices_one_has_moved_and_never_neighbours_or_ends():
    for seed in range(20):
        chosen = motion.moved_ones(volume(30), 4, seed)
        assert min(chosen) > 0
        assert max(chosen) < 29
        assert min(np.diff(chosen)) > 1
        assert 6 <= len(chosen) <= 8
    assert motion.moved_ones(volume(30), 4, 0) != motion.moved_ones(volume(30), 4, 1)


def test_the_measurement_lacks_what_moved_and_keeps_it_as_it_was_seen():
    item = volume()
    measurement = MRI().simulate(item, TASK, 0)
    chosen = measurement.params["moved_slices"]
    known = measurement.arrays["mask"][5, 0].all(axis=1)
    assert np.flatnonzero(~known).tolist() == chosen
    problem = MRI().problem(measurement)
    seen = problem.to_source(MRI().baselines()["as-it-is"](measurement, problem, {})).numpy()
    clean = slices_first(MRI().as_measured(item, measurement.record).pixels)
    errors = np.abs(seen - clean).max(axis=(0, 1, 3))
    assert (errors[known] < 1e-4 * clean.max()).all()
    assert (errors[~known] > 1e-2 * clean.max()).all()
    with pytest.raises(BadInputError, match="2 slices are too few"):
        MRI().simulate(volume(2), TASK, 0)


@pytest.mark.samples
def test_slices_that_moved_are_found_in_a_real_head_and_none_where_none_did():
    """6.5 mm slices: of those that lost most (PSNR under 25 dB) at least 3 of 4 are found."""
    item = MRI().read(sample_path("brain2"))
    assert MRI().moved_slices(item) == []
    top, lost, found = np.percentile(item.pixels, 99.9), 0, 0
    for seed in range(4):
        chosen = motion.moved_ones(item, 5, seed)
        pixels = motion.moved(item, chosen, seed, num_moves=3, shift_mm=4.0)
        seen = set(MRI().moved_slices(Item(pixels, item.record)))
        assert seen <= set(chosen), "a slice that had not moved"
        errors = np.mean((pixels - item.pixels)[0] ** 2, axis=(1, 2)) / top**2
        bad = {z for z in chosen if -10 * np.log10(errors[z] + 1e-12) < 25}
        lost, found = lost + len(bad), found + len(bad & seen)
    assert lost >= 4
    assert found >= 0.75 * lost


def test_neither_noise_nor_a_flat_volume_has_moved():
    rng = np.random.default_rng(0)
    base = volume(13)
    noisy = np.abs(base.pixels + rng.normal(0, 0.02 * base.pixels.max(), base.pixels.shape))
    flat = np.full_like(base.pixels, 7)
    for pixels in (noisy.astype(np.float32), flat, np.zeros_like(flat), base.pixels[:, :2]):
        record = replace(base.record, shape=pixels.shape)
        assert MRI().moved_slices(Item(pixels, record)) == []


def test_other_domains_know_of_no_such_slices():
    assert list(City().moved_slices(picture("city", 32))) == []
