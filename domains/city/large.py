"""Writes city images that are too large to be held: TIFF in tiles, PNG in bands of rows."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from domains.base import Array, ItemRecord
from domains.city.exif import png_part, png_parts

TILE_PX = 512
BAND_PX = 128

BigReader = Callable[[slice, slice, slice], Array]
"""(z, y, x) -> pixels (c z h w) in the dtype that is written."""


def write_tiff(
    record: ItemRecord, dtype: np.dtype[np.generic], read: BigReader, stem: Path
) -> Path:
    """Write a tiled TIFF: bands interleaved or planar as in the source, z as pages."""
    import tifffile

    from domains.city.writer import tiff_facts

    c, z, h, w = record.shape
    planar = c > 1 and record.meta.get("layout", "interleaved") == "planar"
    size = (c, h, w) if planar else (h, w, c) if c > 1 else (h, w)
    config = None if c == 1 else "separate" if planar else "contig"
    path = stem.with_name(stem.name + ".tif")
    tifffile.imwrite(
        path,
        _tiles(record, read, planar=planar),
        shape=size if z == 1 else (z, *size),
        dtype=dtype,
        tile=(TILE_PX, TILE_PX),
        bigtiff=dtype.itemsize * c * z * h * w > 2**31,
        photometric="rgb" if c == 3 and dtype.kind == "u" else "minisblack",
        planarconfig=config,
        compression="deflate",
        metadata=None,
        **tiff_facts(record.meta),
    )
    return path


def _tiles(record: ItemRecord, read: BigReader, *, planar: bool) -> Iterator[Array]:
    """Tiles in the order of the file, those at the far edges filled up with zeros."""
    c, z, h, w = record.shape
    for page in range(z):
        for band in range(c if planar else 1):
            for y in range(0, h, TILE_PX):
                for x in range(0, w, TILE_PX):
                    box = read(slice(page, page + 1), slice(y, y + TILE_PX), slice(x, x + TILE_PX))
                    tile = np.zeros((c, TILE_PX, TILE_PX), box.dtype)
                    tile[:, : box.shape[2], : box.shape[3]] = box[:, 0]
                    yield tile[band] if planar or c == 1 else tile.transpose(1, 2, 0).copy()


def write_png(
    record: ItemRecord, dtype: np.dtype[np.generic], read: BigReader, stem: Path, *, opaque: bool
) -> Path:
    """Write an 8- or 16-bit grey or RGB PNG; `opaque` puts back the alpha channel of the source.

    Rows are filtered by "Sub" and compressed in one stream. Source: PNG specification (ISO/IEC
    15948), sections 5, 9 and 11.
    """
    c, _, h, w = record.shape
    colour = {(1, False): 0, (3, False): 2, (1, True): 4, (3, True): 6}[c, opaque]
    path = stem.with_name(stem.name + ".png")
    deflate = zlib.compressobj(6)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        head = struct.pack(">IIBBBBB", w, h, 8 * dtype.itemsize, colour, 0, 0, 0)
        file.write(png_part(b"IHDR", head))
        file.write(png_parts(record.meta.get("kept", {}), h, w))
        for y in range(0, h, BAND_PX):
            band = read(slice(0, 1), slice(y, min(y + BAND_PX, h)), slice(0, w))[:, 0]
            file.write(png_part(b"IDAT", deflate.compress(_rows(band, opaque=opaque))))
        file.write(png_part(b"IDAT", deflate.flush()))
        file.write(png_part(b"IEND", b""))
    return path


def _rows(band: Array, *, opaque: bool) -> bytes:
    """Rows of (c h w) as PNG has them: a filter byte each, then differences to the left."""
    image = band.transpose(1, 2, 0)
    if opaque:
        alpha = np.full_like(image[..., :1], np.iinfo(image.dtype).max)
        image = np.concatenate([image, alpha], axis=2)
    step = image.shape[2] * image.dtype.itemsize
    rows = np.ascontiguousarray(image, image.dtype.newbyteorder(">")).view(np.uint8)
    rows = rows.reshape(len(image), -1)
    filtered = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = 1
    filtered[:, 1 : 1 + step] = rows[:, :step]
    filtered[:, 1 + step :] = rows[:, step:] - rows[:, :-step]
    return filtered.tobytes()
