"""GeoTIFF and COG through rasterio: everything that a georeferenced file says beside its pixels.

What is kept stands in `meta["geotiff"]` of the record: reference system, transform, ground control
points, rational polynomials, no-data value, names, units and colours of bands, tags, and how the
file is laid out. Windows of the image and larger images of it move the georeference along. Files
beside the image (.aux.xml, .ovr, .tfw) are not read: an item is what its bytes say.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from domains.base import Array, BadInputError, ItemRecord
from domains.files import require_size
from domains.validity import INVALID, may_be_light, pack, unpack

TAGS = frozenset({33550, 33922, 34264, 34735, 42112, 42113, 50844})
"""TIFF tags of GeoTIFF and GDAL: scale, tie points, transform, keys, metadata, no data, RPC."""
WINDOW_PX = 512
NODATA_IS_NAN = "nan"

_LOSSLESS = frozenset({"deflate", "lzw", "zstd", "packbits", "lzma"})
_OWN_NAMESPACES = frozenset({"IMAGE_STRUCTURE", "DERIVED_SUBDATASETS", "COLOR_PROFILE", "RPC"})
_NAMING = frozenset({"TIFFTAG_ARTIST", "TIFFTAG_HOSTCOMPUTER", "TIFFTAG_IMAGEDESCRIPTION"})
"""What names people, or is free text, in a picture that lies nowhere on the earth."""

BigReader = Callable[[slice, slice, slice], Array]
"""(z, y, x) -> pixels (c z h w) in the dtype that is written."""


@contextmanager
def _gdal() -> Iterator[Any]:
    """Rasterio with GDAL kept to one file: it lists no folder, writes no side file, asks no net."""
    import rasterio

    options = {
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        "GDAL_PAM_ENABLED": "NO",
        "GDAL_TIFF_INTERNAL_MASK": "YES",
        "GDAL_HTTP_MAX_RETRY": "0",
    }
    with rasterio.Env(**options), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield rasterio


def read(path: Path) -> tuple[Array, dict[str, Any]]:
    """A GeoTIFF's pixels (c 1 h w) in its dtype, and `meta` for the record.

    An alpha band becomes the pixels without data, and no band.

    Raises:
        BadInputError: if its values are no intensities, or no pixel has data.
    """
    with _gdal() as rasterio, rasterio.open(path.resolve(), driver="GTiff") as source:
        require_size(path, (source.count, source.height, source.width), source.shape)
        colours = [band.name for band in source.colorinterp]
        if "palette" in colours:
            raise BadInputError(
                f"{path}: its values are numbers of classes or colours (a palette), which cannot "
                "be restored as light; convert it to RGB"
            )
        bands = [number for number, name in enumerate(colours, start=1) if name != "alpha"]
        pixels = source.read(bands)
        geo = _facts(source, bands)
        invalid = _invalid(path, source, colours, pixels, geo)
    planar = len(bands) > 1 and geo["layout"].get("interleave") == "band"
    meta: dict[str, Any] = {"layout": "planar" if planar else "interleaved", "geotiff": geo}
    if isinstance(geo["nodata"], float) and geo["nodata"]:
        meta["nodata"] = geo["nodata"]
    if invalid is not None:
        if invalid.all():
            raise BadInputError(f"{path}: not one pixel has data; leave it out")
        meta[INVALID] = pack(invalid)
        invalid = np.broadcast_to(invalid, pixels.shape)
        if pixels.dtype.kind == "f":
            # What stands for NaN must be a number, and tells nothing: the mask does.
            lost = invalid & ~np.isfinite(pixels)
            pixels[lost] = np.median(pixels[~invalid])
    return pixels[:, None], meta


def _facts(source: Any, bands: Sequence[int]) -> dict[str, Any]:
    """What `write` needs of an open file, JSON-able; lists of bands without alpha."""
    points, points_crs = source.gcps
    spaces = [n for n in source.tag_namespaces() if n not in _OWN_NAMESPACES and "xml:" not in n]
    nodata = source.nodata
    georeferenced = source.crs is not None or not source.transform.is_identity
    tags = source.tags()
    if not (georeferenced or points):
        tags = {name: value for name, value in tags.items() if name not in _NAMING}

    def chosen(values: Sequence[Any]) -> list[Any]:
        return [values[number - 1] for number in bands]

    return {
        "shape": list(source.shape),
        "crs": source.crs.to_wkt() if source.crs else None,
        "transform": list(source.transform)[:6] if georeferenced else None,
        "gcps": [[p.row, p.col, p.x, p.y, p.z] for p in points],
        "gcps_crs": points_crs.to_wkt() if points and points_crs else None,
        "nodata": NODATA_IS_NAN if nodata is not None and np.isnan(nodata) else nodata,
        "alpha": "alpha" in [c.name for c in source.colorinterp],
        "colours": chosen([c.name for c in source.colorinterp]),
        "descriptions": chosen(source.descriptions),
        "units": chosen(source.units),
        "scales": chosen(source.scales),
        "offsets": chosen(source.offsets),
        "tags": {"": tags, **{name: source.tags(ns=name) for name in spaces}},
        "band_tags": [_lasting(source.tags(number)) for number in bands],
        "rpc": source.tags(ns="RPC"),
        "icc": source.tags(ns="COLOR_PROFILE").get("SOURCE_ICC_PROFILE"),
        "layout": _layout(source),
    }


def _lasting(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags of a band but the statistics of pixels that will be others."""
    return {k: v for k, v in tags.items() if not k.startswith("STATISTICS_")}


def _layout(source: Any) -> dict[str, Any]:
    profile, structure = source.profile, source.tags(ns="IMAGE_STRUCTURE")
    overviews = source.overviews(1)
    tiled = bool(profile.get("tiled"))
    return {
        # A tiled file with overviews is one in all but the order of its parts.
        "cog": structure.get("LAYOUT") == "COG" or (tiled and bool(overviews)),
        "overviews": overviews,
        "tile": [profile["blockysize"], profile["blockxsize"]] if tiled else None,
        "interleave": profile.get("interleave", "pixel"),
        "compress": str(profile.get("compress", "")).lower(),
        "predictor": structure.get("PREDICTOR"),
    }


def _invalid(
    path: Path, source: Any, colours: Sequence[str], pixels: Array, geo: dict[str, Any]
) -> Array | None:
    """Pixels (1|c h w) that alpha, a mask of the file, or NaN says to hold no data."""
    from rasterio.enums import MaskFlags

    if geo["alpha"]:
        alpha = source.read(colours.index("alpha") + 1)
        top = np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1.0
        if not np.isin(alpha, (0, top)).all():
            raise BadInputError(
                f"{path}: it has half-transparent pixels; make its alpha band 0 or {top:g}"
            )
        return np.asarray(alpha == 0)[None] if (alpha == 0).any() else None
    if source.mask_flag_enums[0] == [MaskFlags.per_dataset]:
        geo["mask"] = True
        mask = np.asarray(source.dataset_mask() == 0)[None]
        return mask if mask.any() else None
    if geo["nodata"] == NODATA_IS_NAN and pixels.dtype.kind == "f":
        lost = np.isnan(pixels)
        if (lost == lost[:1]).all():
            lost = lost[:1]
        return lost if lost.any() else None
    return None


def write(record: ItemRecord, dtype: np.dtype[np.generic], read: BigReader, stem: Path) -> Path:
    """Write a GeoTIFF as its source was: a COG if that was one, window by window.

    Args:
        record: of the item; its `meta["geotiff"]` is of `read` here.
        dtype: of the pixels.
        read: gives a box of them.
        stem: of the path.
    """
    geo, path = record.meta["geotiff"], stem.with_name(stem.name + ".tif")
    if not geo["layout"]["cog"]:
        with _gdal() as rasterio:
            _write_tiff(rasterio, record, dtype, read, path)
        return path
    draft = stem.with_name(stem.name + ".draft.tif")
    try:
        with _gdal() as rasterio:
            _write_tiff(rasterio, record, dtype, read, draft)
            rasterio.shutil.copy(draft, path, driver="COG", **_cog_options(geo, record.shape))
    finally:
        draft.unlink(missing_ok=True)
    return path


def _cog_options(geo: Mapping[str, Any], shape: Sequence[int]) -> dict[str, Any]:
    layout = geo["layout"]
    tile = (layout["tile"] or [WINDOW_PX])[0]
    overviews = layout["overviews"] or max(shape[2:]) > tile
    return {
        "COMPRESS": _compression(layout).upper(),
        "BLOCKSIZE": tile,
        "OVERVIEWS": "AUTO" if overviews else "NONE",
        "OVERVIEW_RESAMPLING": "AVERAGE",
        "BIGTIFF": "IF_SAFER",
    }


def _compression(layout: Mapping[str, Any]) -> str:
    """As the source, if that keeps every value: a second lossy pass would undo a restoration."""
    return layout["compress"] if layout["compress"] in _LOSSLESS else "deflate"


def _write_tiff(
    rasterio: Any, record: ItemRecord, dtype: np.dtype[np.generic], read: BigReader, path: Path
) -> None:
    geo = record.meta["geotiff"]
    c, _, h, w = record.shape
    invalid = None
    if INVALID in record.meta:
        invalid = _enlarged(unpack(record.meta[INVALID], c, *_source_size(record)), (h, w))
    options = _creation_options(geo, dtype, c)
    with rasterio.open(path, "w", height=h, width=w, dtype=dtype.name, **options) as target:
        _describe(rasterio, target, record)
        for y in range(0, h, WINDOW_PX):
            for x in range(0, w, WINDOW_PX):
                rows, columns = slice(y, min(y + WINDOW_PX, h)), slice(x, min(x + WINDOW_PX, w))
                box = read(slice(0, 1), rows, columns)[:, 0].copy()
                lost = None if invalid is None else invalid[:, rows, columns]
                window = rasterio.windows.Window.from_slices(rows, columns)
                _write_window(target, geo, box, lost, window)


def _write_window(
    target: Any, geo: Mapping[str, Any], box: Array, lost: Array | None, window: Any
) -> None:
    """Write (c h w) with what the file says of pixels without data."""
    if geo["nodata"] is not None:
        box = _marked(box, lost, geo)
    target.write(box, list(range(1, len(box) + 1)), window=window)
    if not (geo["alpha"] or geo.get("mask")):
        return
    there = np.ones(box.shape[1:], bool) if lost is None else ~lost.any(axis=0)
    if geo["alpha"]:
        top = np.iinfo(box.dtype).max if box.dtype.kind in "iu" else 1
        target.write((there * box.dtype.type(top)).astype(box.dtype), len(box) + 1, window=window)
    else:
        target.write_mask(there, window=window)


def _marked(box: Array, lost: Array | None, geo: Mapping[str, Any]) -> Array:
    """(c h w) with the no-data value where there is none, and nowhere that was restored."""
    value = box.dtype.type(geo["nodata"])
    if geo.get("filled"):
        alike = box == value
        if may_be_light(value, box.dtype):
            alike = alike.all(axis=0, keepdims=True)
        box[: len(alike)] = np.where(alike, _beside(value), box[: len(alike)])
    if lost is not None and not (geo["alpha"] or geo.get("mask")):
        box = np.where(np.broadcast_to(lost, box.shape), value, box)
    return box


def _beside(value: Any) -> Any:
    """The value next to one, on the side of 0."""
    if value.dtype.kind == "f":
        return np.nextafter(value, value.dtype.type(value == 0))
    return value - 1 if value > 0 else value + 1


def _creation_options(
    geo: Mapping[str, Any], dtype: np.dtype[np.generic], num_bands: int
) -> dict[str, Any]:
    layout = geo["layout"]
    options: dict[str, Any] = {
        "driver": "GTiff",
        "count": num_bands + geo["alpha"],
        "interleave": layout["interleave"],
        "compress": _compression(layout),
        "BIGTIFF": "IF_SAFER",
    }
    if layout["tile"]:
        options |= {"tiled": True}
        options |= {"blockysize": layout["tile"][0], "blockxsize": layout["tile"][1]}
    if layout["predictor"] and (layout["predictor"] == "3") == (dtype.kind == "f"):
        options["predictor"] = layout["predictor"]
    if geo["colours"][:3] == ["red", "green", "blue"]:
        options["photometric"] = "RGB"
    if geo["alpha"]:
        options["ALPHA"] = "YES"
    if geo["icc"]:
        options["SOURCE_ICC_PROFILE"] = geo["icc"]
    return options


def _describe(rasterio: Any, target: Any, record: ItemRecord) -> None:
    """Put back what the source said beside its pixels, moved to the window and size of ours."""
    geo = record.meta["geotiff"]
    (top, left), fine = _origin(record), record.shape[2] / _source_size(record)[0]
    if geo["crs"]:
        target.crs = rasterio.crs.CRS.from_wkt(geo["crs"])
    if geo["transform"]:
        a, b, c, d, e, f = geo["transform"]
        c, f = c + a * left + b * top, f + d * left + e * top
        target.transform = rasterio.Affine(a / fine, b / fine, c, d / fine, e / fine, f)
    if geo["gcps"]:
        point = rasterio.control.GroundControlPoint
        points = [
            point(row=(row - top) * fine, col=(column - left) * fine, x=x, y=y, z=z)
            for row, column, x, y, z in geo["gcps"]
        ]
        target.gcps = (points, rasterio.crs.CRS.from_wkt(geo["gcps_crs"] or ""))
    if geo["nodata"] is not None:
        target.nodata = float(geo["nodata"])
    colours = [*geo["colours"], *(["alpha"] if geo["alpha"] else [])]
    target.colorinterp = [rasterio.enums.ColorInterp[name] for name in colours]
    for number, description in enumerate(geo["descriptions"], start=1):
        if description:
            target.set_band_description(number, description)
        target.set_band_unit(number, geo["units"][number - 1] or "")
        target.update_tags(number, **geo["band_tags"][number - 1])
    target.scales = [*geo["scales"], *([1.0] if geo["alpha"] else [])]
    target.offsets = [*geo["offsets"], *([0.0] if geo["alpha"] else [])]
    for name, tags in geo["tags"].items():
        target.update_tags(ns=name or None, **tags)
    if geo["rpc"]:
        target.update_tags(ns="RPC", **_moved_rpc(geo["rpc"], (top, left), fine))


def _source_size(record: ItemRecord) -> tuple[int, int]:
    """(h, w) that the image of the record has in pixels of its source: of the window, if cut."""
    crop = record.meta.get("crop")
    height, width = crop[2:] if crop else record.meta["geotiff"]["shape"]
    return int(height), int(width)


def _origin(record: ItemRecord) -> tuple[int, int]:
    top, left = (record.meta.get("crop") or (0, 0))[:2]
    return int(top), int(left)


def _moved_rpc(rpc: Mapping[str, str], origin: tuple[int, int], fine: float) -> dict[str, str]:
    """Rational polynomials of a window and a finer grid: line and sample are affine in them.

    Source: GDAL's RPC metadata domain (RFC 22): the centre of the first pixel has line 0.
    """
    moved = dict(rpc)
    for name, start in zip(("LINE", "SAMP"), origin, strict=True):
        offset, scale = float(rpc[f"{name}_OFF"]), float(rpc[f"{name}_SCALE"])
        if (start, fine) != (0, 1):
            moved[f"{name}_OFF"] = repr((offset - start + 0.5) * fine - 0.5)
            moved[f"{name}_SCALE"] = repr(scale * fine)
    return moved


def _enlarged(invalid: Array, size: tuple[int, int]) -> Array:
    """(1|c h w) on a finer grid of whole multiples."""
    factors = [fine // coarse for fine, coarse in zip(size, invalid.shape[1:], strict=True)]
    return invalid.repeat(factors[0], axis=1).repeat(factors[1], axis=2)
