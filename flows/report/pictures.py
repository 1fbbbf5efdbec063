"""Arrays to pictures: display windows, error maps, encoding, and labelled strips for a README.

Pixels come in source units (c h w). A display window never changes a figure: figures are made
from the arrays, pictures are 8-bit views of them.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from domains.base import Array, ItemRecord

_HU_WINDOWS = (("lung window", -600.0, 1500.0), ("soft-tissue window", 40.0, 400.0))
# Inferno by its anchors (matplotlib, CC0): dark = no error, and as dark in print.
_INFERNO = (
    (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85),
    (227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164),
)  # fmt: skip
RAW_SCANS = ("npy", "bart", "fastmri", "ismrmrd")
"""Formats of raw k-space: the image has the brightness of its coils, which is not evened out."""

_COLOURS = 3
_LIT, _WHITE, _RIM = 0.05, 2.5, 0.8
"""Share of the brightest that is no background; white over its median; where that is too dark."""

_INK, _PAPER, _FAINT = (32, 36, 56), (255, 255, 255), (104, 108, 124)


@dataclass(frozen=True)
class Window:
    """A range of source units shown from black to white.

    Attributes:
        label: what the reader is told.
        low: shown black.
        high: shown white.
    """

    label: str
    low: float
    high: float

    def show(self, pixels: Array) -> Array:
        """Pixels (c h w) in source units -> uint8 (h, w) or (h, w, 3); NaN shows black."""
        unit = (np.nan_to_num(pixels.astype(np.float64)) - self.low) / (self.high - self.low)
        bands = np.round(255 * np.clip(unit, 0, 1)).astype(np.uint8)
        return bands[:3].transpose(1, 2, 0) if len(bands) >= 3 else bands[0]


def windows_for(truth: Array, record: ItemRecord, scale: tuple[float, float]) -> list[Window]:
    """The display windows of an item.

    HU are shown in the two windows that a radiologist would ask for; anything else over the range
    that the metrics use, or, where the item fills little of that range (11 bits stored as 16),
    between its own percentiles.

    Args:
        truth: (c h w) in source units.
        record: of the item.
        scale: (offset, gain) of the domain's unit_scale.
    """
    if record.units == "HU":
        return [
            Window(
                _minus(f"{name} ({centre:g} ± {width / 2:g} HU)"),
                centre - width / 2,
                centre + width / 2,
            )
            for name, centre, width in _HU_WINDOWS
        ]
    offset, gain = scale
    low, high = offset, offset + 1 / gain
    shown = truth if len(truth) >= _COLOURS else truth[:1]  # a phase beside it is not shown
    dark, bright = (float(v) for v in np.percentile(shown, (0.5, 99.5)))
    if record.source_format in RAW_SCANS and (usual := _usual_white(shown)) < _RIM * (high - low):
        told = f"0 to {usual:.4g}{plain_units(record.units)}, {_WHITE:g} times the median"
        return [Window(f"{told} of what is no background; brighter is white", 0.0, usual)]
    if bright - low < 0.5 * (high - low) and bright > dark:
        return [
            Window(
                f"stretched to {dark:.4g} to {bright:.4g}{plain_units(record.units)}", dark, bright
            )
        ]
    return [Window(_minus(f"{low:.4g} to {high:.4g}{plain_units(record.units)}"), low, high)]


def _usual_white(magnitude: Array) -> float:
    """A white for magnitudes of which a rim beside the coils is brighter than all else."""
    lit = magnitude[magnitude > _LIT * np.percentile(magnitude, 99.9)]
    return _WHITE * float(np.median(lit)) if lit.size else np.inf


def plain_units(units: str) -> str:
    """Units as shown after a number; an intensity has none."""
    return "" if units == "intensity" else f" {units}"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}", 1) if "(-" in text or text.startswith("-") else text


@dataclass(frozen=True)
class ErrorScale:
    """How the error maps of a task are coloured: |restored - truth|, channels averaged.

    Items of one task may differ in units and range (8-bit photographs, 11-bit satellite bands), so
    the scale is a share of the range that the metrics use.

    Attributes:
        full: the share shown brightest; larger errors are as bright.
    """

    full: float

    @property
    def gain(self) -> float:
        """How much stronger than in the metrics' own range an error is shown."""
        return 1 / self.full

    def end_label(self, gain: float, units: str) -> str:
        """The bright end of the scale, for an item of that `gain` (of unit_scale) and units."""
        return f"{100 * self.full:g}% of the range = {self.full / gain:.3g}{plain_units(units)}"

    def show(self, truth: Array, restored: Array, gain: float) -> Array:
        """Error map of (c h w) arrays in source units as uint8 (h, w, 3)."""
        return inferno(np.clip(absolute_error(truth, restored) * gain / self.full, 0, 1))


def error_scale(errors: Sequence[Array]) -> ErrorScale:
    """One scale for all error maps of a task, so that they can be compared by eye.

    Args:
        errors: absolute errors (h, w) of the method to beat, as shares of the metrics' range; a
            round number at or above their 99th percentile becomes the full scale.
    """
    level = float(np.percentile(np.concatenate([e.ravel() for e in errors]), 99))
    return ErrorScale(min(round_up(level), 1.0) if level > 0 else 1.0)


def absolute_error(truth: Array, restored: Array) -> Array:
    """Absolute difference of (c h w) arrays, averaged over channels, (h, w) float64."""
    difference = np.nan_to_num(restored.astype(np.float64)) - truth
    return np.abs(difference).mean(axis=0)


def round_up(value: float) -> float:
    """The next number of the form 1, 2 or 5 times a power of ten, at or above `value` > 0."""
    power = 10.0 ** math.floor(math.log10(value))
    step = next(s for s in (1, 2, 5, 10) if s * power >= value * (1 - 1e-9))
    return float(f"{step * power:.0e}")


def inferno(unit: Array) -> Array:
    """Colour values on [0, 1]: uint8, one axis more."""
    stops = np.linspace(0, 1, len(_INFERNO))
    colours = np.array(_INFERNO, dtype=np.float64).T
    return np.stack([np.interp(unit, stops, c) for c in colours], axis=-1).round().astype(np.uint8)


def encode(picture: Array, quality: int | None) -> str:
    """A uint8 picture as a data URI: WebP, lossless if `quality` is None."""
    from PIL import Image

    buffer = io.BytesIO()
    options = {"lossless": True, "quality": 60} if quality is None else {"quality": quality}
    Image.fromarray(picture).save(buffer, "webp", method=4, **options)
    return data_uri(buffer.getvalue())


def data_uri(webp: bytes) -> str:
    """A WebP file as a data URI."""
    return "data:image/webp;base64," + base64.b64encode(webp).decode("ascii")


def as_it_lies(picture: Array, record: ItemRecord) -> Array:
    """A picture (h, w) or (h, w, 3) with square pixels, whole ones repeated, as a body stands.

    Slices are often farther apart than their pixels: seen from the side a scan would be a few
    flat lines, and, counted from the feet, upside down.

    Args:
        picture: of a slice of the item.
        record: spacing (z, y, x) in mm, affine to RAS, and whether the item was turned.
    """
    _, row_mm, column_mm = record.spacing_mm or (1.0, 1.0, 1.0)
    rows, columns = max(1, round(row_mm / column_mm)), max(1, round(column_mm / row_mm))
    if record.meta.get("turned") and record.affine and record.affine[2][1] > 0:
        picture = picture[::-1]
    return picture.repeat(rows, axis=0).repeat(columns, axis=1)


def figure_strip(
    tiles: Sequence[tuple[str, str, Array]],
    *,
    title: str = "",
    tile_width: int = 320,
    detail: tuple[int, int, int] | None = None,
) -> Array:
    """Pictures side by side with their names, on white: what a README or MLflow shows.

    Args:
        tiles: (name, second line, uint8 picture (h, w) or (h, w, 3)), all of one size.
        title: a line above all.
        tile_width: of each picture, pixels.
        detail: (row, column, side) of a square window that a second row shows enlarged, and a
            frame marks in the first; None: no second row.
    Returns:
        uint8 (h, w, 3).
    """
    from PIL import Image, ImageDraw, ImageFont

    gap, head, name_height = 12, 30 if title else 0, 44
    rows = [[_fit(picture, tile_width) for *_, picture in tiles]]
    if detail is not None:
        top, left, side = detail
        cuts = [p[top : top + side, left : left + side] for *_, p in tiles]
        rows[0] = [_framed(_fit(p, tile_width), p.shape, detail) for *_, p in tiles]
        rows.append([_enlarge(cut, tile_width) for cut in cuts])
    heights = [max(p.height for p in row) for row in rows]
    width = gap + len(tiles) * (tile_width + gap)
    height = gap + head + name_height + sum(h + gap for h in heights)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    bold, small = ImageFont.load_default(17), ImageFont.load_default(14)
    draw.text((gap, gap - 2), title, fill=_INK, font=bold)
    for i, (name, line, _) in enumerate(tiles):
        x, y = gap + i * (tile_width + gap), gap + head
        draw.text((x, y), name, fill=_INK, font=bold)
        draw.text((x, y + 22), line, fill=_FAINT, font=small)
        y += name_height
        for row, row_height in zip(rows, heights, strict=True):
            sheet.paste(row[i], (x, y))
            y += row_height + gap
    return np.asarray(sheet)


def busiest_window(truth: Array, share: float = 0.22) -> tuple[int, int, int]:
    """Where a detail is worth showing: the square of most structure in the truth.

    It looks at the truth alone, so that it does not pick the place that flatters a method. Strong
    edges count no more than middling ones, else an outline wins over what it holds; a margin of
    half a square is left out.

    Args:
        truth: uint8 picture (h, w) or (h, w, 3).
        share: side of the square over the shorter side of the picture.

    Returns:
        (row, column, side).
    """
    grey = truth.astype(np.float64).reshape(*truth.shape[:2], -1).mean(axis=-1)
    energy = np.hypot(*np.gradient(grey))
    if energy.any():
        energy = np.minimum(energy, np.percentile(energy[energy > 0], 85))
    side = max(int(share * min(grey.shape)), 2)
    total = np.pad(energy.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    boxes = (
        total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    )
    margin = side // 2
    inner = boxes[margin:-margin, margin:-margin]
    row, column = np.unravel_index(int(inner.argmax()), inner.shape)
    return int(row) + margin, int(column) + margin, side


def _fit(picture: Array, width: int) -> Any:
    from PIL import Image

    image = Image.fromarray(picture).convert("RGB")
    size = (width, round(image.height * width / image.width))
    return image.resize(size, Image.Resampling.LANCZOS)


def _enlarge(cut: Array, width: int) -> Any:
    from PIL import Image

    return Image.fromarray(cut).convert("RGB").resize((width, width), Image.Resampling.NEAREST)


def _framed(image: Any, shape: tuple[int, ...], detail: tuple[int, int, int]) -> Any:
    """Mark the detail's window in a resized picture of original `shape`."""
    from PIL import ImageDraw

    scale = image.width / shape[1]
    top, left, side = (round(v * scale) for v in detail)
    ImageDraw.Draw(image).rectangle(
        (left, top, left + side, top + side), outline=(240, 90, 60), width=2
    )
    return image
