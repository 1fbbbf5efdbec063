"""CovProx's data step for a nonlinear A: descent on the posterior energy in the metric of Sigma.

    U(x) = 1/2 |R^(-1/2) (y - A(x))|^2 + 1/2 |Sigma^(-1/2) (x - centre)|^2

With x = centre + Sigma w the slope in that metric is grad U = J' R^-1 (A x - y) + w, no inverse of
Sigma is needed, and the condition number is 1 + L, L the steepest curvature of the misfit against
Sigma. Nesterov's momentum for a strongly convex function, dropped where it leads uphill; where A
bends more than was measured, so that the slope turns and steepens, back to the gentlest point with
half the step. U does not steer: clipping and quantisation are flat where their gradients lead on.
It judges: straight through a rounding a gradient need not lead down, so of the points met whose U
is below the start's the one with the least slope is returned, or the start if there is none. R may
follow A x: then the misfit is the quasi-likelihood, whose slope has the R of where x is. For a
linear A the minimum is centre + K (y - A centre). About a draw, with y perturbed alike, it is
"randomise then optimise": exact for linear A.

Source: Nesterov 2004, Introductory lectures on convex optimization, 2.2.1 (constant step scheme);
O'Donoghue and Candes 2015 (arXiv:1204.3982), gradient restart; Bardsley et al. 2014,
doi:10.1137/140964023, for the draw; Wedderburn 1974, doi:10.1093/biomet/61.3.439, for the
quasi-likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from diffusion_core.posterior.conditional import (
    curvature,
    data_and_gradient,
    misfit_gradient,
)
from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.posterior.linear import Accuracy, Update
from diffusion_core.posterior.run import Counted
from diffusion_core.protocols import Data, NoiseModel, Signal

NOISE_FLOOR = 0.01
"""Least standard deviation of a datum, units of y: exact data have no slope to descend."""
_FLED = 16.0
"""A slope so much steeper (squared) than the gentlest met, and against it: too long a step."""
_NODES = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))
"""Gauss and Legendre's three places in 0..1 and their weights: exact where R is constant."""


@dataclass(frozen=True, eq=False)
class _Point:
    """A point of the descent; everything is a batch element's own, scalars are (b 1 1 1).

    Attributes:
        w: where, x = centre + Sigma w.
        delta: Sigma w.
        slope: grad U in Sigma's metric.
        uphill: Sigma slope.
        steepness: <slope, Sigma slope>.
        energy: U here less U at the centre.
    """

    w: Signal
    delta: Signal
    slope: Signal
    uphill: Signal
    steepness: Tensor
    energy: Tensor

    @property
    def share(self) -> Tensor:
        """The slope against the way from the centre, squared; infinite at the centre itself."""
        way = _inner(self.w, self.delta).clamp_min(torch.finfo(self.w.dtype).tiny)
        return (self.steepness / way).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def where(self, chosen: Tensor, other: Self) -> Self:
        """This point in the batch elements that are chosen (b 1 1 1), the other in the rest."""
        mine, others = ([getattr(p, f.name) for f in fields(p)] for p in (self, other))
        pairs = zip(mine, others, strict=True)
        return type(self)(*(torch.where(chosen, a, b) for a, b in pairs))


@dataclass(frozen=True, eq=False)
class _Energy:
    """U about a centre."""

    calls: Counted
    covariance: Covariance
    noise: NoiseModel
    y: Data
    centre: Signal
    A_centre: Data

    def at(self, w: Signal) -> _Point:
        """Everything about centre + Sigma w: a call of A and of its pullback."""
        delta = self.covariance.apply(w)
        x = self.centre + delta
        Ax, gradient = data_and_gradient(self.calls, x, self.y, self.noise, NOISE_FLOOR)
        slope = gradient + w
        uphill = self.covariance.apply(slope)
        energy = self._misfit_gained(Ax) + 0.5 * _inner(w, delta)
        return _Point(w, delta, slope, uphill, _inner(slope, uphill), energy)

    def _misfit_gained(self, Ax: Data) -> Tensor:
        """Integral of R(t)^-1 (t - y) dt from A(centre) to A(x)."""
        way, gained = Ax - self.A_centre, torch.zeros_like(Ax)
        for place, weight in _NODES:
            t = self.A_centre + place * way
            R = self.noise.variance(t).clamp_min(NOISE_FLOOR**2)
            gained = gained + weight * (t - self.y) / R
        each = (way.conj() * gained).real if way.is_complex() else way * gained
        return each.flatten(1).sum(dim=1)[:, None, None, None]


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

    An element that has converged is frozen, so that its result does not depend on the others of
    its batch.

    Args:
        calls: the operator, nonlinear or linear.
        covariance: Sigma, on a canvas of the image's own size.
        noise: R.
        y: measurement.
        centre: of the Gaussian, (b c h w).
        probe: a draw of N(0, Sigma): how far the curvature of the misfit is measured.
        accuracy: `tolerance` is of the slope against the way from the centre, both in Sigma's
            metric; `max_steps` counts steps, each a call of A and of its pullback.

    Returns:
        The way from the centre to a point of no greater U; its slope, the worst of the batch, as
        the relative residual, and the steps of the element that took most.
    """

    def slope(x: Signal) -> Signal:
        return misfit_gradient(calls, x, y, noise, NOISE_FLOOR)

    width = probe.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    L = curvature(lambda x: covariance.apply(slope(x)), centre, width, probe)
    energy = _Energy(calls, covariance, noise, y, centre, calls.A(centre))
    h = 1.0 / (1.0 + L)
    w = torch.zeros_like(centre)
    here = gentlest = kept = energy.at(w)
    open_, count = kept.share > accuracy.tolerance**2, 0
    while count < accuracy.max_steps and bool(open_.any()):
        count += 1
        back = ~(_inner(gentlest.slope, here.uphill) > 0)
        fled = back & ~(here.steepness <= _FLED * gentlest.steepness)
        h = torch.where(fled, 0.5 * h, h)
        gentlest = here.where(here.steepness < gentlest.steepness, gentlest)
        before, w = w, torch.where(fled, gentlest.w, here.w - h * here.slope)
        onward = ~fled & (_inner(here.uphill, w - before) <= 0)
        momentum = (1.0 - h.sqrt()) / (1.0 + h.sqrt())
        here = energy.at(torch.where(onward, w + momentum * (w - before), w))
        gentler = (here.steepness < kept.steepness) | (kept.energy == 0)
        kept = here.where(open_ & (here.energy < 0) & gentler, kept)
        open_ = open_ & (here.share > accuracy.tolerance**2)
    return Update(kept.delta, count, float(kept.share.max()) ** 0.5)


def _inner(a: Signal, b: Signal) -> Tensor:
    """Inner product of each batch element, (b 1 1 1)."""
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)
