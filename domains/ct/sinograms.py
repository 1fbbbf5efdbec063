"""Sinograms as scanners leave them: NumPy or HDF5, and a geometry beside them in JSON.

    SCAN.npy           (views bins) or (z views bins), real numbers
    SCAN.h5            the same as dataset "sinogram"
    SCAN.json          the geometry; of an HDF5 file it may stand in its attribute "geometry"

    {"beam": "parallel",            or "fan": then source_mm (source to the centre of rotation) and
                                    detector_mm (source to the flat detector)
     "angles_degrees": [0, 1, ...], or "num_views" and "arc_degrees", which divide it from 0
     "bin_mm": 1.2,                 width of a detector element
     "offset_mm": 0.0,              of the detector's middle from the central ray
     "values": "line-integrals",    or "counts", which want counts_per_ray
     "counts_per_ray": 100000,      I0, photons a ray through air
     "electronic_counts": 0,        standard deviation of the read-out noise
     "water_per_mm": 0.02,          attenuation of water, what HU are reckoned from
     "image": {"height": 512, "width": 512, "pixel_mm": [0.7, 0.7]},   default: the field of view
     "slice_mm": 1.0}

Values that are NaN were not measured: dead elements, traces of metal. With "find_lying_bins": true
elements that stand out from their neighbours, which make rings, count as not measured too.
Angles and detector run as geometry.py says. Where line integrals state no counts_per_ray it is
estimated from how far neighbouring views differ, which takes fine structure for noise: state it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from domains.base import Array, BadInputError, ItemRecord, Measurement
from domains.ct.unmeasured import lying_bins
from domains.files import MAX_PIXELS, fault_in_words, files_digest, keyed_id, require_file
from domains.hdf5 import own_dataset, require_stored, text_attribute

SUFFIXES = (".npy", ".h5", ".hdf5")
DATASET, GEOMETRY = "sinogram", "geometry"
MOST_ANGLES = 100_000
MAX_SIDE = 4096
_FEWEST_COUNTS, _MOST_COUNTS = 1e2, 1e8
_MAD = 1.4826
"""A normal variable's standard deviation over its median absolute deviation."""


class ImageGrid(BaseModel):
    """The image that is wanted."""

    model_config = ConfigDict(extra="forbid")
    height: int = Field(ge=16, le=MAX_SIDE)
    width: int = Field(ge=16, le=MAX_SIDE)
    pixel_mm: tuple[float, float]


class ScanGeometry(BaseModel):
    """The JSON beside a sinogram; see the module."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    beam: str = Field(pattern="^(parallel|fan)$")
    angles_degrees: list[float] | None = Field(None, min_length=1, max_length=MOST_ANGLES)
    num_views: int | None = Field(None, ge=1, le=MOST_ANGLES)
    arc_degrees: float | None = Field(None, gt=0, le=360)
    bin_mm: float = Field(gt=0, le=1e3)
    offset_mm: float = Field(0.0, ge=-1e4, le=1e4)
    source_mm: float | None = Field(None, gt=0, le=1e6)
    detector_mm: float | None = Field(None, gt=0, le=1e6)
    values: str = Field("line-integrals", pattern="^(line-integrals|counts)$")
    counts_per_ray: float | None = Field(None, gt=0)
    electronic_counts: float = Field(0.0, ge=0)
    water_per_mm: float = Field(0.02, gt=0, lt=1)
    image: ImageGrid | None = None
    slice_mm: float = Field(1.0, gt=0)
    find_lying_bins: bool = False

    @property
    def magnification(self) -> float:
        """Of the centre of rotation on the detector."""
        if self.beam == "parallel" or self.source_mm is None or self.detector_mm is None:
            return 1.0
        return self.detector_mm / self.source_mm


def companions(path: Path) -> tuple[Path, ...]:
    """The geometry beside a sinogram, where there is one."""
    beside = path.with_suffix(".json")
    return (beside,) if beside.is_file() else ()


def measured(path: Path) -> Measurement:
    """Read a sinogram as the measurement of an image in HU.

    Returns:
        y (z 1 views bins) float32: line integrals.

    Raises:
        BadInputError: if the file or its geometry cannot be used.
    """
    require_file(path)
    try:
        values, text = _read_hdf5(path) if path.suffix != ".npy" else (_read_numpy(path), None)
    except BadInputError:
        raise
    except Exception as error:
        raise BadInputError(
            f"{path}: no sinogram can be read from it ({fault_in_words(error)}); export it again"
        ) from error
    geometry = _geometry(path, text)
    z, views, bins = values.shape
    angles = _angles(path, geometry, views)
    known = np.isfinite(values)
    y, noise = _line_integrals(path, np.where(known, values, np.median(values[known])), geometry)
    if geometry.find_lying_bins:
        known &= ~lying_bins(y, known)[:, None]
    arrays = {} if known.all() else {"mask": known[:, None]}
    height, width, pixel_mm = _grid(geometry, bins)
    digest = files_digest([path, *companions(path)])
    params: dict[str, Any] = {
        "num_views": views,
        "arc_degrees": _arc(angles),
        "angles_degrees": angles,
        "num_bins": bins,
        "bin_mm": geometry.bin_mm,
        "offset_mm": geometry.offset_mm,
        "water_per_mm": geometry.water_per_mm,
    }
    if geometry.beam == "fan":
        params |= {"source_mm": geometry.source_mm, "detector_mm": geometry.detector_mm}
    return Measurement(
        record=ItemRecord(
            item_id=keyed_id("ct", digest, b""),
            domain="ct",
            shape=(1, z, height, width),
            dtype="float32",
            units="HU",
            source_digest=digest,
            source_format="sinogram",
            spacing_mm=(geometry.slice_mm, *pixel_mm),
        ),
        task="given",
        operator=f"{geometry.beam}-beam",
        params=params,
        noise=noise,
        y=np.where(known, y, 0)[:, None],
        arrays=arrays,
    )


def _read_numpy(path: Path) -> Array:
    return _checked(path, np.load(path, allow_pickle=False, mmap_mode="r"))


def _read_hdf5(path: Path) -> tuple[Array, str | None]:
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        data = own_dataset(path, file, DATASET)
        if data is None:
            raise BadInputError(f"{path}: holds no dataset '{DATASET}' of its own; save it as such")
        texts = (text_attribute(path, holder, GEOMETRY) for holder in (data, file))
        return _checked(path, data), next((text for text in texts if text is not None), None)


def _checked(path: Path, data: Any) -> Array:
    """(z views bins) float64 of an array that is looked at before it is read."""
    size = " x ".join(str(n) for n in data.shape)
    if data.dtype.kind not in "iuf":
        raise BadInputError(f"{path}: a sinogram holds real numbers, not {data.dtype.name}")
    if len(data.shape) not in (2, 3) or 0 in data.shape or math.prod(data.shape) > MAX_PIXELS // 4:
        raise BadInputError(
            f"{path}: {size} is no sinogram; give (views, bins) or (slices, views, bins), "
            f"{MAX_PIXELS // 4} values or fewer"
        )
    if hasattr(data, "id"):  # of HDF5
        require_stored(path, data, data.nbytes)
    values = np.asarray(data[...], np.float64)
    num_bad = np.count_nonzero(np.isinf(values))
    if num_bad or np.isnan(values).all():
        raise BadInputError(
            f"{path}: {num_bad} of its values are infinite, or all are NaN; replace them (NaN is "
            "for what was not measured)"
        )
    return values if values.ndim == 3 else values[None]


def _geometry(path: Path, text: str | None) -> ScanGeometry:
    beside = path.with_suffix(".json")
    if text is None:
        if not beside.is_file():
            raise BadInputError(f"{path}: no geometry beside it; write {beside.name} (see README)")
        if beside.stat().st_size > 1 << 24:
            raise BadInputError(f"{beside}: too large for a geometry; check the file")
        text = beside.read_text(encoding="utf-8", errors="replace")
    try:
        geometry = ScanGeometry.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise BadInputError(
            f"{path}: its geometry cannot be used: {place}: {first['msg'].lower()}"
        ) from None
    fault = _fault(geometry)
    if fault:
        raise BadInputError(f"{path}: its geometry {fault}")
    return geometry


def _fault(geometry: ScanGeometry) -> str:
    """What a geometry lacks, in words; "" if nothing."""
    if geometry.beam == "fan" and (geometry.source_mm is None or geometry.detector_mm is None):
        return "is of a fan and states no source_mm and detector_mm; add them"
    if geometry.angles_degrees is None and None in (geometry.num_views, geometry.arc_degrees):
        return "states no angles; add angles_degrees, or num_views and arc_degrees"
    if geometry.values == "counts" and geometry.counts_per_ray is None:
        return "is of counts and states no counts_per_ray; add the counts of a ray through air"
    return ""


def _angles(path: Path, geometry: ScanGeometry, views: int) -> list[float]:
    angles = geometry.angles_degrees
    if angles is None:
        count, arc = geometry.num_views or 0, geometry.arc_degrees or 0.0
        angles = [arc * view / count for view in range(count)]
    if len(angles) != views:
        raise BadInputError(
            f"{path}: {views} views, and its geometry has {len(angles)} angles; they must agree"
        )
    return angles


def _arc(angles: list[float]) -> float:
    """Degrees that the views stand for: their span and one step more, at most a turn."""
    if len(angles) == 1:
        return 180.0
    span = max(angles) - min(angles)
    return float(min(span * len(angles) / (len(angles) - 1), 360.0)) or 360.0


def _line_integrals(
    path: Path, values: Array, geometry: ScanGeometry
) -> tuple[Array, Mapping[str, Any]]:
    """(z views bins) float32, and the noise model."""
    from domains.ct.degradations import log_transform

    counts = geometry.counts_per_ray
    if geometry.values == "counts" and counts is not None:
        if values.max() > 2 * counts:
            raise BadInputError(
                f"{path}: counts reach {values.max():.4g} where air has counts_per_ray "
                f"{counts:.4g}; check both"
            )
        values = log_transform(values, counts)
    known = counts is not None
    if counts is None:
        counts = estimated_counts(values)
    noise = {
        "kind": "poisson",
        "counts_per_ray": float(counts),
        "electronic_counts": geometry.electronic_counts,
        **({} if known else {"estimated": True}),
    }
    return values.astype(np.float32), noise


def estimated_counts(line_integrals: Array) -> float:
    """I0 of line integrals (z views bins), from the second differences of neighbouring views.

    Var(p) = exp(p) / I0, so that exp(-p / 2) times a second difference over sqrt(6) has variance
    1 / I0 where the scan is smooth from view to view. Structure makes it too small: cautious.
    """
    if line_integrals.shape[1] < 3:
        return 1e5
    second = np.diff(line_integrals, n=2, axis=1) / math.sqrt(6)
    scaled = second * np.exp(-line_integrals[:, 1:-1] / 2)
    spread = _MAD * float(np.median(np.abs(scaled - np.median(scaled))))
    return float(np.clip(1 / max(spread, 1e-9) ** 2, _FEWEST_COUNTS, _MOST_COUNTS))


def _grid(geometry: ScanGeometry, bins: int) -> tuple[int, int, tuple[float, float]]:
    """(height, width, pixel_mm): as stated, or a square about the field of view."""
    if geometry.image is not None:
        return geometry.image.height, geometry.image.width, geometry.image.pixel_mm
    seen_mm = (bins * geometry.bin_mm - 2 * abs(geometry.offset_mm)) / geometry.magnification
    pixel = geometry.bin_mm / geometry.magnification
    side = min(max(16, math.ceil(max(seen_mm, pixel) / pixel)), MAX_SIDE)
    return side, side, (pixel, pixel)


def dump_geometry(geometry: ScanGeometry) -> str:
    """The JSON of a geometry, without what was not set."""
    return json.dumps(geometry.model_dump(exclude_none=True, exclude_unset=True), indent=1)
