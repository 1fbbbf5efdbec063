"""Sparse wavelets on any linear operator: the compressed-sensing baseline of MRI."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pywt
import torch
from torch import Tensor

from diffusion_core.protocols import Data, LinearOperator, Signal
from domains.base import Array
from domains.classical import EXACT_WEIGHT, operator_norm_squared, relative_change


@dataclass(frozen=True)
class WaveletSettings:
    """How sparse wavelet coefficients are found.

    Attributes:
        strength: lambda, nats per unit of a detail coefficient's magnitude, >= 0.
        wavelet: an orthogonal wavelet of PyWavelets.
        num_levels: of the decomposition; fewer where the image is too small for them.
        num_iterations: of FISTA, at most.
        continuation: the first shrinkage is so many times stronger; it falls to its own strength
            over 70% of the iterations. Without it k-space that was not measured stays empty for
            hundreds of iterations.
        shift: take every step in a shifted basis (cycle spinning): no block artefacts.
        tolerance: stop when no batch element moves by more than this share of its norm.
    """

    strength: float = 20.0
    wavelet: str = "db4"
    num_levels: int = 4
    num_iterations: int = 80
    continuation: float = 50.0
    shift: bool = True
    tolerance: float = 1e-4


def minimise_wavelet(
    operator: LinearOperator,
    y: Data,
    start: Signal,
    weights: Tensor | None,
    settings: WaveletSettings,
    *,
    complex_pair: bool = False,
) -> Signal:
    """Minimise sum w |y - A x|^2 / 2 + strength * |W x|_1 by FISTA, W an orthonormal basis.

    Args:
        operator: A, on a batch.
        y: data (b *m).
        start: (b c h w), a first estimate in network units.
        weights: 1 / variance, broadcastable to y; None if the data are exact, which this method
            fits as if they had a little noise.
        settings: strength and effort.
        complex_pair: the two channels are the parts of one complex image, whose coefficients are
            shrunk in magnitude.
    Source: Beck & Teboulle 2009 (FISTA); Lustig et al. 2007 (sparse MRI); random shifts as in
        Figueiredo & Nowak 2003, here by a fixed sequence.
    """
    if weights is None:
        weights = torch.tensor(EXACT_WEIGHT)
    step = 1.0 / (operator_norm_squared(operator, start) * float(weights.max()))
    x, z, momentum = start, start, 1.0
    for k in range(settings.num_iterations):
        excess = settings.continuation ** (1 - k / (0.7 * settings.num_iterations))
        threshold = step * settings.strength * max(excess, 1.0)
        before = x
        x = z - step * operator.A_adjoint(weights * (operator.A(z) - y))
        x = _shrink(x, threshold, _shift_of(k, settings), settings, complex_pair)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        z = x + (momentum - 1) / following * (x - before)
        momentum = following
        if excess <= 1 and relative_change(x, before) < settings.tolerance:
            break
    return x


def shrink_wavelets(image: Array, threshold: float, wavelet: str, num_levels: int) -> Array:
    """Shrink the detail coefficients of (... h w), real or complex, in an orthonormal basis.

    The image is mirrored up to a multiple of 2^num_levels, where the basis is periodic. An image
    narrower than the wavelet at the coarsest level has fewer levels.
    """
    height, width = image.shape[-2:]
    num_levels = min(num_levels, pywt.dwt_max_level(min(height, width), wavelet))
    multiple = 2**num_levels
    border = ((0, -height % multiple), (0, -width % multiple))
    padded = np.pad(image, ((0, 0),) * (image.ndim - 2) + border, mode="symmetric")
    bands = pywt.wavedec2(padded, wavelet, mode="periodization", level=num_levels, axes=(-2, -1))
    shrunk = [bands[0]] + [
        tuple(_soft_threshold(band, threshold) for band in level) for level in bands[1:]
    ]
    out = pywt.waverec2(shrunk, wavelet, mode="periodization", axes=(-2, -1))
    return np.ascontiguousarray(out[..., :height, :width])


def _soft_threshold(band: Array, threshold: float) -> Array:
    """Shorten values by the threshold, complex ones in magnitude."""
    tiny = float(np.finfo(band.real.dtype).tiny)
    shrunk: Array = band * (1 - threshold / np.maximum(np.abs(band), max(threshold, tiny)))
    return shrunk


def _shrink(
    x: Signal,
    threshold: float,
    shift: tuple[int, int],
    settings: WaveletSettings,
    complex_pair: bool,
) -> Signal:
    """The proximal step of the wavelet penalty, in a basis shifted by some pixels."""
    moved = torch.roll(x, shift, dims=(-2, -1))
    image = (torch.complex(moved[:, 0], moved[:, 1]) if complex_pair else moved).numpy()
    out = torch.from_numpy(shrink_wavelets(image, threshold, settings.wavelet, settings.num_levels))
    back = torch.stack([out.real, out.imag], dim=1) if complex_pair else out
    return torch.roll(back.to(x.dtype), (-shift[0], -shift[1]), dims=(-2, -1))


def _shift_of(k: int, settings: WaveletSettings) -> tuple[int, int]:
    """The k-th of a fixed sequence of shifts that covers a period of the basis evenly."""
    if not settings.shift:
        return 0, 0
    period = 2**settings.num_levels
    # Powers of the plastic number's inverse: a two-dimensional low-discrepancy sequence.
    return int(k * 0.7548776662 % 1 * period), int(k * 0.5698402910 % 1 * period)
