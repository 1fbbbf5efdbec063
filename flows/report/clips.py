"""Clips: neighbouring slices or frames one after another, so that flicker between them is seen.

A picture of one slice does not show whether the next one agrees with it. Of each task with a stack
the page has one clip, of the longest run of neighbouring slices, its middle where it is long.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from domains.base import Array
from flows.report.cases import Case, Key
from flows.report.page import case_label, picture_name, show_view
from flows.report.pictures import Window, as_it_lies, windows_for
from flows.report.rows import Row, TaskSummary

if TYPE_CHECKING:
    from PIL.Image import Image

LEAST_FRAMES, MOST_FRAMES = 4, 24
TILE_PX = 224
FRAME_MS = 200
_GAP_PX = 4
_QUALITY = 80


@dataclass(frozen=True)
class Clip:
    """Frames of some pictures side by side.

    Attributes:
        first: label of the first slice.
        last: of the last one.
        names: what stands side by side, from the left.
        frames: (h w 3) uint8, of one size.
    """

    first: str
    last: str
    names: Sequence[str]
    frames: Sequence[Array]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        height, width = self.frames[0].shape[:2]
        return width, height

    def encode(self, quality: int = _QUALITY) -> bytes:
        """An animated WebP that begins again after its end."""
        buffer = io.BytesIO()
        first, *others = (_image(frame) for frame in self.frames)
        first.save(
            buffer, "webp", save_all=True, append_images=others, duration=FRAME_MS, loop=0,
            quality=quality, method=4,
        )  # fmt: skip
        return buffer.getvalue()


def neighbours(summary: TaskSummary, rows: Iterable[Row]) -> Sequence[Key]:
    """The slices of a task's clip: the longest run that all shown methods restored, cut to size.

    Returns:
        Keys in order of z; none where no item has LEAST_FRAMES neighbouring slices.
    """
    shown = {m.method for m in (summary.best_classical, summary.ours) if m is not None}
    made: dict[Key, set[str]] = {}
    for row in rows:
        made.setdefault((row["item"], row["slice"]), set()).add(row["method"])
    whole = sorted(key for key, methods in made.items() if shown <= methods)
    longest: list[Key] = []
    run: list[Key] = []
    for item, z in whole:
        run = [*run, (item, z)] if run and run[-1] == (item, z - 1) else [(item, z)]
        longest = run if len(run) > len(longest) else longest
    if not shown or len(longest) < LEAST_FRAMES:
        return []
    start = max(0, (len(longest) - MOST_FRAMES) // 2)
    return longest[start : start + MOST_FRAMES]


def make_clip(cases: Iterable[Case]) -> Clip | None:
    """A clip of slices in order, read one at a time; None if there is none.

    All frames are shown in one window, that of the first: a window of each would flicker itself.
    """
    frames: list[Array] = []
    labels: list[str] = []
    names: list[str] = []
    window: Window | None = None
    for case in cases:
        window = window or windows_for(case.truth, case.record, case.scale)[0]
        tiles = {
            "Truth": window.show(case.truth),
            f"Measured: {case.view.label}": show_view(case, window),
            **{picture_name(method): window.show(p) for method, p in case.restored.items()},
        }
        names = list(tiles)
        labels.append(case_label(case))
        frames.append(_frame([as_it_lies(tile, case.record) for tile in tiles.values()]))
    return Clip(labels[0], labels[-1], names, frames) if frames else None


def _frame(tiles: Sequence[Array]) -> Array:
    """Pictures (h w) or (h w 3) of one size side by side, each TILE_PX wide at most."""
    height, width = tiles[0].shape[:2]
    scale = min(1.0, TILE_PX / width)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    gap = np.full((size[1], _GAP_PX, 3), 255, np.uint8)
    parts: list[Array] = []
    for tile in tiles:
        parts += [np.asarray(_image(tile).resize(size)), gap]
    return np.concatenate(parts[:-1], axis=1)


def _image(picture: Array) -> Image:
    from PIL import Image as Pictures

    return Pictures.fromarray(picture).convert("RGB")
