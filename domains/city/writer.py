"""Writes city images: PNG, TIFF or GeoTIFF, in the dtype of the source and with what it said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from domains.base import Array, BadInputError, Item, ItemRecord, ReadBox
from domains.city import exif

USUAL_FRAMES_PER_S = 25.0
"""Of clips that do not say."""
PNG_HEAD_BYTES = 33
"""Signature and first chunk, which says the size: what follows may be in any order."""


def write(item: Item, stem: Path) -> Path:
    """Write an item: TIFF if it came from one or PNG cannot hold it, else PNG.

    Values are rounded to the record's dtype and bounded by it. JPEGs are written as PNG and
    clips as FFV1: a second lossy pass would undo part of the restoration.

    Returns:
        The path written: stem + ".png" or ".tif".
    """
    dtype = np.dtype(item.record.dtype)
    pixels = to_dtype(item.pixels, dtype)
    c, z, _, _ = pixels.shape
    if "geotiff" in item.record.meta:
        from domains.city import geotiff

        return geotiff.write(item.record, dtype, lambda z, y, x: pixels[:, z, y, x], stem)
    if _is_clip(item.record):
        return write_clip(item.record, lambda z, y, x: pixels[:, z, y, x], stem)
    fits_png = z == 1 and c in (1, 3) and pixels.dtype in (np.uint8, np.uint16)
    if item.record.source_format == "tiff" or not fits_png:
        return _write_tiff(pixels, stem, item.record.meta)
    meta = item.record.meta
    opaque, bilevel = meta.get("alpha") == "opaque", meta.get("mode") == "bilevel"
    path = stem.with_name(stem.name + ".png")
    if pixels.dtype == np.uint8 and c == 1 and (opaque or bilevel):
        _write_grey_png(pixels[0, 0], path, opaque=opaque)
    else:
        _write_png(pixels[:, 0], path, opaque=opaque)
    if "kept" in meta:
        _insert(path, exif.png_parts(meta["kept"], *pixels.shape[2:]))
    return path


def write_large(record: ItemRecord, read: ReadBox, stem: Path) -> Path:
    """Write an item that cannot be held, of the same kind and values; black and white as grey."""
    from domains.city import large

    dtype = np.dtype(record.dtype)
    c, z, _, _ = record.shape

    def rounded(z: slice, y: slice, x: slice) -> Array:
        return to_dtype(read(z, y, x), dtype)

    if "geotiff" in record.meta:
        from domains.city import geotiff

        return geotiff.write(record, dtype, rounded, stem)
    if _is_clip(record):
        return write_clip(record, rounded, stem)
    fits_png = z == 1 and c in (1, 3) and dtype in (np.uint8, np.uint16)
    if record.source_format == "tiff" or not fits_png:
        return large.write_tiff(record, dtype, rounded, stem)
    opaque = record.meta.get("alpha") == "opaque"
    return large.write_png(record, dtype, rounded, stem, opaque=opaque)


def _is_clip(record: ItemRecord) -> bool:
    """Whether an item is frames of a video, one or more, in its colours."""
    return record.source_format == "video" and record.shape[0] == 3 and record.dtype == "uint8"


def write_clip(record: ItemRecord, read: ReadBox, stem: Path) -> Path:
    """Write frames as a lossless clip (FFV1, RFC 9043) of the source's rate, one at a time.

    Args:
        record: of the item.
        read: gives a box of its pixels (c z h w) as uint8.
        stem: of the path.

    Raises:
        BadInputError: if OpenCV has no FFV1 here.
    """
    import cv2

    path = stem.with_name(stem.name + ".avi")
    _, z, h, w = record.shape
    rate = float(record.meta.get("frames_per_s", USUAL_FRAMES_PER_S))
    clip = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"FFV1"), rate, (w, h))
    try:
        if not clip.isOpened():
            raise BadInputError(f"{path}: OpenCV has no FFV1 here; install opencv-python-headless")
        for frame in range(z):
            box = read(slice(frame, frame + 1), slice(0, h), slice(0, w))
            clip.write(np.ascontiguousarray(box[::-1, 0].transpose(1, 2, 0)))
    finally:
        clip.release()
    return path


def _insert(path: Path, parts: bytes) -> None:
    """Put chunks behind the header of a PNG."""
    data = path.read_bytes()
    path.write_bytes(data[:PNG_HEAD_BYTES] + parts + data[PNG_HEAD_BYTES:])


def to_dtype(pixels: Array, dtype: np.dtype[np.generic]) -> Array:
    """Round and bound computed values to a dtype; values that fit are unchanged."""
    if pixels.dtype == dtype or dtype.kind == "f":
        return pixels.astype(dtype)
    info = np.iinfo(dtype)  # type: ignore[type-var]
    return np.clip(np.rint(pixels), info.min, info.max).astype(dtype)


def _write_grey_png(grey: Array, path: Path, *, opaque: bool) -> Path:
    """Write (h w) uint8 in the modes that OpenCV lacks: grey with alpha; else black and white.

    Restored pixels of a black and white source that are neither make it a grey image.
    """
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(grey))
    if opaque:
        image.putalpha(255)
    elif np.isin(grey, (0, 255)).all():
        image = image.convert("1", dither=Image.Dither.NONE)
    image.save(path)
    return path


def _write_png(bands: Array, path: Path, *, opaque: bool) -> Path:
    """Write (c h w) as PNG; `opaque` puts back the alpha channel that the source had."""
    import cv2

    image = bands[::-1].transpose(1, 2, 0)  # OpenCV wants BGR, and writes 16-bit colour
    if opaque:
        alpha = np.full_like(image[..., :1], np.iinfo(image.dtype).max)
        grey = image.shape[2] == 1
        image = np.concatenate([*([image] * (3 if grey else 1)), alpha], axis=2)
    found, data = cv2.imencode(".png", np.ascontiguousarray(image))
    if not found:
        raise BadInputError(f"{path}: cannot be written as PNG")
    path.write_bytes(data.tobytes())
    return path


def _write_tiff(pixels: Array, stem: Path, meta: Mapping[str, Any]) -> Path:
    """Write (c z h w) as TIFF: bands interleaved or planar as in the source, z as pages."""
    import tifffile

    path = stem.with_name(stem.name + ".tif")
    planar = meta.get("layout", "interleaved") == "planar"
    c, z, _, _ = pixels.shape
    image = pixels.transpose(1, 0, 2, 3) if planar else pixels.transpose(1, 2, 3, 0)
    image = image[0] if z == 1 else image
    if c == 1:
        image = image.squeeze(-3 if planar else -1)
        config = None
    else:
        config = "separate" if planar else "contig"
    tifffile.imwrite(
        path,
        np.ascontiguousarray(image),
        photometric="rgb" if c == 3 and pixels.dtype.kind == "u" else "minisblack",
        planarconfig=config,
        compression="deflate",
        metadata=None,
        **tiff_facts(meta),
    )
    return path


def tiff_facts(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Options for tifffile that put back the profile and the resolution of the source."""
    kept: Mapping[str, str] = meta.get("kept", {})
    facts: dict[str, Any] = {}
    profile, dots = exif.profile_to_write(kept), exif.resolution_to_write(kept)
    if profile:
        facts["iccprofile"] = profile
    if dots:
        facts |= {"resolution": dots, "resolutionunit": 2}
    return facts
