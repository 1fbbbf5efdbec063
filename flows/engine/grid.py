"""How an item is cut into blocks: index arithmetic alone.

    +-----------------------+        A block is a write region, made of whole chunks, with one
    |   read region (halo)  |        writer; and a read region, grown by the halo and cut off at
    |   +---------------+   |        the border of the plane. Regions start at multiples of 8
    |   | write region  |   |        in the item's own coordinates, the total stride of the
    |   | chunk | chunk |   |        network, so that every block sees the grid that the whole
    |   +---------------+   |        plane would. Halos are recomputed, never exchanged.
    +-----------------------+

Operators that see a whole plane get whole planes, several slices deep; pixelwise ones get whole
planes too while these are small, and tiles when they are not. Stacks whose slices are restored
jointly are cut into slabs: some slices that are written, and some more on either side that are only
read. How deep a slab is depends on the size of a plane alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

Shape4 = tuple[int, int, int, int]

STRIDE = 8
"""Total stride of the network, in pixels."""

HALO_PX = 96
"""Grown on each side of a tile: the network's reach is about 100 px, 4e-7 is left beyond 96."""

MAX_CANVAS_PX = 1536**2
"""Largest plane of a pixelwise operator that is done in one block."""

SLAB_PX = 2**22
"""Pixels of the slices that a slab writes, where stacks are restored jointly."""

SLAB_SLICES = (4, 64)
"""Slices that a slab writes at least and at most."""

SLAB_HALO = 4
"""Slices read on either side of a slab: what one slice says of another fades by the slices between
(infra/decisions/0028)."""

MAX_CHUNK_PX = 512
"""Longest side of a stored chunk."""

DENOISER_BATCH_PX = 512**2
"""Pixels in one call of the denoiser, where a plane is less: larger batches are split."""

DEVICE_BATCH_PX = 2**22
"""Pixels in one call of the denoiser on a GPU, filled from all lanes of a worker."""

MAX_BATCH = 16
"""Windows in such a call, however small they are."""

DENOISER_PLANE_PX = 1024**2
"""Largest plane in one call of the denoiser: larger ones are tiled."""

DENOISER_TILE_PX = 768
"""Side of a tile of the denoiser within a block's canvas, halo not counted."""

PIXELWISE = frozenset({"mask", "identity"})
"""Kinds of operator whose measurement can be cut by a window."""


@dataclass(frozen=True)
class Region:
    """A box of an item, z0 <= z < z1 and so on, in the item's own coordinates."""

    z0: int
    z1: int
    y0: int
    y1: int
    x0: int
    x1: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, h, w)."""
        return self.z1 - self.z0, self.y1 - self.y0, self.x1 - self.x0

    @property
    def num_pixels(self) -> int:
        """Pixels of one channel."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """One unit of work: what it writes, and what it reads of the measurement."""

    index: int
    write: Region
    read: Region


@dataclass(frozen=True)
class Grid:
    """The blocks of one item.

    Attributes:
        shape: (c, z, h, w) of the item.
        slices: depth of a block.
        tile_h: rows of a write region; h if planes are whole.
        tile_w: columns of a write region; w if planes are whole.
        halo: pixels read around a write region.
        halo_z: slices read on either side of it.
    """

    shape: Shape4
    slices: int
    tile_h: int
    tile_w: int
    halo: int
    halo_z: int = 0

    @property
    def content(self) -> dict[str, Any]:
        """What of it can change a pixel, JSON-able."""
        content = asdict(self)
        if not self.halo_z:
            del content["halo_z"]  # of grids that were cut before there were slabs
        return {**content, "reach": self.reach} if self.tiled else content

    @property
    def counts(self) -> tuple[int, int, int]:
        """Blocks along z, y and x."""
        _, z, h, w = self.shape
        return -(-z // self.slices), -(-h // self.tile_h), -(-w // self.tile_w)

    @property
    def num_blocks(self) -> int:
        """All blocks of the item."""
        return math.prod(self.counts)

    @property
    def tiled(self) -> bool:
        """Whether planes are cut."""
        return (self.tile_h, self.tile_w) != self.shape[2:]

    @property
    def reach(self) -> int | None:
        """Pixels at which the prior's C^-1 ends, so that a block need not see the whole plane.

        Its long tail would carry a hundredth of the range across any halo into the holes.
        """
        return self.halo if self.tiled else None

    @property
    def chunk(self) -> Shape4:
        """Shape of a stored chunk; it divides every write region but those at the far edges."""
        c, _, h, w = self.shape
        return c, 1, _chunk_side(self.tile_h, h), _chunk_side(self.tile_w, w)

    @property
    def canvas(self) -> tuple[int, int, int]:
        """(z, h, w) of the largest read region."""
        _, z, h, w = self.shape
        tall, wide = self.tile_h + 2 * self.halo, self.tile_w + 2 * self.halo
        return min(self.slices + 2 * self.halo_z, z), min(tall, h), min(wide, w)

    def block(self, index: int) -> Block:
        """The block of an index: z slowest, x fastest.

        Raises:
            IndexError: if there is no such block.
        """
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} of {self.num_blocks}")
        _, rows, columns = self.counts
        iz, rest = divmod(index, rows * columns)
        iy, ix = divmod(rest, columns)
        _, z, h, w = self.shape
        z0, z1 = _span(iz, self.slices, z)
        y0, y1 = _span(iy, self.tile_h, h)
        x0, x1 = _span(ix, self.tile_w, w)
        write = Region(z0, z1, y0, y1, x0, x1)
        read = Region(
            max(z0 - self.halo_z, 0),
            min(z1 + self.halo_z, z),
            max(y0 - self.halo, 0),
            min(y1 + self.halo, h),
            max(x0 - self.halo, 0),
            min(x1 + self.halo, w),
        )
        return Block(index, write, read)

    def block_of_chunk(self, index: tuple[int, int, int, int]) -> int:
        """Index of the block that writes a chunk (c, z, y, x)."""
        _, rows, columns = self.counts
        _, tall, wide = self.chunk[1:]
        z, y, x = index[1] // self.slices, index[2] * tall, index[3] * wide
        return (z * rows + y // self.tile_h) * columns + x // self.tile_w

    def __iter__(self) -> Iterator[Block]:
        return (self.block(i) for i in range(self.num_blocks))


def make_grid(
    shape: Shape4,
    operator: str,
    *,
    slices_per_block: int,
    block_size: int,
    jointly: bool = False,
) -> Grid:
    """Cut an item by the reach of its operator.

    Args:
        shape: (c, z, h, w).
        operator: kind of operator.
        slices_per_block: depth where planes are whole and seen whole.
        block_size: side of a tile's write region, a multiple of 8 pixels.
        jointly: whether slices are restored jointly: then slabs, whatever slices_per_block says.

    Raises:
        ValueError: if a size is not usable.
    """
    if slices_per_block < 1 or block_size < STRIDE or block_size % STRIDE:
        raise ValueError(
            f"blocks need at least one slice and sides that are multiples of {STRIDE} px, not "
            f"{slices_per_block=}, {block_size=}"
        )
    _, z, h, w = shape
    if jointly:
        whole = operator not in PIXELWISE or h * w <= MAX_CANVAS_PX
        tall, wide, halo = (h, w, 0) if whole else (block_size, block_size, HALO_PX)
        slices, halo_z = _slab(z, h * w)
        return Grid(shape, slices, min(tall, h), min(wide, w), halo, halo_z)
    if operator not in PIXELWISE:
        # Photographs come one at a time; several small slices share the work of a large operator.
        return Grid(shape, min(slices_per_block, z), h, w, 0)
    if h * w <= MAX_CANVAS_PX:
        return Grid(shape, 1, h, w, 0)
    return Grid(shape, 1, min(block_size, h), min(block_size, w), HALO_PX)


def _slab(num_slices: int, plane_px: int) -> tuple[int, int]:
    """Slices that a slab writes, and its halo: none where one slab holds the stack."""
    fewest, most = SLAB_SLICES
    slices = min(max(SLAB_PX // plane_px, fewest), most)
    return (num_slices, 0) if num_slices <= slices + SLAB_HALO else (slices, SLAB_HALO)


def _span(index: int, step: int, length: int) -> tuple[int, int]:
    return index * step, min((index + 1) * step, length)


def _chunk_side(tile: int, length: int) -> int:
    """A divisor of the tile, or any size if one tile spans the plane."""
    if tile <= MAX_CHUNK_PX:
        return tile
    if tile >= length:
        return MAX_CHUNK_PX
    return max(n for n in range(STRIDE, MAX_CHUNK_PX + 1, STRIDE) if tile % n == 0)
