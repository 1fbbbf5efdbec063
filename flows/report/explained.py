"""Explained restorations as pictures, words and a page: see flows.explaining."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import Array
from flows.report.describe import MINUS, method_label
from flows.report.pictures import encode, figure_strip, inferno, round_up, windows_for

if TYPE_CHECKING:
    from flows.explaining import Answer, Explained, Level, Steadiness

_COLUMNS = 5
_FRAME_WIDTH = 210
_MAP_WIDTH = 320
_BLACK = 1e-3
"""Least full scale of a map, in standard deviations of the image."""


def film(one: Explained) -> Array | None:
    """D(x; sigma) level by level, and the restored image last: uint8 (h, w, 3).

    All frames are shown in the one window of the restored image. None where there are none.
    """
    if not one.film:
        return None
    window = windows_for(one.restored, one.record, one.scale)[0]
    told = {level.sigma: level for level in one.levels}
    tiles = [
        (f"sigma {frame.sigma:.3g}", _under(told[frame.sigma]), window.show(frame.pixels))
        for frame in one.film
    ]
    tiles.append(("Restored", f"residual {one.residual:.3g}", window.show(one.restored)))
    title = f"{_heading(one)}; {_printable(window.label)}"
    rows = [
        figure_strip(tiles[i : i + _COLUMNS], title=title if i == 0 else "",
                     tile_width=_FRAME_WIDTH)
        for i in range(0, len(tiles), _COLUMNS)
    ]  # fmt: skip
    width = max(row.shape[1] for row in rows)
    return np.concatenate([_widened(row, width) for row in rows])


def map_picture(one: Explained) -> Array | None:
    """The restored image, what the data determine of it, and maps of what the prior invented."""
    found = one.invented
    if found is None:
        return None
    window = windows_for(one.restored, one.record, one.scale)[0]
    tiles = [
        ("Restored", _printable(window.label), window.show(one.restored)),
        ("Determined by the data", "with the gain of a white prior", window.show(found.determined)),
        _map(f"Invented by the prior: {found.share:.1%}", found.amplitude),
    ]
    if found.beyond is not None and found.beyond_amplitude is not None:
        tiles.append(_map(f"Beyond kriging: {found.beyond:.1%}", found.beyond_amplitude))
    return figure_strip(tiles, title=_heading(one), tile_width=_MAP_WIDTH)


def _printable(text: str) -> str:
    """Text in the letters of the pictures' font, which has no minus but the hyphen."""
    return text.replace(MINUS, "-")


def _map(name: str, amplitude: Array) -> tuple[str, str, Array]:
    full = map_scale(amplitude)
    shown = inferno(np.clip(amplitude / full, 0, 1))
    return name, f"brightest: {full:g} of the image's std", shown


def map_scale(amplitude: Array) -> float:
    """The amplitude shown brightest: a round number at or above its 99th percentile."""
    return round_up(max(float(np.percentile(amplitude, 99)), _BLACK))


def _widened(picture: Array, width: int) -> Array:
    return np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)


def _heading(one: Explained) -> str:
    return f"{one.item}, slice {one.slice}: {one.task}, {method_label(one.method)}"


def _under(level: Level) -> str:
    moved = "" if level.moved is None else f", moved {level.moved:.3g}"
    return f"residual {level.residual:.3g}{moved}"


def sentences(one: Explained) -> list[str]:
    """The figures in words, a sentence each; what was left out comes last."""
    told = []
    found = one.invented
    if found is not None:
        told.append(
            f"What the prior invented: {found.share:.1%} of the energy of the image about its mean "
            f"is not determined by the data ({_solved(found.steps, found.left)})."
        )
        if found.beyond is not None:
            told.append(
                f"Beyond the best linear estimate (kriging), which knows how smooth images are, "
                f"goes {found.beyond:.1%} of the image's energy; it is judged by another prior "
                "than the first figure, and may exceed it."
            )
    fit = "largest misfit to the exact data" if one.exact_data else "residual"
    told.append(f"The restored image has the {fit} {one.residual:.3g}.")
    told += _steady(one.steadiness)
    told += [f"Left out, {words}." for words in one.left_out]
    return told


def _solved(steps: int, left: float) -> str:
    return f"{steps} CG steps, {left:.0e} left" if steps else "in closed form"


def _steady(found: Steadiness) -> Iterator[str]:
    over = found.seed_spread_over_error
    of_error = "" if over is None else f", {over:.2f} of its error"
    yield (
        f"Over {found.num_seeds} seeds the picture varies by {_share(found.seed_spread)} of its "
        f"range (rms){of_error}."
    )
    if found.noise is not None:
        yield _answered("A change of the data by 1% of their noise", found.noise, found.reference)
    change = "White noise of 0.1% of the range on what is measured"
    yield _answered(change, found.image, found.reference)


def _answered(change: str, answer: Answer, reference: str) -> str:
    moved = f"{change} moves the picture by {_share(answer.moved)} of its range"
    if answer.gain is None:
        return f"{moved}."
    return f"{moved}: {answer.gain:.2f} times what it moves the {reference} estimate by."


def _share(value: float) -> str:
    return f"{100 * value:.2g}%"


def level_rows(one: Explained) -> list[list[str]]:
    """The table of levels; "" for what is not told."""
    return [
        [
            f"{level.sigma:.4g}",
            f"{level.residual:.3g}",
            "" if level.moved is None else f"{level.moved:.3g}",
            "" if level.steps is None else str(level.steps),
            "" if level.left is None else f"{level.left:.1e}",
        ]
        for level in one.levels
    ]


def in_words(one: Explained) -> str:
    """All figures of a slice for a terminal."""
    from flows.console import table

    lines = [f"{_heading(one)}, {one.nfe} evaluations", *sentences(one)]
    if one.levels:
        lines.append(table(list(LEVEL_HEADS), level_rows(one)))
    return "\n".join(lines)


LEVEL_HEADS = ("sigma", "residual of D", "moved", "CG steps", "left")


def section(one: Explained) -> dict[str, Any]:
    """What the template explained.html shows of a slice."""
    pictures = ((film(one), "The way along the levels"), (map_picture(one), "What is invented"))
    return {
        "heading": _heading(one),
        "sentences": sentences(one),
        "heads": LEVEL_HEADS,
        "levels": level_rows(one),
        "pictures": [
            {
                "source": encode(picture, 85),
                "name": f"{name}, {one.item}",
                "width": picture.shape[1],
                "height": picture.shape[0],
            }
            for picture, name in pictures
            if picture is not None
        ],
    }


def picture_files(one: Explained) -> Iterator[tuple[str, Array]]:
    """(file name without suffix, picture) of a slice."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", f"{one.task}-{one.item}-{one.slice}")
    for kind, picture in (("film", film(one)), ("invented", map_picture(one))):
        if picture is not None:
            yield f"{stem}-{kind}", picture


def write_explained(explained: Sequence[Explained], path: Path) -> Path:
    """Write index.html and pictures/*.png of explained slices into a folder.

    Returns:
        Path of index.html.
    """
    from flows.report.page import rendered
    from flows.report.write import save_png, write_whole

    for one in explained:
        for name, picture in picture_files(one):
            save_png(path / "pictures" / f"{name}.png", picture)
    models = sorted({one.model_digest for one in explained if one.model_digest})
    html = rendered("explain.html", explained=[section(one) for one in explained], models=models)
    write_whole(path / "index.html", html.encode())
    return path / "index.html"
