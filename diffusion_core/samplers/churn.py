"""EDM's stochastic sampler: Heun's method with a little noise put in before every step."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diffusion_core.protocols import Denoiser, NormalDraws, Signal
from diffusion_core.samplers._levels import checked_levels, per_sample


@dataclass(frozen=True)
class Churn:
    """How much noise is put in, and where.

    Attributes:
        amount: S_churn, spread over the intervals; 0 leaves Heun's method.
        sigma_low: S_tmin; below it none.
        sigma_high: S_tmax; above it none.
        noise_scale: S_noise, std of the noise; a little over 1 makes up for what D takes off.
    """

    amount: float = 40.0
    sigma_low: float = 0.05
    sigma_high: float = 50.0
    noise_scale: float = 1.0

    def growth(self, sigma: float, num_intervals: int) -> float:
        """gamma: the share by which the level is raised before the step."""
        if not self.sigma_low <= sigma <= self.sigma_high:
            return 0.0
        return min(self.amount / num_intervals, math.sqrt(2.0) - 1.0)


def churned_heun(
    denoise: Denoiser,
    x: Signal,
    sigmas: Float[Tensor, " levels"],
    draws: NormalDraws,
    churn: Churn | None = None,
) -> Signal:
    """Carry x from noise level sigmas[0] to sigmas[-1], raising the level before every step.

    Args:
        denoise: D(x; sigma). Called under the caller's grad mode, twice an interval (once if the
            interval ends at sigma = 0).
        x: samples of p(x; sigmas[0]), in data units. Not modified.
        sigmas: strictly decreasing, in data units; the last may be 0.
        draws: fresh noise; interval i uses level i + 1.
        churn: default Churn().

    Returns:
        Samples of p(x; sigmas[-1]); shape, dtype and device of x.

    Raises:
        ValueError: if sigmas is not strictly decreasing or goes below 0.

    Source: Karras et al. 2022 (arXiv:2206.00364), Algorithm 2.
    """
    churn = churn or Churn()
    levels = checked_levels(sigmas)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        raised = sigma * (1.0 + churn.growth(sigma, len(levels) - 1))
        if raised > sigma:
            added = churn.noise_scale * math.sqrt(raised**2 - sigma**2)
            x = x + added * draws.normal(i + 1, x)
        slope = (x - denoise(x, per_sample(raised, x))) / raised
        x_next = x + (sigma_next - raised) * slope
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, per_sample(sigma_next, x))) / sigma_next
            x_next = x + (sigma_next - raised) * 0.5 * (slope + slope_next)
        x = x_next
    return x
