"""Average pooling: the measurement of a coarser camera."""

from __future__ import annotations

from typing import ClassVar, final

import torch

from diffusion_core.operators.base import Operator
from diffusion_core.protocols import Data, Reach, Signal, SpectralForm


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

    def spectral_form(self, like: Signal) -> SpectralForm:
        """In every square one direction is measured, its mean: S = 1 / factor, U = I.

        V is, square by square, the Householder reflection that takes the constant to the first
        axis; coefficients are (b, c, factor^2, h / factor, w / factor).
        """
        factor, area = self.factor, self.factor**2
        first = torch.eye(area, dtype=like.dtype, device=like.device)[0]
        normal = first - 1.0 / factor  # zero for factor 1: then the reflection is I
        scale = 2.0 / normal.square().sum().clamp_min(1e-30)
        reflect = torch.eye(area).to(like) - scale * torch.outer(normal, normal)

        def coefficients(x: Signal) -> torch.Tensor:
            squares = torch.nn.functional.pixel_unshuffle(x, factor).unflatten(1, (-1, area))
            return torch.einsum("kl,bclhw->bckhw", reflect, squares)

        def image(z: torch.Tensor) -> Signal:
            squares = torch.einsum("kl,bclhw->bckhw", reflect, z).flatten(1, 2)
            return torch.nn.functional.pixel_shuffle(squares, factor)

        def data(y: Data) -> torch.Tensor:
            return y[:, :, None] * first[:, None, None]

        return SpectralForm(first[:, None, None] / factor, coefficients, image, data)
