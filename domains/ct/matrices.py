"""Projector matrices on disk: built once a geometry, memory-mapped read-only by every worker.

A matrix is kept as plain .npy arrays, so that the processes of a node share one copy in the page
cache. It is written view by view: building takes one view's memory, and the transpose's own size.
Beside the arrays stand their hashes, which every process checks once: a bit that flipped would be
in every image, under keys that know of no cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from platformdirs import user_cache_path
from scipy.sparse import csr_array

from diffusion_core.disk import sync
from domains.base import Array, BadInputError
from domains.ct.footprints import view_columns
from domains.ct.geometry import Geometry

STALE_S = 3600.0
SUMS = "sha256.json"
_PARTS = ("data", "indices", "indptr")
_LARGEST = int(np.iinfo(np.int32).max)
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


def matrix_pair(geometry: Geometry, views: Sequence[int]) -> tuple[csr_array, csr_array]:
    """The matrix of some views (views * bins, h * w) and its transpose, mapped from the cache.

    Args:
        geometry: of the scan.
        views: numbers of the views, as `Geometry.angle` takes them.

    Raises:
        BadInputError: if the cache cannot be written, or the matrix would be too large.
    """
    return _mapped(geometry, tuple(views), cache_dir())


@lru_cache(maxsize=8)
def _mapped(geometry: Geometry, views: tuple[int, ...], root: Path) -> tuple[csr_array, csr_array]:
    folder = folder_of(geometry, views, root)
    if not folder.is_dir():
        _store(geometry, views, folder)
    try:
        return _load(geometry, views, folder)
    except (OSError, ValueError, EOFError):  # of an older version, cut short, or damaged since
        shutil.rmtree(folder, ignore_errors=True)
        _store(geometry, views, folder)
        return _load(geometry, views, folder)


def folder_of(geometry: Geometry, views: Sequence[int], root: Path) -> Path:
    """The folder of a matrix; one of all views has the geometry's own name."""
    if list(views) == list(range(geometry.num_views)):
        return root / geometry.digest
    chosen = hashlib.sha256(json.dumps(list(views)).encode()).hexdigest()
    return root / f"{geometry.digest}-{chosen[:12]}"


def _store(geometry: Geometry, views: Sequence[int], folder: Path) -> None:
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
        build(geometry, views, staging)
        shape = _shape(geometry, views)
        transpose = _side(staging, "forward", shape).T.tocsr()
        for part in _PARTS:
            np.save(staging / f"transpose-{part}.npy", getattr(transpose, part))
        (staging / "geometry.json").write_text(json.dumps(asdict(geometry), indent=1))
        sums = {name: _sha256(staging / name) for name in _names()}
        (staging / SUMS).write_text(json.dumps(sums, indent=1))
        for path in [*staging.iterdir(), staging]:
            sync(path)
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def build(geometry: Geometry, views: Sequence[int], folder: Path) -> None:
    """Write the matrix, compressed rows of float32, one view after the other.

    Raises:
        BadInputError: if it has more entries than 32-bit indices can count.
    """
    indptr, count = [np.zeros(1, np.int32)], 0
    with (
        (folder / "forward-data.npy").open("wb") as data,
        (folder / "forward-indices.npy").open("wb") as indices,
    ):
        _write_header(data, np.float32, 0)
        _write_header(indices, np.int32, 0)
        for view in views:
            rows = view_columns(geometry, geometry.angle(view)).tocsr()
            if count + rows.nnz > _LARGEST:
                raise BadInputError(
                    f"a projector of {geometry.num_views} views of {geometry.height} x "
                    f"{geometry.width} pixels is too large to be stored; use fewer views or a "
                    "smaller image"
                )
            rows.data.astype(np.float32).tofile(data)
            rows.indices.astype(np.int32).tofile(indices)
            indptr.append((rows.indptr[1:] + count).astype(np.int32))
            count += rows.nnz
        _write_header(data, np.float32, count)
        _write_header(indices, np.int32, count)
    np.save(folder / "forward-indptr.npy", np.concatenate(indptr))


def _write_header(file: BinaryIO, dtype: Any, count: int) -> None:
    """The header of a vector at the file's start; numpy leaves it room for any length."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count,)}
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header)


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


def _names() -> list[str]:
    return [f"{side}-{part}.npy" for side in ("forward", "transpose") for part in _PARTS]


def _sha256(path: Path) -> str:
    """Read part by part: what is mapped would count as this process's memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(folder: Path) -> None:
    """Raise ValueError if the arrays are not those that were built."""
    sums = json.loads((folder / SUMS).read_text())
    if sums != {name: _sha256(folder / name) for name in _names()}:
        raise ValueError(f"{folder}: a projector is damaged")


def _load(geometry: Geometry, views: Sequence[int], folder: Path) -> tuple[csr_array, csr_array]:
    _check(folder)
    rows, columns = _shape(geometry, views)
    return _side(folder, "forward", (rows, columns)), _side(folder, "transpose", (columns, rows))


def _shape(geometry: Geometry, views: Sequence[int]) -> tuple[int, int]:
    return len(views) * geometry.num_bins, geometry.height * geometry.width


def _side(folder: Path, side: str, shape: tuple[int, int]) -> csr_array:
    return csr_array(tuple(_parts(folder, side)), shape=shape, copy=False)


def _parts(folder: Path, side: str) -> Iterator[Array]:
    for part in _PARTS:
        yield np.load(folder / f"{side}-{part}.npy", mmap_mode="r")
