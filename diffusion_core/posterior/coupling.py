"""Stacks restored jointly: neighbouring slices, or frames, are expected to differ by little.

Along a stack x_0, x_1 ... the differences d_i = x_(i+1) - x_i are taken as N(0, 1 / W_i), W a
precision of each pixel, and the estimates mu of a level, x_i ~ N(mu_i, Sigma_i), are conditioned on
that as on one more measurement, 0 = W^(1/2) D x + n, n ~ N(0, I):

    mu' = mu - Sigma D' W^(1/2) v,     (I + W^(1/2) D Sigma D' W^(1/2)) v = W^(1/2) D mu

by conjugate gradients, the whole stack one system. v is the dual of the differences; a chain
carries it from level to level as the first guess of the next solve.

W is read from the estimates. Two estimates with errors of variance s_i and s_j differ by
delta^2 + s_i + s_j in the mean square, so that

    W = coupling / (max(mean d^2 - s_i - s_j, 0) + LEAST mean (s_i + s_j)),

means over a window and the channels. What is still over the stack is averaged along it; where
neighbours differ by more than their errors, each keeps its own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from diffusion_core.posterior.cg import CGResult, conjugate_gradient
from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.protocols import Signal

WINDOW_PX = 5
"""Side of the window in which squared differences are averaged."""

LEAST = 0.1
"""Least variance of a difference, of the errors' own: it bounds W, and the effort of the solve."""

TOLERANCE, MAX_STEPS = 1e-2, 40
"""Of the solve: its relative residual, and its products with Sigma."""


def differences(x: Signal, stride: int = 1) -> Signal:
    """D x: x[i + stride] - x[i] along the batch; empty if there is no such pair."""
    return x[stride:] - x[:-stride]


def differences_adjoint(d: Signal, stride: int = 1) -> Signal:
    """D' d, `stride` elements longer than d."""
    x = d.new_zeros(len(d) + stride, *d.shape[1:])
    x[stride:] += d
    x[:-stride] -= d
    return x


def pixel_variance(covariance: Covariance, like: Signal) -> Float[Tensor, "b 1 h w"]:
    """The diagonal of Sigma, a mean over channels."""
    stationary = torch.fft.irfft2(covariance.spectrum, s=covariance.canvas)[..., 0, 0].mean()
    if covariance.std is None:
        return stationary.expand_as(like[:, :1])
    return stationary * covariance.std.square().expand_as(like[:, :1])


def difference_precision(
    mu: Signal, covariance: Covariance, coupling: float, stride: int = 1
) -> Float[Tensor, "pairs 1 h w"]:
    """W, from the estimates of a stack.

    Args:
        mu: (b c h w), batch element i + stride the neighbour of element i.
        covariance: Sigma of their errors.
        coupling: factor on W, 0 or more.
        stride: elements from one slice to the next (more than 1 where bands lie in the batch).
    """
    variance = pixel_variance(covariance, mu)
    errors = _windowed(variance[stride:] + variance[:-stride])
    squared = _windowed(differences(mu, stride).square().mean(dim=1, keepdim=True))
    return coupling / ((squared - errors).clamp_min(0.0) + LEAST * errors)


def couple(
    mu: Signal,
    covariance: Covariance,
    precision: Float[Tensor, "pairs 1 h w"],
    stride: int = 1,
    start: Signal | None = None,
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> tuple[Signal, CGResult]:
    """Condition the estimates of a stack on how little neighbours differ.

    Args:
        mu: (b c h w), of more than `stride` elements.
        covariance: Sigma of their errors, on the canvas of mu.
        precision: W, >= 0; 0 leaves a pair of pixels alone.
        stride: elements from one slice to the next.
        start: first guess of the dual; default 0.
        tolerance: relative residual to stop at.
        max_steps: products with Sigma at most.

    Returns:
        mu' of mu's shape, and the solve: its x (1 pairs c h w) is the dual v.
    """
    root = precision.sqrt()

    def spread(v: Signal) -> Signal:
        return covariance.apply(differences_adjoint(root * v, stride))

    def matrix(v: Tensor) -> Tensor:
        return v + (root * differences(spread(v[0]), stride))[None]

    b = (root * differences(mu, stride))[None]
    solved = conjugate_gradient(matrix, b, tolerance=tolerance, max_steps=max_steps, start=start)
    return mu - spread(solved.x[0]), solved


def _windowed(values: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Means over windows, cut off at the border."""
    return avg_pool2d(values, WINDOW_PX, 1, WINDOW_PX // 2, count_include_pad=False)
