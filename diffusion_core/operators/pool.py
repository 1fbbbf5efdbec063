"""Average pooling: the measurement of a coarser camera."""

from __future__ import annotations

from typing import ClassVar, final

import torch

from diffusion_core.operators.base import Operator
from diffusion_core.protocols import Data, Reach, Signal


@final
class Pool(Operator):
    """A x = means of disjoint factor x factor squares; A A' = I / factor^2.

    Attributes:
        factor: side of the squares, pixels.
    """

    kind: ClassVar[str] = "pool"

    def __init__(self, factor: int) -> None:
        if factor < 1:
            raise ValueError(f"factor must be >= 1, not {factor}")
        self.factor = factor
        self.reach: Reach = factor - 1

    def A(self, x: Signal) -> Data:
        """Average every square. Raises ValueError if the squares do not tile the image."""
        height, width = x.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"{height} x {width} pixels do not divide by {self.factor}")
        return torch.nn.functional.avg_pool2d(x, self.factor)

    def A_adjoint(self, y: Data) -> Signal:
        """Spread every mean over its square, divided by the square's area."""
        spread = y.repeat_interleave(self.factor, dim=-2).repeat_interleave(self.factor, dim=-1)
        return spread / self.factor**2
