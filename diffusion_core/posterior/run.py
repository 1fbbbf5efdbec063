"""What every solver's run shares: counted calls, checked levels, the start of the chain."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.linear import Accuracy, DataStep, data_step
from diffusion_core.protocols import (
    Data,
    Denoiser,
    LinearOperator,
    NoiseModel,
    NormalDraws,
    Restoration,
    Signal,
)

Start = Literal["kriging", "adjoint", "noise"]

RENOISE, STATE, DATA_RE, DATA_IM = 0, 1, 2, 3
"""Streams of the keyed noise: what a level's fresh noise is for."""


class Counted:
    """An operator and a denoiser that count their calls; both act as the originals do."""

    def __init__(self, denoise: Denoiser, operator: LinearOperator) -> None:
        self._denoise = denoise
        self._operator = operator
        self.num_denoiser_calls = 0
        self.num_operator_calls = 0

    def A(self, x: Signal) -> Data:
        """Forward map, counted."""
        self.num_operator_calls += 1
        return self._operator.A(x)

    def A_adjoint(self, y: Data) -> Signal:
        """Adjoint, counted."""
        self.num_operator_calls += 1
        return self._operator.A_adjoint(y)

    def denoise(self, x: Signal, sigma: float) -> Signal:
        """D(x; sigma) for one level of the whole batch, counted."""
        self.num_denoiser_calls += 1
        levels = torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device)
        return self._denoise(x, levels).to(x.dtype)

    def data_step(self) -> DataStep:
        """The data step of the operator, its calls counted."""
        return data_step(self._operator, self)

    def restoration(self, x: Signal, **trace: Any) -> Restoration:
        """The account of the run."""
        return Restoration(x, self.num_denoiser_calls, self.num_operator_calls, trace)


def positive_levels(sigmas: Float[Tensor, " levels"]) -> list[float]:
    """The levels to call the denoiser at; a last level of 0 ends the chain and costs nothing.

    Raises:
        ValueError: if they do not strictly decrease, or none is positive, or one is below 0.
    """
    levels = [float(s) for s in sigmas]
    if any(b >= a for a, b in pairwise(levels)) or min(levels, default=-1) < 0:
        raise ValueError(f"noise levels must strictly decrease, none below 0: {levels}")
    positive = [s for s in levels if s > 0]
    if not positive:
        raise ValueError("at least one noise level must be positive")
    return positive


def kriging_estimate(
    prior: CovarianceTable,
    calls: Counted,
    step: DataStep,
    y: Data,
    noise: NoiseModel,
    accuracy: Accuracy,
) -> tuple[Signal, int]:
    """E[x0 | y] under the Gaussian prior of images: no network. Returns CG steps beside it."""
    like = torch.zeros_like(calls.A_adjoint(y))
    mean = prior.prior_mean.to(like)[:, None, None].expand_as(like)
    covariance = prior.prior().on(mean, padding=step.padding)
    update = step(covariance, noise.variance(y), y - calls.A(mean), accuracy)
    return mean + update.delta, update.num_steps


def initial_estimate(
    start: Start,
    prior: CovarianceTable | None,
    calls: Counted,
    step: DataStep,
    y: Data,
    noise: NoiseModel,
    accuracy: Accuracy,
) -> Signal:
    """Where the chain starts, before noise: kriging, A'y, or 0 ("noise": nothing but noise).

    Raises:
        ValueError: if the start is none of these.
    """
    if start not in {"kriging", "adjoint", "noise"}:
        raise ValueError(f"a chain starts from kriging, adjoint or noise, not {start!r}")
    if start == "kriging" and prior is not None:
        return kriging_estimate(prior, calls, step, y, noise, accuracy)[0]
    adjoint = calls.A_adjoint(y)
    return torch.zeros_like(adjoint) if start == "noise" else adjoint


def measurement_noise(variance: Tensor, draws: NormalDraws, level: int, like: Data) -> Data:
    """A draw of n' ~ N(0, R), complex where the data are."""
    std = variance.sqrt()
    if not like.is_complex():
        return std * draws.normal(level, like, DATA_RE)
    real = draws.normal(level, like.real, DATA_RE)
    return std * torch.complex(real, draws.normal(level, like.real, DATA_IM))
