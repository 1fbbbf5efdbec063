"""DDIM: the non-Markovian family between the probability-flow ODE and ancestral sampling."""

from __future__ import annotations

import itertools
import math

from jaxtyping import Float
from torch import Tensor

from diffusion_core.protocols import Denoiser, NormalDraws, Signal
from diffusion_core.samplers._levels import checked_levels, per_sample


def ddim(
    denoise: Denoiser,
    x: Signal,
    sigmas: Float[Tensor, " levels"],
    draws: NormalDraws,
    eta: float = 0.0,
) -> Signal:
    """Carry x from noise level sigmas[0] to sigmas[-1], one call an interval.

    Args:
        denoise: D(x; sigma). Called under the caller's grad mode.
        x: samples of p(x; sigmas[0]), in data units. Not modified.
        sigmas: strictly decreasing, in data units; the last may be 0.
        draws: fresh noise; interval i uses level i + 1. None is drawn at eta = 0.
        eta: 0 is deterministic (Euler's method on the ODE), 1 is ancestral sampling.

    Returns:
        Samples of p(x; sigmas[-1]); shape, dtype and device of x.

    Raises:
        ValueError: if sigmas is not strictly decreasing or goes below 0, or eta not in [0, 1].

    Source: Song et al. 2020 (arXiv:2010.02502), Equations 12 and 16. At s = 1 the fresh noise has
        c = eta (sigma'/sigma) (sigma^2 - sigma'^2)^(1/2), the kept part (sigma'^2 - c^2)^(1/2).
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie between 0 and 1, not {eta}")
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(checked_levels(sigmas))):
        D_x = denoise(x, per_sample(sigma, x))
        fresh = eta * sigma_next / sigma * math.sqrt(sigma**2 - sigma_next**2)
        kept = math.sqrt(sigma_next**2 - fresh**2)
        x = D_x + kept / sigma * (x - D_x)
        if fresh > 0:
            x = x + fresh * draws.normal(i + 1, x)
    return x
