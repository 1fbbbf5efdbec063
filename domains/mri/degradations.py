"""Undersampled k-space of a clean magnitude volume: phase, noise, lines left out.

    k = M (F m + n),   m = magnitude e^{i phi},   F = fft2, norm "ortho", zero frequency at [0, 0]

all in the source's intensity units. n is complex white noise, of the same strength in all slices.
With several coils each measures k_j = M (F s_j m + n_j), s_j its sensitivity; n_j is as strong in
every coil.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from domains.base import Array, BadInputError, Item, Measurement, Task
from domains.imaging import slices_first
from domains.keyed import pixel_digest, slice_rngs
from domains.mri.coils import simulated_maps

SCALE_PERCENTILE = 99.9
PHASE_STD_RAD = 1.0
MAX_HALF_TURNS = 2
"""Phase waves run through up to this many half periods over the image, along either axis."""


def simulate(item: Item, task: Task, seed: int) -> Measurement:
    """Measure a clean magnitude volume as the task says.

    Operator parameters: acceleration (>= 1), centre_share (0..1), phase "smooth" or "zero";
    "multi-coil" has num_coils too.
    Noise: {"kind": "snr", "snr_db": 10 log10(mean |F m|^2 / E |n|^2) over all of k-space}, means
    over all slices and coils of the item.

    Returns:
        y (z 1|coils h w) complex64, zeros where not measured; arrays["mask"] (z 1 1 w); noise
        "gaussian" with sigma_y of the real (and of the imaginary) part; params["scale_q"], the
        network scale.
    """
    params = dict(task.operator_params)
    if task.noise["kind"] != "snr":
        raise BadInputError(
            f"task '{task.name}': noise '{task.noise['kind']}' is not for k-space; use 'snr'"
        )
    magnitude = slices_first(item.pixels).astype(np.float32)
    phase = image_phase(item, params["phase"], seed)
    image = magnitude * np.exp(1j * phase)
    if task.operator == "multi-coil":
        image = image * simulated_maps(item.record, int(params["num_coils"]), seed)
    k = np.fft.fft2(image, norm="ortho")
    sigma_y = float(np.sqrt(np.mean(np.abs(k) ** 2) / 10 ** (task.noise["snr_db"] / 10) / 2))
    rngs = slice_rngs(seed, item.record, "noise")
    noise = np.stack([rng.standard_normal((2, *k.shape[1:])) for rng in rngs])
    mask = line_mask(item, float(params["acceleration"]), float(params["centre_share"]), seed)
    y = ((k + sigma_y * (noise[:, 0] + 1j * noise[:, 1])) * mask).astype(np.complex64)
    params |= {"phase_encode_axis": "w", "scale_q": scale_of(y)}
    return Measurement(
        record=item.record,
        task=task.name,
        operator=task.operator,
        params=params,
        noise={"kind": "gaussian", "sigma_y": sigma_y, "snr_db": float(task.noise["snr_db"])},
        y=y,
        arrays={"mask": mask},
        truth_digest=pixel_digest(item.pixels),
        seed=seed,
    )


def scale_of(y: Array) -> float:
    """The network scale q: the 99.9th percentile of the zero-filled magnitude over all slices.

    Of several coils it is the root of the sum of squares, which unit sensitivities make the image's
    own magnitude.

    Raises:
        BadInputError: if nothing was measured.
    """
    zero_filled = np.linalg.norm(np.fft.ifft2(y, norm="ortho"), axis=1)
    return positive_scale(float(np.percentile(zero_filled, SCALE_PERCENTILE)))


def positive_scale(q: float) -> float:
    """Q itself, if an image can be divided by it.

    Raises:
        BadInputError: if it is 0 or not finite.
    """
    if not np.isfinite(q) or q <= 0:
        raise BadInputError("the image is empty: its 99.9th percentile is 0; leave it out")
    return q


def line_mask(item: Item, acceleration: float, centre_share: float, seed: int) -> Array:
    """Which phase-encode lines (along w) are measured: (z 1 1 w), a draw of its own each slice."""
    width = item.record.shape[3]
    rngs = slice_rngs(seed, item.record, "lines")
    lines = [random_lines(width, acceleration, centre_share, rng) for rng in rngs]
    return np.stack(lines)[:, None, None]


def random_lines(
    num_lines: int, acceleration: float, centre_share: float, rng: np.random.Generator
) -> Array:
    """round(num_lines / acceleration) lines: the centre ones and others at random; (num_lines,).

    Index 0 is the zero frequency, as fft2 has it. The centre block has round(centre_share
    num_lines) lines, at least 1.

    Raises:
        BadInputError: if the centre alone is more than the acceleration allows.
    """
    num_measured = round(num_lines / acceleration)
    num_centre = max(round(centre_share * num_lines), 1)
    if not num_centre <= num_measured <= num_lines:
        raise BadInputError(
            f"acceleration {acceleration:g} of {num_lines} lines leaves {num_measured}, and the "
            f"centre takes {num_centre}; use a larger image or a smaller acceleration"
        )
    lines = np.zeros(num_lines, bool)
    start = num_lines // 2 - num_centre // 2  # fftshift puts the zero frequency at num_lines // 2
    lines[start : start + num_centre] = True
    others = rng.permutation(np.flatnonzero(~lines))[: num_measured - num_centre]
    lines[others] = True
    return np.fft.ifftshift(lines)


def image_phase(item: Item, kind: str, seed: int) -> Array:
    """The simulated phase of every slice in radians, (z 1 h w) float32; "zero" or "smooth".

    Raises:
        BadInputError: for another kind.
    """
    z, h, w = item.record.shape[1:]
    if kind == "zero":
        return np.zeros((z, 1, h, w), np.float32)
    if kind != "smooth":
        raise BadInputError(f"unknown phase '{kind}': choose 'smooth' or 'zero'")
    rngs = slice_rngs(seed, item.record, "phase")
    return np.stack([smooth_phase(h, w, rng) for rng in rngs])[:, None]


def smooth_phase(height: int, width: int, rng: np.random.Generator) -> Array:
    """A constant, any, plus waves of at most one period over the image; std 1 rad; (h w) float32.

    Coil, field and echo centre leave such phases. Slower than the phases of training patches
    (domains/mri/training.py), which cover it.
    """
    v = np.linspace(0, 1, height)
    u = np.linspace(0, 1, width)
    waves: list[Any] = []
    for ky in range(MAX_HALF_TURNS + 1):
        for kx in range(-MAX_HALF_TURNS, MAX_HALF_TURNS + 1):
            if ky == 0 and kx <= 0:
                continue  # the constant, and the mirror images of waves that are there
            amplitude = rng.standard_normal() / (kx**2 + ky**2)
            shift = rng.uniform(0, 2 * np.pi)
            waves.append((ky, kx, amplitude, shift))
    expected_std = np.sqrt(sum(0.5 / (ky**2 + kx**2) ** 2 for ky, kx, _, _ in waves))
    field = np.full((height, width), rng.uniform(-np.pi, np.pi))
    for ky, kx, amplitude, shift in waves:
        gain = PHASE_STD_RAD / expected_std * amplitude
        field += gain * np.cos(np.pi * (ky * v[:, None] + kx * u[None, :]) + shift)
    return field.astype(np.float32)
