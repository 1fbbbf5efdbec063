"""A linear map given as a sparse matrix, with its transpose stored: scipy on CPU, torch on CUDA.

scipy's compressed-row product is used on the CPU because it takes read-only memory-mapped arrays as
they are: the workers of a node share the pages of a projector of hundreds of megabytes. Gradients
do not flow through it.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar, Self

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from diffusion_core.operators.base import Operator
from diffusion_core.protocols import Data, Signal


class Sparse(Operator):
    """A x = scale * matrix @ x, channels and batch elements side by side as columns.

    Two matrices are kept, not one: a product with the transpose of a compressed-row matrix scatters
    instead of gathering, which no GPU library does well.

    Attributes:
        matrix: (prod(data_shape), h * w) compressed rows.
        transpose: its transpose, compressed rows.
        image_shape: (h, w).
        data_shape: shape of the data of one channel, e.g. (views, bins): y is (b, c, *data_shape).
        scale: a factor on the matrix; lets one cached matrix serve several units.
    """

    kind: ClassVar[str] = "sparse"

    def __init__(
        self,
        matrix: csr_array,
        transpose: csr_array,
        image_shape: tuple[int, int],
        data_shape: tuple[int, ...],
        scale: float = 1.0,
    ) -> None:
        """Raises ValueError if the shapes do not fit each other."""
        expected = (int(np.prod(data_shape)), int(np.prod(image_shape)))
        if matrix.shape != expected or transpose.shape != expected[::-1]:
            raise ValueError(
                f"matrix {matrix.shape} and transpose {transpose.shape} do not map "
                f"{image_shape} to {data_shape}"
            )
        self.matrix = matrix
        self.transpose = transpose
        self.image_shape = image_shape
        self.data_shape = data_shape
        self.scale = scale
        self._on_device: tuple[Tensor, Tensor] | None = None

    def A(self, x: Signal) -> Data:
        """Multiply every channel of every batch element; y is (b, c, *data_shape)."""
        columns = self._columns(x, self.image_shape)
        return self._product(0, columns).reshape(*x.shape[:2], *self.data_shape) * self.scale

    def A_adjoint(self, y: Data) -> Signal:
        """Multiply by the transpose; the result is (b, c, h, w)."""
        columns = self._columns(y, self.data_shape)
        return self._product(1, columns).reshape(*y.shape[:2], *self.image_shape) * self.scale

    def to(self, device: torch.device | str) -> Self:
        """The same operator on `device`: compressed rows in torch, or scipy again on the CPU."""
        moved = copy.copy(self)
        on_cpu = torch.device(device).type == "cpu"
        moved._on_device = (
            None
            if on_cpu
            else (_torch_csr(self.matrix, device), _torch_csr(self.transpose, device))
        )
        return moved

    def _columns(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(b, c, *shape) -> (b c, n)."""
        if tuple(values.shape[2:]) != tuple(shape):
            raise ValueError(f"expected (b, c, {shape}), not {tuple(values.shape)}")
        return values.reshape(values.shape[0] * values.shape[1], -1)

    def _product(self, side: int, rows: Tensor) -> Tensor:
        """(k, n) -> (k, m): the matrix (side 0) or its transpose (side 1) times each row."""
        if self._on_device is not None:
            return (self._on_device[side].to(rows.dtype) @ rows.T).T
        matrix = (self.matrix, self.transpose)[side]
        # One vector at a time: as fast as many (memory-bound), and the rounding of an image's data
        # cannot depend on the batch that it is in.
        return torch.from_numpy(np.stack([matrix @ row for row in rows.detach().numpy()]))


def _torch_csr(matrix: csr_array, device: torch.device | str) -> Tensor:
    """A scipy matrix as a torch tensor on `device` (copied: memory-mapped arrays are read-only)."""

    def moved(values: np.ndarray[Any, Any]) -> Tensor:
        return torch.tensor(np.array(values)).to(device)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            moved(matrix.indptr),
            moved(matrix.indices),
            moved(matrix.data),
            size=matrix.shape,
            check_invariants=False,
        )
