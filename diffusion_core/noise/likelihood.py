"""Likelihoods of measurements: n ~ N(0, R), R diagonal, as `protocols.NoiseModel` wants them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.protocols import Data


@dataclass(frozen=True, eq=False)
class GaussianNoise:
    """The same Gaussian noise on every measurement: R = sigma_y^2 I.

    Attributes:
        sigma_y: standard deviation in the units of y, >= 0; 0 means exact data. Complex data has
            it in the real and in the imaginary part each. A tensor gives one level a batch element
            (one axis), or any shape that broadcasts to y.
    """

    sigma_y: float | Tensor

    def __post_init__(self) -> None:
        if not bool(torch.as_tensor(self.sigma_y).ge(0).all()):
            raise ValueError(f"sigma_y must be >= 0, not {self.sigma_y}")

    def variance(self, Ax: Data) -> Tensor:
        """R's diagonal: broadcastable to Ax, in its real dtype; its axes are all of Ax's, or none.

        Raises:
            ValueError: if sigma_y has neither one level, nor one a batch element, nor Ax's axes.
        """
        variance = torch.as_tensor(self.sigma_y, dtype=Ax.real.dtype, device=Ax.device) ** 2
        if variance.ndim == 1:
            if len(variance) not in {1, len(Ax)}:
                raise ValueError(
                    f"{len(variance)} levels sigma_y do not fit a batch of {len(Ax)}: give one, "
                    "one a batch element, or a tensor that has the axes of the data"
                )
            return variance.reshape(-1, *(1,) * (Ax.ndim - 1))
        missing = Ax.ndim - variance.ndim
        return variance.reshape(*(1,) * missing, *variance.shape) if variance.ndim else variance


@dataclass(frozen=True, eq=False)
class PoissonTransmission:
    """Log-transformed photon counts: y = -log(n / I0) - offset, n ~ Poisson(I0 exp(-p)).

    To first order Var(y) = (n + electronic_counts^2) / n^2 at the expected count n = I0 exp(-p),
    which is exp(p) / I0 without electronic noise (so weights n, from the current estimate).

    Attributes:
        counts_per_ray: I0, photons a ray in air, > 0.
        offset: p - A x, what the affine map of the units has moved from A x into y; a tensor
            that broadcasts to y, or a number.
        electronic_counts: standard deviation of the read-out noise, in counts.
    """

    counts_per_ray: float
    offset: Tensor | float = 0.0
    electronic_counts: float = 0.0

    def __post_init__(self) -> None:
        if self.counts_per_ray <= 0 or self.electronic_counts < 0:
            raise ValueError(
                f"counts_per_ray must be > 0 and electronic_counts >= 0, "
                f"not {self.counts_per_ray} and {self.electronic_counts}"
            )

    def variance(self, Ax: Data) -> Tensor:
        """R's diagonal at the line integrals Ax + offset; shape and dtype of Ax.

        A line integral is never negative, and a count below 1/2 is never recorded
        (n <- max(n, 1/2)): both bounds keep a bad estimate from making absurd weights.
        """
        offset = torch.as_tensor(self.offset, dtype=Ax.dtype, device=Ax.device)
        line_integral = (Ax + offset).clamp(0.0, math.log(2.0 * self.counts_per_ray))
        counts = self.counts_per_ray * torch.exp(-line_integral)
        return (counts + self.electronic_counts**2) / counts**2
