"""Boxes round what is to be removed (people, vehicles, plates), as detectors and people write them.

    CSV     a header: file, and left, top, width, height; or xmin, ymin, xmax, ymax
    JSON    {"street.jpg": [[left, top, width, height], ...], ...}
    JSON    of COCO: images (id, file_name), annotations (image_id, bbox)

Pixels from the upper left corner of the upright picture; fractions take every pixel they touch. A
file is named by its place below the input, or by its name alone where that is the only one.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from domains.base import Array, BadInputError

SUFFIXES = (".json", ".csv")
MAX_BYTES = 256 * 2**20
_SIZED, _CORNERED = ("left", "top", "width", "height"), ("xmin", "ymin", "xmax", "ymax")

Box = tuple[float, float, float, float]
"""left, top, width, height in pixels."""


def read_boxes(path: Path) -> dict[str, tuple[Box, ...]]:
    """The boxes of each file it names, sorted.

    Raises:
        BadInputError: naming the file of boxes, and what is wrong.
    """
    if path.stat().st_size > MAX_BYTES:
        raise BadInputError(f"{path}: over {MAX_BYTES >> 20} MB of boxes; split it")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(_csv_rows(text) if path.suffix.lower() == ".csv" else _json_rows(text))
        found: dict[str, list[Box]] = {}
        for name, numbers in rows:
            found.setdefault(_place(name), []).append(_box(numbers))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise BadInputError(
            f"{path}: not boxes as left, top, width, height of files; give a CSV with the header "
            "file,left,top,width,height, or JSON, as README shows"
        ) from error
    if not found:
        raise BadInputError(f"{path}: holds no box; give one, or leave the file out")
    return {name: tuple(sorted(boxes)) for name, boxes in found.items()}


def boxes_of(boxes: Mapping[str, Sequence[Box]], place: str) -> Sequence[Box]:
    """Those of the file at a place below the input (without suffix); none if it is not named."""
    return boxes.get(place) or boxes.get(PurePosixPath(place).name) or ()


def inside(boxes: Sequence[Box], height: int, width: int) -> Array:
    """(1 h w), True in the boxes.

    Raises:
        BadInputError: if one lies outside the picture.
    """
    missing = np.zeros((1, height, width), bool)
    for left, top, across, down in boxes:
        rows = slice(max(math.floor(top), 0), min(math.ceil(top + down), height))
        columns = slice(max(math.floor(left), 0), min(math.ceil(left + across), width))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            raise BadInputError(
                f"its box at ({left:g}, {top:g}) lies outside its {height} x {width} pixels; "
                "boxes count from the upper left corner of the upright picture"
            )
        missing[0, rows, columns] = True
    return missing


def _csv_rows(text: str) -> Iterator[tuple[str, Sequence[Any]]]:
    for row in csv.DictReader(text.splitlines()):
        values = {str(k).strip().lower(): v for k, v in row.items()}
        if all(name in values for name in _CORNERED):
            x0, y0, x1, y1 = (float(values[name]) for name in _CORNERED)
            yield values["file"], (x0, y0, x1 - x0, y1 - y0)
        else:
            yield values["file"], [values[name] for name in _SIZED]


def _json_rows(text: str) -> Iterator[tuple[str, Sequence[Any]]]:
    told = json.loads(text)
    if "annotations" in told:
        names = {image["id"]: image["file_name"] for image in told["images"]}
        for one in told["annotations"]:
            yield names[one["image_id"]], one["bbox"]
        return
    for name, boxes in told.items():
        for box in boxes:
            yield name, box


def _box(numbers: Sequence[Any]) -> Box:
    left, top, width, height = (float(n) for n in numbers)
    if not all(map(math.isfinite, (left, top, width, height))) or min(width, height) <= 0:
        raise ValueError("no box")
    return left, top, width, height


def _place(name: str) -> str:
    """A file's place without its suffix, as sources are named."""
    path = PurePosixPath(str(name).replace("\\", "/"))
    return str(path.with_suffix(""))
