"""From raw k-space to a problem: noise, sampling, sensitivities, and the way back to files."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from kspace_kit import SIGMA, lines, scan, write_bart

from domains.base import Item
from domains.mri.coils import centre_box, centre_lines
from domains.mri.domain import MRI
from domains.mri.kspace import RawScan, transform_of_centred
from domains.mri.measured import cropped_readout, measured, measurement_of
from domains.mri.prewhitening import compressed, corner_samples, noise_covariance, prewhiten

RNG = np.random.default_rng(7)
MIXING = RNG.standard_normal((4, 4)) + 1j * RNG.standard_normal((4, 4)) + 3 * np.eye(4)


def white(shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def covariance(samples):
    flat = samples.reshape(len(samples), -1)
    return flat @ flat.conj().T / flat.shape[1]


def test_noise_is_white_after_whitening_by_a_noise_scan():
    noise = np.einsum("ij,jhw->ihw", MIXING, white((4, 64, 64)))
    other = np.einsum("ij,jn->in", MIXING, white((4, 20_000), seed=1))
    found = prewhiten(noise[None], other)
    C = covariance(found.k[0]) / (2 * found.sigma_y**2)
    assert np.abs(C - np.eye(4)).max() < 0.06
    # The unit stays: what whitening does to the volume of the noise is undone.
    volume = np.linalg.det(covariance(noise)).real ** (1 / 8)
    assert found.sigma_y * np.sqrt(2) == pytest.approx(volume, rel=0.02)


@pytest.mark.parametrize("kept", [np.ones(48, bool), lines(48, step=3)])
def test_the_corners_of_kspace_tell_the_noise(kept):
    full = scan(h=96, sigma=0.02, mixing=MIXING / 4)
    k = transform_of_centred(full.k * kept)[None].astype(np.complex64)
    true = MIXING @ MIXING.conj().T / 16 * 2 * 0.02**2
    found = noise_covariance(corner_samples(k))
    assert np.abs(found - true).max() < 0.25 * np.abs(true).max()
    assert np.trace(found).real == pytest.approx(np.trace(true).real, rel=0.15)


def test_trimmed_noise_keeps_its_variance():
    k = white((1, 3, 200, 200))
    assert np.trace(noise_covariance(corner_samples(k))).real == pytest.approx(6.0, rel=0.04)


def test_too_few_noise_samples_tell_nothing_of_pairs_of_coils():
    C = noise_covariance(np.einsum("ij,jn->in", MIXING, white((4, 20))))
    assert np.array_equal(C, np.diag(C.diagonal()))


def test_coils_that_see_nothing_are_left_out():
    full = scan(coils=3, sigma=0.0)
    blind = np.linalg.qr(white((8, 8)))[0]
    six = np.zeros((8, *full.k.shape[1:]), complex)
    six[:3] = full.k
    k = np.einsum("ij,jhw->ihw", blind, six) + 0.01 * white(six.shape, seed=3)
    few = compressed(
        prewhiten(transform_of_centred(k)[None].astype(np.complex64), 0.01 * white((8, 5000)))
    )
    assert few.k.shape == (1, 3, 64, 48)
    assert np.linalg.norm(few.k) == pytest.approx(np.linalg.norm(full.k), rel=0.01)


@pytest.mark.parametrize("shape", [(48, 64), (49, 65)])
def test_the_largest_box_without_a_gap_is_found(shape):
    plane = np.zeros(shape, bool)
    plane[np.ix_(np.arange(-5, 6), np.arange(-3, 4))] = True
    assert centre_box(plane) == (11, 7)
    plane[np.ix_(np.arange(-2, 3), np.arange(-20, 21))] = True
    assert centre_box(plane) == (5, 41)
    line = np.abs(np.fft.fftfreq(shape[1], 1 / shape[1])) < 9
    whole = np.broadcast_to(line, shape)
    assert centre_box(whole) == (shape[0] - 1 + shape[0] % 2, 17)
    assert centre_box(whole)[1] == centre_lines(line)
    assert centre_box(whole.T) == (17, min(shape[0] - 1 + shape[0] % 2, 65))


def points(h, w):
    """A quarter of the samples, at random, and the middle ones."""
    kept = np.random.default_rng(5).random((h, w)) < 0.25
    kept[h // 2 - 10 : h // 2 + 11, w // 2 - 10 : w // 2 + 11] = True
    return kept


def half(h, w):
    """Partial Fourier: five eighths of the lines."""
    kept = np.ones((h, w), bool)
    kept[:, : w * 3 // 8] = False
    return kept


SAMPLINGS = {
    "columns": lambda h, w: np.broadcast_to(lines(w), (h, w)),
    "rows": lambda h, w: np.broadcast_to(lines(h)[:, None], (h, w)),
    "points": points,
    "partial": half,
    "all": lambda h, w: np.ones((h, w), bool),
}


@pytest.mark.parametrize("size", [(64, 48), (65, 49)])
@pytest.mark.parametrize("kind", SAMPLINGS)
def test_a_scan_becomes_the_problem_that_it_is(tmp_path, kind, size):
    """The sampling is found; the true image explains the data up to noise and the maps' error."""
    full, kept = scan(*size), SAMPLINGS[kind](*size)
    np.save(tmp_path / "scan.npy", (full.k * kept).astype(np.complex64))
    found = measured(tmp_path / "scan.npy")
    assert np.array_equal(np.fft.fftshift(found.arrays["mask"][0, 0]), kept)
    assert found.params["acceleration"] == pytest.approx(kept.size / kept.sum(), abs=0.01)
    assert found.noise["sigma_y"] == pytest.approx(SIGMA, rel=0.25)
    problem = MRI().problem(found)
    assert problem.shape == (1, 2, *size)
    # All data fitted as well as they can be: the noise is all that is left, within the maps' error.
    x = least_squares(problem)
    image = problem.to_source(x)[0].numpy()
    misfit = (problem.operator.A(x) - problem.y).abs().square().sum()
    variance = 2 * problem.noise.variance(problem.y).mean()
    assert float(misfit / variance) < 2.0 * kept.sum() * full.maps.shape[0]
    if kind in ("columns", "rows", "all"):
        body = np.abs(full.image) > 0.5
        assert np.median(np.abs(image[0] - np.abs(full.image))[body]) < 0.08
        turn = np.exp(1j * (image[1] - np.angle(full.image)))[body]
        assert np.abs(np.diff(np.angle(turn))).mean() < 0.2


def least_squares(problem, steps=25):
    """Conjugate gradients on A'A x = A'y, a little damped."""
    A = problem.operator

    def normal(x):
        return A.normal(x) + 1e-3 * x

    x = torch.zeros(problem.shape)
    r = A.A_adjoint(problem.y)
    p, rr = r, r.square().sum()
    for _ in range(steps):
        q = normal(p)
        step = rr / (p * q).sum().clamp_min(1e-30)
        x, r = x + step * p, r - step * q
        p, rr = r + r.square().sum() / rr.clamp_min(1e-30) * p, r.square().sum()
    return x


def test_a_cropped_readout_keeps_noise_white_and_as_strong(tmp_path):
    kept = lines(48)
    k = white((2, 3, 128, 48)) * kept
    cropped = cropped_readout(tmp_path, k, 64)
    assert cropped.shape == (2, 3, 64, 48)
    assert np.array_equal((cropped != 0).any(axis=(0, 1, 2)), kept)
    assert np.abs(cropped[..., kept]).var() == pytest.approx(np.abs(k[..., kept]).var(), rel=0.05)


def test_one_coil_needs_no_sensitivities():
    full = scan(coils=4)
    k = transform_of_centred(full.k[:1] * lines(48))[None].astype(np.complex64)
    found = measurement_of(RawScan(k, "npy", "0" * 64), None)
    assert (found.operator, found.y.shape) == ("fourier", (1, 1, 64, 48))
    problem = MRI().problem(found)
    assert (problem.condition, problem.shape) == ("mri-complex", (1, 2, 64, 48))
    parts = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 2, 64, 48)))
    magnitude, phase = problem.to_source(parts)[0].numpy()
    expected = (parts[0, 0] + 1j * parts[0, 1]).numpy() * found.params["scale_q"]
    assert np.allclose(magnitude * np.exp(1j * phase), expected)


def test_noise_of_a_noise_scan_is_brought_to_the_scans_bandwidth():
    full = scan()
    k = transform_of_centred(full.k)[None].astype(np.complex64)
    raw = RawScan(k, "npy", "0" * 64, noise=SIGMA / 2 * white((4, 4000)), noise_gain=2.0)
    assert measurement_of(raw, None).noise["sigma_y"] == pytest.approx(SIGMA, rel=0.03)


def test_magnitude_and_phase_become_two_files_of_one_geometry(tmp_path):
    found = measured(write_bart(tmp_path / "scan", scan().k))
    affine = ((0.0, -2.0, 0.0, 5.0), (3.0, 0.0, 0.0, 6.0), (0.0, 0.0, 4.0, 7.0), (0, 0, 0, 1.0))
    record = replace(
        found.record,
        affine=affine,
        spacing_mm=(4.0, 2.0, 3.0),
        meta=found.record.meta | {"orientation": "ALS"},
    )
    pixels = np.random.default_rng(0).standard_normal((2, 1, 64, 48)).astype(np.float32)
    folder = MRI().write(Item(pixels, record), tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == ["magnitude.nii.gz", "phase.nii.gz"]
    for channel, name in enumerate(("magnitude", "phase")):
        image = nibabel.load(folder / f"{name}.nii.gz")
        assert np.allclose(image.affine, affine)
        assert np.array_equal(image.get_fdata()[..., 0].T, pixels[channel, 0])
    assert MRI().write_large(record, lambda *_: pixels, tmp_path / "large") is None
