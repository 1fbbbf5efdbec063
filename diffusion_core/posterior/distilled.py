"""Distilled: one to four evaluations of a student that knows the operator, a data step after each.

    m_0 = E[x0 | y] under the Gaussian prior (kriging), solved until it has converged
    mu_k = D(m_(k-1), inputs; a sigma_k)         the student's estimate of x0: no noise is added
    m_k = mu_k + K_k (y - A mu_k)                CovProx's data step, Sigma = c_k Sigma(sigma_k),
                                                 c = 1 at the last

The levels sigma_k are labels that the student was trained with, scaled by how wrong the start of
an image is expected to be, a = rms error / .07: k-space leaves twice as much open as a random mask.
But for that c, a chain of fewer evaluations is the beginning of a longer one. What the student is
told of the operator are its inputs, the same at every level:

    w = g / (1 + |g|), g = var(x0) A' R^-1 A 1      how well each pixel is determined by itself
    e - K (A e + n), e ~ N(0, P), n ~ N(0, R)       a draw of the start's error, of the Gaussian
                                                    posterior's covariance: streaks, aliases, holes

Both need A and its data step alone, so that any linear operator can be told of in the same way.
Source: the distillation of a chain into one network that agrees with itself along it is that of
consistency models (Song et al. 2023, arXiv:2303.01469); conditioning on the operator, the data step
between, and regression on the truth instead of a sampler's end are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffusion_core.networks.local_unet import NUM_CHANNELS
from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.posterior.linear import Accuracy, Update
from diffusion_core.posterior.linear.base import LEAST_BLUR_VARIANCE
from diffusion_core.posterior.run import (
    PRIOR,
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
    Signal,
    UnsuitedError,
)

REFERENCE_ERROR = 0.07
"""Root mean square of a start's error, network units, at which levels are as they stand: about that
of a random mask that leaves 30% of the pixels."""
_SCALES = (0.5, 2.5)
"""Bounds of a."""


@dataclass(frozen=True, eq=False)
class Distilled:
    """A posterior solver (protocols.Solver) for a distilled model's denoiser.

    Of the levels that it is called with only the number counts.

    Attributes:
        prior: the covariance table of the teacher's condition.
        levels: sigma_k, as the student was trained; as many evaluations at most. Those that it is
            told are a times as large.
        inflation: c, or one c_k a level, of the data steps that another estimate follows.
        final_inflation: c of the last one: what it lets in of the data's noise nobody takes out.
        final_data_step: whether the last estimate is brought to the data too; a one-pass regressor
            returns its own.
        local: whether Sigma varies from pixel to pixel.
        start: see CovProx; a student is used with the start that it was trained from.
        tolerance: relative residual of the linear solves.
        start_tolerance: of the solve of the start, and of the draw of its error.
        max_steps: CG steps at most.
    """

    prior: CovarianceTable
    levels: Sequence[float] = (0.4,)
    inflation: float | Sequence[float] = 4.0
    final_inflation: float = 1.0
    final_data_step: bool = True
    local: bool = True
    start: Start = "kriging"
    tolerance: float = 5e-3
    start_tolerance: float = 1e-4
    max_steps: int = 200

    def __post_init__(self) -> None:
        if not self.levels or not all(s > 0 for s in self.levels):
            raise ValueError(f"distilled takes one level > 0 or more, not {self.levels}")
        num = 1 if isinstance(self.inflation, int | float) else len(self.inflation)
        if num not in {1, len(self.levels)}:
            raise ValueError(
                f"{num} inflations do not fit {len(self.levels)} levels: give one each"
            )
        if not all(self.inflation_at(k) > 0 for k in range(len(self.levels))):
            raise ValueError(f"inflation must be positive, not {self.inflation}")
        if not self.final_inflation > 0:
            raise ValueError(f"final_inflation must be positive, not {self.final_inflation}")

    def __call__(
        self,
        denoise: Denoiser,
        operator: LinearOperator,
        y: Data,
        noise: NoiseModel,
        sigmas: Float[Tensor, " levels"],
        draws: NormalDraws,
    ) -> Restoration:
        """Restore a batch in as many evaluations as `sigmas` has positive levels.

        Args:
            denoise: of images with the student's inputs beside them (networks/student.py).
            operator: see protocols.Solver, as the others.
            y: data.
            noise: its likelihood.
            sigmas: as many as there shall be evaluations; their values do not count.
            draws: of the inputs' draw.

        Raises:
            UnsuitedError: if the student was not distilled for so many evaluations, or the operator
                is nonlinear.
        """
        num = len(positive_levels(sigmas))
        if num > len(self.levels):
            raise UnsuitedError(
                f"the model was distilled for {len(self.levels)} evaluations at most, not {num}: "
                "ask for fewer, or take covprox with the model that it was distilled from"
            )
        calls = Counted(denoise, operator)
        term = DataTerm(self, calls, y, noise, draws)
        m, channels = term.start, term.start.shape[1]
        trace = []
        for level, sigma in enumerate(self.levels[:num]):
            shown = torch.cat([m, term.inputs], dim=1)
            m = calls.denoiser(shown, sigma * term.scale)[:, :channels]
            last = level + 1 == num
            if not last or self.final_data_step:
                update = term.update(level, m, self.final_inflation if last else None)
                m = m + update.delta
                moved = float(update.delta.square().mean().sqrt())
                trace.append({"sigma": sigma, "steps": update.num_steps, "moved": moved})
        return calls.restoration(m, levels=trace)

    def inflation_at(self, level: int) -> float:
        """c_k."""
        if isinstance(self.inflation, int | float):
            return float(self.inflation)
        return float(self.inflation[min(level, len(self.inflation) - 1)])


class DataTerm:
    """One measurement as a student meets it: where to start, what it is told, the data steps.

    Attributes:
        start: m_0, (b c h w).
        inputs: (b, 1 + 3, h, w): w, and the error's draw with the unused channels at 0.
        variance: (b,) mean square of the draw, the start's expected error.
        scale: (b,) a, of the levels that the student is told.
    """

    def __init__(
        self, solver: Distilled, calls: Counted, y: Data, noise: NoiseModel, draws: NormalDraws
    ) -> None:
        self._solver, self._calls, self._noise = solver, calls, noise
        self._y = calls.checked(y)
        self._step = calls.data_step()
        exactly = Accuracy(solver.start_tolerance, solver.max_steps)
        R = noise.variance(self._y)
        self.start = initial_estimate(
            solver.start, solver.prior, calls, self._step, self._y, noise, exactly
        )
        mean = solver.prior.mean_like(self.start)
        covariance = solver.prior.prior().on(mean, padding=self._step.padding)
        determined = self._determined(covariance, R)
        error = self._error(covariance, R, draws, exactly)
        self.variance = error.square().mean(dim=(1, 2, 3))
        self.scale = (self.variance.sqrt() / REFERENCE_ERROR).clamp(*_SCALES)
        error = F.pad(error, (0, 0, 0, 0, 0, NUM_CHANNELS - error.shape[1]))
        self.inputs = torch.cat([determined, error], dim=1)

    def update(self, level: int, mu: Signal, inflation: float | None = None) -> Update:
        """K_k (y - A mu): how far the data move an estimate (b c h w) of a level.

        Args:
            level: k, from 0.
            mu: the estimate.
            inflation: c, if it is not the level's.
        """
        solver = self._solver
        A_mu = self._calls.A(mu)
        c = solver.inflation_at(level) if inflation is None else inflation
        covariance = solver.prior.at(solver.levels[level]).on(
            mu, c, self._step.padding, local=solver.local
        )
        R = self._noise.variance(A_mu)
        accuracy = Accuracy(solver.tolerance, solver.max_steps)
        return self._step(covariance, R, self._y - A_mu, accuracy)

    def _determined(self, covariance: Covariance, R: Tensor) -> Float[Tensor, "b 1 h w"]:
        """w: 0 where a pixel's own level is left open, towards 1 where the data tell it."""
        seen = self._calls.A(torch.ones_like(self.start))
        weighted = seen / R.clamp_min(LEAST_BLUR_VARIANCE)
        answer = self._calls.A_adjoint(weighted).mean(dim=1, keepdim=True)
        g = _pixel_variance(covariance) * answer
        return g / (1.0 + g.abs())

    def _error(
        self, covariance: Covariance, R: Tensor, draws: NormalDraws, accuracy: Accuracy
    ) -> Signal:
        """A draw of N(0, P - K A P), the error of kriging if images were Gaussian."""
        xi = draws.normal(0, covariance.white_like(self.start), PRIOR)
        size = self.start.shape[-2], self.start.shape[-1]
        e = covariance.apply_root(xi, size)
        seen = self._calls.A(e)
        seen = self._calls.checked(seen + measurement_noise(R, draws, 0, seen))
        return e - self._step(covariance, R, seen, accuracy).delta


def _pixel_variance(covariance: Covariance) -> float:
    """Variance of a pixel under C, mean over the channels: the mean of the spectrum's modes."""
    h, w = covariance.canvas
    halves = covariance.spectrum.sum(dim=(-2, -1)) * 2.0
    # The modes of rfft2 stand for two each, but for the first column and, of an even width, the
    # last one.
    alone = covariance.spectrum[..., 0].sum(dim=-1)
    if w % 2 == 0:
        alone = alone + covariance.spectrum[..., -1].sum(dim=-1)
    return float(((halves - alone) / (h * w)).mean())
