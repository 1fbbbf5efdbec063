"""Colour filter mosaics: a camera's sensor measures one colour a pixel."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusion_core.operators.base import Operator
from diffusion_core.protocols import Data, Reach, Signal

CHANNELS = "RGB"


@final
class Mosaic(Operator):
    """y(p) = x(p) in the channel that pixel p's filter passes; y is (b, 1, h, w).

    Its rows are orthonormal: A A' = I, and A' A is a mask of its own for each channel.

    Attributes:
        pattern: filters of the repeated 2 x 2 cell, row by row, letters of RGB: "RGGB" is Bayer's.
    """

    kind: ClassVar[str] = "mosaic"
    reach: Reach = 0

    def __init__(self, pattern: str = "RGGB") -> None:
        """Raises ValueError if the pattern is not four letters of R, G, B."""
        if len(pattern) != 4 or not set(pattern) <= set(CHANNELS):
            raise ValueError(f"a mosaic's pattern is four letters of R, G, B, not {pattern!r}")
        self.pattern = pattern

    def mask(
        self, height: int, width: int, device: torch.device | None = None
    ) -> Bool[Tensor, "1 3 h w"]:
        """Where each channel is measured."""
        letters = [CHANNELS.index(letter) for letter in self.pattern]
        cell = torch.tensor(letters, device=device).reshape(2, 2)
        tiled = cell.repeat((height + 1) // 2, (width + 1) // 2)[:height, :width]
        return torch.stack([tiled == c for c in range(len(CHANNELS))])[None]

    def A(self, x: Signal) -> Data:
        """Look through the filters. Raises ValueError unless x has three channels."""
        if x.shape[1] != len(CHANNELS):
            raise ValueError(f"expected {len(CHANNELS)} channels, not {x.shape[1]}")
        return (x * self.mask(x.shape[-2], x.shape[-1], x.device)).sum(dim=1, keepdim=True)

    def A_adjoint(self, y: Data) -> Signal:
        """Each datum in its channel, 0 in the others."""
        return y * self.mask(y.shape[-2], y.shape[-1], y.device)
