"""Blur of a scene that goes on beyond the picture: what every real camera sees."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.operators.base import Operator
from diffusion_core.operators.blur import Blur
from diffusion_core.protocols import Data, Signal


@final
class CroppedBlur(Operator):
    """A x = the middle of k * x: the picture is a window of a larger canvas, which is the unknown.

    A pixel near the border of a photograph holds light of what lies beyond it. That is unknown, so
    it is restored with the rest; the canvas exceeds the picture by the kernel's radius at least, so
    that no datum sees round it. A' y is y on the canvas with 0 about it, correlated.

    Attributes:
        blur: k * x on the canvas, circular.
        margin: (top, left) pixels of the canvas before the picture.
        shape: (h, w) of the picture.
    """

    kind: ClassVar[str] = "cropped-blur"

    def __init__(
        self,
        kernel: Float[Tensor, "kh kw"],
        shape: tuple[int, int],
        margin: tuple[int, int],
        canvas: tuple[int, int],
    ) -> None:
        """Raises ValueError if a datum would see round the canvas."""
        self.margin = margin
        self.shape = shape
        after = tuple(n - before - m for n, before, m in zip(canvas, margin, shape, strict=True))
        for taps, before, behind in zip(kernel.shape, margin, after, strict=False):
            if before < (taps - 1) - taps // 2 or behind < taps // 2:
                raise ValueError(
                    f"a picture of {shape} at {margin} of a canvas of {canvas} leaves less than "
                    f"half a kernel of {tuple(kernel.shape)} beside it"
                )
        self.blur = Blur(kernel, canvas)

    def A(self, x: Signal) -> Data:
        """Convolve, and keep the picture."""
        return self.crop(self.blur.A(x))

    def A_adjoint(self, y: Data) -> Signal:
        """Put zeros round the picture, and correlate."""
        return self.blur.A_adjoint(self.grow(y))

    def crop(self, x: Signal) -> Signal:
        """The picture's part of the canvas."""
        (top, left), (h, w) = self.margin, self.shape
        return x[..., top : top + h, left : left + w]

    def grow(self, y: Data) -> Signal:
        """The picture on the canvas, 0 about it. Raises ValueError for one of another size."""
        if tuple(y.shape[-2:]) != self.shape:
            raise ValueError(f"pictures of {self.shape} expected, not {tuple(y.shape)}")
        (top, left), (h, w), (H, W) = self.margin, self.shape, self.blur.shape
        return torch.nn.functional.pad(y, (left, W - left - w, top, H - top - h))
