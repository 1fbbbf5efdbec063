"""Receive coils: simulated sensitivities, and their estimate from the centre of k-space.

Simulated coils stand round the image on an ellipse; each is most sensitive near itself, with a
smooth phase, and together they satisfy sum_j |s_j|^2 = 1. The estimate knows only the lines at the
centre of k-space that are all measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.linalg import splu

from domains.base import Array, BadInputError, ItemRecord
from domains.keyed import keyed_rng

RING = 1.25
"""Semi-axes of the ellipse of coils, in half widths of the image."""
REACH = 0.9
"""Distance at which a coil's sensitivity is down to 2^-1.5, in half widths of the image."""
MAX_TURN = 1.2
"""Largest slope of a coil's phase, radians over half a width."""
CALIBRATION_ROWS = 65
BLOCK_SIDE = 6
NOISE_MARGIN = 1.0
LEAST_SHARE = 1e-10
"""Of the largest eigenvalue: less is rounding, where there is hardly any noise."""
COARSE_SIDE = 64
STIFFNESS = 1e-3
"""Weight of a map's bending on the coarse grid, beside what the brightest, surest place weighs."""


def simulated_maps(record: ItemRecord, num_coils: int, seed: int) -> Array:
    """True sensitivities of an item's scan, the same for all slices: (1 coils h w) complex64."""
    rng = keyed_rng(seed, record.source_digest, "coils", 0)
    return coil_maps(record.shape[2], record.shape[3], num_coils, rng)[None]


def coil_maps(height: int, width: int, num_coils: int, rng: np.random.Generator) -> Array:
    """Sensitivities (coils h w) complex64 of a ring of coils, sum_j |s_j|^2 = 1.

    Raises:
        BadInputError: if there are fewer than two coils.
    """
    if num_coils < 2:
        raise BadInputError(f"{num_coils} coils are no array; use 2 or more, or a single-coil task")
    y = np.linspace(-1, 1, height)[:, None]
    x = np.linspace(-1, 1, width)[None, :]
    turn = 2 * np.pi * (np.arange(num_coils) + rng.uniform(-0.2, 0.2, num_coils)) / num_coils
    turn += rng.uniform(0, 2 * np.pi)
    slopes = rng.uniform(-MAX_TURN, MAX_TURN, (num_coils, 2))
    maps = []
    for angle, (slope_y, slope_x) in zip(turn, slopes, strict=True):
        distance2 = (y - RING * np.sin(angle)) ** 2 + (x - RING * np.cos(angle)) ** 2
        phase = angle + slope_y * y + slope_x * x
        maps.append((1 + distance2 / REACH**2) ** -1.5 * np.exp(1j * phase))
    field = np.stack(maps)
    unit: Array = field / np.sqrt((np.abs(field) ** 2).sum(axis=0))
    return unit.astype(np.complex64)


def estimated_maps(y: Array, mask: Array, sigma_y: float) -> Array:
    """Sensitivities of every slice from its own k-space alone: (z coils h w) complex64, unit.

    Blocks of the calibration lines lie in a low-dimensional space. A k-space is consistent with it
    if projecting all its blocks changes nothing; in image space that reads G(r) m(r) = m(r) at each
    pixel, so that the sensitivities are the eigenvectors of G(r) to the eigenvalue 1. They are
    found on a coarse grid, smooth as they are, and interpolated. Where there is no tissue, or where
    the periodic transform puts two edges of the image beside each other, no one vector stands out:
    there the maps are continued smoothly from the places that are sure.

    Args:
        y: (z coils h w) k-space, zero frequency at [0, 0].
        mask: (z 1 1 w) measured lines, or (z 1 h w) samples.
        sigma_y: standard deviation of the noise in the real part of y, and in the imaginary.

    Returns:
        Maps of sum_j |s_j|^2 = 1 at every pixel. Their common phase, which no measurement tells
        from the image's own, is that of one virtual coil, so that it is smooth.

    Source: Uecker et al. 2014 (ESPIRiT), doi:10.1002/mrm.24751.
    """
    return np.stack([_maps_of(k, plane[0], sigma_y) for k, plane in zip(y, mask, strict=True)])


def centre_lines(lines: Array) -> int:
    """Number of measured lines about the zero frequency without a gap, an odd one."""
    frequencies = np.fft.fftfreq(len(lines), 1 / len(lines))
    unseen = np.abs(frequencies[~lines])
    reach = int(unseen.min()) - 1 if len(unseen) else (len(lines) - 1) // 2
    return 2 * reach + 1


def centre_box(plane: Array) -> tuple[int, int]:
    """Rows and columns, both odd, of the largest box about the zero frequency without a gap.

    Args:
        plane: (h w), or (1 w) where whole lines are measured, of any number; zero frequency first.
    """
    if len(plane) == 1:
        return CALIBRATION_ROWS, centre_lines(plane[0])
    most = min(centre_lines(np.asarray(plane.any(axis=1))), CALIBRATION_ROWS)
    boxes = []
    for reach in range(most // 2 + 1):
        columns = np.asarray(plane[np.arange(-reach, reach + 1)].all(axis=0))
        boxes.append((2 * reach + 1, min(centre_lines(columns), CALIBRATION_ROWS)))
    return max(boxes, key=lambda box: box[0] * box[1])


def _maps_of(k: Array, plane: Array, sigma_y: float) -> Array:
    """One slice: k (coils h w), plane (1|h w)."""
    coils, h, w = k.shape
    rows, num_lines = centre_box(plane)
    rows = min(h - 1 + h % 2, rows)
    calibration = _centre(k, rows, num_lines)
    sides = (min(BLOCK_SIDE, (rows + 1) // 2), min(BLOCK_SIDE, (num_lines + 1) // 2))
    projector = _block_projector(calibration, sides, sigma_y)
    lags = _lag_kernel(projector.reshape(coils, *sides, coils, *sides))
    places = [np.linspace(-0.5, n - 0.5, min(n, COARSE_SIDE) * 2 + 1)[1::2] for n in (h, w)]
    matrices = _at_places(lags, places, (h, w))
    vectors, sureness = _principal(matrices)
    weight = (sureness * _low_resolution(calibration, places, (h, w))) ** 2
    coarse = _continued(vectors, weight)
    fine = _interpolated(coarse, (h, w))
    unit: Array = fine / np.maximum(np.sqrt((np.abs(fine) ** 2).sum(axis=0)), 1e-6)
    return unit.astype(np.complex64)


def _centre(k: Array, rows: int, columns: int) -> Array:
    """The central rows x columns of k-space, both odd, frequencies increasing."""
    shifted = np.fft.fftshift(k, axes=(-2, -1))
    top, left = k.shape[-2] // 2 - rows // 2, k.shape[-1] // 2 - columns // 2
    return shifted[:, top : top + rows, left : left + columns]


def _block_projector(calibration: Array, sides: tuple[int, int], sigma_y: float) -> Array:
    """The projector (n n) onto the space of blocks (coils, sides) of the calibration data.

    Its directions are those whose singular value exceeds the largest that noise alone has.
    """
    blocks = np.lib.stride_tricks.sliding_window_view(calibration, sides, axis=(-2, -1))
    X = np.moveaxis(blocks, (1, 2), (-2, -1)).reshape(len(calibration) * sides[0] * sides[1], -1)
    X = X.astype(np.complex128)
    values, vectors = np.linalg.eigh(X @ X.conj().T)
    of_noise = 2 * sigma_y**2 * (np.sqrt(X.shape[0]) + np.sqrt(X.shape[1])) ** 2
    kept = vectors[:, values > max(NOISE_MARGIN * of_noise, LEAST_SHARE * values[-1])]
    projector: Array = kept @ kept.conj().T
    return projector


def _lag_kernel(projector: Array) -> Array:
    """K_ij(l) = mean over blocks d' - d = l of P[(i d), (j d')]: (coils coils lags lags)."""
    coils, kh, kw = projector.shape[:3]
    lags = np.zeros((coils, coils, 2 * kh - 1, 2 * kw - 1), complex)
    for a in range(kh):
        for b in range(kw):
            # d = (a, b): lag d' - d runs from -a to kh - 1 - a, and lag 0 has index kh - 1.
            block = np.moveaxis(projector[:, a, b], 1, -3)
            lags[..., kh - 1 - a : 2 * kh - 1 - a, kw - 1 - b : 2 * kw - 1 - b] += block
    averaged: Array = lags / (kh * kw)
    return averaged


def _at_places(lags: Array, places: Sequence[Array], size: tuple[int, int]) -> Array:
    """G_ij(r) = sum_l K_ij(l) exp(-2 pi i l r / size) at places r: (rows columns coils coils)."""
    waves = []
    for r, length, count in zip(places, size, lags.shape[-2:], strict=True):
        lag = np.arange(count) - count // 2
        waves.append(np.exp(-2j * np.pi * np.outer(r, lag) / length))
    matrices: Array = np.einsum("yl,ijlm,xm->yxij", waves[0], lags, waves[1], optimize=True)
    return matrices


def _principal(matrices: Array) -> tuple[Array, Array]:
    """Unit principal eigenvectors (coils rows columns), phased by one virtual coil.

    With them how far their eigenvalues, at most 1, are above the next: (rows columns).
    """
    hermitian = 0.5 * (matrices + np.swapaxes(matrices.conj(), -1, -2))
    values, all_vectors = np.linalg.eigh(hermitian)
    vectors = all_vectors[..., -1]
    _, common = np.linalg.eigh(np.einsum("yxi,yxj->ij", vectors, vectors.conj()))
    phase = np.exp(-1j * np.angle(vectors @ common[:, -1].conj()))
    return np.moveaxis(vectors * phase[..., None], -1, 0), values[..., -1] - values[..., -2]


def _low_resolution(calibration: Array, places: Sequence[Array], size: tuple[int, int]) -> Array:
    """The image's magnitude at places as the windowed calibration lines have it, at most 1."""
    waves = []
    for r, length, count in zip(places, size, calibration.shape[-2:], strict=True):
        window = np.hanning(count + 2)[1:-1]
        waves.append(
            np.exp(2j * np.pi * np.outer(r, np.arange(count) - count // 2) / length) * window
        )
    images = np.einsum("ya,cab,xb->cyx", waves[0], calibration, waves[1], optimize=True)
    magnitude = np.linalg.norm(images, axis=0)
    shares: Array = magnitude / max(magnitude.max(), np.finfo(float).tiny)
    return shares


def _continued(vectors: Array, weight: Array) -> Array:
    """Fields s of least sum weight |s - v|^2 + STIFFNESS |second differences of s|^2, all coils.

    The edges are free: unlike the transform, sensitivities are not periodic.
    """
    h, w = weight.shape
    down, across = np.eye(h), np.eye(w)
    bends = [
        sparse.kron(np.diff(down, 2, axis=0), across),
        sparse.kron(down, np.diff(across, 2, axis=0)),
        np.sqrt(2) * sparse.kron(np.diff(down, axis=0), np.diff(across, axis=0)),
    ]
    bending = sparse.vstack(bends)
    matrix = sparse.diags_array(np.maximum(weight, 1e-12).ravel()) + STIFFNESS * (
        bending.T @ bending
    )
    solve = splu(matrix.tocsc()).solve
    wanted = (weight * vectors).reshape(len(vectors), -1).T
    fields = solve(np.ascontiguousarray(wanted.real)) + 1j * solve(
        np.ascontiguousarray(wanted.imag)
    )
    found: Array = fields.T.reshape(vectors.shape)
    return found


def _interpolated(coarse: Array, size: tuple[int, int]) -> Array:
    """Cubic interpolation of (coils rows columns) complex fields to the pixels of an image."""
    factors = (1.0, size[0] / coarse.shape[1], size[1] / coarse.shape[2])

    def fine(part: Array) -> Array:
        return ndimage.zoom(part, factors, order=3, mode="nearest", grid_mode=True)

    return fine(coarse.real) + 1j * fine(coarse.imag)
