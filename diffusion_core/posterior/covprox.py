"""CovProx: a covariance-aware data step after every denoising (ours, the default solver).

At each level x0 | x ~ N(mu, Sigma) is taken, mu = D(x; sigma), Sigma = c S C S measured on
validation images (covariance.py), and conditioned on y in closed form or by converged CG:

    mean mode      m = mu + K (y - A mu),              K = Sigma A' (A Sigma A' + R)^-1
    sample mode    m = s + K (y - A s - n'),           s = mu + Sigma^(1/2) xi,  n' ~ N(0, R)
    fresh          x' = m + beta (m - m_before) + zeta sigma' eps
    deterministic  x' = m + (sigma' / sigma) (x - m)

No gradient goes through the network, so a level costs one evaluation of D. The chain's error is
larger than a fresh-noise residual, hence the inflation c > 1. Fresh noise keeps D in the regime it
was trained in, but what of it the data do not see stays in m: so zeta fades along the levels. Where
the data say nothing a level brings the chain nearer by a share sigma^2 / (P + sigma^2) only: beta,
a heavy ball, makes up for few levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.linear import Accuracy
from diffusion_core.posterior.run import (
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
    NormalDraws,
    Restoration,
)

Ramp = float | Sequence[float]
"""A constant, or its values at the first level and at the last."""

_INFLATION: dict[str, Ramp] = {"mean": 4.0, "sample": 1.5}
_ZETA: dict[str, Ramp] = {"mean": (0.7, 0.0), "sample": 1.0}


@dataclass(frozen=True, eq=False)
class CovProx:
    """A posterior solver (protocols.Solver).

    Attributes:
        prior: the covariance table of the denoiser's condition.
        mode: "mean" (best estimate) or "sample" (a draw of the posterior).
        inflation: c, factor on Sigma, geometric along the levels; default 4 (mean), 1.5 (sample).
        renoise: "fresh" noise, or "deterministic" (the conditional probability-flow ODE).
        zeta: scale of the fresh noise that a level starts from, linear along the levels (the start
            has the whole noise of the first); default .7 to 0 (mean), 1 (sample).
        momentum: beta, linear along the levels; with fresh noise only.
        local: whether Sigma varies from pixel to pixel (S).
        start: "kriging", "adjoint" or "noise", each with noise of the first level added.
        tolerance: relative residual of the linear solves.
        max_steps: CG steps a level at most.
    """

    prior: CovarianceTable
    mode: Literal["mean", "sample"] = "mean"
    inflation: Ramp | None = None
    renoise: Literal["fresh", "deterministic"] = "fresh"
    zeta: Ramp | None = None
    momentum: Ramp = 0.0
    local: bool = True
    start: Start = "kriging"
    tolerance: float = 1e-2
    max_steps: int = 40

    def __post_init__(self) -> None:
        if self.mode not in _ZETA or self.renoise not in {"fresh", "deterministic"}:
            raise ValueError(
                "covprox has the modes mean and sample, and renoises fresh or deterministic, "
                f"not {self.mode!r} and {self.renoise!r}"
            )
        for ramp in (self.inflation, self.zeta, self.momentum):
            _ends(0.0 if ramp is None else ramp)

    def __call__(
        self,
        denoise: Denoiser,
        operator: LinearOperator,
        y: Data,
        noise: NoiseModel,
        sigmas: Float[Tensor, " levels"],
        draws: NormalDraws,
    ) -> Restoration:
        """Restore a batch; the last data step's m is returned. See protocols.Solver."""
        levels = positive_levels(sigmas)
        calls = Counted(denoise, operator)
        step = calls.data_step()
        accuracy = Accuracy(self.tolerance, self.max_steps)
        m = initial_estimate(self.start, self.prior, calls, step, y, noise, accuracy)
        x = m + levels[0] * draws.normal(0, m, RENOISE)
        inflation = _INFLATION[self.mode] if self.inflation is None else self.inflation
        zeta = _ZETA[self.mode] if self.zeta is None else self.zeta
        trace: list[dict[str, Any]] = []
        last = max(1, len(levels) - 1)
        for i, sigma in enumerate(levels):
            mu = calls.denoise(x, sigma)
            A_mu = calls.A(mu)
            R = noise.variance(A_mu)
            c = _geometric(inflation, i / last)
            covariance = self.prior.at(sigma).on(mu, c, step.padding, local=self.local)
            centre, residual = mu, y - A_mu
            if self.mode == "sample":
                xi = draws.normal(i, covariance.white_like(mu), STATE)
                centre = mu + covariance.apply_root(xi, (mu.shape[-2], mu.shape[-1]))
                residual = y - calls.A(centre) - measurement_noise(R, draws, i, y)
            update = step(covariance, R, residual, accuracy)
            before, m = m, centre + update.delta
            trace.append(
                {"sigma": sigma, "steps": update.num_steps, "left": update.relative_residual}
            )
            if i + 1 < len(levels):
                sigma_next, progress = levels[i + 1], (i + 1) / last
                if self.renoise == "deterministic":
                    x = m + (sigma_next / sigma) * (x - m)
                else:
                    x = m + _linear(self.momentum, progress) * (m - before)
                    scale = _linear(zeta, progress) * sigma_next
                    x = x + scale * draws.normal(i + 1, m, RENOISE) if scale else x
        return calls.restoration(m, levels=trace)


def _ends(ramp: Ramp) -> tuple[float, float]:
    """First and last value."""
    if isinstance(ramp, int | float):
        return float(ramp), float(ramp)
    if len(ramp) != 2:
        raise ValueError(f"give one value, or the first and the last, not {list(ramp)}")
    return float(ramp[0]), float(ramp[1])


def _linear(ramp: Ramp, progress: float) -> float:
    first, last = _ends(ramp)
    return first + (last - first) * progress


def _geometric(ramp: Ramp, progress: float) -> float:
    first, last = _ends(ramp)
    return float(first * (last / first) ** progress)
