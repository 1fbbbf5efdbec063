"""Heun's method on the probability-flow ODE."""

from __future__ import annotations

import itertools

from jaxtyping import Float
from torch import Tensor

from diffusion_core.protocols import Denoiser, Signal
from diffusion_core.samplers._levels import checked_levels, per_sample


def heun(denoise: Denoiser, x: Signal, sigmas: Float[Tensor, " levels"]) -> Signal:
    """Carry x from noise level sigmas[0] to sigmas[-1] by Heun's method.

    Two denoiser calls per interval; an interval ending at sigma = 0 costs one: the slope
    is 0/0 there, and the Euler step lands on D(x; sigma).

    Args:
        denoise: D(x; sigma). Called under the caller's grad mode.
        x: samples of p(x; sigmas[0]), in data units. Not modified.
        sigmas: strictly decreasing, in data units; the last may be 0.

    Returns:
        Samples of p(x; sigmas[-1]); shape, dtype and device of x.

    Raises:
        ValueError: if sigmas is not strictly decreasing or goes below 0.

    Source: Karras et al. 2022 (arXiv:2206.00364), Algorithm 1, sigma(t) = t, s(t) = 1.
    """
    levels = checked_levels(sigmas)
    for sigma, sigma_next in itertools.pairwise(levels):
        slope = (x - denoise(x, per_sample(sigma, x))) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, per_sample(sigma_next, x))) / sigma_next
            x_next = x + (sigma_next - sigma) * 0.5 * (slope + slope_next)
        x = x_next
    return x
