"""Data steps of operators that are diagonal in Fourier: exact for S = 1, else a few steps of CG.

Each falls back on the plain dual form where R varies from datum to datum.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.operators import Blur, Downsample, Fourier, Pool
from diffusion_core.operators.fourier import from_complex, to_complex
from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.posterior.linear.base import (
    LEAST_BLUR_VARIANCE,
    Accuracy,
    DualStep,
    Update,
    mean_square,
    positive,
    solve,
    uniform_level,
)
from diffusion_core.posterior.spectra import full_spectrum
from diffusion_core.protocols import Data, LinearOperator, Signal

_LEAST_GAIN = 1e-4
"""Of A A' on the coarse grid, relative to the largest: below it exact data cannot be inverted."""


class BlurStep(DualStep):
    """Circular convolution: (|k|^2 C + R)^-1 is the inverse, or at mean S^2 the preconditioner."""

    def __init__(self, operator: LinearOperator, blur: Blur) -> None:
        super().__init__(operator)
        self.power = blur.transfer.abs().square()

    def __call__(
        self, covariance: Covariance, variance: Tensor, residual: Data, accuracy: Accuracy
    ) -> Update:
        """See DataStep."""
        uniform = uniform_level(variance)
        if uniform is None:
            return self.solve(covariance, positive(variance), residual, accuracy, None)
        level = uniform.clamp_min(LEAST_BLUR_VARIANCE)
        blurred = self.power.to(covariance.spectrum) * covariance.spectrum
        inverse = 1.0 / (mean_square(covariance) * blurred + level)

        def precondition(v: Tensor) -> Tensor:
            return covariance.filter(v, inverse)

        if covariance.std is None:
            adjoint = self.operator.A_adjoint(precondition(residual))
            return Update(covariance.apply(adjoint))
        return self.solve(covariance, level, residual, accuracy, precondition)


class PoolStep(DualStep):
    """Pooling, or a filter before leaving pixels out: A C A' is circulant on the coarse grid.

    A filter that loses modes of the coarse grid is a blur, and exact data are given its noise.
    """

    def __init__(self, operator: LinearOperator, pool: Pool | Downsample) -> None:
        super().__init__(operator)
        self.pool = pool
        self.floor = LEAST_BLUR_VARIANCE if _loses_modes(pool) else 0.0

    def __call__(
        self, covariance: Covariance, variance: Tensor, residual: Data, accuracy: Accuracy
    ) -> Update:
        """See DataStep."""
        uniform = uniform_level(variance)
        if uniform is None:
            variance = positive(variance) if self.floor else variance
            return self.solve(covariance, variance, residual, accuracy, None)
        level = uniform.clamp_min(self.floor)
        coarse = mean_square(covariance) * self._pooled_spectrum(covariance)
        tiny = torch.finfo(coarse.dtype).tiny
        inverse = 1.0 / (coarse + level).clamp_min(tiny)
        size = residual.shape[-2:]

        def precondition(v: Tensor) -> Tensor:
            modes = torch.fft.rfft2(covariance.to_opponent(v)) * inverse
            return covariance.from_opponent(torch.fft.irfft2(modes, s=size))

        if covariance.std is None:
            adjoint = self.operator.A_adjoint(precondition(residual))
            return Update(covariance.apply(adjoint))
        return self.solve(covariance, level, residual, accuracy, precondition)

    def _pooled_spectrum(self, covariance: Covariance) -> Float[Tensor, "1 c hf wf"]:
        """Spectrum of the pooled field: the pooled image of one column of C, which is exact."""
        height, width = covariance.canvas
        factor = self.pool.factor
        corner = torch.zeros(1, 1, height // factor, width // factor).to(covariance.spectrum)
        corner[..., 0, 0] = 1.0
        column = torch.fft.rfft2(self.pool.A_adjoint(corner)) * covariance.spectrum
        column = self.pool.A(torch.fft.irfft2(column, s=(height, width)))
        return torch.fft.rfft2(column).real.clamp_min(0.0)


def _loses_modes(pool: Pool | Downsample) -> bool:
    """Whether a mode of the coarse grid is measured ten thousand times as weakly as another."""
    if isinstance(pool, Pool):
        return False  # A A' is a multiple of the identity
    transfer, factor = pool.blur.transfer, pool.factor
    height, width = pool.blur.shape
    corner = torch.zeros(1, 1, height // factor, width // factor).to(transfer.real)
    corner[..., 0, 0] = 1.0
    gain = torch.fft.rfft2(pool.A(pool.A_adjoint(corner))).real
    return bool(gain.min() < _LEAST_GAIN * gain.max())


class FourierStep(DualStep):
    """Single-coil MRI, one datum t(k) a mode: y(k), or for a real image mean of y(k), conj y(-k).

    P(k) is the share of the pair (k, -k) that was measured (1/2 or 1; 1 for complex images), so t
    has variance R / P, and A Sigma A' becomes Q F Sigma F' Q on the measured modes Q. With S, the
    preconditioner is Q F (S (C + R / S_mean^2) S)^-1 F' Q: Sigma's own inverse, which is cheap.
    """

    def __init__(self, operator: LinearOperator, fourier: Fourier) -> None:
        super().__init__(operator)
        self.mask = fourier.mask
        self.channels = fourier.channels

    def __call__(
        self, covariance: Covariance, variance: Tensor, residual: Data, accuracy: Accuracy
    ) -> Update:
        """See DataStep."""
        spectrum = covariance.spectrum
        uniform = uniform_level(variance)
        if uniform is None or bool((spectrum != spectrum[:1]).any()):
            return self.solve(covariance, variance, residual, accuracy, None)
        share = self.mask.to(spectrum.dtype)
        if self.channels == 1:
            share = 0.5 * (share + _mirrored(share.expand(-1, -1, *covariance.canvas)))
        measured = (share > 0).to(spectrum.dtype)
        share = share.clamp_min(0.5)
        noise = uniform / share
        datum = measured * _modes(self.operator.A_adjoint(residual)) / share
        full = full_spectrum(spectrum[:1], covariance.canvas[1])
        if covariance.std is None:
            return Update(_image(full / (full + noise) * datum, self.channels))

        std, level = covariance.std, uniform / mean_square(covariance)
        inverse = 1.0 / (spectrum + level)

        def matrix(v: Tensor) -> Tensor:
            image = covariance.apply(_image(v, self.channels))
            return measured * _modes(image) + noise * v

        def precondition(v: Tensor) -> Tensor:
            image = covariance.filter(_image(v, self.channels) / std, inverse) / std
            return measured * _modes(image)

        solved = solve(matrix, datum, precondition, accuracy)
        delta = covariance.apply(_image(solved.delta, self.channels))
        return Update(delta, solved.num_steps, solved.relative_residual)


def _modes(image: Signal) -> Tensor:
    """Unitary transform of a real or (re, im) image: (b 1 h w) complex."""
    return torch.fft.fft2(image if image.shape[1] == 1 else to_complex(image), norm="ortho")


def _image(modes: Tensor, channels: int) -> Signal:
    """Inverse of `_modes`."""
    image = torch.fft.ifft2(modes, norm="ortho")
    return image.real if channels == 1 else from_complex(image)


def _mirrored(modes: Tensor) -> Tensor:
    """The value at -k, for every k."""
    return modes.flip((-2, -1)).roll((1, 1), (-2, -1))
