"""The shared nouns of the diffusion core: signals, denoisers, operators, noise, solvers.

Everything in this package talks through these few types. Axes, once and for all:

    item         c z h w   channel, slice or frame, row, column (c = 1 grey, 2 complex, 3 colour)
    batch        b c h w   what networks, operators and solvers see; slices or frames become b
    measurement  b *m      whatever the operator makes; complex for Fourier data

Pixels are in network units: an affine map of the physical units to about [-1, 1], never clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Num
from torch import Tensor

Signal = Float[Tensor, "b c h w"]
Data = Num[Tensor, "b *m"]
Sigma = Float[Tensor, " b"]

Reach = int | Literal["plane"]
"""How far an operator looks: a radius in pixels (0: pixel by pixel), or the whole plane."""


@runtime_checkable
class Denoiser(Protocol):
    """D(x; sigma): the estimate of E[x0 | x] for x = x0 + sigma eps, in network units."""

    def __call__(self, x: Signal, sigma: Sigma) -> Signal:
        """Denoise a batch; sigma has one level per batch element."""
        ...


@runtime_checkable
class LinearOperator(Protocol):
    """y = A x, real-linear, acting on each batch element alone.

    `A_adjoint` is the true adjoint under <u, v> = Re sum conj(u) v, with no options.
    deepinv's physics objects have the same two methods and are accepted as they are.
    """

    def A(self, x: Signal) -> Data:
        """Apply the forward map."""
        ...

    def A_adjoint(self, y: Data) -> Signal:
        """Apply the adjoint of the forward map."""
        ...


@runtime_checkable
class NonlinearOperator(Protocol):
    """y = A(x), any map that autograd can follow, acting on each batch element alone."""

    def A(self, x: Signal) -> Data:
        """Apply the forward map, differentiably."""
        ...

    def initial(self, y: Data) -> Signal:
        """A crude image of the unknown's shape to start from: the data seen as an image, or 0."""
        ...


@dataclass(frozen=True, eq=False)
class SpectralForm:
    """A = U S V' with V orthogonal and U'U = I: what exact spectral solvers need of an operator.

    Coefficients may be complex (Fourier): then their real and imaginary parts are two directions.

    Attributes:
        singular_values: S >= 0, real, broadcastable to coefficients; 0 where nothing was measured.
        coefficients: V' x of an image; white noise becomes white noise.
        image: V z.
        data: U' y, laid out as coefficients; anything where S is 0.
    """

    singular_values: Tensor
    coefficients: Callable[[Signal], Tensor]
    image: Callable[[Tensor], Signal]
    data: Callable[[Data], Tensor]


@runtime_checkable
class HasSpectralForm(Protocol):
    """An operator that knows its singular value decomposition."""

    def spectral_form(self, like: Signal) -> SpectralForm:
        """A = U S V' for images of the shape, dtype and device of `like`."""
        ...


class UnsuitedError(ValueError):
    """The solver cannot take this operator or noise; another solver can."""


class NoiseModel(Protocol):
    """The likelihood of the measurement: n ~ N(0, R) with R diagonal, perhaps signal-dependent."""

    def variance(self, Ax: Data) -> Tensor:
        """Diagonal of R at the noiseless measurement Ax, broadcastable to it; 0 means exact data.

        For complex data it is the variance of the real part, and as much again of the imaginary.
        """
        ...


class NormalDraws(Protocol):
    """A source of standard normal noise addressed by level and global voxel, never by order."""

    def normal(self, level: int, like: Tensor, stream: int = 0) -> Tensor:
        """Standard normal noise shaped like `like` (real dtypes), the same on every call."""
        ...


@dataclass(frozen=True)
class Restoration:
    """What a solver returns: pixels and the account of how they were made."""

    x: Signal
    num_denoiser_calls: int
    num_operator_calls: int
    trace: dict[str, Any] = field(default_factory=dict)


class Solver(Protocol):
    """A posterior solver: y = A x0 + n, and a denoiser for the prior, to a restored x."""

    def __call__(
        self,
        denoise: Denoiser,
        operator: LinearOperator,
        y: Data,
        noise: NoiseModel,
        sigmas: Float[Tensor, " levels"],
        draws: NormalDraws,
    ) -> Restoration:
        """Restore a batch along the decreasing noise levels `sigmas` (the last may be 0)."""
        ...
