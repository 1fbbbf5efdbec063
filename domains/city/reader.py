"""Reads city images: photographs through scikit-image, TIFF by tifffile, video frames by OpenCV.

Pixels come upright, as every viewer shows them: what EXIF or a TIFF tag says of the orientation is
heeded here, once, and the files written say 1. `meta` of the record tells the writer and the
physics what they need: `value_range` (black and white of the values), `layout` (how a TIFF orders
its axes), `alpha` and `mode` (of a PNG: opaque, bilevel), `kept` (EXIF, colour profile, resolution:
see exif.py), `orientation` (as the file had it, if not 1), `geotiff` (see geotiff.py), `invalid`
(pixels without data: see domains/validity.py).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import Array, BadInputError, Item, ItemRecord
from domains.city import exif
from domains.files import (
    fault_in_words,
    file_digest,
    keyed_id,
    require_file,
    require_finite,
    require_held,
    require_size,
)
from domains.validity import INVALID, unpack

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {
    ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".tif": "tiff", ".tiff": "tiff",
}  # fmt: skip
VIDEO_SUFFIXES = (".mp4", ".avi")
MOST_FRAMES_PER_S = 1000.0
SUFFIXES = (*FORMATS, *VIDEO_SUFFIXES)
BLANK_FOLD = 2000
"""Times that a picture can be larger than its file: blank pages fold well."""
SLACK_BYTES = 1 << 16

_GDAL_NODATA = 42113
"""The TIFF tag that names the value of pixels without data."""
_TIFF_ORIENTATION, _TIFF_PROFILE = 274, 34675
_WHITE_IS_ZERO, _PALETTE, _COLOUR_FILTER = 0, 3, 32803
_OTHER_COLOURS = {5: "CMYK", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32844: "LogL", 32845: "LogLuv"}
"""Colours of a TIFF that are no light as they stand."""
_ALPHA = (1, 2)
"""Kinds of a TIFF's extra samples that are alpha: multiplied into the colours, or not."""


def read(path: Path) -> Item:
    """Read one image (1 frame) or video (z = frames); pixels (c z h w) in the file's dtype.

    Raises:
        BadInputError: if the file cannot be used.
    """
    require_file(path)
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        frames, rate = _read_video(path)
        return _item(path, frames, "video", {"frames_per_s": rate} if rate else {})
    if suffix not in FORMATS:
        raise BadInputError(f"{path}: not an image we read; expected {', '.join(SUFFIXES)}")
    try:
        if FORMATS[suffix] == "tiff":
            pixels, meta = _read_tiff(path)
        else:
            pixels, meta = _read_photograph(path)
    except BadInputError:
        raise
    except Exception as error:
        raise BadInputError(
            f"{path}: not a readable {FORMATS[suffix].upper()} image "
            f"({fault_in_words(error, path)}); export it again"
        ) from error
    return _item(path, pixels, FORMATS[suffix], meta)


def _item(path: Path, pixels: Array, source_format: str, meta: dict[str, Any]) -> Item:
    """Check the pixels (c z h w) and give them a record."""
    if pixels.dtype.kind not in "uif" or pixels.dtype.itemsize > 8:
        raise BadInputError(f"{path}: pixels of type {pixels.dtype.name} are not supported")
    require_finite(path, pixels)
    digest = file_digest(path)
    c, z, h, w = pixels.shape
    seen = _with_data(pixels, meta)
    record = ItemRecord(
        item_id=keyed_id("city", digest, b""),
        domain="city",
        shape=(c, z, h, w),
        dtype=pixels.dtype.name,
        units="intensity",
        source_digest=digest,
        source_format=source_format,
        meta={**meta, "value_range": value_range(seen if seen.size else pixels)},
    )
    return Item(np.ascontiguousarray(pixels), record)


def _with_data(pixels: Array, meta: dict[str, Any]) -> Array:
    """The pixels that hold data, one after the other."""
    if INVALID in meta:
        invalid = unpack(meta[INVALID], pixels.shape[0], *pixels.shape[2:])
        pixels = pixels[:, 0][~np.broadcast_to(invalid, pixels[:, 0].shape)]
    return pixels[pixels != meta["nodata"]] if "nodata" in meta else pixels


def value_range(pixels: Array) -> list[float]:
    """Black and white of the values: invertible, coarse, and never tighter than the data.

    8-bit images span their dtype. Satellites and cameras put 10 to 14 bits into 16, so that
    other whole numbers span the power of two they fit in; fractions within [0, 1] span that.
    """
    if pixels.dtype == np.uint8:
        return [0.0, 255.0]
    low, high = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind == "f" and low >= 0 and high <= 1:
        return [0.0, 1.0]
    num_bits = max(8, int(np.ceil(np.log2(max(abs(low), high, 1.0) + 1))))
    white = 2.0**num_bits - 1
    return [-white if low < 0 else 0.0, white]


def _read_photograph(path: Path) -> tuple[Array, dict[str, Any]]:
    """PNG or JPEG: (c 1 h w), uint8 or uint16."""
    with _open_picture(path) as header:
        mode, (width, height) = header.mode, header.size
        require_size(path, (height, width), (height, width))
        num_bytes = height * width * len(header.getbands())
        require_held(path, num_bytes, compressed=True, fold=BLANK_FOLD)
        if mode in ("CMYK", "YCCK", "LAB", "HSV"):
            raise BadInputError(f"{path}: {mode} colours are not supported; convert it to RGB")
        transparent = "transparency" in header.info
        kept = exif.kept_of({str(k): v for k, v in header.info.items()})
    orientation = exif.orientation_of(header.info.get("exif") or b"")
    image = _decode(path, sixteen_bit_colour=_is_deep_colour_png(path))
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    bands = image[..., None] if image.ndim == 2 else image
    meta: dict[str, Any] = {"mode": "bilevel"} if mode == "1" else {}
    if kept:
        meta["kept"] = kept
    if orientation != 1:
        bands, meta["orientation"] = exif.upright(bands, orientation), orientation
    if bands.shape[2] in (2, 4):
        bands = _without_alpha(path, bands)
        meta["alpha"] = "opaque"
    elif transparent:
        raise BadInputError(f"{path}: it has transparent pixels; save it without transparency")
    return bands.transpose(2, 0, 1)[:, None], meta


def _open_picture(path: Path) -> Image.Image:
    """Read a picture's header through Pillow, which bounds its size."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # Pillow warns at half of the size that it refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path)
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise BadInputError(
            f"{path}: over the limit of {limit} pixels of a photograph; cut it, or save it as TIFF"
        ) from error


def _decode(path: Path, *, sixteen_bit_colour: bool) -> Array:
    """Decode through scikit-image; colour PNGs of 16 bits through OpenCV.

    Pillow, which scikit-image uses, silently reduces those to 8 bits.
    """
    if not sixteen_bit_colour:
        from PIL import Image
        from skimage import io

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return np.asarray(io.imread(path))
    return _decode_with_opencv(path)


def _decode_with_opencv(path: Path) -> Array:
    """(h w) or (h w c), colours in the order RGB(A)."""
    import cv2

    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError("OpenCV cannot decode it")
    return np.asarray(image if image.ndim == 2 else image[..., [2, 1, 0, 3][: image.shape[2]]])


def _is_deep_colour_png(path: Path) -> bool:
    """True if the file is a PNG with 16 bits a sample and more than one sample a pixel."""
    with path.open("rb") as file:
        head = file.read(26)
    return head[:8] == b"\x89PNG\r\n\x1a\n" and head[24] == 16 and head[25] in (2, 4, 6)


def _without_alpha(path: Path, bands: Array) -> Array:
    """Drop an alpha channel that says nothing."""
    if bands[..., -1].min() != np.iinfo(bands.dtype).max:
        raise BadInputError(f"{path}: it has transparent pixels; save it without transparency")
    return bands[..., :-1]


def _read_tiff(path: Path) -> tuple[Array, dict[str, Any]]:
    """TIFF of any number of bands and pages: (c z h w) in the file's dtype.

    Through tifffile, as scikit-image does, but without its guess which axis holds the colours:
    the file says so. What GDAL or a GIS wrote goes through rasterio.
    """
    import tifffile

    from domains.city import geotiff

    with tifffile.TiffFile(path) as tiff:
        series = tiff.series[0]
        first = tiff.pages.first
        axes, shape = series.axes, series.shape
        size = dict(zip(axes, shape, strict=True))
        require_size(path, shape, (size["Y"], size["X"]))
        _require_honest_segments(path, series)
        _require_light(path, first)
        turned = first.photometric == _WHITE_IS_ZERO
        alpha = any(kind in _ALPHA for kind in first.extrasamples)
        one_page = not set(axes) - set("SCYX")
        if one_page and (alpha or any(tag in first.tags for tag in geotiff.TAGS)):
            if turned:
                raise BadInputError(f"{path}: a scene whose white is 0; save it with black as 0")
            return geotiff.read(path)
        if alpha:
            raise BadInputError(f"{path}: pages with an alpha channel; save them without it")
        nodata = _nodata(first.tags.get(_GDAL_NODATA))
        kept, orientation = _tiff_kept(first)
        try:
            image = np.asarray(series.asarray())
        except ValueError as error:
            if "imagecodecs" not in str(error) or any(a not in "YXS" for a in axes):
                raise
            # tifffile needs imagecodecs for LZW and other compressions; OpenCV has them.
            image, turned = _decode_with_opencv(path), turned and first.bitspersample > 8
    image = image.reshape(shape)
    bands = [a for a in axes if a in "SC"]
    pages = [a for a in axes if a not in "SCYX"]
    if len(bands) > 1 or len(pages) > 1:
        raise BadInputError(f"{path}: axes {axes} are not one image; export one image per file")
    order = [axes.index(a) for a in (*bands, *pages, "Y", "X")]
    pixels = image.transpose(order)
    if not bands:
        pixels = pixels[None]
    if not pages:
        pixels = pixels[:, None]
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if turned:
        pixels, nodata = _black_is_zero(path, pixels, nodata, first.bitspersample)
    layout = "planar" if bands and axes.index(bands[0]) < axes.index("Y") else "interleaved"
    meta: dict[str, Any] = {"layout": layout, **nodata}
    if kept:
        meta["kept"] = kept
    if orientation != 1:
        pixels = exif.upright(pixels.transpose(2, 3, 0, 1), orientation).transpose(2, 3, 0, 1)
        meta["orientation"] = orientation
    return pixels, meta


def _require_light(path: Path, page: Any) -> None:
    """Refuse a TIFF whose values are numbers of colours, or colours that are not light."""
    kind = int(page.photometric)
    if kind == _PALETTE:
        raise BadInputError(
            f"{path}: its values are numbers of classes or colours (a palette), which cannot be "
            "restored as light; convert it to RGB"
        )
    if kind in _OTHER_COLOURS:
        raise BadInputError(
            f"{path}: {_OTHER_COLOURS[kind]} colours are not supported; convert it to RGB"
        )
    if kind == _COLOUR_FILTER:
        raise BadInputError(
            f"{path}: a camera's raw mosaic, whose neighbours are of unlike colours; develop it "
            "to RGB"
        )


def _black_is_zero(
    path: Path, pixels: Array, nodata: dict[str, float], bits: int
) -> tuple[Array, dict[str, float]]:
    """Light of values that fall with it, as faxes and scanners write them, and its no-data value.

    It is written with black as 0, which every viewer shows the same.
    """
    if pixels.dtype.kind != "u":
        raise BadInputError(
            f"{path}: its white is 0, and its values are {pixels.dtype.name}, so that its black is "
            "not known; save it with black as 0"
        )
    white = np.iinfo(pixels.dtype).max if bits == 1 else 2**bits - 1
    turned = (white - pixels).astype(pixels.dtype)
    return turned, {name: white - value for name, value in nodata.items()}


def _tiff_kept(page: Any) -> tuple[dict[str, str], int]:
    """Profile and resolution of a page as `meta` has them, and its orientation."""
    profile, orientation = page.tags.get(_TIFF_PROFILE), page.tags.get(_TIFF_ORIENTATION)
    info: dict[str, Any] = {"icc_profile": None if profile is None else profile.value}
    if "XResolution" in page.tags and page.resolutionunit in (2, 3):
        per_inch = 1.0 if page.resolutionunit == 2 else 2.54
        info["dpi"] = tuple(dots * per_inch for dots in page.resolution)
    told = 1 if orientation is None else int(orientation.value)
    return exif.kept_of(info), told if 1 <= told <= 8 else 1


def _require_honest_segments(path: Path, series: Any) -> None:
    """Refuse a TIFF whose stored strips or tiles are far more, or far less, than its pixels."""
    stored = sum(sum(page.databytecounts) for page in series.pages if page is not None)
    bits = sum(page.size * page.bitspersample for page in series.pages if page is not None)
    require_held(path, bits // 8, compressed=True, fold=BLANK_FOLD)
    if stored > bits // 4 + SLACK_BYTES:
        raise BadInputError(
            f"{path}: it stores {stored / 1e6:.3g} MB for {bits / 8e6:.3g} MB of pixels, which is "
            "no image; export it again"
        )


def _nodata(tag: Any) -> dict[str, float]:
    """The no-data value that GDAL wrote as text, where it is a number other than 0."""
    try:
        value = float(str(tag.value).strip(" \0"))
    except (AttributeError, ValueError):
        return {}
    return {"nodata": value} if np.isfinite(value) and value else {}


def _read_video(path: Path) -> tuple[Array, float]:
    """All frames of a video, (3 z h w) uint8, RGB; and how many a second, 0 if it does not say."""
    import cv2

    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise BadInputError(f"{path}: not a readable video; export it again")
        props = (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH)
        z, h, w = (int(capture.get(prop)) for prop in props)
        require_size(path, (z, h, w, 3), (h, w))
        rate = float(capture.get(cv2.CAP_PROP_FPS))
        frames = []
        while True:
            found, frame = capture.read()
            if not found:
                break
            frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()
    if not frames:
        raise BadInputError(f"{path}: the video has no readable frame; export it again")
    return np.stack(frames).transpose(3, 0, 1, 2), rate if 0 < rate <= MOST_FRAMES_PER_S else 0.0
