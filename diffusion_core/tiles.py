"""Tiles of one canvas: index arithmetic, and the denoiser applied tile by tile.

    global   0        stride                   The canvas starts at a global coordinate; tiles
             |--|--|--|--|--|--|--|--|--|--|   start at multiples of `tile` there, windows at
                 [canvas                ]      multiples of `stride`: so a pixel keeps its phase
                 [ write ][ write ][wri ]      in the network's grid whatever the cut. Each pixel
                 [ read      ]                 is written once, from a window that reaches `halo`
                      [ read      ]            beyond it, or to the border of the canvas.

With a halo of the network's reach or more, tiles equal the whole to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from diffusion_core.protocols import Denoiser, Sigma, Signal


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in canvas coordinates: read_start <= start < stop <= read_stop."""

    start: int
    stop: int
    read_start: int
    read_stop: int

    @property
    def read(self) -> slice:
        """What is read of the canvas."""
        return slice(self.read_start, self.read_stop)

    @property
    def write(self) -> slice:
        """What is written of the canvas."""
        return slice(self.start, self.stop)

    @property
    def inner(self) -> slice:
        """The written part within what was read."""
        return slice(self.start - self.read_start, self.stop - self.read_start)


def spans(length: int, tile: int, halo: int, stride: int, origin: int = 0) -> list[Span]:
    """Cut one axis into tiles.

    Args:
        length: of the canvas, pixels.
        tile: side of a tile, a multiple of stride.
        halo: pixels to read beyond a tile; rounded up to a multiple of stride.
        stride: total stride of the network.
        origin: global coordinate of the canvas, a multiple of stride.

    Returns:
        Tiles in order; they cover the canvas, each pixel once.

    Raises:
        ValueError: if tile or origin is not a multiple of stride, or the canvas is empty.
    """
    if length < 1 or tile < 1 or halo < 0 or tile % stride or origin % stride:
        raise ValueError(
            f"tiles need a canvas, and tile and origin in multiples of the stride: {length=}, "
            f"{tile=}, {halo=}, {stride=}, {origin=}"
        )
    halo = -(-halo // stride) * stride
    first = origin // tile * tile - origin
    starts = range(first, length, tile)
    return [
        Span(
            max(start, 0),
            min(start + tile, length),
            max(start - halo, 0),
            min(start + tile + halo, length),
        )
        for start in starts
    ]


def tiled_denoiser(
    denoise: Denoiser,
    tile: int,
    halo: int,
    stride: int,
    max_batch: int,
    origin_yx: tuple[int, int] = (0, 0),
) -> Denoiser:
    """The denoiser of a whole canvas, called on tiles.

    Args:
        denoise: D(x; sigma) on windows; local, with a reach of at most `halo`.
        tile: side of the tiles, pixels, a multiple of stride.
        halo: pixels read beyond a tile.
        stride: total stride of the network.
        max_batch: windows (of equal size) in one call at most.
        origin_yx: global coordinate of the canvas, multiples of stride.

    Returns:
        A denoiser; one call of it is one evaluation of D on every pixel, halos counted extra.
    """

    def tiled(x: Signal, sigma: Sigma) -> Signal:
        rows, columns = (
            spans(size, tile, halo, stride, origin)
            for size, origin in zip(x.shape[-2:], origin_yx, strict=True)
        )
        alike = defaultdict(list)
        for b in range(x.shape[0]):
            for y in rows:
                for column in columns:
                    window = x[b, :, y.read, column.read]
                    alike[tuple(window.shape)].append((b, y, column))
        out = torch.empty_like(x)
        for group in alike.values():
            for i in range(0, len(group), max_batch):
                part = group[i : i + max_batch]
                windows = torch.stack([x[b, :, y.read, c.read] for b, y, c in part])
                levels = torch.stack([sigma[b] for b, _, _ in part])
                for (b, y, c), D_x in zip(part, denoise(windows, levels), strict=True):
                    out[b, :, y.write, c.write] = D_x[:, y.inner, c.inner]
        return out

    return tiled
