"""CovProx: a covariance-aware data step after every denoising (ours, the default solver).

At each level x0 | x ~ N(mu, Sigma) is taken, mu = D(x; sigma), Sigma = c S C S measured on
validation images (covariance.py), and conditioned on y in closed form or by converged CG:

    mean mode      m = mu + K (y - A mu),              K = Sigma A' (A Sigma A' + R)^-1
    sample mode    m = s + K (y - A s - n'),           s = mu + Sigma^(1/2) xi,  n' ~ N(0, R)
    fresh          x' = m + beta (m - m_before) + zeta sigma' eps
    deterministic  x' = m + (sigma' / sigma) (x - m)

A nonlinear A has no gain: m then minimises the posterior's energy, by descent (descent.py), about
mu or about s with y - n'. No gradient goes through the network, so a level costs one evaluation of
D. The chain's error is
larger than a fresh-noise residual, hence the inflation c > 1. Fresh noise keeps D in the regime it
was trained in, but what of it the data do not see stays in m: so zeta fades along the levels. Where
the data say nothing a level brings the chain nearer by a share sigma^2 / (P + sigma^2) only: beta,
a heavy ball, makes up for few levels. The elements of a batch may be a stack, whose neighbours are
expected to be alike: mu is conditioned on that before the data are heard (coupling.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from diffusion_core.operators import Identity
from diffusion_core.posterior.coupling import couple, difference_precision
from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.descent import descend
from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.posterior.graded import denoise_graded
from diffusion_core.posterior.linear import Accuracy, Update
from diffusion_core.posterior.misfit import misfit_by_place, misfit_of_image
from diffusion_core.posterior.run import (
    ADAPT,
    PROBE,
    RENOISE,
    STATE,
    Counted,
    Start,
    initial_estimate,
    measurement_noise,
    positive_levels,
)
from diffusion_core.protocols import (
    Data,
    Denoiser,
    LinearOperator,
    NoiseModel,
    NonlinearOperator,
    NormalDraws,
    Restoration,
    Signal,
    UnsuitedError,
)

Ramp = float | Sequence[float]
"""A constant, or values at evenly spaced places of the chain: two are those at the first level and
at the last, as many as there are levels one a level; between them it is interpolated."""

_INFLATION: dict[str, Ramp] = {"mean": 4.0, "sample": 1.5, "graded": 4.0}
_ZETA: dict[str, Ramp] = {"mean": (0.7, 0.0), "sample": 1.0, "graded": 0.0}


@dataclass(frozen=True, eq=False)
class CovProx:
    """A posterior solver (protocols.Solver).

    Attributes:
        prior: the covariance table of the denoiser's condition.
        mode: "mean" (best estimate), "sample" (a draw of the posterior), or "graded" (the best
            estimate of an image under noise that varies over it: graded.py).
        inflation: c > 0, factor on Sigma, geometric along the levels; default 4 (mean), 1.5
            (sample). calibration.py fits it.
        renoise: "fresh" noise, or "deterministic" (the conditional probability-flow ODE).
        zeta: scale of the fresh noise that a level starts from, linear along the levels (the start
            has the whole noise of the first); default .7 to 0 (mean), 1 (sample).
        momentum: beta, linear along the levels; with fresh noise only.
        adapt: multiply c, at all levels, by how much larger the data's misfit at the first level
            is than Sigma foresees (misfit.py), place by place where the operator is local: images
            and their parts differ in texture, and the table holds their average.
        local: whether Sigma varies from pixel to pixel (S).
        start: "kriging", "scaled-adjoint", "adjoint" or "noise", each with noise of
            the first level added.
        tolerance: relative residual of the linear solves (of a descent: see descent.py).
        max_steps: CG steps, or gradients, a level at most.
        z_coupling: how much is made of the likeness of neighbours in a stack: a factor on the
            precision of their differences, 0 for slices or frames each by itself; mean mode only.
        z_inflation: > 0, factor on the Sigma that they are coupled by, apart from the data step's.
        z_stride: batch elements from one slice to the next.
    """

    prior: CovarianceTable
    mode: Literal["mean", "sample", "graded"] = "mean"
    inflation: Ramp | None = None
    renoise: Literal["fresh", "deterministic"] = "fresh"
    zeta: Ramp | None = None
    momentum: Ramp = 0.0
    adapt: bool = False
    local: bool = True
    start: Start = "kriging"
    tolerance: float = 1e-2
    max_steps: int = 40
    z_coupling: float = 0.0
    z_inflation: float = 1.0
    z_stride: int = 1

    def __post_init__(self) -> None:
        if self.mode not in _ZETA or self.renoise not in {"fresh", "deterministic"}:
            raise ValueError(
                "covprox has the modes mean, sample and graded, and renoises fresh or "
                f"deterministic, not {self.mode!r} and {self.renoise!r}"
            )
        if not all(_values(ramp) for ramp in (self.inflation, self.zeta, self.momentum)):
            raise ValueError("inflation, zeta and momentum take one value or more, not none")
        if not all(0 < c < math.inf for c in _values(self.inflation)):
            raise ValueError(f"inflation must be positive and finite, not {self.inflation}")
        for name in ("zeta", "momentum"):
            if not all(map(math.isfinite, _values(getattr(self, name)))):
                raise ValueError(f"{name} must be finite, not {getattr(self, name)}")
        if not 0 <= self.z_coupling < math.inf or not 0 < self.z_inflation < math.inf:
            raise ValueError(
                "z_coupling must be 0 or more and z_inflation more than 0, both finite, not "
                f"{self.z_coupling} and {self.z_inflation}"
            )
        if self.z_coupling and self.mode != "mean":
            raise ValueError("stacks are coupled in mean mode alone: set z_coupling to 0 to sample")

    def __call__(
        self,
        denoise: Denoiser,
        operator: LinearOperator | NonlinearOperator,
        y: Data,
        noise: NoiseModel,
        sigmas: Float[Tensor, " levels"],
        draws: NormalDraws,
    ) -> Restoration:
        """Restore a batch; the last data step's m is returned. See protocols.Solver."""
        if self.mode == "graded":
            return _graded(denoise, operator, y, noise, sigmas)
        chain = Chain(self, denoise, operator, y, noise, sigmas, draws)
        for level in range(len(chain.levels)):
            mu = chain.couple(level, chain.denoise(level))
            chain.advance(level, chain.condition(level, mu))
        return chain.calls.restoration(chain.m, levels=chain.trace)

    def inflation_at(self, progress: float) -> float:
        """c at a place of the chain: 0 is the first level, 1 the last."""
        default = _INFLATION[self.mode]
        return _geometric(default if self.inflation is None else self.inflation, progress)

    def zeta_at(self, progress: float) -> float:
        """Zeta of the fresh noise that a level starts from."""
        return _linear(_ZETA[self.mode] if self.zeta is None else self.zeta, progress)

    def momentum_at(self, progress: float) -> float:
        """Beta of the step that leads to a level."""
        return _linear(self.momentum, progress)


class Chain:
    """A batch on its way along the levels, one level at a time (CovProx, and its calibration).

    Attributes:
        solver: its settings.
        calls: what was called.
        levels: noise levels > 0, decreasing.
        x: state that the next level begins with.
        m: estimate of the last level done, the start before the first.
        trace: of each level, the "steps" of its linear solve, the relative residual "left", and how
            far the data "moved" the estimate (root mean square, network units).
    """

    def __init__(
        self,
        solver: CovProx,
        denoise: Denoiser,
        operator: LinearOperator | NonlinearOperator,
        y: Data,
        noise: NoiseModel,
        sigmas: Float[Tensor, " levels"],
        draws: NormalDraws,
    ) -> None:
        self.solver = solver
        self.levels = positive_levels(sigmas)
        self.calls = Counted(denoise, operator)
        self.trace: list[dict[str, Any]] = []
        y = self.calls.checked(y)
        self._step = self.calls.data_step() if self.calls.is_linear else None
        self._padding = 0 if self._step is None else self._step.padding
        self._y, self._noise, self._draws = y, noise, draws
        self._misfit: Tensor | None = None
        self._dual: Tensor | None = None
        self._accuracy = Accuracy(solver.tolerance, solver.max_steps)
        self.m = initial_estimate(
            solver.start, solver.prior, self.calls, self._step, y, noise, self._accuracy
        )
        self.x = self.m + self.levels[0] * draws.normal(0, self.m, RENOISE)

    def progress(self, level: int) -> float:
        """Place of a level in the chain: 0 is the first, 1 the last."""
        return level / max(1, len(self.levels) - 1)

    def denoise(self, level: int) -> Signal:
        """mu = D(x; sigma)."""
        return self.calls.denoise(self.x, self.levels[level])

    def couple(self, level: int, mu: Signal) -> Signal:
        """What mu becomes once neighbours in the stack are heard; mu itself if it has none."""
        solver = self.solver
        if not solver.z_coupling or len(mu) <= solver.z_stride:
            return mu
        table = solver.prior.at(self.levels[level])
        covariance = table.on(mu, solver.z_inflation)
        precision = difference_precision(mu, covariance, solver.z_coupling, solver.z_stride)
        coupled, solved = couple(mu, covariance, precision, solver.z_stride, self._dual)
        self._dual = solved.x
        return coupled

    def condition(self, level: int, mu: Signal, inflation: float | None = None) -> Signal:
        """m: what mu becomes, or a draw about it, once the data are heard.

        Args:
            level: at which.
            mu: the denoiser's estimate.
            inflation: c; default the solver's.
        """
        sigma, solver = self.levels[level], self.solver
        c = solver.inflation_at(self.progress(level)) if inflation is None else inflation
        A_mu = self.calls.A(mu)
        R = self._noise.variance(A_mu)
        table, padding = solver.prior.at(sigma), self._padding
        covariance = table.on(mu, c, padding, local=solver.local)
        if solver.adapt:
            if self._misfit is None:  # at the first level, of its first estimate
                foreseen = table.on(mu, 1.0, padding, local=solver.local)
                self._misfit = self.misfit(A_mu, R, foreseen, mu)
            covariance = covariance.times(self._misfit.expand_as(mu[:, :1]))
        centre, A_centre, y = mu, A_mu, self._y
        if solver.mode == "sample":
            centre = mu + self._draw_of(covariance, level, mu, STATE)
            y = y - measurement_noise(R, self._draws, level, y)
            A_centre = self.calls.A(centre)
        update = self._update(level, covariance, R, y - A_centre, centre, A_centre)
        self.trace.append(
            {
                "sigma": sigma,
                "steps": update.num_steps,
                "left": update.relative_residual,
                "moved": float(update.delta.square().mean().sqrt()),
            }
        )
        return centre + update.delta

    def _update(
        self,
        level: int,
        covariance: Covariance,
        R: Tensor,
        residual: Data,
        centre: Signal,
        A_centre: Data,
    ) -> Update:
        """How far the data A(centre) + residual move the centre."""
        if self._step is not None:
            return self._step(covariance, R, residual, self._accuracy)
        y = A_centre + residual
        probe = self._draw_of(covariance, level, centre, PROBE)
        return descend(self.calls, covariance, self._noise, y, centre, probe, self._accuracy)

    def _draw_of(self, covariance: Covariance, level: int, mu: Signal, stream: int) -> Signal:
        """A draw of N(0, Sigma) for the image."""
        xi = self._draws.normal(level, covariance.white_like(mu), stream)
        return covariance.apply_root(xi, (mu.shape[-2], mu.shape[-1]))

    def misfit(
        self, A_mu: Data, R: Tensor, covariance: Covariance, mu: Signal
    ) -> Float[Tensor, "b 1 _ _"]:
        """The factor on Sigma that the data tell of: see misfit.py."""
        e = self._draw_of(covariance, 0, mu, ADAPT)
        foreseen = self.calls.A(e) if self._step else self.calls.A(mu + e) - A_mu
        residual = self._y - A_mu
        if self.calls.reach != "plane":
            size = mu.shape[-2], mu.shape[-1]
            return misfit_by_place(residual, foreseen, R, size).to(mu)
        unused = len(self.levels)  # the noise of the levels is for their draws
        n = measurement_noise(R, self._draws, unused, A_mu)

        def update(factor: Tensor, residual: Data) -> Signal:
            scaled = covariance.times(factor.expand_as(mu[:, :1]))
            return self._update(0, scaled, R, residual, mu, A_mu).delta

        return misfit_of_image(update, covariance, residual, foreseen, n)

    def advance(self, level: int, m: Signal) -> None:
        """Take m as the level's estimate, and bring x to the next level if there is one."""
        before, self.m = self.m, m
        if level + 1 == len(self.levels):
            return
        sigma, sigma_next = self.levels[level], self.levels[level + 1]
        if self.solver.renoise == "deterministic":
            self.x = m + (sigma_next / sigma) * (self.x - m)
            return
        progress = self.progress(level + 1)
        self.x = m + self.solver.momentum_at(progress) * (m - before)
        scale = self.solver.zeta_at(progress) * sigma_next
        if scale:
            self.x = self.x + scale * self._draws.normal(level + 1, m, RENOISE)


def _graded(
    denoise: Denoiser,
    operator: LinearOperator | NonlinearOperator,
    y: Data,
    noise: NoiseModel,
    sigmas: Float[Tensor, " levels"],
) -> Restoration:
    """The mode "graded": no chain, and no data step.

    Raises:
        UnsuitedError: if something else than noise is wrong with the image.
    """
    if not isinstance(operator, Identity):
        raise UnsuitedError(
            "covprox's mode graded takes noise off images and nothing else; choose the mode mean"
        )
    calls = Counted(denoise, operator)
    y = calls.checked(y)
    x = denoise_graded(calls, y, noise.variance(y), positive_levels(sigmas))
    return calls.restoration(x)


def _values(ramp: Ramp | None) -> tuple[float, ...]:
    """The values of a ramp; a default counts as 1."""
    if ramp is None:
        return (1.0,)
    return (float(ramp),) if isinstance(ramp, int | float) else tuple(map(float, ramp))


def _linear(ramp: Ramp, progress: float) -> float:
    """Value at a place in 0..1, linear between the places of the values."""
    values = _values(ramp)
    place = progress * (len(values) - 1)
    left = min(int(place), max(0, len(values) - 2))
    right = min(left + 1, len(values) - 1)
    return values[left] + (values[right] - values[left]) * (place - left)


def _geometric(ramp: Ramp, progress: float) -> float:
    """As _linear, in the logarithm."""
    if isinstance(ramp, int | float):
        return float(ramp)
    return math.exp(_linear([math.log(value) for value in _values(ramp)], progress))
