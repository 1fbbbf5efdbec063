"""CovProx's data step for a nonlinear A: descent on the posterior energy in the metric of Sigma.

    U(x) = 1/2 |R^(-1/2) (y - A(x))|^2 + 1/2 |Sigma^(-1/2) (x - centre)|^2

With x = centre + Sigma w the slope in that metric is grad U = J' R^-1 (A x - y) + w, no inverse of
Sigma is needed, and the condition number is 1 + L, L the steepest curvature of the misfit against
Sigma. Nesterov's momentum for a strongly convex function, dropped where it leads uphill; where A
bends more than was measured, so that the slope turns and steepens, back to the best point with half
the step. U itself is never asked for: clipping and quantisation are flat where their gradients lead
on. For a linear A the minimum is centre + K (y - A centre). About a draw, with y perturbed alike,
it is "randomise then optimise": exact for linear A.

Source: Nesterov 2004, Introductory lectures on convex optimization, 2.2.1 (constant step scheme);
O'Donoghue and Candes 2015 (arXiv:1204.3982), gradient restart; Bardsley et al. 2014,
doi:10.1137/140964023, for the draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_core.posterior.conditional import curvature, misfit_gradient
from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.posterior.linear import Accuracy, Update
from diffusion_core.posterior.run import Counted
from diffusion_core.protocols import Data, NoiseModel, Signal

NOISE_FLOOR = 0.01
"""Least standard deviation of a datum, units of y: exact data have no slope to descend."""
_FLED = 16.0
"""A slope so much steeper (squared) than the gentlest met, and against it: too long a step."""


def descend(
    calls: Counted,
    covariance: Covariance,
    noise: NoiseModel,
    y: Data,
    centre: Signal,
    probe: Signal,
    accuracy: Accuracy,
) -> Update:
    """Minimise U from the centre; R follows x without its gradient.

    Args:
        calls: the operator, nonlinear or linear.
        covariance: Sigma, on a canvas of the image's own size.
        noise: R.
        y: measurement.
        centre: of the Gaussian, (b c h w).
        probe: a draw of N(0, Sigma): how far the curvature of the misfit is measured.
        accuracy: `tolerance` is of the slope against the way from the centre, both in Sigma's
            metric; `max_steps` counts gradients, each a call of A and of its pullback.

    Returns:
        The way from the centre.
    """

    def slope(x: Signal) -> Signal:
        return misfit_gradient(calls, x, y, noise, NOISE_FLOOR)

    width = float(probe.square().mean().sqrt())
    L = curvature(lambda x: covariance.apply(slope(x)), centre, width, probe)
    h = 1.0 / (1.0 + L)
    w = ahead = best = best_slope = torch.zeros_like(centre)
    least = torch.full_like(L, torch.inf)
    left, count = 1.0, 0
    while count < accuracy.max_steps and left > accuracy.tolerance:
        count += 1
        gradient = slope(centre + covariance.apply(ahead)) + ahead
        uphill = covariance.apply(gradient)
        steepness = _squared(gradient, uphill)
        back = ~(_squared(best_slope, uphill) > 0)
        fled = back & ~(steepness <= _FLED * least)
        gentler = steepness < least
        best, best_slope = (
            torch.where(gentler, ahead, best),
            torch.where(gentler, gradient, best_slope),
        )
        least = least.fmin(steepness)
        h = torch.where(fled, 0.5 * h, h)
        before, w = w, torch.where(fled, best, ahead - h * gradient)
        step = covariance.apply(w - before)
        onward = ~fled & (_squared(gradient, step) <= 0)
        momentum = (1.0 - h.sqrt()) / (1.0 + h.sqrt())
        ahead = torch.where(onward, w + momentum * (w - before), w)
        delta = covariance.apply(w)
        share = steepness / _squared(w, delta).clamp_min(torch.finfo(w.dtype).tiny)
        left = float(torch.where(fled, torch.inf, share).max()) ** 0.5
    return Update(delta, count, left)


def _squared(a: Signal, b: Signal) -> Tensor:
    """Inner product of each batch element, (b 1 1 1)."""
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)
