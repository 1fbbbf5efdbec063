"""Pixels without data: where they are, how they travel in a record, what stands in for them.

A pixel is without data if its file says so: by a no-data value, by NaN where NaN is that value, by
an alpha band, or by a mask inside the file. It holds no light, so that nothing may be learnt from
it; and it must come back as it came unless somebody asks for it to be filled.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from domains.base import Array, Item

INVALID = "invalid"
"""The entry of a record's `meta` that holds packed pixels without data."""


def pack(invalid: Array) -> str:
    """Booleans (1|c h w) as a short text: packed bits, deflated, base64."""
    return base64.b64encode(zlib.compress(np.packbits(invalid).tobytes(), 9)).decode()


def unpack(text: str, num_bands: int, height: int, width: int) -> Array:
    """The booleans of `pack`: (1|c h w).

    Raises:
        ValueError: if the text holds other than one plane, or one a band.
    """
    bits = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8))
    plane = height * width
    for planes in (1, num_bands):
        if bits.size == -(-planes * plane // 8) * 8:
            return bits[: planes * plane].reshape(planes, height, width).astype(bool)
    raise ValueError(f"{bits.size} bits are not those of {num_bands} x {height} x {width} pixels")


def invalid_pixels(meta: Mapping[str, Any], pixels: Array) -> Array | None:
    """Which pixels (1|c h w) of an image (c 1 h w) its file says to hold no data; None if none.

    Args:
        meta: of the record.
        pixels: of the image.
    """
    c, z, h, w = pixels.shape
    if z != 1:
        return None
    if INVALID in meta:
        return unpack(meta[INVALID], c, h, w)
    value = meta.get("geotiff", {}).get("nodata")
    if not isinstance(value, int | float):
        return None
    lost = lacking(pixels[:, 0], value)
    return lost if lost.any() else None


def lacking(bands: Array, value: float) -> Array:
    """Where bands (c ...) hold the no-data value: (1 ...), or (c ...) where bands differ in it."""
    lost = np.asarray(bands == value)
    if may_be_light(value, bands.dtype) or (lost == lost[:1]).all():
        return np.asarray(lost.all(axis=0, keepdims=True))
    return lost


def may_be_light(value: float, dtype: np.dtype[Any]) -> bool:
    """Whether a no-data value in one band alone may be light: 0, and any of a byte."""
    return value == 0 or dtype == np.uint8


def stand_in(item: Item, filled: Array | None) -> Item:
    """The image with the nearest measured value wherever it holds no data.

    Args:
        item: (c 1 h w).
        filled: (h w), (1 h w) or (c 1 h w), True where pixels are to be restored: these are no
            matter of ours.

    Returns:
        The item itself if nothing remains without data; else one whose record tells which pixels
        do, packed.
    """
    from scipy.ndimage import distance_transform_edt

    invalid = invalid_pixels(item.record.meta, item.pixels)
    if invalid is None:
        return item
    pixels = item.pixels.copy()
    for band, plane in enumerate(pixels[:, 0]):
        lost = invalid[min(band, len(invalid) - 1)]
        if lost.any() and not lost.all():
            nearest = distance_transform_edt(lost, return_distances=False, return_indices=True)
            plane[...] = plane[tuple(nearest)]
    meta = {key: value for key, value in item.record.meta.items() if key != INVALID}
    if filled is not None:
        asked = np.asarray(filled, bool).reshape(-1, *invalid.shape[1:])
        invalid = invalid & ~asked
        if "geotiff" in meta:
            meta["geotiff"] = {**meta["geotiff"], "filled": True}
    if invalid.any():
        meta[INVALID] = pack(invalid)
    return Item(pixels, replace(item.record, meta=meta))
