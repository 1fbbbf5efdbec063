"""DPM-Solver++(2M): an exponential integrator with one call an interval and order 2."""

from __future__ import annotations

import itertools
import math

from jaxtyping import Float
from torch import Tensor

from diffusion_core.protocols import Denoiser, Signal
from diffusion_core.samplers._levels import checked_levels, per_sample


def dpm_solver_2m(denoise: Denoiser, x: Signal, sigmas: Float[Tensor, " levels"]) -> Signal:
    """Carry x from noise level sigmas[0] to sigmas[-1] by DPM-Solver++(2M).

    The linear part of the flow is solved exactly in lambda = -ln sigma; D is extrapolated linearly
    in lambda from this level and the one before. The first interval, and one that ends at
    sigma = 0 (lambda infinite), are of first order.

    Args:
        denoise: D(x; sigma). Called under the caller's grad mode, once an interval.
        x: samples of p(x; sigmas[0]), in data units. Not modified.
        sigmas: strictly decreasing, in data units; the last may be 0.

    Returns:
        Samples of p(x; sigmas[-1]); shape, dtype and device of x.

    Raises:
        ValueError: if sigmas is not strictly decreasing or goes below 0.

    Source: Lu et al. 2022 (arXiv:2211.01095), Algorithm 2, seen from s = 1.
    """
    D_before, h_before = None, 0.0
    for sigma, sigma_next in itertools.pairwise(checked_levels(sigmas)):
        D_x = denoise(x, per_sample(sigma, x))
        if sigma_next == 0:
            return D_x
        h = math.log(sigma / sigma_next)
        estimate = D_x
        if D_before is not None:
            estimate = D_x + 0.5 * h / h_before * (D_x - D_before)
        x = sigma_next / sigma * x - math.expm1(-h) * estimate
        D_before, h_before = D_x, h
    return x
