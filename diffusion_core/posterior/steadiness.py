"""How steady a restoration is: under another seed, and under a small change of what was measured.

A change d of the data changes the best linear estimate by K d. What the solver's answer changes by,
over that, is its gain: about 1 it answers a small change as an estimate must that hears the data at
all; far above 1 it makes much of little. One direction is tried, drawn at random, and the gain is
of that one: it bounds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_core.operators.base import measured_by
from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.gaussian import white_covariance
from diffusion_core.posterior.linear import Accuracy, data_step
from diffusion_core.posterior.run import measurement_noise
from diffusion_core.protocols import (
    Data,
    LinearOperator,
    NoiseModel,
    NonlinearOperator,
    NormalDraws,
    Signal,
)

THOROUGH = Accuracy(tolerance=1e-4, max_steps=200)
_LEVEL = 0
_STREAM = 1


def seed_spread(restorations: Sequence[Tensor]) -> float:
    """Root mean square over pixels of the standard deviation over restorations, unbiased.

    Args:
        restorations: of the same measurement, by different seeds, of one shape.

    Raises:
        ValueError: of fewer than two.
    """
    if len(restorations) < 2:
        raise ValueError("one restoration has no spread: two seeds or more are needed")
    return float(torch.stack(list(restorations)).double().var(dim=0).mean().sqrt())


def noise_change(
    operator: LinearOperator | NonlinearOperator,
    x: Signal,
    noise: NoiseModel,
    share: float,
    draws: NormalDraws,
) -> Data | None:
    """A change of the data by a share of their own noise; None where they have none.

    Args:
        operator: A.
        x: restored batch; the noise is that of A x.
        noise: its model.
        share: of its standard deviation.
        draws: of the direction.
    """
    Ax = operator.A(x)
    R = noise.variance(Ax)
    if not bool((R > 0).any()):
        return None
    return measured_by(operator, share * measurement_noise(R, draws, _LEVEL, Ax))


def image_change(
    operator: LinearOperator | NonlinearOperator, x: Signal, std: float, draws: NormalDraws
) -> Data:
    """The change of the data if the image had white noise of a standard deviation on it.

    Args:
        operator: A.
        x: restored batch.
        std: in network units.
        draws: of the direction.
    """
    e = std * draws.normal(_LEVEL, x, _STREAM)
    if isinstance(operator, LinearOperator):
        return operator.A(e)
    return operator.A(x + e) - operator.A(x)


def linear_response(
    operator: LinearOperator,
    x: Signal,
    noise: NoiseModel,
    change: Data,
    prior: CovarianceTable | None,
    accuracy: Accuracy = THOROUGH,
) -> Signal:
    """K d: by how much kriging's estimate changes, or without a prior the minimum-norm one's.

    Args:
        operator: A.
        x: restored batch; R is taken at A x.
        noise: likelihood.
        change: d, of the data.
        prior: mean and spectrum of images; None: white, of x's own variance.
        accuracy: of an iterative solve.
    """
    step = data_step(operator)
    if prior is None:
        covariance = white_covariance(float(x.var()), x)
    else:
        covariance = prior.prior().on(prior.mean_like(x), padding=step.padding)
    return step(covariance, noise.variance(operator.A(x)), change, accuracy).delta


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.double().square().mean().sqrt())
