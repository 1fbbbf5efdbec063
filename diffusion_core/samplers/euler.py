"""Euler's method on the probability-flow ODE (DDIM, seen from s = 1)."""

from __future__ import annotations

import itertools

from jaxtyping import Float
from torch import Tensor

from diffusion_core.protocols import Denoiser, Signal
from diffusion_core.samplers._levels import checked_levels, per_sample


def euler(denoise: Denoiser, x: Signal, sigmas: Float[Tensor, " levels"]) -> Signal:
    """Carry x from noise level sigmas[0] to sigmas[-1] by Euler's method, one call an interval.

    Args:
        denoise: D(x; sigma). Called under the caller's grad mode.
        x: samples of p(x; sigmas[0]), in data units. Not modified.
        sigmas: strictly decreasing, in data units; the last may be 0.

    Returns:
        Samples of p(x; sigmas[-1]); shape, dtype and device of x.

    Raises:
        ValueError: if sigmas is not strictly decreasing or goes below 0.

    Source: dx/dsigma = (x - D(x; sigma)) / sigma, Karras et al. 2022 (arXiv:2206.00364),
        Equation 1 at s = 1; the step is DDIM's, Song et al. 2020 (arXiv:2010.02502), eta = 0.
    """
    levels = checked_levels(sigmas)
    for sigma, sigma_next in itertools.pairwise(levels):
        D_x = denoise(x, per_sample(sigma, x))
        x = D_x + (sigma_next / sigma) * (x - D_x)
    return x
