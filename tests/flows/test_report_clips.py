"""A clip shows neighbouring slices in order, in one window, with nothing lost on the way."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from report_kit import scan, story, synthetic_page

from flows.report.clips import FRAME_MS, MOST_FRAMES, TILE_PX, make_clip, neighbours
from flows.report.page import render
from flows.report.rows import summarise

HU = ("HU", (-1000.0, 1 / 3000))


def rows_of(slices, item="a"):
    """Rows of ours and of one classical method."""
    template = story("ct-sparse60", [scan(0)], *HU).rows
    kept = [row for row in template if row["method"] in {"covprox", "tv"}]
    return [{**row, "item": item, "slice": z} for z in slices for row in kept]


def keys_of(rows):
    [summary] = summarise(rows)
    return list(neighbours(summary, rows))


def test_the_longest_run_of_neighbours_is_shown_and_its_middle_where_it_is_long():
    assert keys_of([*rows_of([0, 2, 4, 6]), *rows_of([7, 3, 5, 4, 6], "b")]) == [
        ("b", z) for z in (3, 4, 5, 6, 7)
    ]
    assert keys_of(rows_of([1, 2, 3])) == [], "three slices are no clip"
    assert keys_of(rows_of([1, 2, 3, 5, 6])) == []
    long = keys_of(rows_of(range(100)))
    assert len(long) == MOST_FRAMES
    assert (long[0][1], long[-1][1]) == (38, 61)
    last_of_one = [*rows_of([8, 9], "a"), *rows_of([10, 11], "b")]
    assert keys_of(last_of_one) == [], "slices of two items are no neighbours"


def test_a_slice_that_one_of_the_methods_lacks_ends_the_run():
    rows = rows_of(range(9))
    without = [r for r in rows if (r["slice"], r["method"]) != (4, "tv")]
    assert [z for _, z in keys_of(without)] == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def told():
    return story("ct-sparse60", [scan(i) for i in range(3)], *HU)


def test_every_frame_has_all_pictures_side_by_side_in_the_window_of_the_first(told):
    clip = make_clip(iter(told.cases))
    assert clip is not None
    assert (clip.first, clip.last) == ("item-ct, slice 0", "item-ct, slice 2")
    assert clip.names[0] == "Truth"
    assert clip.names[-1] == "CovProx (ours)"
    assert clip.size == (4 * 48 + 3 * 4, 48)
    black, white = -1350.0, 150.0  # the lung window
    for case, frame in zip(told.cases, clip.frames, strict=True):
        tissue = np.clip((case.truth[0] - black) / (white - black), 0, 1) * 255
        assert np.abs(frame[:, :48, 0] - tissue).max() <= 1
        assert (frame[:, 48:52] == 255).all()
    brighter = replace(told.cases[1], truth=told.cases[1].truth + 30.0)
    one, two = (make_clip([told.cases[0], case]).frames[1] for case in (told.cases[1], brighter))
    assert two[:, :48].mean() > one[:, :48].mean(), "a frame has no window of its own"
    assert make_clip([]) is None


def test_wide_pictures_are_made_smaller_and_no_small_one_larger(told):
    wide = {
        "truth": np.zeros((1, 300, 600)),
        "view": replace(told.cases[0].view, pixels=np.zeros((1, 300, 600))),
        "restored": {m: np.zeros((1, 300, 600)) for m in told.cases[0].restored},
    }
    clip = make_clip([replace(told.cases[0], **wide)])
    assert clip is not None
    assert clip.size == (4 * TILE_PX + 3 * 4, TILE_PX // 2)


def test_the_page_plays_it(told):
    page = synthetic_page()
    with_clip = replace(page, stories=[replace(told, clip=make_clip(told.cases)), page.stories[1]])
    html = render(with_clip)
    [found] = [part for part in html.split("<details")[1:] if part.startswith(' class="clip"')]
    assert "From the left: Truth, Measured: FBP" in found
    assert "item-ct, slice 0 to item-ct, slice 2" in found
    source = found.split('src="data:image/webp;base64,')[1].split('"')[0]
    with Image.open(io.BytesIO(base64.b64decode(source))) as film:
        assert film.n_frames == 3
        assert film.info["loop"] == 0
        frames = []
        for number in range(3):
            film.seek(number)
            film.load()
            assert film.info["duration"] == FRAME_MS
            frames.append(np.asarray(film.convert("RGB"), float))
    clip = make_clip(told.cases)
    assert clip is not None
    for shown, meant in zip(frames, clip.frames, strict=True):
        assert np.abs(shown - meant).mean() < 6
    assert 'class="clip"' not in render(page)
