"""Polygons of GeoJSON as masks of scenes: the pixels that they touch, and what does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from scipy.ndimage import binary_dilation
from skimage.measure import points_in_poly

from domains.base import BadInputError
from domains.city import reader
from domains.polygons import inside, read_polygons
from flows.api_restore import restore
from flows.config import ComputeSettings, MethodSettings, RestoreSettings

CRS, PLACE = "EPSG:32633", rasterio.Affine(0.5, 0, 400000, 0, -0.5, 5800000)
TURNED = PLACE @ rasterio.Affine.rotation(30)
CAR = [(400003.2, 5799990.1), (400007.9, 5799991.3), (400006.0, 5799996.7)]
ROOF = [(400012.0, 5799985.0), (400018.0, 5799985.0), (400018.0, 5799993.0), (400012.0, 5799993.0)]
SKYLIGHT = [(400013.1, 5799986.1), (400016.9, 5799986.1), (400016.9, 5799991.9)]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))


def scene(path, transform=PLACE, crs=CRS, **more):
    pixels = np.random.default_rng(0).integers(1, 255, (3, 48, 56)).astype("u1")
    how = {"driver": "GTiff", "count": 3, "height": 48, "width": 56, "dtype": "uint8"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **how, transform=transform, crs=crs, **more) as file:
        file.write(pixels)
    return path


def collection(path, *geometries, crs=None):
    features = [{"type": "Feature", "properties": {}, "geometry": g} for g in geometries]
    told = {"type": "FeatureCollection", "features": features}
    if crs is not None:
        told["crs"] = {"type": "name", "properties": {"name": crs}}
    path.write_text(json.dumps(told))
    return path


def polygon(*rings):
    return {"type": "Polygon", "coordinates": [[*ring, ring[0]] for ring in rings]}


def touched(transform, points_per_side, *rings):
    """By another library: the pixels with a point inside; a ring inside another is a hole."""
    side = (np.arange(points_per_side) + 0.5) / points_per_side
    y, x = np.meshgrid(np.add.outer(np.arange(48), side), np.add.outer(np.arange(56), side),
                       indexing="ij")  # fmt: skip
    points = np.stack(transform @ (x.ravel(), y.ravel()), axis=1)
    inner = np.zeros(len(points), bool)
    for ring in rings:
        inner ^= points_in_poly(points, ring)
    return inner.reshape(48, points_per_side, 56, points_per_side).any(axis=(1, 3))


@pytest.mark.parametrize("transform", [PLACE, TURNED], ids=["north up", "turned"])
def test_every_pixel_that_a_polygon_touches_is_missing_and_its_holes_are_not(tmp_path, transform):
    item = reader.read(scene(tmp_path / "a.tif", transform))
    several = {"type": "MultiPolygon", "coordinates": [polygon(ROOF, SKYLIGHT)["coordinates"]]}
    name = "urn:ogc:def:crs:EPSG::32633"
    told = read_polygons(collection(tmp_path / "p.geojson", polygon(CAR), several, crs=name))
    missing = inside(told, item)[0]
    expected = touched(transform, 9, CAR, ROOF, SKYLIGHT)
    assert expected.sum() > 100
    assert not (expected & ~missing).any(), "a pixel that is touched stays"
    assert not (missing & ~binary_dilation(expected)).any(), "a pixel far from all is taken"
    hole = touched(transform, 1, SKYLIGHT) & ~binary_dilation(expected)
    assert hole.any()
    assert not (missing & hole).any()


@pytest.mark.parametrize(
    ("shape", "crs", "reason"),
    [
        (
            polygon(CAR),
            "EPSG:4326",
            r"are in EPSG:4326, the scene is in EPSG:32633; reproject them",
        ),
        (
            polygon([(15.0, 52.0), (15.1, 52.0), (15.1, 52.1)]),
            None,
            r"span 15 to 15\.1 and 52 to 52\.1",
        ),
        (polygon(CAR), "no such thing", "names no reference system that is known"),
    ],
)
def test_polygons_elsewhere_are_told_in_one_sentence(tmp_path, shape, crs, reason):
    item = reader.read(scene(tmp_path / "a.tif"))
    with pytest.raises(BadInputError, match=reason) as error:
        inside(read_polygons(collection(tmp_path / "p.geojson", shape, crs=crs)), item)
    assert str(tmp_path) not in str(error.value), "reasons are recorded"
    assert "\n" not in str(error.value)


def test_a_picture_that_lies_nowhere_has_no_polygons(tmp_path):
    from evaluation_kit import picture
    from PIL import Image

    Image.fromarray(picture(0, (3, 1, 40, 48))[:, 0].transpose(1, 2, 0)).save(tmp_path / "a.png")
    told = read_polygons(collection(tmp_path / "p.geojson", polygon(CAR)))
    with pytest.raises(BadInputError, match="no georeference"):
        inside(told, reader.read(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "no GeoJSON"),
        ("[]", "no GeoJSON"),
        ('{"type": "FeatureCollection", "features": [{"geometry": null}]}', "no GeoJSON"),
        ('{"type": "FeatureCollection", "features": []}', "holds no polygon"),
        (
            '{"features": [{"geometry": {"type": "Point", "coordinates": [1, 2]}}]}',
            "no whole polygons",
        ),
        (
            '{"features": [{"geometry": {"type": "Polygon", "coordinates": [[[1, 2], [1, 2]]]}}]}',
            "no whole polygons",
        ),
    ],
)
def test_a_file_that_holds_no_polygons_is_told_by_its_name(tmp_path, text, reason):
    path = tmp_path / "p.geojson"
    path.write_text(text)
    with pytest.raises(BadInputError, match=reason) as error:
        read_polygons(path)
    assert str(error.value).startswith(f"{path}: ")


def test_what_polygons_cover_is_restored_and_all_else_stays(tmp_path):
    path = scene(tmp_path / "scenes" / "a.tif")
    far = scene(tmp_path / "scenes" / "far.tif", rasterio.Affine(0.5, 0, 500000, 0, -0.5, 5800000))
    boxes = collection(tmp_path / "boxes.geojson", polygon(ROOF))
    settings = RestoreSettings(
        input=tmp_path / "scenes",
        output=tmp_path / "out",
        domain="city",
        mask=str(boxes),
        method=MethodSettings(name="telea", kind="baseline"),
        compute=ComputeSettings(executor="inline"),
    )
    result = restore(settings)
    (left_out,) = result.quarantined
    assert left_out.source == far
    assert "no polygon of boxes.geojson lies on it" in left_out.reason
    (written,) = result.files
    missing = inside(read_polygons(boxes), reader.read(path))[0]
    with rasterio.open(written) as ours, rasterio.open(path) as theirs:
        assert (ours.crs, ours.transform) == (theirs.crs, theirs.transform)
        before, after = theirs.read(), ours.read()
    np.testing.assert_array_equal(after[:, ~missing], before[:, ~missing])
    assert (after[:, missing] != before[:, missing]).mean() > 0.5
