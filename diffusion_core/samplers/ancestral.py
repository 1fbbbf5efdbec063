"""Ancestral sampling: the reverse Markov chain of DDPM, seen from s = 1."""

from __future__ import annotations

import itertools
import math

from jaxtyping import Float
from torch import Tensor

from diffusion_core.protocols import Denoiser, NormalDraws, Signal
from diffusion_core.samplers._levels import checked_levels, per_sample


def ancestral(
    denoise: Denoiser, x: Signal, sigmas: Float[Tensor, " levels"], draws: NormalDraws
) -> Signal:
    """Carry x from noise level sigmas[0] to sigmas[-1] by sampling q(x' | x, x0 = D(x; sigma)).

    Args:
        denoise: D(x; sigma). Called under the caller's grad mode.
        x: samples of p(x; sigmas[0]), in data units. Not modified.
        sigmas: strictly decreasing, in data units; the last may be 0.
        draws: fresh noise; interval i uses level i + 1.

    Returns:
        Samples of p(x; sigmas[-1]); shape, dtype and device of x.

    Raises:
        ValueError: if sigmas is not strictly decreasing or goes below 0.

    Source: Ho et al. 2020 (arXiv:2006.11239), Equations 6-7; with s = 1 the mean is
        x0 + (sigma'/sigma)^2 (x - x0) and the variance sigma'^2 (1 - (sigma'/sigma)^2).
    """
    levels = checked_levels(sigmas)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        D_x = denoise(x, per_sample(sigma, x))
        ratio = (sigma_next / sigma) ** 2
        x = D_x + ratio * (x - D_x)
        if sigma_next > 0:
            x = x + sigma_next * math.sqrt(1.0 - ratio) * draws.normal(i + 1, x)
    return x
