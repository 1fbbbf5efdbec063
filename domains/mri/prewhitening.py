"""Noise of receive coils: its covariance, coils made independent of each other, and fewer of them.

    n ~ CN(0, C),   C = L L^H,   k' = g L^{-1} k   with   g = det(C)^(1 / (2 coils))

so that k' has white noise of variance g^2 in every coil, and its unit is still the source's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from domains.base import Array

CORNER_SHARE = 0.05
"""Of what was measured, farthest from the centre: hardly anything but noise."""
LEAST_SAMPLES_A_COIL = 8
"""Fewer samples than this times the coils tell of each coil's noise, not of pairs."""
TRIM = 0.9
"""Share of the corner samples, the weakest, that are taken for noise."""
LEAST_NOISE = 1e-6
"""Of the strongest sample: below it a scan has no noise to speak of."""


@dataclass(frozen=True)
class WhiteScan:
    """k (z coils h w) with white noise; sigma_y is that of its real and of its imaginary part."""

    k: Array
    sigma_y: float


def noise_covariance(noise: Array) -> Array:
    """E[n n^H] (coils coils) of noise samples (coils n); diagonal where they are too few."""
    coils, count = noise.shape
    values = noise.astype(np.complex128)
    covariance: Array = values @ values.conj().T / max(count, 1)
    if count < LEAST_SAMPLES_A_COIL * coils:
        return np.diag(covariance.diagonal())
    return covariance


def corner_samples(k: Array) -> Array:
    """The measured samples farthest from the zero frequency, all slices: (coils n).

    Those with the greatest energy over all coils are left out: edges of the image reach far. What
    that takes from the noise's variance (the mean of the lower part of a Gamma distribution of
    shape `coils`) is given back.

    Args:
        k: (z coils h w), zero frequency at [0, 0], 0 where nothing was measured.
    """
    from scipy import stats

    _, coils, h, w = k.shape
    radius2 = (np.fft.fftfreq(h)[:, None] * 2) ** 2 + (np.fft.fftfreq(w)[None] * 2) ** 2
    measured = (k != 0).any(axis=1)
    radii = np.broadcast_to(radius2, measured.shape)[measured]
    samples = np.moveaxis(k, 1, 0)[:, measured]
    count = max(round(CORNER_SHARE * len(radii)), min(len(radii), LEAST_SAMPLES_A_COIL * coils))
    far = samples[:, np.argsort(radii, kind="stable")[-count:]]
    scale = np.sqrt((np.abs(far) ** 2).mean(axis=1, keepdims=True))
    energy = (np.abs(far / np.maximum(scale, np.finfo(np.float32).tiny)) ** 2).sum(axis=0)
    kept = far[:, energy <= np.quantile(energy, TRIM)]
    cut = stats.gamma.ppf(TRIM, coils)
    lost: float = stats.gamma.cdf(cut, coils + 1) / TRIM
    return kept / np.sqrt(lost)


def prewhiten(k: Array, noise: Array | None = None) -> WhiteScan:
    """Make the noise of all coils white, of one variance, and independent.

    Args:
        k: (z coils h w), zero frequency at [0, 0], 0 where nothing was measured.
        noise: (coils n), samples of noise alone, of the strength that k has; None: k's corners.

    Source: Kellman and McVeigh 2005, doi:10.1002/mrm.20713 (appendix A); Hansen and Kellman 2015,
    doi:10.1002/jmri.24687.
    """
    C = noise_covariance(corner_samples(k) if noise is None else noise)
    floor = (LEAST_NOISE * float(np.abs(k).max())) ** 2
    C = C + floor * np.eye(len(C))
    L = np.linalg.cholesky(C)
    gain = float(np.exp(np.log(L.diagonal().real).mean()))
    whitening = gain * np.linalg.inv(L)
    white = np.einsum("ij,zjhw->zihw", whitening, k, optimize=True).astype(np.complex64)
    return WhiteScan(white, gain / 2**0.5)


def compressed(scan: WhiteScan) -> WhiteScan:
    """Fewer, virtual coils where the others would hold noise alone.

    Unitary mixtures of white coils are white. Those are kept whose energy over what was measured
    exceeds the largest that noise alone reaches (Marchenko-Pastur).

    Source: Buehrer et al. 2007 (array compression), doi:10.1002/mrm.21237.
    """
    coils = scan.k.shape[1]
    samples = np.moveaxis(scan.k, 1, 0)[:, (scan.k != 0).any(axis=1)].astype(np.complex128)
    values, vectors = np.linalg.eigh(samples @ samples.conj().T)
    of_noise = 2 * scan.sigma_y**2 * (np.sqrt(samples.shape[1]) + np.sqrt(coils)) ** 2
    kept = vectors[:, values > of_noise]
    if kept.shape[1] in (0, coils):
        return scan
    k = np.einsum("ji,zjhw->zihw", kept.conj(), scan.k, optimize=True)
    return WhiteScan(k.astype(np.complex64), scan.sigma_y)
