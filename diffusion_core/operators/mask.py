"""Missing pixels: a diagonal operator of zeros and ones."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusion_core.operators.base import Operator
from diffusion_core.protocols import Data, Reach, Signal, SpectralForm


@final
class Mask(Operator):
    """A x = x where a pixel was measured, 0 elsewhere; y keeps the shape of x.

    Keeping the shape (instead of gathering the measured pixels) lets batch elements have different
    masks. A is a projection: A A' = A' A = A.

    Attributes:
        mask: (b|1, c|1, h, w) boolean, True where measured. Users' masks mark what is *missing*;
            domains turn them round.
    """

    kind: ClassVar[str] = "mask"
    reach: Reach = 0

    def __init__(self, mask: Bool[Tensor, "b c h w"]) -> None:
        if mask.dtype != torch.bool or mask.ndim != 4:
            raise ValueError(f"mask must be boolean (b c h w), not {mask.dtype} {mask.shape}")
        self.mask = mask

    def A(self, x: Signal) -> Data:
        """Keep the measured pixels."""
        return x * self.mask

    def A_adjoint(self, y: Data) -> Signal:
        """Keep the measured pixels: a mask is its own adjoint."""
        return self.measured(y)

    def measured(self, y: Data) -> Data:
        """0 for missing pixels: files mark them by NaN, which times 0 is NaN."""
        return torch.where(self.mask, y, 0)

    def spectral_form(self, like: Signal) -> SpectralForm:
        """U = V = I, and S is the mask."""
        return SpectralForm(self.mask.to(like), lambda x: x, lambda z: z, lambda y: y)
