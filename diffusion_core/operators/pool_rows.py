"""Averages of adjacent rows: thick slices, seen from the side."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from diffusion_core.operators.base import Operator
from diffusion_core.protocols import Data, Reach, Signal


@final
class PoolRows(Operator):
    """A x = means of factor adjacent rows; the last group has what is left of them.

    A A' is diagonal: 1 / (rows of the group).

    Attributes:
        factor: rows of a group.
    """

    kind: ClassVar[str] = "pool-rows"

    def __init__(self, factor: int, num_rows: int) -> None:
        """Groups of the rows of an image of `num_rows`. Raises ValueError if there are none."""
        if factor < 1 or num_rows < 1:
            raise ValueError(f"factor and num_rows must be >= 1, not {factor} and {num_rows}")
        self.factor = factor
        self.num_rows = num_rows
        self.reach: Reach = factor - 1

    def A(self, x: Signal) -> Data:
        """Average every group. Raises ValueError on another number of rows."""
        if x.shape[-2] != self.num_rows:
            raise ValueError(f"{x.shape[-2]} rows, not {self.num_rows}")
        groups = x.split(self.factor, dim=-2)
        return torch.cat([group.mean(dim=-2, keepdim=True) for group in groups], dim=-2)

    def A_adjoint(self, y: Data) -> Signal:
        """Spread every mean over its group, divided by the group's rows."""
        counts = self._counts(y)
        return (y / counts[:, None]).repeat_interleave(counts.long(), dim=-2)

    def _counts(self, like: Tensor) -> Tensor:
        """Rows of each group."""
        starts = torch.arange(0, self.num_rows, self.factor, device=like.device)
        return (self.num_rows - starts).clamp_max(self.factor).to(like.dtype)
