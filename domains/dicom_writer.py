"""Restored items back to DICOM: a derived series beside its source, in the same study.

What is kept is the source's own: patient, study, frame of reference, planes, rescale, window,
padding. What is new says so: UIDs made of the content, so that the same restoration gives the same
bytes; ImageType DERIVED; what was done, with which model, to which images. Private elements and
what describes the old pixels (extremes, icons, signatures, times of creation) are left out.
Source: DICOM PS3.3, C.7.6.1 (general image), C.12.1 (SOP common), C.8.16 (enhanced CT and MR).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import numpy as np

from domains import dicom
from domains.base import Array, BadInputError, ItemRecord, ReadBox
from domains.dicom_derived import (
    Provenance,
    as_stored,
    derive,
    derive_groups,
    save,
    set_pixels,
)
from domains.dicom_grid import Grid
from domains.dicom_series import Series, series_of, stored_frames
from domains.files import files_digest

if TYPE_CHECKING:
    from pydicom import Dataset

_SAME_MM = 1e-3


def write_series(
    record: ItemRecord, read: ReadBox, stem: Path, source: Path, provenance: Provenance
) -> Path | None:
    """Write an item as a series derived from the one that it was read from.

    Args:
        record: of the item; finer in the plane or with slices between is allowed.
        read: gives a box of its pixels; slices are read one at a time.
        stem: of the file, or of the folder of a series of several files.
        source: file or folder of the series, unchanged since.
        provenance: of the pixels.

    Returns:
        `stem`.dcm of a series of one file, else the folder `stem`; None if the source's kind
        (a multi-frame file on another grid, slices that state no plane) cannot hold the item.

    Raises:
        BadInputError: if the source is gone or was changed.
    """
    series = series_of(source, None)
    if files_digest(series.files) != record.source_digest:
        raise BadInputError(f"{source}: the series was changed since it was read; restore it again")
    volume = _Volume(record, read)
    affine = volume.affine
    with dicom.discreet():
        if _multi_frame(series):
            return _write_multi_frame(volume, affine, stem, series, provenance)
        if len(volume) > 1 and affine is None:
            return None
        return _write_slices(volume, affine, stem, series, provenance)


class _Volume:
    """A restored volume slice by slice, as the source has its slices.

    Attributes:
        shape: (slices, rows, columns).
        affine: 4x4, LPS mm, of array axes (column, row, slice); None where there is none.
    """

    def __init__(self, record: ItemRecord, read: ReadBox) -> None:
        from nibabel import orientations

        from domains.medical import turn_of

        _, z, h, w = record.shape
        lengths = (w, h, z)
        self._read, self._turn = read, turn_of(record)
        self._axis = int(np.flatnonzero(self._turn[:, 0] == 2)[0])  # of canonical (x, y, z)
        stored = [0, 0, 0]
        for (axis, _), length in zip(self._turn, lengths, strict=True):
            stored[int(axis)] = length
        self.shape = (stored[2], stored[1], stored[0])
        self.affine: Array | None = None
        if record.affine is not None:
            to_source = orientations.inv_ornt_aff(self._turn, lengths)
            self.affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.array(record.affine) @ to_source

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, k: int) -> Array:
        """Slice k: (rows columns)."""
        from nibabel import orientations

        forwards = self._turn[self._axis, 1] > 0
        index = k if forwards else len(self) - 1 - k
        box = [slice(None)] * 3
        box[2 - self._axis] = slice(index, index + 1)
        plane = self._read(*box)[0].transpose(2, 1, 0)
        flat = self._turn.copy()
        flat[self._axis, 1] = 1
        return np.ascontiguousarray(orientations.apply_orientation(plane, flat)[..., 0].T)

    @property
    def digest(self) -> str:
        """Sha256 of the pixels."""
        code = hashlib.sha256(str(self.shape).encode())
        for k in range(len(self)):
            code.update(np.ascontiguousarray(self[k], np.float32).tobytes())
        return code.hexdigest()


def _multi_frame(series: Series) -> bool:
    return "NumberOfFrames" in dicom.read_header(series.lead, ["NumberOfFrames"])


def _uid(*parts: object) -> str:
    """A UID made of its content: 2.25 and the number of a UUID (PS3.5, B.2)."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    return f"2.25.{UUID(bytes=digest[:16], version=4).int}"


def _series_uid(volume: _Volume, series: Series, provenance: Provenance) -> str:
    return _uid("series", files_digest(series.files), volume.digest, provenance)


# --- one file a slice ------------------------------------------------------------------------


def _write_slices(
    volume: _Volume, affine: Array | None, stem: Path, series: Series, provenance: Provenance
) -> Path:
    grid = series.grid
    series_uid = _series_uid(volume, series, provenance)
    places = _source_places(volume, affine, grid)
    numbers = _numbers(grid, places)
    single = len(volume) == 1
    if not single:
        stem.mkdir()
    for k, (nearest, here) in enumerate(places):
        frame = grid.frames[nearest[0]]
        dataset = dicom.read_whole(frame.path)
        before = dicom.decode(frame.path, dataset)[frame.index] if here else None
        sources = [grid.frames[i] for i in nearest]
        derive(dataset, sources, series_uid, _uid("sop", series_uid, k), provenance)
        dataset.InstanceNumber = numbers[k]
        if not here and affine is not None:
            _set_plane(dataset, affine, k, volume.shape[1:], grid)
        if affine is not None and len(places) > grid.num_places:
            _set_thickness(dataset, affine, grid)
        set_pixels(dataset, as_stored(volume[k], frame, dataset, before)[None])
        target = stem.with_name(stem.name + ".dcm") if single else stem / f"{k + 1:05d}.dcm"
        save(dataset, target)
    return stem.with_name(stem.name + ".dcm") if single else stem


def _source_places(
    volume: _Volume, affine: Array | None, grid: Grid
) -> list[tuple[tuple[int, ...], bool]]:
    """Of each slice the source's frames that it comes from, and whether it is on its grid."""
    first = grid.frames[0]
    same_size = volume.shape[1:] == first.rows_columns
    if affine is None or first.position is None:
        return [((k,), same_size) for k in range(len(volume))]
    normal = first.normal
    along = np.array([frame.corner @ normal for frame in grid.frames])
    tolerance = _tolerance(affine, grid)
    places: list[tuple[tuple[int, ...], bool]] = []
    for k in range(len(volume)):
        corner = (affine @ (0, 0, k, 1))[:3]
        distance = np.abs(along - corner @ normal)
        nearest = int(distance.argmin())
        off = float(np.linalg.norm(grid.frames[nearest].corner - corner))
        here = same_size and off < tolerance
        if here or distance[nearest] < _SAME_MM or len(along) == 1:
            places.append(((nearest,), here))
        else:
            beside = sorted(np.argsort(distance)[:2].tolist(), key=lambda i: distance[i])
            places.append((tuple(beside), False))
    return places


def _tolerance(affine: Array, grid: Grid) -> float:
    """How far a frame may be from its place on the even grid and be the same, mm."""
    step = grid.spacing_mm[0] if grid.spacing_mm else 1.0
    thinner = _step(affine, grid) or step
    return 0.1 * min(step, thinner) + _SAME_MM


def _numbers(grid: Grid, places: Sequence[tuple[tuple[int, ...], bool]]) -> list[int]:
    """InstanceNumbers: the source's where every slice is one of its own, or else counted."""
    own = [grid.frames[nearest[0]].number for nearest, _ in places]
    if len(set(own)) == len(own):
        return own
    downwards = grid.frames[0].number > grid.frames[-1].number
    return [len(own) - k if downwards else k + 1 for k in range(len(own))]


def _set_plane(
    dataset: Dataset,
    affine: Array,
    k: int,
    rows_columns: tuple[int, ...],
    grid: Grid,
) -> None:
    """Where a slice lies that the source does not have."""
    position = (affine @ (0, 0, k, 1))[:3]
    dataset.ImagePositionPatient = [_decimal(v) for v in position]
    across, down = (float(np.linalg.norm(affine[:3, axis])) for axis in (0, 1))
    if rows_columns != grid.frames[0].rows_columns:
        dataset.PixelSpacing = [_decimal(down), _decimal(across)]
    if "SliceLocation" in dataset:
        shift = (position - grid.frames[0].corner) @ grid.frames[0].normal
        start = float(dicom.read_header(grid.frames[0].path, ["SliceLocation"]).SliceLocation)
        dataset.SliceLocation = _decimal(start + _direction(grid) * float(shift))


def _set_thickness(dataset: Dataset, affine: Array, grid: Grid) -> None:
    """Of slices that are thinner than the source's."""
    step = _step(affine, grid)
    dataset.SliceThickness = _decimal(step)
    if "SpacingBetweenSlices" in dataset:
        dataset.SpacingBetweenSlices = _decimal(step)


def _step(affine: Array, grid: Grid) -> float:
    """From slice to slice along the normal, mm."""
    return abs(float(affine[:3, 2] @ grid.frames[0].normal))


def _direction(grid: Grid) -> float:
    """1 where the source's SliceLocation rises along the normal, else -1."""
    first, last = (dicom.read_header(grid.frames[i].path, ["SliceLocation"]) for i in (0, -1))
    if "SliceLocation" not in first or "SliceLocation" not in last:
        return 1.0
    return -1.0 if float(last.SliceLocation) < float(first.SliceLocation) else 1.0


def _decimal(value: float) -> str:
    """A decimal string of at most 16 characters (PS3.5, VR DS)."""
    from pydicom.valuerep import format_number_as_ds

    return format_number_as_ds(float(np.round(value, 9)) + 0.0)


# --- all frames in one file ------------------------------------------------------------------


def _write_multi_frame(
    volume: _Volume, affine: Array | None, stem: Path, series: Series, provenance: Provenance
) -> Path | None:
    grid = series.grid
    places = _source_places(volume, affine, grid)
    if not all(here for _, here in places) or grid.doubles or len(volume) != len(grid.frames):
        return None
    stored = stored_frames(grid.frames, series.lead)
    dataset = dicom.read_whole(series.lead)
    source_series = str(dataset.SeriesInstanceUID)
    series_uid = _series_uid(volume, series, provenance)
    derive(dataset, grid.frames[:1], series_uid, _uid("sop", series_uid, 0), provenance)
    derive_groups(dataset, source_series, provenance)
    pixels: list[Array] = [np.empty(0)] * len(grid.frames)
    for k, ((index, *_), _) in enumerate(places):
        frame = grid.frames[index]
        pixels[frame.index] = as_stored(volume[k], frame, dataset, stored[frame])
    set_pixels(dataset, np.stack(pixels))
    target = stem.with_name(stem.name + ".dcm")
    save(dataset, target)
    return target
