"""JPEG: coding and decoding as one map, its rounding passed straight through. Nonlinear.

The steps are those of the standard (ITU-T T.81) as libjpeg takes them at 4:4:4: RGB to YCbCr in 8
bits, 8 x 8 DCT (in integers there), division by the tables, rounding, and back. Where a step
rounds, the gradient is that of the identity (Bengio et al. 2013, arXiv:1308.3432).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_core.operators.base import Unmoved
from diffusion_core.protocols import Data, Reach, Signal

# ITU-T T.81, Annex K.1: Tables K.1 (luminance) and K.2 (chrominance).
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# ITU-R BT.601, as JFIF has it.
_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)


@dataclass(frozen=True)
class JPEG(Unmoved):
    """A(x) = decode(encode(x)), for images in [-1, 1] of 1 or 3 channels (a NonlinearOperator).

    Attributes:
        quality: 1 to 100, libjpeg's scale. Chrominance is not subsampled (4:4:4).
    """

    kind: ClassVar[str] = "jpeg"
    reach: ClassVar[Reach] = 7

    quality: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be 1 to 100, not {self.quality}")

    def A(self, x: Signal) -> Data:
        """Code and decode; rounded to 8 bits, back in [-1, 1]. Raises ValueError on 2 channels."""
        c, h, w = x.shape[1:]
        if c not in {1, 3}:
            raise ValueError(f"JPEG takes 1 or 3 channels, not {c}")
        planes = F.pad(127.5 * (x + 1.0), (0, -w % 8, 0, -h % 8), mode="replicate")
        colours = colour_matrix(c).to(x)
        # YCbCr with 128 taken from luminance: all between -128 and 127.
        level = torch.tensor([128.0, 0.0, 0.0]).to(x)[:c, None, None]
        ycc = _eight_bits(torch.einsum("kc,bchw->bkhw", colours, planes) - level)
        step = self.tables(c).to(x)[:, None, None]
        decoded = _eight_bits(inverse_dct(step * _rounded(dct(ycc) / step)))
        rgb = torch.einsum("kc,bchw->bkhw", torch.linalg.inv(colours), decoded + level)
        return _rounded(rgb[..., :h, :w].clamp(0.0, 255.0)) / 127.5 - 1.0

    def initial(self, y: Data) -> Signal:
        """The decoded image itself."""
        return y

    def tables(self, channels: int) -> Tensor:
        """Quantisation steps: (channels, 8, 8) float64, in grey levels."""
        scale = 5000 // self.quality if self.quality < 50 else 200 - 2 * self.quality
        base = torch.tensor([_LUMINANCE, _CHROMINANCE, _CHROMINANCE][:channels])
        return ((base * scale + 50) // 100).clamp(1, 255).double()


def _rounded(x: Tensor) -> Tensor:
    """x rounded, halves away from zero as libjpeg does; the gradient of x."""
    rounded = x.sign() * (x.abs() + 0.5).floor()
    return x + (rounded - x).detach()


def colour_matrix(channels: int) -> Tensor:
    """RGB to YCbCr for 3 channels, 1 for one: (channels, channels)."""
    return torch.tensor(_YCBCR) if channels == 3 else torch.eye(1)


def _eight_bits(x: Tensor) -> Tensor:
    return _rounded(x).clamp(-128.0, 127.0)


def _basis(like: Tensor) -> Tensor:
    """The orthonormal DCT-II of eight samples."""
    n = torch.arange(8, dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * n + 1) * n[:, None] / 16) / 2
    basis[0] /= math.sqrt(2.0)
    return basis.to(like)


def dct(planes: Tensor) -> Tensor:
    """(b c h w) -> coefficients (b, c, h / 8, w / 8, 8, 8)."""
    blocks = planes.unflatten(-2, (-1, 8)).unflatten(-1, (-1, 8)).transpose(-3, -2)
    basis = _basis(planes)
    return basis @ blocks @ basis.T


def inverse_dct(coefficients: Tensor) -> Tensor:
    """Back to (b c h w)."""
    basis = _basis(coefficients)
    blocks = basis.T @ coefficients @ basis
    return blocks.transpose(-3, -2).flatten(-2, -1).flatten(-3, -2)
