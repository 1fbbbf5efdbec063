"""The parallel-beam projector: exact strip integrals in mm, as a cached sparse matrix.

A square pixel seen from angle theta casts a trapezoid on the detector: the convolution of two
boxes as wide as |dx cos theta| and |dy sin theta|. An entry of the matrix is the part of that
trapezoid's area (dx dy in all) that falls on a detector bin, divided by the bin's width: the line
integral through the pixel, in mm, averaged over the bin. Source: De Man and Basu 2004,
doi:10.1088/0031-9155/49/11/024 (its exact parallel-beam special case).

A matrix is built once a geometry and kept on disk as plain .npy arrays that are memory-mapped, so
that the worker processes of a node share one copy in the page cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, final

import numpy as np
from platformdirs import user_cache_path
from scipy.sparse import csc_array, csr_array

from diffusion_core.operators.sparse import Sparse
from domains.base import Array, BadInputError

PROJECTOR_VERSION = 1
"""Part of the cache key: raise it when the entries of the matrix change."""

STALE_S = 3600.0
_PARTS = ("data", "indices", "indptr")
_cache_dir: Path | None = None


def set_cache_dir(path: Path | None) -> None:
    """Keep projectors under `path`; None returns to SASHIKO_CACHE or the user's cache."""
    global _cache_dir
    _cache_dir = path


def cache_dir() -> Path:
    """Where projectors are kept."""
    if _cache_dir is not None:
        return _cache_dir
    home = os.environ.get("SASHIKO_CACHE")
    return (Path(home) if home else user_cache_path("sashiko")) / "projectors"


@dataclass(frozen=True)
class ParallelGeometry:
    """Where the pixels and the detector bins are, in mm about the centre of rotation.

    Pixel (row i, column j) has its centre at x = (j - (w - 1) / 2) dx, y = (i - (h - 1) / 2) dy;
    the view at angle theta sees it at s = x cos theta + y sin theta; bins are centred about s = 0.

    Attributes:
        height: of the image, pixels.
        width: of the image, pixels.
        pixel_mm: (dy, dx).
        num_views: number of angles.
        arc_degrees: they divide this arc evenly, its end excluded: theta_i = i arc / num_views.
        num_bins: of the detector.
        bin_mm: width of a bin.
    """

    height: int
    width: int
    pixel_mm: tuple[float, float]
    num_views: int
    arc_degrees: float
    num_bins: int
    bin_mm: float

    @classmethod
    def covering(
        cls,
        height: int,
        width: int,
        pixel_mm: tuple[float, float],
        num_views: int,
        arc_degrees: float,
    ) -> ParallelGeometry:
        """The detector covers the image's diagonal with bins as wide as the (smaller) spacing."""
        bin_mm = min(pixel_mm)
        diagonal_mm = math.hypot(height * pixel_mm[0], width * pixel_mm[1])
        num_bins = math.ceil(diagonal_mm / bin_mm)
        return cls(height, width, pixel_mm, num_views, arc_degrees, num_bins, bin_mm)

    @property
    def angles(self) -> Array:
        """Radians, (num_views,)."""
        return np.radians(self.arc_degrees) * np.arange(self.num_views) / self.num_views

    @property
    def bin_centres_mm(self) -> Array:
        """Detector coordinate s of each bin's centre, (num_bins,)."""
        return (np.arange(self.num_bins) - (self.num_bins - 1) / 2) * self.bin_mm

    @property
    def digest(self) -> str:
        """Names the matrix in the cache."""
        text = json.dumps({"version": PROJECTOR_VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@final
class ParallelBeam(Sparse):
    """scale times the line integrals of an image: y is (b, c, views, bins), mm times x's unit.

    Attributes:
        geometry: of pixels and detector.
    """

    kind: ClassVar[str] = "parallel-beam"

    def __init__(self, geometry: ParallelGeometry, scale: float = 1.0) -> None:
        """Takes the matrix from the cache, or builds it (seconds) and leaves it there."""
        matrix, transpose = projector(geometry)
        image_shape = (geometry.height, geometry.width)
        super().__init__(
            matrix, transpose, image_shape, (geometry.num_views, geometry.num_bins), scale
        )
        self.geometry = geometry


def view_columns(geometry: ParallelGeometry, theta: float) -> csc_array:
    """One view as (num_bins, h * w), compressed columns: a pixel's few bins lie side by side."""
    dy, dx = geometry.pixel_mm
    halves = abs(dx * math.cos(theta)) / 2, abs(dy * math.sin(theta)) / 2
    wide, narrow = max(halves), min(halves)
    x = (np.arange(geometry.width) - (geometry.width - 1) / 2) * (dx * math.cos(theta))
    y = (np.arange(geometry.height) - (geometry.height - 1) / 2) * (dy * math.sin(theta))
    s = (y[:, None] + x[None, :]).ravel()
    left = -geometry.num_bins * geometry.bin_mm / 2
    first = np.floor((s - (wide + narrow) - left) / geometry.bin_mm).astype(np.int32)
    num_touched = math.floor(2 * (wide + narrow) / geometry.bin_mm) + 2
    weights = np.empty((s.size, num_touched), np.float32)
    edge = left + first * geometry.bin_mm - s
    below = _trapezoid_cdf(edge, wide, narrow)
    for j in range(num_touched):
        above = _trapezoid_cdf(edge + (j + 1) * geometry.bin_mm, wide, narrow)
        weights[:, j] = (above - below) * (dx * dy / geometry.bin_mm)
        below = above
    bins = first[:, None] + np.arange(num_touched, dtype=np.int32)
    # Rounding leaves specks of weight outside the footprint, and outside the detector's edge.
    kept = (weights > 1e-6 * max(dx, dy)) & (bins >= 0) & (bins < geometry.num_bins)
    indptr = np.zeros(s.size + 1, np.int32)
    np.cumsum(kept.sum(axis=1), out=indptr[1:])
    return csc_array((weights[kept], bins[kept], indptr), shape=(geometry.num_bins, s.size))


def _trapezoid_cdf(s: Array, wide: float, narrow: float) -> Array:
    """Share left of s of a trapezoid about 0: boxes of half-width wide >= narrow, convolved."""
    inner, outer = wide - narrow, wide + narrow
    r = np.minimum(np.abs(s), outer)
    share = np.minimum(r, inner) / (2 * wide)
    if narrow > 1e-9 * wide:
        # The flank: density falls linearly from 1 / (2 wide) at inner to 0 at outer.
        depth = np.maximum(r - inner, 0.0)
        share += depth * (1 - depth / (4 * narrow)) / (2 * wide)
    return 0.5 + np.copysign(share, s)


def build(geometry: ParallelGeometry) -> csr_array:
    """The whole matrix in memory: (views * bins, h * w), compressed rows, float32."""
    views = [view_columns(geometry, theta).tocsr() for theta in geometry.angles]
    counts = np.cumsum([0] + [view.nnz for view in views])
    if counts[-1] > np.iinfo(np.int32).max:
        raise BadInputError(
            f"a projector of {geometry.num_views} views of {geometry.height} x {geometry.width} "
            "pixels is too large to be stored; use fewer views or a smaller image"
        )
    data = np.concatenate([view.data for view in views])
    indices = np.concatenate([view.indices for view in views])
    starts = zip(views, counts[:-1], strict=True)
    indptr = np.concatenate([v.indptr[:-1] + start for v, start in starts] + [counts[-1:]])
    shape = (geometry.num_views * geometry.num_bins, geometry.height * geometry.width)
    return csr_array((data, indices.astype(np.int32), indptr.astype(np.int32)), shape=shape)


def projector(geometry: ParallelGeometry) -> tuple[csr_array, csr_array]:
    """The matrix and its transpose, memory-mapped from the cache; built if it is not there.

    Raises:
        BadInputError: if the cache cannot be written.
    """
    return _mapped(geometry, cache_dir())


@lru_cache(maxsize=8)
def _mapped(geometry: ParallelGeometry, root: Path) -> tuple[csr_array, csr_array]:
    folder = root / geometry.digest
    if not folder.is_dir():
        _store(geometry, folder)
    try:
        return _load(geometry, folder)
    except (OSError, ValueError, EOFError):  # cut short by a full disk, or damaged since
        shutil.rmtree(folder, ignore_errors=True)
        _store(geometry, folder)
        return _load(geometry, folder)


def _store(geometry: ParallelGeometry, folder: Path) -> None:
    """Build into a folder of our own, then rename: another process may do the same."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        staging = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise BadInputError(
            f"{folder.parent}: the projector cache cannot be written ({error.strerror}); "
            "set SASHIKO_CACHE to a writable folder"
        ) from error
    try:
        matrix = build(geometry)
        _save(matrix, staging, "forward")
        _save(matrix.T.tocsr(), staging, "transpose")
        (staging / "geometry.json").write_text(json.dumps(asdict(geometry), indent=1))
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Remove what killed builders left behind; a build takes seconds, never an hour."""
    for left in root.glob(".building-*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > STALE_S:
            shutil.rmtree(left, ignore_errors=True)


def _publish(staging: Path, folder: Path) -> None:
    """Rename; where another process was first, keep its equal matrix."""
    try:
        staging.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _save(matrix: csr_array, folder: Path, side: str) -> None:
    for part in _PARTS:
        np.save(folder / f"{side}-{part}.npy", getattr(matrix, part))


def _load(geometry: ParallelGeometry, folder: Path) -> tuple[csr_array, csr_array]:
    rows, columns = geometry.num_views * geometry.num_bins, geometry.height * geometry.width
    forward, transpose = (
        csr_array(tuple(_parts(folder, side)), shape=shape, copy=False)
        for side, shape in (("forward", (rows, columns)), ("transpose", (columns, rows)))
    )
    return forward, transpose


def _parts(folder: Path, side: str) -> Iterator[Array]:
    for part in _PARTS:
        yield np.load(folder / f"{side}-{part}.npy", mmap_mode="r")
