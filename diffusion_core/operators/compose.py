"""Algebra of operators: one after another, and several measurements of one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from diffusion_core.operators.base import Operator, device_of, measured_by
from diffusion_core.protocols import Data, LinearOperator, Signal


@final
class Compose(Operator):
    """A = outer . inner. `inner` must make something `outer` takes (an image, as blur and pool do).

    Attributes:
        outer: applied last.
        inner: applied first.
    """

    kind: ClassVar[str] = "compose"

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        self.outer = outer
        self.inner = inner

    def A(self, x: Signal) -> Data:
        """outer(inner(x))."""
        return self.outer.A(self.inner.A(x))

    def A_adjoint(self, y: Data) -> Signal:
        """inner'(outer'(y)): (B C)' = C' B'."""
        return self.inner.A_adjoint(self.outer.A_adjoint(y))

    def measured(self, y: Data) -> Data:
        """What the outer operator measured."""
        return measured_by(self.outer, y)


@final
class Stack(Operator):
    """A x = (A_1 x, A_2 x ...), each flattened, side by side: y is (b, m_1 + m_2 + ...).

    All real or all complex. `split` takes data apart again.

    Attributes:
        operators: the rows of the stack.
        shapes: shape of each A_i x of one batch element.
    """

    kind: ClassVar[str] = "stack"

    def __init__(
        self, operators: Sequence[LinearOperator], signal_shape: tuple[int, int, int]
    ) -> None:
        """Stack operators on images of `signal_shape` (c, h, w). Raises ValueError if mixed."""
        self.operators = tuple(operators)
        probe = torch.zeros(1, *signal_shape, device=device_of(self.operators))
        data = [op.A(probe) for op in self.operators]
        if len({y.is_complex() for y in data}) != 1:
            raise ValueError("stack operators of real data, or operators of complex data, not both")
        self.shapes = tuple(tuple(y.shape[1:]) for y in data)

    def A(self, x: Signal) -> Data:
        """Measure with every operator."""
        return torch.cat([op.A(x).flatten(1) for op in self.operators], dim=1)

    def A_adjoint(self, y: Data) -> Signal:
        """Sum of the adjoints."""
        parts = zip(self.operators, self.split(y), strict=True)
        images = [op.A_adjoint(part) for op, part in parts]
        return torch.stack(images).sum(dim=0)

    def measured(self, y: Data) -> Data:
        """What each operator measured."""
        parts = zip(self.operators, self.split(y), strict=True)
        return torch.cat([measured_by(op, part).flatten(1) for op, part in parts], dim=1)

    def split(self, y: Data) -> list[Tensor]:
        """The parts of stacked data, each in its operator's own shape."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        parts = y.split(sizes, dim=1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]
