"""Masks that nobody painted: boxes of detectors, and strokes, stripes and dead lines found."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation_kit import picture
from PIL import Image
from skimage import data

from domains.base import BadInputError, Item, ItemRecord
from domains.city.degradations import strokes
from domains.strokes import find_strokes
from flows.api_restore import restore
from flows.boxes import boxes_of, inside, read_boxes
from flows.config import ComputeSettings, MethodSettings, RestoreSettings
from flows.damage import stroke_pixels

FILL = MethodSettings(name="telea", kind="baseline")
BOXES = {"a": [(3.0, 2.0, 8.0, 7.0), (20.5, 10.25, 4.0, 3.0)], "b": [(36.0, 30.0, 8.0, 7.0)]}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))


@pytest.fixture
def photos(tmp_path):
    """Equal photographs of 40 x 48: a, b in a folder below, and c without any box."""
    pixels = picture(0, (3, 1, 40, 48))[:, 0].transpose(1, 2, 0)
    for place in ("a.png", "street/b.png", "c.png"):
        path = tmp_path / "photos" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return pixels, tmp_path / "photos"


def restored(photos, mask):
    settings = RestoreSettings(
        input=photos, output=photos.parent / "out", domain="city", mask=str(mask), method=FILL,
        compute=ComputeSettings(executor="inline"),
    )  # fmt: skip
    result = restore(settings)
    files = photos.parent / "out" / "files"
    return result, {
        str(path.relative_to(files).with_suffix("")): np.asarray(Image.open(path))
        for path in files.rglob("*.png")
    }


def written(folder, kind):
    """The same boxes in each of the formats."""
    path = folder / f"boxes.{'csv' if kind.startswith('csv') else 'json'}"
    rows = [(name, *box) for name in BOXES for box in BOXES[name]]
    if kind == "csv":
        lines = [f"{n}.jpg,{x},{y},{w},{h}" for n, x, y, w, h in rows]
        path.write_text("\n".join(["file,left,top,width,height", *lines]))
    elif kind == "csv corners":
        lines = [f"car,{x},{y},{x + w},{y + h},{n}.jpg" for n, x, y, w, h in rows]
        path.write_text("\n".join(["class,xmin,ymin,xmax,ymax,file", *lines]))
    elif kind == "json":
        path.write_text(json.dumps({f"{n}.png": BOXES[n] for n in BOXES}))
    else:
        images = [{"id": 7 + k, "file_name": f"{n}.png"} for k, n in enumerate(BOXES)]
        ids = {image["file_name"]: image["id"] for image in images}
        told = [{"image_id": ids[f"{n}.png"], "bbox": box} for n, *box in rows]
        path.write_text(json.dumps({"images": images, "annotations": told, "categories": []}))
    return path


@pytest.mark.parametrize("kind", ["csv", "csv corners", "json", "coco"])
def test_what_is_boxed_is_removed_and_nothing_else(photos, kind):
    pixels, folder = photos
    path = written(folder, kind)
    assert read_boxes(path) == {name: tuple(boxes) for name, boxes in BOXES.items()}
    result, files = restored(folder, path)
    assert (result.quarantined, result.num_unknown) == ((), 0)
    changed = {name: (image != pixels).any(axis=2) for name, image in files.items()}
    inside = np.zeros((40, 48), bool)
    inside[2:9, 3:11] = inside[10:14, 20:25] = True  # half covered pixels too
    assert changed["a"].sum() > 50
    assert not changed["a"][~inside].any()
    assert changed["street/b"][30:37, 36:44].mean() > 0.5
    changed["street/b"][30:37, 36:44] = False
    assert not changed["street/b"].any()
    assert not changed["c"].any()


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", '{"a": [[1, 2, 3]]}', '{"a": [[1, 2, -3, 4]]}', '{"a": [[1, 2, "x", 4]]}',
     '{"annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}], "images": []}', "[" * 5000],
)  # fmt: skip
def test_boxes_that_are_none_are_told_by_the_name_of_their_file(photos, text):
    path = photos[1].parent / "boxes.json"
    path.write_text(text)
    with pytest.raises(BadInputError, match=r"boxes\.json: "):
        restored(photos[1], path)


def test_a_box_outside_its_picture_is_the_pictures_matter(photos):
    path = photos[1].parent / "boxes.json"
    path.write_text(json.dumps({"a.png": [[100, 2, 5, 5]], "b.png": [[1, 1, 5, 5]]}))
    result, files = restored(photos[1], path)
    assert [q.reason.split(";")[0] for q in result.quarantined] == [
        "its box at (100, 2) lies outside its 40 x 48 pixels"
    ]
    assert set(files) == {"c", "street/b"}


def test_a_box_takes_every_pixel_that_it_touches():
    found = inside([(20.5, 10.25, 4.0, 3.0), (-3.0, 38.5, 4.2, 9.0)], 40, 48)
    expected = np.zeros((1, 40, 48), bool)
    expected[0, 10:14, 20:25] = expected[0, 38:, :2] = True
    np.testing.assert_array_equal(found, expected)


def test_a_place_is_known_by_its_whole_name_first():
    boxes = {"b": ((1.0, 1.0, 2.0, 2.0),), "street/b": ((5.0, 5.0, 2.0, 2.0),)}
    assert boxes_of(boxes, "street/b") == boxes["street/b"]
    assert boxes_of(boxes, "park/b") == boxes["b"]
    assert boxes_of(boxes, "park/d") == ()


# --- strokes that are found -----------------------------------------------------------------


def photograph(image):
    """An 8-bit picture (h w c) as an item."""
    pixels = np.ascontiguousarray(np.atleast_3d(image).transpose(2, 0, 1)[:, None])
    record = ItemRecord(
        item_id="city-1", domain="city", shape=pixels.shape, dtype="uint8", units="intensity",
        source_digest="0" * 64, source_format="png", meta={"value_range": [0.0, 255.0]},
    )  # fmt: skip
    return Item(pixels, record)


@pytest.mark.parametrize(
    ("clean", "most"),
    # The camera man's tripod is clipped to black: a false alarm.
    [(data.cat, 0), (data.rocket, 1e-3), (data.coffee, 1e-3), (data.camera, 5e-3)],
)
def test_clean_photographs_show_no_strokes(clean, most):
    assert find_strokes(photograph(clean())).mean() <= most


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (230, 25, 25)])
def test_strokes_of_one_colour_are_found(colour):
    image = data.cat().copy()
    drawn = strokes(*image.shape[:2], 0.1, np.random.default_rng(3))
    image[drawn] = colour
    found = find_strokes(photograph(image))[0]
    assert found[drawn].mean() > 0.9
    assert found[~drawn].mean() < 0.01


def test_wedges_of_a_broken_scan_corrector_are_found_and_dark_margins_are_not():
    image = data.cat().copy()
    h, w = image.shape[:2]
    y, x = np.mgrid[:h, :w]
    wedges = (y + 0.15 * x) % 33 < 14 * np.abs(x / w - 0.5)
    image[wedges] = 0
    image[:, :60] = 0
    found = find_strokes(photograph(image))[0]
    assert not found[:, :50].any()
    assert found[:, 80:][wedges[:, 80:]].mean() > 0.8
    assert found[:, 80:][~wedges[:, 80:]].mean() < 0.05


def test_a_white_square_is_part_of_the_scene():
    image = data.cat().copy()
    image[100:112, 100:112] = 255
    assert not find_strokes(photograph(image)).any()


def test_dead_lines_are_found_whatever_their_colours():
    image = data.camera().copy()
    image[100], image[300:302] = 77, 140
    found = find_strokes(photograph(image))[0]
    assert found[100].all()
    assert found[300:302].all()
    assert find_strokes(photograph(image.T))[0][:, 100].all()
    assert found.mean() < 0.012  # of it the lines .006


@pytest.mark.parametrize(("kind", "words"), [("jpeg", "found, as JPEG blurs"), ("png", "found; ")])
def test_of_a_jpeg_without_strokes_it_is_said_that_thin_ones_are_missed(kind, words):
    item = photograph(data.cat())
    with pytest.raises(BadInputError, match=words):
        stroke_pixels(replace(item, record=replace(item.record, source_format=kind)))


def test_found_strokes_are_mended_and_pictures_without_any_say_so(photos):
    _, folder = photos
    image = data.cat()[:120, :160].copy()
    drawn = np.zeros(image.shape[:2], bool)
    drawn[40:44, 20:140] = True
    image[drawn] = 255
    Image.fromarray(image).save(folder / "drawn.png")
    result, files = restored(folder, "auto")
    assert {q.reason.split(";")[0] for q in result.quarantined} == {
        "no stroke, stripe or dead line was found"
    }
    assert set(files) == {"drawn"}
    truth = data.cat()[:120, :160]
    error = np.abs(files["drawn"][drawn].astype(float) - truth[drawn]).mean()
    assert error < 15
    assert (files["drawn"] == image).all(axis=2).mean() > 0.9
