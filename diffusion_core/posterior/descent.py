"""CovProx's data step for a nonlinear A: descent on the posterior energy in the metric of Sigma.

    U(x) = 1/2 |R^(-1/2) (y - A(x))|^2 + 1/2 |Sigma^(-1/2) (x - centre)|^2

With x = centre + Sigma w the slope in that metric is grad U = J' R^-1 (A x - y) + w, no inverse of
Sigma is needed, and the condition number is 1 + L, L the steepest curvature of the misfit against
Sigma. Nesterov's momentum for a strongly convex function, dropped where it leads uphill. U itself
is never asked for: clipping and quantisation are flat where their gradients lead on. For a linear A
the minimum is centre + K (y - A centre). About a draw, with y perturbed alike, it is "randomise
then optimise": exact for linear A.

Source: Nesterov 2004, Introductory lectures on convex optimization, 2.2.1 (constant step scheme);
O'Donoghue and Candes 2015 (arXiv:1204.3982), gradient restart; Bardsley et al. 2014,
doi:10.1137/140964023, for the draw.
"""

from __future__ import annotations

import torch

from diffusion_core.posterior.conditional import curvature, misfit_gradient
from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.posterior.linear import Accuracy, Update
from diffusion_core.posterior.run import Counted
from diffusion_core.protocols import Data, NoiseModel, Signal

NOISE_FLOOR = 0.01
"""Least standard deviation of a datum, units of y: exact data have no slope to descend."""


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
        accuracy: `tolerance` is of the slope against the way from the centre; `max_steps` counts
            gradients, each a call of A and of its pullback.

    Returns:
        The way from the centre.
    """

    def slope(x: Signal) -> Signal:
        return misfit_gradient(calls, x, y, noise, NOISE_FLOOR)

    width = float(probe.square().mean().sqrt())
    L = curvature(lambda x: covariance.apply(slope(x)), centre, width, probe)
    h = 1.0 / (1.0 + L)
    momentum = (1.0 - h.sqrt()) / (1.0 + h.sqrt())
    w = ahead = torch.zeros_like(centre)
    left, count = 1.0, 0
    while count < accuracy.max_steps and left > accuracy.tolerance:
        count += 1
        gradient = slope(centre + covariance.apply(ahead)) + ahead
        before, w = w, ahead - h * gradient
        uphill = (gradient * covariance.apply(w - before)).flatten(1).sum(dim=1) > 0
        ahead = w + torch.where(uphill[:, None, None, None], 0.0, momentum) * (w - before)
        delta = covariance.apply(w)
        left = _share(covariance.apply(gradient), delta)
    return Update(delta, count, left)


def _share(slope: Signal, way: Signal) -> float:
    """Norm of one against the other's, of the batch element where it is greatest."""
    norms = [v.flatten(1).norm(dim=1) for v in (slope, way)]
    return float((norms[0] / norms[1].clamp_min(1e-30)).max())
