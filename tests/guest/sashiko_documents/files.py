"""Reads and writes pages through Pillow: PNG, TIFF with a page a slice; dots an inch are kept."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from domains.base import Array, BadInputError, Item, ItemRecord
from domains.files import file_digest, keyed_id, require_file, require_size

MODES = ("1", "L", "RGB")
INCH_MM = 25.4


def read(path: Path) -> Item:
    """Pages (c z h w) uint8, c = 1 grey or 3 red, green, blue; z = pages."""
    require_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged file, which is refused in our words
            with Image.open(path, formats=("PNG", "TIFF")) as image:
                return _item(path, image)
    except BadInputError:
        raise
    except Image.DecompressionBombError as error:
        raise BadInputError(f"{path}: the page has too many pixels; scan it coarser") from error
    except Exception as error:
        raise BadInputError(
            f"{path}: no readable page, or pages of several sizes; scan or save it again"
        ) from error


def _item(path: Path, image: Image.Image) -> Item:
    width, height = image.size
    mode, num_pages = image.mode, int(getattr(image, "n_frames", 1))
    if mode not in MODES or "transparency" in image.info:
        raise BadInputError(f"{path}: pages of mode {mode} are not read; save it as grey or RGB")
    require_size(path, (num_pages, height, width, len(image.getbands())), (height, width))
    dots = image.info.get("dpi")
    pages = [_page(page) for page in ImageSequence.Iterator(image)]
    pixels = np.stack(pages).transpose(3, 0, 1, 2)
    digest = file_digest(path)
    c, z, h, w = pixels.shape
    spacing = None
    if dots and min(float(d) for d in dots) > 0:
        spacing = (1.0, INCH_MM / float(dots[1]), INCH_MM / float(dots[0]))
    record = ItemRecord(
        item_id=keyed_id("documents", digest, b""),
        domain="documents",
        shape=(c, z, h, w),
        dtype="uint8",
        units="grey levels",
        source_digest=digest,
        source_format="png" if image.format == "PNG" else "tiff",
        spacing_mm=spacing,
        meta={"bilevel": mode == "1"},
    )
    return Item(np.ascontiguousarray(pixels), record)


def _page(page: Image.Image) -> Array:
    values = np.asarray(page)
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    return values[..., None] if values.ndim == 2 else values


def write(item: Item, stem: Path) -> Path:
    """Write pages in 8 bits, black and white ones as such: PNG, or TIFF where it was one."""
    pixels = np.clip(np.rint(item.pixels), 0, 255).astype(np.uint8).transpose(1, 2, 3, 0)
    bilevel = item.record.meta.get("bilevel") and np.isin(pixels, (0, 255)).all()
    pages = [Image.fromarray(page[..., 0] if page.shape[2] == 1 else page) for page in pixels]
    if bilevel:
        pages = [page.convert("1", dither=Image.Dither.NONE) for page in pages]
    how: dict[str, Any] = {}
    if item.record.spacing_mm is not None:
        _, y, x = item.record.spacing_mm
        how["dpi"] = (INCH_MM / x, INCH_MM / y)
    if item.record.source_format == "png" and len(pages) == 1:
        path = stem.with_name(f"{stem.name}.png")
        pages[0].save(path, **how)
        return path
    path = stem.with_name(f"{stem.name}.tif")
    pages[0].save(path, save_all=True, append_images=pages[1:], compression="tiff_deflate", **how)
    return path
