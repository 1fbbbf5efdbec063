"""CovProx: a covariance-aware data step after every denoising (ours, the default solver).

At each level x0 | x ~ N(mu, Sigma) is taken, mu = D(x; sigma), Sigma = c S C S measured on
validation images (covariance.py), and conditioned on y in closed form or by converged CG:

    mean mode      m = mu + K (y - A mu),              K = Sigma A' (A Sigma A' + R)^-1
    sample mode    m = s + K (y - A s - n'),           s = mu + Sigma^(1/2) xi,  n' ~ N(0, R)
    fresh          x' = m + zeta sigma' eps
    deterministic  x' = m + (sigma' / sigma) (x - m)

No gradient goes through the network, so a level costs one evaluation of D. The chain's error is
larger than a fresh-noise residual, hence the inflation c > 1.
"""

from __future__ import annotations

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

_INFLATION = {"mean": 4.0, "sample": 1.5}


@dataclass(frozen=True, eq=False)
class CovProx:
    """A posterior solver (protocols.Solver).

    Attributes:
        prior: the covariance table of the denoiser's condition.
        mode: "mean" (best estimate) or "sample" (a draw of the posterior).
        inflation: c, factor on Sigma at the first level; default 4 (mean), 1.5 (sample).
        last_inflation: c at the last level, geometric in between; default `inflation`.
        renoise: "fresh" noise, or "deterministic" (the conditional probability-flow ODE).
        zeta: scale of the fresh noise after the first level; 0 gives x' = m.
        last_zeta: the same before the last level, linear in between; default `zeta`.
        local: whether Sigma varies from pixel to pixel (S).
        start: "kriging", "adjoint" or "noise", each with noise of the first level added.
        tolerance: relative residual of the linear solves.
        max_steps: CG steps a level at most.
    """

    prior: CovarianceTable
    mode: Literal["mean", "sample"] = "mean"
    inflation: float | None = None
    last_inflation: float | None = None
    renoise: Literal["fresh", "deterministic"] = "fresh"
    zeta: float = 1.0
    last_zeta: float | None = None
    local: bool = True
    start: Start = "kriging"
    tolerance: float = 1e-2
    max_steps: int = 40

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
        trace: list[dict[str, Any]] = []
        for i, sigma in enumerate(levels):
            mu = calls.denoise(x, sigma)
            A_mu = calls.A(mu)
            R = noise.variance(A_mu)
            c = self._inflation(i / max(1, len(levels) - 1))
            covariance = self.prior.at(sigma).on(mu, c, step.padding, local=self.local)
            centre, residual = mu, y - A_mu
            if self.mode == "sample":
                xi = draws.normal(i, covariance.white_like(mu), STATE)
                centre = mu + covariance.apply_root(xi, (mu.shape[-2], mu.shape[-1]))
                residual = y - calls.A(centre) - measurement_noise(R, draws, i, y)
            update = step(covariance, R, residual, accuracy)
            m = centre + update.delta
            trace.append(
                {"sigma": sigma, "steps": update.num_steps, "left": update.relative_residual}
            )
            if i + 1 < len(levels):
                zeta = self._zeta(i / max(1, len(levels) - 2))
                x = self._renoised(x, m, sigma, levels[i + 1], zeta, draws, i + 1)
        return calls.restoration(m, levels=trace)

    def _inflation(self, progress: float) -> float:
        """c at a share of the way from the first level to the last."""
        first = _INFLATION[self.mode] if self.inflation is None else self.inflation
        last = first if self.last_inflation is None else self.last_inflation
        return float(first * (last / first) ** progress)

    def _zeta(self, progress: float) -> float:
        """Scale of the fresh noise at a share of the way from the first level to the last."""
        last = self.zeta if self.last_zeta is None else self.last_zeta
        return self.zeta + (last - self.zeta) * progress

    def _renoised(
        self,
        x: Tensor,
        m: Tensor,
        sigma: float,
        sigma_next: float,
        zeta: float,
        draws: NormalDraws,
        level: int,
    ) -> Tensor:
        """The state at the next level."""
        if self.renoise == "deterministic":
            return m + (sigma_next / sigma) * (x - m)
        if zeta == 0:
            return m
        return m + zeta * sigma_next * draws.normal(level, m, RENOISE)
