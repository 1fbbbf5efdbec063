"""JPEG seen from its file: the quantised coefficients are linear data with rounding noise.

    y = T x + n,  T = DCT of 8 x 8 blocks of YCbCr, in quantisation steps,  |n| <= 1/2

Rounding errs evenly within a step, with variance 1/12: taken as Gaussian, a compressed image is a
linear problem for every solver, where decode(encode(x)) (jpeg.py) is flat almost everywhere.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.operators.base import Operator
from diffusion_core.operators.jpeg import JPEG, colour_matrix, dct, inverse_dct
from diffusion_core.protocols import Data, Reach, Signal

ROUNDING_STD = 12.0**-0.5
"""Of an even error within one step."""
BLOCK = 8
"""Pixels a side of a block."""
GREY_LEVELS = 127.5
LEVEL_SHIFT = -0.5
"""Network 0 is grey level 127.5, of which JPEG takes 128."""


@final
class JPEGCoefficients(Operator):
    """Images of 1 or 3 channels in [-1, 1] to coefficients (b, c, h / 8, w / 8, 8, 8) in steps.

    Sides divide by 8: what a coder fills up a last block with is not to be seen in the image.

    Attributes:
        quality: 1 to 100, libjpeg's scale; chrominance is not subsampled (4:4:4).
        shape: (h, w) of the images.

    Source: ITU-T T.81, A.3.3 (DCT) and A.3.4 (quantisation).
    """

    kind: ClassVar[str] = "jpeg-coefficients"
    reach: Reach = 7

    def __init__(self, quality: int, shape: tuple[int, int]) -> None:
        """Raises ValueError unless 1 <= quality <= 100 and the sides divide by 8."""
        if shape[0] % BLOCK or shape[1] % BLOCK:
            raise ValueError(f"JPEG's blocks of 8 x 8 do not divide {shape[0]} x {shape[1]}")
        self.quality = quality
        self.shape = shape
        self._codec = JPEG(quality)

    def A(self, x: Signal) -> Data:
        """Coefficients, in steps. Raises ValueError for 2 channels or another size."""
        c, h, w = x.shape[1:]
        if c not in {1, 3} or (h, w) != tuple(self.shape):
            raise ValueError(f"JPEG of 1 or 3 x {self.shape} applied to {tuple(x.shape[1:])}")
        ycc = torch.einsum("kc,bchw->bkhw", colour_matrix(c).to(x), GREY_LEVELS * x)
        return dct(ycc) / self.steps(x)

    def A_adjoint(self, y: Data) -> Signal:
        """See Operator."""
        ycc = inverse_dct(y / self.steps(y))
        return GREY_LEVELS * torch.einsum("kc,bkhw->bchw", colour_matrix(y.shape[1]).to(y), ycc)

    def data_of(self, decoded: Signal) -> Data:
        """y of a decoded image: its coefficients rounded to what the file held."""
        offset = torch.zeros_like(self.A(decoded))
        offset[:, 0, ..., 0, 0] = BLOCK * LEVEL_SHIFT / self.steps(decoded)[0, 0, 0, 0, 0]
        return (self.A(decoded) + offset).round() - offset

    def steps(self, like: Tensor) -> Float[Tensor, "c 1 1 8 8"]:
        """Quantisation steps in grey levels, for the channels of `like`."""
        return self._codec.tables(like.shape[1]).to(like)[:, None, None]
