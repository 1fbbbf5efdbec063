"""Missing pixels of which a coarser scale knows something: the means of squares inside holes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusion_core.operators.base import Operator
from diffusion_core.operators.mask import Mask
from diffusion_core.operators.pool import Pool
from diffusion_core.protocols import Data, NoiseModel, Reach, Signal


@final
class MaskWithMeans(Operator):
    """A x = (the measured pixels, 0 elsewhere; the means of the guided squares, 0 elsewhere).

    Data are (b 2c h w): the channels of the image, and as many that hold the mean of a square at
    its first pixel. So a datum has a place, as every pixel has, whatever window of a plane is seen.
    Squares that the border of the image cuts are never guided.

    Attributes:
        mask: (b|1, c|1, h, w) boolean, True where measured.
        cells: (b|1, c|1, h // factor, w // factor) boolean, True where a mean is known.
        factor: side of the squares, pixels.
    """

    kind: ClassVar[str] = "guided-mask"

    def __init__(
        self, mask: Bool[Tensor, "b c h w"], cells: Bool[Tensor, "b c H W"], factor: int
    ) -> None:
        self.pixels = Mask(mask)
        self.pool = Pool(factor)
        self.mask, self.cells, self.factor = mask, cells, factor
        self.reach: Reach = factor - 1
        self.size = int(mask.shape[-2]), int(mask.shape[-1])
        rows, columns = (side // factor for side in self.size)
        if cells.dtype != torch.bool or tuple(cells.shape[-2:]) != (rows, columns):
            raise ValueError(
                f"{self.size} pixels have {rows} x {columns} squares of {factor}: give a boolean "
                f"for each, not {cells.dtype} {tuple(cells.shape)}"
            )

    def means(self, x: Signal) -> Tensor:
        """The means of the guided squares, 0 of others: (b c H W)."""
        rows, columns = self.cells.shape[-2] * self.factor, self.cells.shape[-1] * self.factor
        return self.pool.A(x[..., :rows, :columns]) * self.cells

    def means_adjoint(self, means: Tensor) -> Signal:
        """The adjoint of `means`."""
        spread = self.pool.A_adjoint(torch.where(self.cells, means, 0))
        more = [side - done for side, done in zip(self.size, spread.shape[-2:], strict=True)]
        return torch.nn.functional.pad(spread, (0, more[1], 0, more[0]))

    def A(self, x: Signal) -> Data:
        """Keep the measured pixels, and average the guided squares."""
        return self.join(self.pixels.A(x), self.means(x))

    def A_adjoint(self, y: Data) -> Signal:
        """The pixels where they are, and every mean spread over its square, by its area."""
        pixels, means = self.split(y)
        return self.pixels.A_adjoint(pixels) + self.means_adjoint(means)

    def measured(self, y: Data) -> Data:
        """0 for what was not measured: files mark it by NaN."""
        pixels, means = self.split(y)
        return self.join(self.pixels.measured(pixels), torch.where(self.cells, means, 0))

    def join(self, pixels: Tensor, means: Tensor) -> Data:
        """Pixels (b c h w) and means (b c H W) as data."""
        placed = torch.zeros_like(pixels)
        placed[(..., *self._corners)] = means
        return torch.cat([pixels, placed], dim=1)

    def split(self, y: Data) -> tuple[Tensor, Tensor]:
        """Data as pixels (b c h w) and means (b c H W)."""
        pixels, placed = y.chunk(2, dim=1)
        return pixels, placed[(..., *self._corners)]

    @property
    def _corners(self) -> tuple[slice, slice]:
        """The first pixel of every square."""
        rows, columns = (side * self.factor for side in self.cells.shape[-2:])
        return slice(0, rows, self.factor), slice(0, columns, self.factor)


@dataclass(frozen=True, eq=False)
class MeansNoise:
    """The noise of the pixels, and the uncertainty of the means.

    Attributes:
        operator: lays out the data.
        pixels: noise of the measured pixels.
        means: variance of the guided means, broadcastable to (b c H W), > 0.
    """

    operator: MaskWithMeans
    pixels: NoiseModel
    means: Tensor

    def variance(self, Ax: Data) -> Tensor:
        """Diagonal of R, of the data's shape."""
        pixels, means = self.operator.split(Ax)
        of_pixels = self.pixels.variance(pixels).expand_as(pixels)
        return self.operator.join(of_pixels, self.means.to(means).expand_as(means))
