"""What projectors share: channels and batch elements are columns of one product with a matrix."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from torch import Tensor

from diffusion_core.operators.base import Operator
from diffusion_core.protocols import Data, Signal

Side = Literal[0, 1]
"""0: the matrix; 1: its transpose."""


class Projector(Operator):
    """A x = scale * matrix @ x for every channel of every batch element; y is (b, c, *data_shape).

    Attributes:
        image_shape: (h, w).
        data_shape: shape of the data of one channel, e.g. (views, bins).
        scale: a factor on the matrix; lets one cached matrix serve several units.
    """

    image_shape: tuple[int, int]
    data_shape: tuple[int, ...]
    scale: float

    def A(self, x: Signal) -> Data:
        """Multiply every channel of every batch element. Raises ValueError on a wrong shape."""
        columns = _columns(x, self.image_shape)
        return self.product(0, columns).reshape(*x.shape[:2], *self.data_shape) * self.scale

    def A_adjoint(self, y: Data) -> Signal:
        """Multiply by the transpose; the result is (b, c, h, w)."""
        columns = _columns(y, self.data_shape)
        return self.product(1, columns).reshape(*y.shape[:2], *self.image_shape) * self.scale

    @abstractmethod
    def product(self, side: Side, rows: Tensor) -> Tensor:
        """(k, n) -> (k, m): the matrix, or its transpose, times each row, apart from the others."""


def _columns(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(b, c, *shape) -> (b c, n)."""
    if tuple(values.shape[2:]) != tuple(shape):
        raise ValueError(f"expected (b, c, {shape}), not {tuple(values.shape)}")
    return values.reshape(values.shape[0] * values.shape[1], -1)
