"""What every data step shares: its accuracy, its result, and the dual form that fits any A."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffusion_core.posterior.cg import Map, conjugate_gradient
from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.protocols import Data, LinearOperator, Signal

LEAST_BLUR_VARIANCE = 1e-6
"""Half a step of an 8-bit image: deblurring with exact data would divide by zero, and so would
weighing exact data against noisy ones of the same image."""
_SPREAD = 1.5
"""Two circulants stand at mean -+ this many standard deviations of the log gain."""


@dataclass(frozen=True)
class Accuracy:
    """How far an iterative solve goes.

    Attributes:
        tolerance: relative residual of the linear system to stop at; 0 takes all steps.
        max_steps: products with its matrix at most.
    """

    tolerance: float = 1e-3
    max_steps: int = 40

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < math.inf or self.max_steps < 1:
            raise ValueError(
                "a solve takes a step at least, to a tolerance >= 0, not "
                f"{self.max_steps} steps to {self.tolerance}"
            )


@dataclass(frozen=True, eq=False)
class Update:
    """K r, and what it took.

    Attributes:
        delta: K r, to be added to the estimate.
        num_steps: CG steps; 0 for a closed form.
        relative_residual: of the linear system solved, the worst of the batch.
    """

    delta: Signal
    num_steps: int = 0
    relative_residual: float = 0.0


class DataStep(ABC):
    """K r = Sigma A' (A Sigma A' + R)^-1 r for one operator; built once a run.

    Attributes:
        padding: pixels by which the canvas of Sigma should exceed the image.
    """

    padding: int = 0

    @abstractmethod
    def __call__(
        self, covariance: Covariance, variance: Tensor, residual: Data, accuracy: Accuracy
    ) -> Update:
        """The update of an estimate mu.

        Args:
            covariance: Sigma on the canvas of the unknown, padded as `padding` asks.
            variance: diagonal of R, broadcastable to the data; all 0 for exact data.
            residual: y - A mu.
            accuracy: of iterative solves.

        Returns:
            K residual; exact up to rounding where num_steps is 0.
        """


class DualStep(DataStep):
    """Any operator: CG on (A Sigma A' + R) v = r, then K r = Sigma A' v."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator

    def __call__(
        self, covariance: Covariance, variance: Tensor, residual: Data, accuracy: Accuracy
    ) -> Update:
        """See DataStep."""
        return self.solve(covariance, variance, residual, accuracy, None)

    def solve(
        self,
        covariance: Covariance,
        variance: Tensor,
        residual: Data,
        accuracy: Accuracy,
        precondition: Map | None,
    ) -> Update:
        """The same with an approximate inverse of the matrix."""

        def matrix(v: Data) -> Data:
            return self.operator.A(covariance.apply(self.operator.A_adjoint(v))) + variance * v

        solved = solve(matrix, residual, precondition, accuracy)
        delta = covariance.apply(self.operator.A_adjoint(solved.delta))
        return Update(delta, solved.num_steps, solved.relative_residual)


class PrimalStep(DualStep):
    """CG in image space on (C^-1 + S A' R^-1 A S) u = S A' R^-1 r, K r = S u; R > 0.

    It lowers the posterior energy at every step, so that even a solve stopped early is a good
    estimate; the dual form's is not.
    """

    def solve_primal(
        self,
        covariance: Covariance,
        weight: Tensor,
        residual: Data,
        accuracy: Accuracy,
        precondition: Map | None,
    ) -> Update:
        """Solve with weight = 1 / R, broadcastable to the data."""
        A, A_adjoint, std = self.operator.A, self.operator.A_adjoint, covariance.std
        inverse = 1.0 / covariance.spectrum

        def scaled(x: Signal) -> Signal:
            return x if std is None else std * x

        def matrix(u: Signal) -> Signal:
            return covariance.filter(u, inverse) + scaled(A_adjoint(weight * A(scaled(u))))

        solved = solve(matrix, scaled(A_adjoint(weight * residual)), precondition, accuracy)
        return Update(scaled(solved.delta), solved.num_steps, solved.relative_residual)


def solve(
    matrix: Map, b: Tensor, precondition: Map | None, accuracy: Accuracy, scalar_dims: int = 1
) -> Update:
    """CG to the accuracy asked for; the solution stands in `delta`."""
    result = conjugate_gradient(
        matrix,
        b,
        precondition,
        tolerance=accuracy.tolerance,
        max_steps=accuracy.max_steps,
        scalar_dims=scalar_dims,
    )
    return Update(result.x, result.num_steps, result.relative_residual)


def mean_square(covariance: Covariance) -> Tensor | float:
    """Mean of S^2, per batch element: the S of a circulant approximation."""
    if covariance.std is None:
        return 1.0
    return covariance.std.square().mean(dim=(1, 2, 3), keepdim=True)


def uniform_level(variance: Tensor) -> Float[Tensor, "b 1 1 1"] | None:
    """R of each batch element (or of all) where it is a multiple of the identity; else None.

    Of data (b c h w): a variance of fewer axes lacks the first.
    """
    if 1 < variance.ndim < 4:
        variance = variance.reshape(*(1,) * (4 - variance.ndim), *variance.shape)
    if variance.ndim == 0 or variance.numel() == variance.shape[0]:
        return variance.reshape(-1, 1, 1, 1)
    each = variance.reshape(len(variance), -1)
    return each[:, :1].reshape(-1, 1, 1, 1) if bool((each == each[:, :1]).all()) else None


def is_exact(variance: Tensor) -> Bool[Tensor, "b 1 1 1"]:
    """Whether all data of a batch element (or of all) are exact."""
    num_elements = len(variance) if variance.ndim else 1
    return (variance == 0).reshape(num_elements, -1).all(dim=1).reshape(-1, 1, 1, 1)


def positive(variance: Tensor) -> Tensor:
    """R > 0, for closed forms that divide by it: exact data get the least variance instead."""
    return torch.where(variance > 0, variance, LEAST_BLUR_VARIANCE)


def mean_weight(weight: Tensor) -> Tensor:
    """Mean of 1 / R over the data of each batch element, (b|1 1 1 1)."""
    if weight.ndim == 0:
        return weight.reshape(1, 1, 1, 1)
    return weight.flatten(1).mean(dim=1).reshape(-1, 1, 1, 1)


def two_levels(gain: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A low and a high gain for each batch element, and the share of each at every pixel.

    Args:
        gain: (b 1 h w), > 0.

    Returns:
        (share (b 1 h w), level (b 1 1 1)) of the low and of the high one; the shares sum to 1, and
        interpolate log gain between the levels.
    """
    log_gain = gain.log()
    middle = log_gain.mean(dim=(1, 2, 3), keepdim=True)
    spread = _SPREAD * log_gain.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-3)
    high = ((log_gain - middle) / (2.0 * spread) + 0.5).clamp(0.0, 1.0)
    levels = torch.exp(middle - spread), torch.exp(middle + spread)
    return [(1.0 - high, levels[0]), (high, levels[1])]
