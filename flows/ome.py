"""OME-Zarr 0.5 as bytes: Zarr v3 metadata, chunks and the multiscale attributes of an item.

    ITEM.ome.zarr/
      zarr.json          group: attributes "ome" (multiscales, omero) and "sashiko" (provenance)
      0/zarr.json        float32 (c z y x), full resolution, source units
      0/c/0/0/0/0 ...    chunks: little-endian, zstd with a checksum
      1/ 2/              each half the rows and columns of the one before (means of 2 x 2)

Written here rather than by a library because the engine hashes a chunk before it is stored, stores
it under an attempt's own prefix, and assembles the winners by link; what is written is read back by
zarr-python in the tests. Source: OME-NGFF 0.5 (ngff.openmicroscopy.org/0.5), Zarr v3 core.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from domains.base import Array, ItemRecord

Shape4 = tuple[int, int, int, int]

DTYPE = np.dtype("<f4")
ZSTD_LEVEL = 1
SMALLEST_LEVEL_PX = 256
MAX_LEVELS = 3


def chunk_name(index: Sequence[int]) -> str:
    """Key of a chunk inside its array: "c/0/3/1/0"."""
    return "/".join(["c", *map(str, index)])


def encode_chunk(values: Array, chunk: Shape4) -> bytes:
    """Encode the values of one chunk, padded with 0 to the chunk's shape at the far edges."""
    from numcodecs.zstd import Zstd

    if values.shape != chunk:
        whole = np.zeros(chunk, DTYPE)
        whole[tuple(slice(n) for n in values.shape)] = values
        values = whole
    return bytes(Zstd(level=ZSTD_LEVEL, checksum=True).encode(np.ascontiguousarray(values, DTYPE)))


def decode_chunk(data: bytes, chunk: Shape4) -> Array:
    """Decode one chunk; raises RuntimeError or ValueError if its checksum or size is wrong."""
    from numcodecs.zstd import Zstd

    return np.frombuffer(Zstd().decode(data), DTYPE).reshape(chunk)


def cut_chunks(
    values: Array, origin: Sequence[int], chunk: Shape4
) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Cut a region whose origin lies on the chunk grid into (chunk index, values).

    Raises:
        ValueError: if the origin is not on the grid: two writers would then share a chunk.
    """
    for index in chunk_indices(values.shape, origin, chunk):
        starts = [i * n - o for i, n, o in zip(index, chunk, origin, strict=True)]
        part = tuple(slice(a, a + n) for a, n in zip(starts, chunk, strict=True))
        yield index, values[part]


def chunk_indices(
    shape: Sequence[int], origin: Sequence[int], chunk: Shape4
) -> Iterator[tuple[int, ...]]:
    """Indices of the chunks that a region touches, the last axis fastest.

    Raises:
        ValueError: if the region's origin is not on the chunk grid.
    """
    if any(o % n for o, n in zip(origin, chunk, strict=True)):
        raise ValueError(f"origin {tuple(origin)} is not on the chunk grid {chunk}")
    counts = [math.ceil(size / n) for size, n in zip(shape, chunk, strict=True)]
    first = [o // n for o, n in zip(origin, chunk, strict=True)]
    for offset in itertools.product(*map(range, counts)):
        yield tuple(a + b for a, b in zip(first, offset, strict=True))


def array_metadata(shape: Shape4, chunk: Shape4) -> bytes:
    """zarr.json of one resolution level."""
    return _json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": "float32",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0,
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": True}},
            ],
            "attributes": {},
            "dimension_names": ["c", "z", "y", "x"],
        }
    )


def level_shapes(shape: Shape4) -> list[Shape4]:
    """Shapes of the pyramid: rows and columns halve (rounding up) until the plane is small."""
    shapes = [shape]
    while len(shapes) < MAX_LEVELS and max(shapes[-1][2:]) > SMALLEST_LEVEL_PX:
        c, z, h, w = shapes[-1]
        shapes.append((c, z, -(-h // 2), -(-w // 2)))
    return shapes


def halve(values: Array) -> Array:
    """Means of 2 x 2 pixels (c z h w); an odd last row or column is averaged with itself."""
    odd = [(0, 0), (0, 0), *((0, n % 2) for n in values.shape[2:])]
    v = np.pad(values, odd, mode="edge")
    return (v[..., ::2, ::2] + v[..., 1::2, ::2] + v[..., ::2, 1::2] + v[..., 1::2, 1::2]) / 4


def group_metadata(
    record: ItemRecord,
    levels: Sequence[Shape4],
    window: tuple[float, float],
    facts: Mapping[str, Any],
) -> bytes:
    """zarr.json of the item: multiscales with spacing, display window, and our provenance.

    Args:
        record: of the restored item.
        levels: shapes of the resolution levels, finest first.
        window: smallest and largest pixel, for viewers.
        facts: JSON-able provenance, kept under "sashiko".
    """
    spaced = record.spacing_mm is not None
    spacing = record.spacing_mm or (1.0, 1.0, 1.0)
    unit = {"unit": "millimeter"} if spaced else {}
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", **unit} for name in "zyx"]
    ome = {
        "version": "0.5",
        "multiscales": [
            {
                "name": record.item_id,
                "type": "mean",
                "axes": axes,
                "datasets": [_dataset(i, spacing) for i in range(len(levels))],
            }
        ],
        "omero": {"channels": _channels(record, window)},
    }
    return _json(
        {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"ome": ome, "sashiko": dict(facts)},
        }
    )


def _dataset(level: int, spacing: tuple[float, float, float]) -> dict[str, Any]:
    """A level's transformation: pixel centres of level k lie (2^k - 1)/2 fine pixels further in."""
    z, y, x = spacing
    factor = 2.0**level
    shift = (factor - 1) / 2
    return {
        "path": str(level),
        "coordinateTransformations": [
            {"type": "scale", "scale": [1.0, z, y * factor, x * factor]},
            {"type": "translation", "translation": [0.0, 0.0, y * shift, x * shift]},
        ],
    }


def _channels(record: ItemRecord, window: tuple[float, float]) -> list[dict[str, Any]]:
    low, high = window
    count = record.shape[0]
    colours = ["FF0000", "00FF00", "0000FF"] if count == 3 else ["FFFFFF"] * count
    limits = {"min": low, "max": high, "start": low, "end": high}
    return [
        {"label": record.units, "color": colour, "active": True, "window": limits}
        for colour in colours
    ]


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
