"""The blocks of a JPEG file as linear data, whatever its tables, subsampling and size.

    y = Q^-1 T P C x + n,   C colours, P means of the pixels that share a sample, T the DCT of
                            8 x 8 blocks, Q the file's own steps, |n| <= 1/2

As JPEGCoefficients, which knows a quality and no subsampling; here the data are flat, one component
after the other, and what a coder fills up the last blocks with is part of A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffusion_core.operators.base import Operator
from diffusion_core.operators.jpeg import colour_matrix, dct, inverse_dct
from diffusion_core.operators.jpeg_coefficients import (
    BLOCK,
    GREY_LEVELS,
    LEVEL_SHIFT,
    ROUNDING_STD,
)
from diffusion_core.protocols import Data, Reach, Signal


@final
class JPEGBlocks(Operator):
    """Images of 1 or 3 channels in [-1, 1] to coefficients (b, m) in steps.

    Attributes:
        shape: (h, w) of the images.
        factors: of each component, (rows, columns) of pixels that share a sample.
        is_ycc: whether three components are brightness and two chrominances.
        steps: of each component, (8, 8) quantisation steps in grey levels.

    Source: ITU-T T.81, A.1.1 (sampling), A.3.3 (DCT), A.3.4 (quantisation); libjpeg's jcsample.c
        (the mean of the pixels) and jcprepct.c (a last block is filled up by its last pixels).
    """

    kind: ClassVar[str] = "jpeg-blocks"
    reach: Reach = "plane"

    def __init__(
        self,
        steps: Sequence[Float[Tensor, "8 8"]],
        factors: Sequence[tuple[int, int]],
        shape: tuple[int, int],
        *,
        is_ycc: bool = True,
    ) -> None:
        """Raises ValueError unless there are 1 or 3 components, all of positive steps."""
        if len(steps) not in {1, 3} or len(factors) != len(steps):
            raise ValueError(f"a JPEG image has 1 or 3 components, not {len(steps)}")
        if not all(bool((step > 0).all()) for step in steps):
            raise ValueError("quantisation steps are above 0")
        self.steps = tuple(step.double().reshape(BLOCK, BLOCK) for step in steps)
        self.factors = tuple((int(rows), int(columns)) for rows, columns in factors)
        self.shape = (int(shape[0]), int(shape[1]))
        self.is_ycc = is_ycc

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Of each component, rows and columns of blocks that the image reaches."""
        return [
            (-(-self.shape[0] // (BLOCK * rows)), -(-self.shape[1] // (BLOCK * columns)))
            for rows, columns in self.factors
        ]

    def A(self, x: Signal) -> Data:
        """Coefficients, in steps. Raises ValueError for other channels or another size."""
        if (x.shape[1], *x.shape[-2:]) != (len(self.steps), *self.shape):
            raise ValueError(f"JPEG of {len(self.steps)} x {self.shape} applied to {x.shape[1:]}")
        planes = torch.einsum("kc,bchw->bkhw", self._colours(x), GREY_LEVELS * x)
        data = []
        for k, (step, factor) in enumerate(zip(self.steps, self.factors, strict=True)):
            height, width = self._padded(k)
            grown = (0, width - self.shape[1], 0, height - self.shape[0])
            samples = F.avg_pool2d(F.pad(planes[:, k : k + 1], grown, mode="replicate"), factor)
            data.append((dct(samples) / step.to(x)).flatten(1))
        return torch.cat(data, dim=1)

    def A_adjoint(self, y: Data) -> Signal:
        """See Operator."""
        planes = []
        for k, part in enumerate(self._split(y)):
            factor = self.factors[k]
            samples = inverse_dct(part / self.steps[k].to(y)) / (factor[0] * factor[1])
            pixels = samples.repeat_interleave(factor[0], -2).repeat_interleave(factor[1], -1)
            planes.append(_folded(_folded(pixels, self.shape[0], -2), self.shape[1], -1))
        return GREY_LEVELS * torch.einsum(
            "kc,bkhw->bchw", self._colours(y), torch.cat(planes, dim=1)
        )

    def data_of(self, coefficients: Data) -> Data:
        """y of a file's integers (b, m): network 0 is grey level 127.5, of which JPEG takes 128."""
        parts = [part.clone() for part in self._split(coefficients)]
        for k, part in enumerate(parts):
            if k == 0 or not self.is_ycc:
                part[..., 0, 0] -= BLOCK * LEVEL_SHIFT / self.steps[k][0, 0].to(part)
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def decoded(self, y: Data) -> Signal:
        """The picture that a decoder shows: chrominance enlarged linearly, all clipped."""
        planes = []
        for part, step, factor in zip(self._split(y), self.steps, self.factors, strict=True):
            samples = inverse_dct(part * step.to(y))
            size = [-(-side // f) for side, f in zip(self.shape, factor, strict=True)]
            samples = samples[..., : size[0], : size[1]]
            grown = [side * f for side, f in zip(size, factor, strict=True)]
            pixels = samples
            if factor != (1, 1):
                pixels = F.interpolate(samples, size=grown, mode="bilinear", align_corners=False)
            planes.append(pixels[..., : self.shape[0], : self.shape[1]])
        colours = torch.linalg.inv(self._colours(y))
        image = torch.einsum("kc,bchw->bkhw", colours, torch.cat(planes, dim=1))
        return (image / GREY_LEVELS).clamp(-1.0, 1.0)

    def rounding_std(self, like: Tensor) -> Float[Tensor, "1 m"]:
        """Of y: of the coefficients, and of the pixels that a coder rounds before them."""
        parts = [
            (ROUNDING_STD * (1 + step.to(like) ** -2).sqrt()).expand(*blocks, BLOCK, BLOCK)
            for step, blocks in zip(self.steps, self.blocks, strict=True)
        ]
        return torch.cat([part.flatten() for part in parts])[None]

    def _colours(self, like: Tensor) -> Tensor:
        ycc = len(self.steps) == 3 and self.is_ycc
        return (colour_matrix(3) if ycc else torch.eye(len(self.steps))).to(like)

    def _padded(self, k: int) -> tuple[int, int]:
        """Pixels that the whole blocks of a component stand for."""
        (rows, columns), (tall, wide) = self.blocks[k], self.factors[k]
        return BLOCK * rows * tall, BLOCK * columns * wide

    def _split(self, y: Data) -> list[Tensor]:
        """(b, 1, rows, columns, 8, 8) of each component."""
        sizes = [rows * columns * BLOCK**2 for rows, columns in self.blocks]
        parts = zip(y.split(sizes, dim=1), self.blocks, strict=True)
        return [part.reshape(-1, 1, *blocks, BLOCK, BLOCK) for part, blocks in parts]


def _folded(x: Tensor, size: int, dim: int) -> Tensor:
    """The adjoint of repeating the last row (or column): what exceeds `size` is added to it."""
    kept, over = x.split([size, x.shape[dim] - size], dim=dim)
    last = kept.narrow(dim, size - 1, 1) + over.sum(dim=dim, keepdim=True)
    return torch.cat([kept.narrow(dim, 0, size - 1), last], dim=dim)
