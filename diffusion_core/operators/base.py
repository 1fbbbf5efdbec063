"""What every linear operator of ours shares: a kind, a reach, A'A, and moving between devices."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from diffusion_core.protocols import Data, Reach, Signal


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Real inner product Re sum conj(a) b of each batch element; shape (b,), float64 or as given.

    The sum runs in the precision of the arguments: pass float64 to judge float32 results.
    """
    product = (a.conj() * b).real
    return product.reshape(product.shape[0], -1).sum(dim=1)


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
    """A tensor or operator (or a tuple of them) on `device`; anything else as it is."""
    if isinstance(value, Tensor | Operator):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value
