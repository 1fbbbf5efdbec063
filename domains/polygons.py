"""Polygons of GeoJSON round what is to be removed from a scene: people, vehicles, clouds.

Coordinates are those of the scene's own reference system. A file that names its system (the member
"crs", as GDAL writes it) must name that one; a file that does not is taken at its word where its
polygons touch the scene. Source: RFC 7946, and its forerunner of 2008 for "crs".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domains.base import Array, BadInputError, Item

SUFFIX = ".geojson"
MAX_BYTES = 256 * 2**20
KINDS = ("Polygon", "MultiPolygon")


@dataclass(frozen=True)
class Polygons:
    """What a file of polygons says.

    Attributes:
        path: of the file, for messages.
        shapes: GeoJSON geometries, of KINDS.
        crs: name of their reference system, None where the file names none.
    """

    path: Path
    shapes: tuple[dict[str, Any], ...]
    crs: str | None = None


def read_polygons(path: Path) -> Polygons:
    """The polygons of a FeatureCollection.

    Raises:
        BadInputError: naming the file, and what is wrong.
    """
    from rasterio.features import is_valid_geom

    if path.stat().st_size > MAX_BYTES:
        raise BadInputError(f"{path}: over {MAX_BYTES >> 20} MB of polygons; split it")
    try:
        told = json.loads(path.read_text(encoding="utf-8-sig"))
        shapes = tuple(one["geometry"] for one in told["features"])
        kinds = {str(shape["type"]) for shape in shapes}
        whole = all(map(is_valid_geom, shapes))
        crs = told["crs"]["properties"]["name"] if told.get("crs") else None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise BadInputError(
            f"{path}: no GeoJSON of polygons; give a FeatureCollection, as `ogr2ogr -f GeoJSON` "
            "writes it"
        ) from error
    if not shapes:
        raise BadInputError(f"{path}: holds no polygon; give one, or leave the file out")
    if not kinds <= set(KINDS) or not whole:
        raise BadInputError(
            f"{path}: holds shapes that are no whole polygons; give {' and '.join(KINDS)} alone"
        )
    return Polygons(path, shapes, None if crs is None else str(crs))


def inside(polygons: Polygons, item: Item) -> Array:
    """(1 h w), True in every pixel that a polygon touches.

    Raises:
        BadInputError: if the item lies nowhere on the earth, its reference system is another, or
            no polygon touches it.
    """
    from rasterio.features import geometry_mask
    from rasterio.transform import Affine

    geo = item.record.meta.get("geotiff") or {}
    if geo.get("transform") is None:
        raise BadInputError(
            "it has no georeference, and polygons have no pixels; give a GeoTIFF, or boxes in "
            "pixels as .csv"
        )
    _require_same_crs(polygons, geo.get("crs"))
    _, _, h, w = item.record.shape
    transform = Affine(*geo["transform"])
    missing = geometry_mask(polygons.shapes, (h, w), transform, all_touched=True, invert=True)
    if not missing.any():
        x0, y0, x1, y1 = _bounds(polygons)
        corners = np.array([transform @ (x, y) for x in (0, w) for y in (0, h)])
        (left, bottom), (right, top) = corners.min(axis=0), corners.max(axis=0)
        raise BadInputError(
            f"no polygon of {polygons.path.name} lies on it: they span {x0:g} to {x1:g} and "
            f"{y0:g} to {y1:g}, the scene {left:g} to {right:g} and {bottom:g} to {top:g} in its "
            "own reference system; give polygons in that, or leave the scene out"
        )
    return np.asarray(missing)[None]


def _require_same_crs(polygons: Polygons, scene: str | None) -> None:
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    if polygons.crs is None:
        return
    try:
        said = CRS.from_user_input(polygons.crs)
    except CRSError as error:
        raise BadInputError(
            f"{polygons.path.name} names no reference system that is known; name it as EPSG:NUMBER"
        ) from error
    own = None if scene is None else CRS.from_wkt(scene)
    if own is None or said != own:
        theirs, ours = (_name(crs) for crs in (said, own))
        raise BadInputError(
            f"the polygons of {polygons.path.name} are in {theirs}, the scene is in {ours}; "
            f"reproject them, as `ogr2ogr -t_srs {ours}` does"
        )


def _name(crs: Any) -> str:
    if crs is None:
        return "no reference system"
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else str(crs.to_string())[:60]


def _bounds(polygons: Polygons) -> tuple[float, float, float, float]:
    from rasterio.features import bounds

    boxes = np.array([bounds(shape) for shape in polygons.shapes])
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])
