"""DICOM series to items: which files belong together, and their slices as one volume.

A file stands for the series that it and its neighbours in the same folder make: the files of one
SeriesInstanceUID, of one size, plane and kind of image; acquisitions that lie on the same places
are items of their own. A folder stands for the one series that it holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domains import dicom
from domains.base import Array, BadInputError, Item, ItemRecord
from domains.dicom_grid import Frame, Grid, grid_of
from domains.files import code_of, file_digest, files_digest, keyed_id, require_size

if TYPE_CHECKING:
    from pydicom import Dataset

_KEY_TAGS = [
    "SeriesInstanceUID", "Rows", "Columns", "ImageType", "ImageOrientationPatient", "EchoTime",
    "ImagePositionPatient", "AcquisitionNumber", "TemporalPositionIdentifier", "SOPInstanceUID",
    "DiffusionBValue", "NumberOfFrames", "InstanceNumber",
]  # fmt: skip
_MODALITIES = (
    "CR", "CT", "DX", "ECG", "IVUS", "MG", "MR", "NM", "OCT", "OT", "PR", "PT", "REG", "RF",
    "RTDOSE", "RTIMAGE", "RTPLAN", "RTSTRUCT", "SC", "SEG", "SM", "SR", "US", "XA",
)  # fmt: skip
"""Those that are told; a value of no such kind may be anything, a name too (PS3.3, C.7.3.1.1.1)."""
_SPLIT_BY = ("AcquisitionNumber", "TemporalPositionIdentifier", "DiffusionBValue", "EchoTime")
"""What may tell slices on the same places apart."""

OTHER_PLANE = 0.01
"""Direction cosines of slices that differ by more make another series, as those of a scout do."""

_KINDS_OF_IMAGE = 3
"""Values of ImageType that tell a scout from a slice and a phase from a magnitude."""


@dataclass(frozen=True, eq=False)
class Series:
    """The frames of one item, and the files they lie in.

    Attributes:
        lead: the file that stands for all.
        files: sorted by name.
        grid: their frames in order.
    """

    lead: Path
    files: tuple[Path, ...]
    grid: Grid


@dataclass(frozen=True)
class _Listed:
    """What sorts a file into its series."""

    path: Path
    key: tuple[Any, ...]
    position: tuple[float, ...] | None
    uid: str
    marks: tuple[Any, ...]
    orientation: tuple[float, ...] = ()


def leads(files: Sequence[Path]) -> list[Path]:
    """Of files the ones that stand for an item: all but the further files of a series."""
    return sorted({members_of(path)[0] if _in_series(path) else path for path in files})


def _in_series(path: Path) -> bool:
    return not path.is_symlink() and dicom.is_dicom(path)


def members_of(path: Path) -> tuple[Path, ...]:
    """The files of the series that a file belongs to, sorted by name; itself alone if unreadable.

    Args:
        path: a file, or a folder of one series.

    Raises:
        BadInputError: if a folder holds none, or several.
    """
    folder = path if path.is_dir() else path.parent
    stats = [(p, p.stat()) for p in sorted(folder.iterdir()) if p.is_file() and not p.is_symlink()]
    state = tuple((p.name, s.st_mtime_ns, s.st_size) for p, s in stats)
    series = _series_in(folder, state)
    if path.is_dir():
        if len(series) != 1:
            raise BadInputError(
                f"{path}: holds {len(series)} DICOM series where one is wanted; give the folder "
                "of one, or a file of it"
            )
        return series[0]
    return next((files for files in series if path in files), (path,))


@lru_cache(maxsize=64)
def _series_in(
    folder: Path, state: tuple[tuple[str, int, int], ...]
) -> tuple[tuple[Path, ...], ...]:
    """The series of a folder in this state, each as its files."""
    groups: dict[tuple[Any, ...], list[_Listed]] = defaultdict(list)
    for name, _, _ in state:
        path = folder / name
        if not name.startswith(".") and dicom.is_dicom(path):
            listed = _listed(path)
            groups[listed.key].append(listed)
    return tuple(
        tuple(sorted(item.path for item in part))
        for group in groups.values()
        for plane in _by_plane(group)
        for part in _without_overlaps(plane)
    )


def _by_plane(group: list[_Listed]) -> list[list[_Listed]]:
    """Split a group by the directions of its planes; what scanners round differently is one."""
    planes: list[list[_Listed]] = []
    for item in group:
        for plane in planes:
            first = plane[0].orientation
            if len(first) == len(item.orientation) and np.allclose(
                first, item.orientation, rtol=0, atol=OTHER_PLANE
            ):
                plane.append(item)
                break
        else:
            planes.append([item])
    return planes


def _listed(path: Path) -> _Listed:
    """Sort a file by its header; what cannot be read, and a multi-frame file, is by itself."""
    try:
        header = dicom.read_header(path, _KEY_TAGS)
        with dicom.discreet():
            uid = str(header.get("SeriesInstanceUID") or "")
            if not uid or header.get("NumberOfFrames") is not None:
                return _Listed(path, (str(path),), None, "", ())
            orientation = tuple(float(v) for v in header.get("ImageOrientationPatient") or ())
            kind = [str(v) for v in header.get("ImageType") or ()][:_KINDS_OF_IMAGE]
            size = (int(header.get("Rows", 0)), int(header.get("Columns", 0)))
            position = header.get("ImagePositionPatient")
            return _Listed(
                path,
                (uid, size, tuple(kind)),
                None if position is None else tuple(round(float(v), 3) for v in position),
                str(header.get("SOPInstanceUID", "")),
                tuple(str(header.get(tag, "")) for tag in _SPLIT_BY),
                orientation,
            )
    except Exception:  # pydicom converts values late, and raises as it likes; reading will tell
        return _Listed(path, (str(path),), None, "", ())


def _without_overlaps(group: list[_Listed]) -> list[list[_Listed]]:
    """Split a group where an acquisition, an echo ... tells slices on the same places apart."""
    distinct = {item.uid: item for item in group}
    places = {item.position for item in distinct.values()}
    if len(places) == len(distinct):
        return [group]
    for number in range(len(_SPLIT_BY)):
        parts: dict[Any, list[_Listed]] = defaultdict(list)
        for item in group:
            parts[item.marks[number]].append(item)
        if len(parts) > 1 and all(_apart(part) for part in parts.values()):
            return list(parts.values())
    return [group]


def _apart(part: list[_Listed]) -> bool:
    uids = {item.uid for item in part}
    return len(uids) == len({item.position for item in part if item.position is not None})


def series_of(path: Path, modality: str | None) -> Series:
    """The series that a file or folder stands for, in order; no pixel is read.

    Args:
        path: file or folder.
        modality: that is wanted ("CT", "MR"); None takes any.

    Raises:
        BadInputError: if it cannot be used.
    """
    files = members_of(path)
    frames = [frame for file in files for frame in _frames(file, path, modality)]
    if modality == "CT" and not all(frame.rescale_stated for frame in frames):
        raise BadInputError(
            f"{path}: it states no rescale slope and intercept, so that its values are not known "
            "in HU; export it again"
        )
    grid = grid_of(frames, path)
    _, rows, columns = (grid.num_places, *grid.frames[0].rows_columns)
    require_size(path, (rows, columns, grid.num_places), (rows, columns))
    return Series(files[0], files, grid)


def _frames(file: Path, name: Path, modality: str | None) -> list[Frame]:
    """The frames of one file, as its header has them; `name` is for messages."""
    header = dicom.read_header(file)
    try:
        with dicom.discreet():
            dicom.stored_of(file, header)
            if modality is not None:
                _require_modality(name, header, modality)
            if "PerFrameFunctionalGroupsSequence" in header:
                return _enhanced_frames(file, header)
            if dicom.num_frames(header) > 1:  # in their order, nobody knows where
                count = range(dicom.num_frames(header))
                return [_frame(file, index, header, {}, header, header) for index in count]
            return [_frame(file, 0, header, header, header, header)]
    except BadInputError as error:
        if file != name:  # names of files may tell of people; the series is what is refused
            reason = str(error).removeprefix(f"{file}: ").removeprefix(f"{name}: ")
            raise BadInputError(f"{name}: {_which(file)}: {reason}") from None
        raise
    except Exception:
        which = "" if file == name else f"{_which(file)}: "
        raise BadInputError(
            f"{name}: {which}its header is damaged (position, spacing or rescale cannot be read); "
            "export it again"
        ) from None


def _which(file: Path) -> str:
    """A file of a series by its content, for who is told of the series by another file's name."""
    return f"its file with {code_of(file_digest(file))}"


def _require_modality(name: Path, header: Dataset, modality: str) -> None:
    found = str(header.get("Modality") or "")
    if found != modality:
        known = found if found in _MODALITIES else "another"
        raise BadInputError(
            f"{name}: its modality is {known}, not {modality}; choose another --domain, or leave "
            "it out"
        )
    if "LOCALIZER" in [str(v) for v in header.get("ImageType") or ()]:
        raise BadInputError(f"{name}: a localizer, a projection and no slice; leave it out")


def _enhanced_frames(file: Path, header: Dataset) -> list[Frame]:
    shared = header.get("SharedFunctionalGroupsSequence") or [{}]
    frames = []
    for index, own in enumerate(header.PerFrameFunctionalGroupsSequence):

        def part(name: str, own: Any = own) -> Any:
            return (own.get(name) or shared[0].get(name) or [{}])[0]

        frames.append(
            _frame(
                file,
                index,
                header,
                {**_elements(part("PlanePositionSequence"), "ImagePositionPatient"),
                 **_elements(part("PlaneOrientationSequence"), "ImageOrientationPatient")},
                part("PixelMeasuresSequence"),
                part("PixelValueTransformationSequence"),
            )
        )  # fmt: skip
    if len(frames) != dicom.num_frames(header):
        raise BadInputError(f"{file}: it does not describe each of its frames; export it again")
    return frames


def _elements(group: Any, *names: str) -> dict[str, Any]:
    return {name: group.get(name) for name in names}


def _frame(
    file: Path, index: int, header: Dataset, plane: Any, measures: Any, rescale: Any
) -> Frame:
    """A frame from where its plane, its measures and its rescale stand."""
    position, orientation = plane.get("ImagePositionPatient"), plane.get("ImageOrientationPatient")
    spacing, thickness = measures.get("PixelSpacing"), measures.get("SliceThickness")
    slope, intercept = rescale.get("RescaleSlope"), rescale.get("RescaleIntercept")
    frame = Frame(
        path=file,
        index=index,
        uid=str(header.get("SOPInstanceUID", "")),
        number=int(header.get("InstanceNumber") or 0) if index == 0 else index + 1,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        rescale_stated=slope is not None and intercept is not None,
        rows_columns=(int(header.Rows), int(header.Columns)),
        spacing_mm=None if not any(spacing or ()) else (float(spacing[0]), float(spacing[1])),
        thickness_mm=None if thickness is None else float(thickness),
        position=None if not position else np.array([float(v) for v in position]),
        orientation=None if not orientation else np.array([float(v) for v in orientation]),
    )
    _require_sound(frame)
    return frame


def _require_sound(frame: Frame) -> None:
    """Refuse a geometry or a rescale that cannot be. Raises ValueError."""
    numbers = [frame.slope, frame.intercept, *(frame.spacing_mm or ()), frame.thickness_mm or 0.0]
    for part, length in ((frame.position, 3), (frame.orientation, 6)):
        if part is not None:
            if part.shape != (length,):
                raise ValueError("wrong number of values")
            numbers += part.tolist()
    if not np.isfinite(numbers).all() or frame.slope == 0 or min(frame.spacing_mm or (1,)) <= 0:
        raise ValueError("not finite, or nothing")
    if frame.orientation is not None and abs(np.linalg.norm(frame.normal) - 1) > 1e-2:
        raise ValueError("axes that are not at right angles")


def read_series(path: Path, domain: str, units: str, modality: str | None) -> Item:
    """Read a series as an item, oriented as volumes are (see medical.py).

    Values are rescaled exactly: whole numbers stay whole. Slices that lack are planes of the
    lowest value, named in meta["missing_slices"]; whoever has no use for those refuses them.

    Args:
        path: a file of the series, or its folder.
        domain: for the record.
        units: of the values.
        modality: that is wanted; None takes any.

    Raises:
        BadInputError: if it cannot be used.
    """
    from domains.medical import oriented

    series = series_of(path, modality)
    grid = series.grid
    values = _values(series, path)
    volume = _on_grid(values, grid)
    affine = grid.affine
    placed = affine if affine is not None else np.diag([-1.0, -1.0, 1.0, 1.0])
    pixels, turned, codes, place_axis = oriented(volume.transpose(2, 1, 0), placed)
    meta: dict[str, Any] = {"orientation": codes, "num_source_dims": 3}
    missing = grid.missing
    if missing:
        meta["missing_slices"] = [_place(n, grid, place_axis) for n in missing]
        meta["missing_axis"] = place_axis[0]
    found = found_in_words(grid)
    if found:
        meta["found"] = found
    digest = files_digest(series.files)
    record = ItemRecord(
        item_id=keyed_id(domain, digest, b""),
        domain=domain,
        shape=pixels.shape,
        dtype=pixels.dtype.name,
        units=units,
        source_digest=digest,
        source_format="dicom",
        spacing_mm=_spacing(turned) if affine is not None else grid.spacing_mm,
        affine=None if affine is None else tuple(tuple(float(v) for v in r) for r in turned),
        meta=meta,
    )
    return Item(pixels, record)


def _spacing(turned: Array) -> tuple[float, float, float]:
    x, y, z = np.linalg.norm(turned[:3, :3], axis=0)
    return float(z), float(y), float(x)


def _place(number: int, grid: Grid, place_axis: tuple[int, bool]) -> int:
    """Where a place of the grid lies along its axis of the turned volume."""
    return grid.num_places - 1 - number if place_axis[1] else number


def found_in_words(grid: Grid) -> list[str]:
    """What a reader should know of a series, in sentences."""
    found = []
    if grid.tilt_degrees:
        found.append(f"gantry tilted by {grid.tilt_degrees:.1f} degrees: the affine is sheared")
    if grid.affine is None and len(grid.frames) > 1:
        found.append("its frames state no position: taken in their order")
    if grid.doubles:
        found.append(f"{len(grid.doubles)} of its slices lie twice: counted once")
    if missing := grid.missing:
        named = ", ".join(str(n + 1) for n in missing[:8]) + (" ..." if len(missing) > 8 else "")
        found.append(f"{len(missing)} of {grid.num_places} slices are missing: {named}")
    return found


def _values(series: Series, name: Path) -> list[Array]:
    """Rescaled values of each frame of the grid; doubles must hold the same."""
    wanted = [*series.grid.frames, *(double for double, _ in series.grid.doubles)]
    stored = stored_frames(wanted, name)
    for double, kept in series.grid.doubles:
        same = np.array_equal(stored[double], stored[kept])
        if not same or (double.slope, double.intercept) != (kept.slope, kept.intercept):
            raise BadInputError(
                f"{name}: different images lie on the same place ({len(series.grid.doubles)} "
                "times); export each reconstruction as its own series"
            )
    return [rescaled(stored[frame], frame) for frame in series.grid.frames]


def stored_frames(frames: Sequence[Frame], name: Path) -> dict[Frame, Array]:
    """Stored values (rows columns) of frames; each file is decoded once."""
    by_file: dict[Path, list[Frame]] = defaultdict(list)
    for frame in frames:
        by_file[frame.path].append(frame)
    stored: dict[Frame, Array] = {}
    for number, (file, of_file) in enumerate(by_file.items(), start=1):
        try:
            pixels = dicom.decode(file, dicom.read_whole(file))
        except BadInputError as error:
            if file == name:
                raise
            reason = str(error).removeprefix(f"{file}: ")
            which = f"slice {number} of {len(by_file)}, {_which(file)}"
            raise BadInputError(f"{name}: {which}: {reason}") from None
        stored |= {frame: pixels[frame.index] for frame in of_file}
    return stored


def rescaled(stored: Array, frame: Frame) -> Array:
    """slope * stored + intercept: int64 where both are whole numbers, else float64."""
    if frame.slope.is_integer() and frame.intercept.is_integer():
        return stored.astype(np.int64) * int(frame.slope) + int(frame.intercept)
    return stored * frame.slope + frame.intercept


def _on_grid(values: list[Array], grid: Grid) -> Array:
    """(places rows columns), in the least of the integers that hold all values, else float32."""
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    whole = all(v.dtype.kind == "i" for v in values)
    fitting = [
        kind
        for kind in (np.int16, np.uint16, np.int32, np.uint32)
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max
    ]
    dtype = np.dtype(fitting[0]) if whole and fitting else np.dtype(np.float32)
    volume = np.full((grid.num_places, *values[0].shape), low, dtype)
    for place, plane in zip(grid.places, values, strict=True):
        volume[place] = plane
    return volume
