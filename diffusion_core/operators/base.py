"""What every linear operator of ours shares: a kind, a reach, A'A, and moving between devices."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from diffusion_core.protocols import Data, LinearOperator, NonlinearOperator, Reach, Signal


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Real inner product Re sum conj(a) b of each batch element; shape (b,), float64 or as given.

    The sum runs in the precision of the arguments: pass float64 to judge float32 results.
    """
    product = (a.conj() * b).real
    return product.reshape(product.shape[0], -1).sum(dim=1)


class Unmoved:
    """An operator without tensors is the same on every device."""

    def to(self, device: torch.device | str) -> Self:  # noqa: ARG002 - as Operator has it
        """Itself."""
        return self


class Operator(ABC):
    """y = A x, real-linear, on each batch element alone; subclasses are final.

    Operators compute in the precision of their argument: float32 for work, float64 for tests.

    Attributes:
        kind: the name that tasks and solvers know it by ("mask", "blur", "fourier" ...).
        reach: how far a datum looks: a radius in pixels, or the whole "plane".
    """

    kind: ClassVar[str]
    reach: Reach = "plane"

    @abstractmethod
    def A(self, x: Signal) -> Data:
        """Apply the forward map."""

    @abstractmethod
    def A_adjoint(self, y: Data) -> Signal:
        """Apply the adjoint under <u, v> = Re sum conj(u) v."""

    def measured(self, y: Data) -> Data:
        """y with 0 for what was not measured, whatever stands there (NaN, say); else as it is."""
        return y

    def normal(self, x: Signal) -> Signal:
        """Apply A' A."""
        return self.A_adjoint(self.A(x))

    def to(self, device: torch.device | str) -> Self:
        """The same operator with its tensors on `device`; self is left as it is."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            setattr(moved, name, _moved(value, device))
        return moved


def _moved(value: Any, device: torch.device | str) -> Any:
    """A tensor, operator or module (or a tuple of them) on `device`; anything else as it is."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device)  # which moves a module itself
    if isinstance(value, Tensor | Operator):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value


def measured_by(operator: LinearOperator | NonlinearOperator, y: Data) -> Data:
    """`Operator.measured`, for any operator: foreign ones measure all their data."""
    return operator.measured(y) if isinstance(operator, Operator) else y


def device_of(value: Any) -> torch.device | None:
    """The device of the first tensor found in an operator, module or tuple; None without one."""
    match value:
        case Tensor():
            return value.device
        case nn.Module():
            parts: Iterable[Any] = itertools.chain(value.parameters(), value.buffers())
        case Operator():
            parts = vars(value).values()
        case tuple():
            parts = value
        case _:
            return None
    return next((found for part in parts if (found := device_of(part)) is not None), None)
