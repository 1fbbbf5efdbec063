"""Total variation on any linear operator, and what classical methods share.

    minimise  |R^{-1/2} (y - A x)|^2 / 2 + strength * TV(x)

is the negative log-posterior of a fixed prior, so that the strength is in nats per network unit and
keeps its meaning from one noise level to another. TV is isotropic; channels share one gradient
length, so that colour edges coincide. Two minimisers, each where it is fast:

    minimise_tv         ADMM with circulant-preconditioned conjugate gradients: projectors, k-space,
                        blur, pooling. On 512^2 CT from 60 views it is within 2% of the minimum
                        after 20 steps (2 s a slice); 100 primal-dual steps stay 4 dB short.
    minimise_tv_masked  primal-dual with the data solved exactly: masks, plain denoising. There A'A
                        is far from a circulant and ADMM crawls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffusion_core.operators import Identity, Mask
from diffusion_core.protocols import Data, LinearOperator, NoiseModel, Signal
from domains.base import BadInputError, Problem
from domains.metrics import EXACT_VARIANCE

EXACT_WEIGHT = 1 / 0.05**2
"""What stands for the weight of exact data where only its scale matters."""


def gradient(x: Signal) -> Tensor:
    """Forward differences along rows and columns, 0 across the border: (2 b c h w)."""
    out = x.new_zeros(2, *x.shape)
    torch.sub(x[..., 1:, :], x[..., :-1, :], out=out[0, ..., :-1, :])
    torch.sub(x[..., 1:], x[..., :-1], out=out[1, ..., :-1])
    return out


def gradient_adjoint(g: Tensor) -> Signal:
    """The adjoint of `gradient`: minus the divergence."""
    out = torch.zeros_like(g[0])
    out[..., 1:, :] += g[0, ..., :-1, :]
    out[..., :-1, :] -= g[0, ..., :-1, :]
    out[..., 1:] += g[1, ..., :-1]
    out[..., :-1] -= g[1, ..., :-1]
    return out


def total_variation_of(x: Signal) -> Tensor:
    """Isotropic total variation of each batch element (b,); channels share one gradient length."""
    return _length(gradient(x)).flatten(1).sum(dim=1)


@dataclass(frozen=True)
class TVSettings:
    """How total variation is minimised; only `strength` changes the minimiser itself.

    Attributes:
        strength: lambda, nats per network unit of total variation, > 0.
        num_iterations: at most.
        tolerance: stop when no batch element moves by more than this share of its norm.
        num_cg: conjugate-gradient steps in each iteration (`minimise_tv`).
        edge: height in network units below which the first iteration flattens a gradient; sets
            the penalty rho = strength / edge (`minimise_tv`).
        relaxation: over-relaxation, 1 to 1.9 (`minimise_tv`).
        step: of the primal variable, in network units (`minimise_tv_masked`).
    """

    strength: float = 15.0
    num_iterations: int = 60
    tolerance: float = 1e-4
    num_cg: int = 2
    edge: float = 0.0125
    relaxation: float = 1.7
    step: float = 0.1


def restore_tv(problem: Problem, start: Signal, settings: TVSettings) -> Signal:
    """Total variation with the minimiser that suits the operator.

    Args:
        problem: any linear problem; noise that depends on the signal is judged by the data.
        start: (b c h w), a first estimate in network units.
        settings: strength and effort.
    """
    weights = inverse_variance(problem.noise, problem.y)
    operator = problem.operator
    if isinstance(operator, Mask | Identity):
        measured = operator.mask if isinstance(operator, Mask) else torch.ones_like(start).bool()
        return minimise_tv_masked(measured, problem.y, start, weights, settings)
    complex_pair = problem.condition == "mri-complex"
    return minimise_tv(operator, problem.y, start, weights, settings, complex_pair=complex_pair)


def minimise_tv(
    operator: LinearOperator,
    y: Data,
    start: Signal,
    weights: Tensor | None,
    settings: TVSettings,
    *,
    complex_pair: bool = False,
) -> Signal:
    """Minimise sum w |y - A x|^2 / 2 + strength * TV(x), or TV(x) subject to A x = y.

    ADMM on the splitting v = A x, z = grad x: the weights then touch v alone, pixel by pixel, and
    the linear system in x is mu A'A + rho grad'grad, close to a circulant even for a projector. A
    few conjugate-gradient steps, warm and preconditioned by that circulant, are enough each time.

    Args:
        operator: A, on a batch.
        y: data (b *m).
        start: (b c h w), a first estimate in network units (zero-filled, filtered backprojection).
        weights: 1 / variance, broadcastable to y; None if the data are exact.
        settings: strength and effort.
        complex_pair: the two channels are the parts of one complex image (for the preconditioner).
    Returns:
        (b c h w), not clipped.
    Source: Ramani & Fessler 2012, IEEE TMI 31(3), "A splitting-based iterative algorithm for
        accelerated statistical X-ray CT reconstruction"; isotropic vectorial TV of Bresson & Chan.
    """
    data_penalty = _data_penalty(weights, y)
    rho = settings.strength / settings.edge
    system = _System(operator, data_penalty, rho, start, complex_pair=complex_pair)
    x = start.clone()
    Ax, Dx = operator.A(x), gradient(x)
    v, z = (Ax if weights is not None else y), torch.zeros_like(Dx)
    v_dual, z_dual = torch.zeros_like(Ax), torch.zeros_like(Dx)
    for _ in range(settings.num_iterations):
        before = x
        x, Ax, Dx = system.solve(x, Ax, Dx, v - v_dual, z - z_dual, settings.num_cg)
        Ax_relaxed = torch.lerp(v, Ax, settings.relaxation) + v_dual
        v = y if weights is None else _weighted_mean(y, Ax_relaxed, weights, data_penalty)
        v_dual = Ax_relaxed - v
        Dx_relaxed = torch.lerp(z, Dx, settings.relaxation) + z_dual
        z = _shrink(Dx_relaxed, settings.edge)
        z_dual = Dx_relaxed - z
        if relative_change(x, before) < settings.tolerance:
            break
    return x


def minimise_tv_masked(
    measured: Tensor, y: Signal, start: Signal, weights: Tensor | None, settings: TVSettings
) -> Signal:
    """Minimise sum w |m (y - x)|^2 / 2 + strength * TV(x), or TV(x) subject to m x = m y.

    Args:
        measured: m, boolean, broadcastable to y.
        y: (b c h w) data, pixel by pixel.
        start: (b c h w), a first estimate.
        weights: 1 / variance, broadcastable to y; None if the data are exact.
        settings: strength and effort.
    Returns:
        (b c h w), not clipped.
    Source: Chambolle & Pock 2011, doi:10.1007/s10851-010-0251-1, Algorithm 1.
    """
    tau = settings.step
    sigma = 1 / (8 * tau)  # |grad|^2 <= 8
    pull = None if weights is None else tau / settings.strength * weights * measured
    x, ahead = start, start
    p = torch.zeros_like(gradient(start))
    for _ in range(settings.num_iterations):
        p = p + sigma * gradient(ahead)
        p = p / _length(p).clamp_min(1.0)
        free = x - tau * gradient_adjoint(p)
        before = x
        x = torch.where(measured, y, free) if pull is None else (free + pull * y) / (1 + pull)
        ahead = 2 * x - before
        if relative_change(x, before) < settings.tolerance:
            break
    return x


Settings = TypeVar("Settings")


def settings_from(kind: type[Settings], params: Mapping[str, Any], method: str) -> Settings:
    """Frozen parameters as the settings of a method.

    Raises:
        BadInputError: if a parameter is unknown to it.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = [name for name in params if name not in known]
    if unknown:
        raise BadInputError(
            f"{method} has no parameter '{unknown[0]}': choose one of {', '.join(known)}"
        )
    return kind(**params)


def inverse_variance(noise: NoiseModel, Ax: Data) -> Tensor | None:
    """1 / variance of the data, expanded to their shape; None if they are exact."""
    variance = noise.variance(Ax)
    if float(variance.max()) <= EXACT_VARIANCE:
        return None
    return (1.0 / variance.clamp_min(EXACT_VARIANCE)).expand(Ax.shape)


def operator_norm_squared(
    operator: LinearOperator, like: Signal, num_iterations: int = 20
) -> float:
    """Largest eigenvalue of A'A over the batch, by power iteration, 2% on the safe side."""
    x = irregular(like)
    norm = 1.0
    for _ in range(num_iterations):
        x = operator.A_adjoint(operator.A(x))
        norms = x.flatten(1).norm(dim=1)
        norm = float(norms.max())
        x = x / column(norms.clamp_min(torch.finfo(x.dtype).tiny), x)
    return 1.02 * norm


class _System:
    """(mu A'A + rho grad'grad) x = b, by conjugate gradients with a circulant preconditioner."""

    def __init__(
        self,
        operator: LinearOperator,
        data_penalty: Tensor,
        rho: float,
        like: Signal,
        *,
        complex_pair: bool,
    ) -> None:
        self.operator = operator
        self.data_penalty = data_penalty
        self.rho = rho
        self.complex_pair = complex_pair
        eigenvalues = circulant_eigenvalues(operator, like, complex_pair=complex_pair)
        laplacian = _laplacian_eigenvalues(like)
        symbol = column(data_penalty.reshape(-1), like) * eigenvalues + rho * laplacian
        # The constant image is in the kernel of the gradient, and may be in that of A.
        self.symbol = symbol.clamp_min(1e-6 * float(symbol.max()))

    def solve(
        self, x: Signal, Ax: Data, Dx: Tensor, v: Data, z: Tensor, num_steps: int
    ) -> tuple[Signal, Data, Tensor]:
        """A few steps from x towards A x = v, grad x = z in the weighted least-squares sense.

        Ax and Dx are A x and grad x; the same of the result are returned with it.
        """
        r = self._normal(v - Ax, z - Dx)
        s = self._precondition(r)
        direction, rs = s, _inner(r, s)
        for step in range(num_steps):
            Ad, Dd = self.operator.A(direction), gradient(direction)
            curvature = _energy(Ad) * self.data_penalty.reshape(-1) + self.rho * _energy(
                Dd.movedim(0, 1)
            )
            alpha = rs / curvature.clamp_min(torch.finfo(x.dtype).tiny)
            x = x + column(alpha, x) * direction
            Ax = Ax + column(alpha, Ax) * Ad
            Dx = Dx + column(alpha, x) * Dd
            if step + 1 < num_steps:
                r = self._normal(v - Ax, z - Dx)
                s = self._precondition(r)
                rs, previous = _inner(r, s), rs
                beta = rs / previous.clamp_min(torch.finfo(x.dtype).tiny)
                direction = s + column(beta, x) * direction
        return x, Ax, Dx

    def _normal(self, data: Data, gradients: Tensor) -> Signal:
        return self.operator.A_adjoint(self.data_penalty * data) + self.rho * gradient_adjoint(
            gradients
        )

    def _precondition(self, r: Signal) -> Signal:
        if self.complex_pair:
            z = torch.fft.ifft2(torch.fft.fft2(torch.complex(r[:, 0], r[:, 1])) / self.symbol[:, 0])
            return torch.stack([z.real, z.imag], dim=1)
        half = r.shape[-1] // 2 + 1
        return torch.fft.irfft2(torch.fft.rfft2(r) / self.symbol[..., :half], s=r.shape[-2:])


def circulant_eigenvalues(
    operator: LinearOperator, like: Signal, *, complex_pair: bool = False
) -> Tensor:
    """Eigenvalues >= 0 of the circulant matrix nearest to A'A (T. Chan 1988), by probing.

    The nearest circulant has the diagonal of F A'A F^H for eigenvalues: with |F w| = 1 and random
    phases, conj(F w) F A'A w estimates it, and *is* it if A'A is diagonal in Fourier. Otherwise the
    estimate is averaged over rings of frequency.

    Returns:
        (b 1|c h w), for the full `fft2` grid; one channel if `complex_pair`.
    """
    flat = like[:, 0] if complex_pair else like
    spectrum = torch.fft.fft2(irregular(flat))
    spectrum = spectrum / spectrum.abs().clamp_min(torch.finfo(like.dtype).tiny)
    if complex_pair:
        z = torch.fft.ifft2(spectrum)
        probe = torch.stack([z.real, z.imag], dim=1)
    else:
        probe = torch.fft.ifft2(spectrum).real
    out = operator.A_adjoint(operator.A(probe))
    image = torch.complex(out[:, :1], out[:, 1:]) if complex_pair else out
    estimate = torch.fft.fft2(image) * spectrum.reshape(image.shape).conj()
    off_diagonal = float(estimate.imag.square().sum() / estimate.abs().square().sum())
    if off_diagonal > 1e-4:
        return _ring_average(estimate.real).clamp_min(0.0)
    return estimate.real.clamp_min(0.0)


def _ring_average(values: Tensor) -> Tensor:
    """Replace each value on the `fft2` grid by the mean over its ring of spatial frequency."""
    height, width = values.shape[-2:]
    fy = torch.fft.fftfreq(height)[:, None]
    fx = torch.fft.fftfreq(width)[None]
    ring = ((fy**2 + fx**2).sqrt() * max(height, width)).round().long().flatten()
    flat = values.flatten(-2)
    sums = flat.new_zeros(*flat.shape[:-1], int(ring.max()) + 1).index_add(-1, ring, flat)
    return (sums / torch.bincount(ring))[..., ring].reshape(values.shape)


def _laplacian_eigenvalues(like: Signal) -> Tensor:
    """Eigenvalues of grad'grad on the periodic grid, (h w)."""
    rows, columns = (
        2 - 2 * torch.cos(2 * math.pi * torch.fft.fftfreq(n, dtype=like.dtype))
        for n in like.shape[-2:]
    )
    return rows[:, None] + columns[None]


def _data_penalty(weights: Tensor | None, y: Data) -> Tensor:
    """mu of each batch element, shaped to multiply y: the median weight of its data."""
    if weights is None:
        return torch.full((len(y), *(1,) * (y.ndim - 1)), EXACT_WEIGHT)
    # torch 2.13's median gives nan on an expanded tensor (stride 0): it needs memory of its own.
    each = weights.expand(y.shape).flatten(1).contiguous()
    return column(each.median(dim=1).values, y)


def _weighted_mean(y: Data, Ax: Data, weights: Tensor, penalty: Tensor) -> Data:
    return (weights * y + penalty * Ax) / (weights + penalty)


def _shrink(g: Tensor, threshold: float) -> Tensor:
    """Shorten every pixel's gradient (over both directions and all channels) by the threshold."""
    return g * (1 - threshold / _length(g).clamp_min(threshold))


def _length(g: Tensor) -> Tensor:
    """(2 b c h w) -> (b 1 h w): length of the gradient over directions and channels."""
    return g.square().sum(dim=(0, 2)).sqrt().unsqueeze(1)


def relative_change(x: Signal, before: Signal) -> float:
    """How far the batch element that moved most has moved, as a share of its norm."""
    moved, size = ((t.flatten(1)).norm(dim=1) for t in (x - before, x))
    return float((moved / size.clamp_min(torch.finfo(x.dtype).tiny)).max())


def irregular(like: Tensor) -> Tensor:
    """White-looking values in [-1/2, 1/2), the same for the same shape: a probe without a seed."""
    generator = np.random.Generator(np.random.Philox(key=20))
    return torch.from_numpy(generator.random(tuple(like.shape)) - 0.5).to(like)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.conj() * b).real.flatten(1).sum(dim=1)


def _energy(a: Tensor) -> Tensor:
    return a.abs().square().flatten(1).sum(dim=1)


def column(values: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b 1 1 ...), to scale the batch elements of `like`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
