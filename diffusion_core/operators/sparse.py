"""A linear map given as a sparse matrix with its transpose: scipy or MKL on the CPU, torch on CUDA.

Both take read-only memory-mapped arrays as they are, so that the workers of a node share the pages
of a projector of hundreds of megabytes. Gradients do not flow through it.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar, Self

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from diffusion_core.operators.projector import Projector, Side


class Sparse(Projector):
    """A x = scale * matrix @ x, channels and batch elements side by side as columns.

    Two matrices are kept, not one: a product with the transpose of a compressed-row matrix scatters
    instead of gathering, which no GPU library does well, and is half as fast on a CPU.

    Attributes:
        matrix: (prod(data_shape), h * w) compressed rows.
        transpose: its transpose, compressed rows.
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
        self._views: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device | str) -> Self:
        """The same operator on `device`: compressed rows in torch, or mapped again on the CPU."""
        moved = copy.copy(self)
        on_cpu = torch.device(device).type == "cpu"
        moved._on_device = (
            None
            if on_cpu
            else (_torch_csr(self.matrix, device), _torch_csr(self.transpose, device))
        )
        return moved

    def product(self, side: Side, rows: Tensor) -> Tensor:
        """See Projector. On the CPU one vector at a time, whose rounding no batch can change."""
        if self._on_device is not None:
            return self.together(side, rows)
        matrix = (self.matrix, self.transpose)[side]
        return torch.from_numpy(np.stack([matrix @ row for row in rows.detach().numpy()]))

    def together(self, side: Side, rows: Tensor) -> Tensor:
        """The same with the matrix read once for all rows: for rows that always come together.

        Four rows take a fifth of the time of one after the other: the product is memory-bound.
        """
        if self._on_device is not None:
            return (self._on_device[side].to(rows.dtype) @ rows.T).T
        columns = rows.detach().T.contiguous()
        if rows.dtype == torch.float32 and torch.backends.mkl.is_available():
            return (self._in_place()[side] @ columns).T
        return torch.from_numpy((self.matrix, self.transpose)[side] @ columns.numpy()).T

    def _in_place(self) -> tuple[Tensor, Tensor]:
        """Both matrices as torch tensors that share their memory; never written to."""
        if self._views is None:
            self._views = _torch_view(self.matrix), _torch_view(self.transpose)
        return self._views


def _torch_csr(matrix: csr_array, device: torch.device | str) -> Tensor:
    """A scipy matrix as a torch tensor on `device` (copied: memory-mapped arrays are read-only)."""

    def moved(values: np.ndarray[Any, Any]) -> Tensor:
        return torch.tensor(np.array(values)).to(device)

    return _assembled(matrix, *(moved(part) for part in _parts(matrix)))


def _torch_view(matrix: csr_array) -> Tensor:
    """A float32 scipy matrix as a torch tensor on the same memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return _assembled(matrix, *(torch.from_numpy(np.asarray(p)) for p in _parts(matrix)))


def _parts(matrix: csr_array) -> tuple[np.ndarray[Any, Any], ...]:
    return matrix.indptr, matrix.indices, matrix.data


def _assembled(matrix: csr_array, indptr: Tensor, indices: Tensor, data: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            indptr, indices, data, size=matrix.shape, check_invariants=False
        )
