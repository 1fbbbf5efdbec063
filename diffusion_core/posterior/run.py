"""What every solver's run shares: counted calls, checked levels, the start of the chain."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.operators.base import measured_by
from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.linear import Accuracy, DataStep, data_step
from diffusion_core.protocols import (
    Data,
    Denoiser,
    LinearOperator,
    NoiseModel,
    NonlinearOperator,
    NormalDraws,
    Reach,
    Restoration,
    Sigma,
    Signal,
    UnsuitedError,
)

Start = Literal["kriging", "scaled-adjoint", "adjoint", "noise"]

RENOISE, STATE, DATA_RE, DATA_IM, LANGEVIN, PRIOR, PRIOR_STATE, PROBE, ADAPT = range(9)
"""Streams of the keyed noise: what a level's fresh noise is for."""


class Counted:
    """An operator and a denoiser that count their calls; both act as the originals do."""

    def __init__(self, denoise: Denoiser, operator: LinearOperator | NonlinearOperator) -> None:
        self._denoise = denoise
        self._operator = operator
        self.num_denoiser_calls = 0
        self.num_operator_calls = 0

    def A(self, x: Signal) -> Data:
        """Forward map, counted."""
        self.num_operator_calls += 1
        return self._operator.A(x)

    def A_adjoint(self, y: Data) -> Signal:
        """Adjoint, counted.

        Raises:
            UnsuitedError: if the operator has none, being nonlinear.
        """
        self.num_operator_calls += 1
        return self._linear.A_adjoint(y)

    @property
    def is_linear(self) -> bool:
        """Whether the operator has an adjoint."""
        return isinstance(self._operator, LinearOperator)

    @property
    def reach(self) -> Reach:
        """How far a datum looks; the plane, if the operator does not say."""
        reach: Reach = getattr(self._operator, "reach", "plane")
        return reach

    @property
    def _linear(self) -> LinearOperator:
        if not isinstance(self._operator, LinearOperator):
            raise UnsuitedError(
                f"{type(self._operator).__name__} has no adjoint: nonlinear operators are for "
                "covprox, daps, split-gibbs, red-diff and dps"
            )
        return self._operator

    def pullback(self, x: Signal) -> tuple[Data, Callable[[Data], Signal]]:
        """A(x), and u -> J(x)' u: the adjoint, or by autograd (a call each way, both counted).

        The pullback may be called once.
        """
        if self.is_linear:
            return self.A(x), self.A_adjoint
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            Ax = self.A(leaf)

        def pull(u: Data) -> Signal:
            self.num_operator_calls += 1
            return torch.autograd.grad(Ax, leaf, u)[0]

        return Ax.detach(), pull

    def initial(self, y: Data) -> Signal:
        """The data as an image: A' y, or what a nonlinear operator offers.

        Raises:
            UnsuitedError: if the operator has neither.
        """
        if isinstance(self._operator, LinearOperator):
            return self.A_adjoint(y)
        if isinstance(self._operator, NonlinearOperator):
            return self._operator.initial(y)
        raise UnsuitedError(
            f"{type(self._operator).__name__} needs A and A_adjoint, or A and initial(y)"
        )

    def checked(self, y: Data) -> Data:
        """The data, 0 in place of what was not measured.

        Raises:
            ValueError: if a measured one is NaN or infinite.
        """
        y = measured_by(self._operator, y)
        if not bool(y.isfinite().all()):
            raise ValueError(
                "the data hold NaN or infinite values where something was measured: mend them, or "
                "mask them as missing"
            )
        return y

    def denoise(self, x: Signal, sigma: float) -> Signal:
        """D(x; sigma) for one level of the whole batch, counted."""
        levels = torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device)
        return self.denoiser(x, levels)

    def denoiser(self, x: Signal, sigma: Sigma) -> Signal:
        """D(x; sigma) as protocols.Denoiser has it, counted."""
        self.num_denoiser_calls += 1
        return self._denoise(x, sigma).to(x.dtype)

    def denoise_pullback(
        self, x: Signal, sigma: float
    ) -> tuple[Signal, Callable[[Signal], Signal]]:
        """D(x; sigma), and u -> (dD/dx)' u, which counts 2 more evaluations and works once."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            D_x = self.denoise(leaf, sigma)

        def pull(u: Signal) -> Signal:
            self.num_denoiser_calls += 2
            return torch.autograd.grad(D_x, leaf, u)[0]

        return D_x.detach(), pull

    def data_step(self) -> DataStep:
        """The data step of the operator, its calls counted.

        Raises:
            UnsuitedError: if the operator is nonlinear.
        """
        return data_step(self._linear, self)

    def restoration(self, x: Signal, **trace: Any) -> Restoration:
        """The account of the run."""
        return Restoration(x, self.num_denoiser_calls, self.num_operator_calls, trace)


def positive_levels(sigmas: Float[Tensor, " levels"]) -> list[float]:
    """The levels to call the denoiser at; a last level of 0 ends the chain and costs nothing.

    Raises:
        ValueError: if they do not strictly decrease, or none is positive, or one is below 0, NaN or
            infinite.
    """
    levels = [float(s) for s in sigmas]
    valid = all(0 <= s < math.inf for s in levels)
    if not levels or not valid or any(b >= a for a, b in pairwise(levels)):
        raise ValueError(f"noise levels must strictly decrease, finite, none below 0: {levels}")
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
    mean = prior.mean_like(like)
    covariance = prior.prior().on(mean, padding=step.padding)
    update = step(covariance, noise.variance(y), y - calls.A(mean), accuracy)
    return mean + update.delta, update.num_steps


def initial_estimate(
    start: Start,
    prior: CovarianceTable | None,
    calls: Counted,
    step: DataStep | None,
    y: Data,
    noise: NoiseModel,
    accuracy: Accuracy,
) -> Signal:
    """Where the chain starts, before noise: kriging, A'y, or 0 ("noise": nothing but noise).

    "adjoint" is A'y as published, in whatever units the adjoint has: only noise of a level far
    above it hides that. "scaled-adjoint" is the multiple of A'y that explains the data best. There
    is no kriging without a prior or a data step: then it is that, or a nonlinear operator's initial
    (which all but "noise" are).

    Raises:
        ValueError: if the start is none of these.
    """
    if start not in get_args(Start):
        *others, last = get_args(Start)
        raise ValueError(f"a chain starts from {', '.join(others)} or {last}, not {start!r}")
    if start == "kriging" and prior is not None and step is not None:
        return kriging_estimate(prior, calls, step, y, noise, accuracy)[0]
    image = calls.initial(y)
    if start == "noise":
        return torch.zeros_like(image)
    return image if start == "adjoint" or not calls.is_linear else _best_scale(calls, image) * image


def _best_scale(calls: Counted, image: Signal) -> Tensor:
    """argmin |y - a A image| over a, of each batch element (b 1 1 1), for image = A'y."""
    energy = image.square().sum(dim=(1, 2, 3))
    seen = calls.A(image).abs().square().flatten(1).sum(dim=1)
    return torch.where(seen > 0, energy / seen, 1.0)[:, None, None, None]


def posterior_std(sigma: float, sigma_data: float) -> float:
    """Standard deviation of x0 given x, for pixels N(0, sigma_data^2) apart from each other."""
    return sigma * sigma_data / math.hypot(sigma, sigma_data)


def relative_precision(variance: Tensor) -> Tensor:
    """R^-1 of each element, times its mean variance: 1 where all data are alike, or exact.

    Data with less than a millionth of the mean variance count as if they had that.
    """
    axes = tuple(range(1, variance.ndim))
    mean = variance.mean(dim=axes, keepdim=True) if axes else variance
    weight = mean / variance.maximum(1e-6 * mean).clamp_min(torch.finfo(variance.dtype).tiny)
    return torch.where(mean > 0, weight, 1.0)


def measurement_noise(variance: Tensor, draws: NormalDraws, level: int, like: Data) -> Data:
    """A draw of n' ~ N(0, R), complex where the data are."""
    std = variance.sqrt()
    if not like.is_complex():
        return std * draws.normal(level, like, DATA_RE)
    real = draws.normal(level, like.real, DATA_RE)
    return std * torch.complex(real, draws.normal(level, like.real, DATA_IM))
