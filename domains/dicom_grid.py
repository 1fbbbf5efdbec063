"""Frames of a series as a grid: sorted by where they are, never by what number they bear.

The position of a frame along the normal of its plane orders the series; the line through the
positions gives the third column of the affine, so that a tilted gantry, whose slices follow each
other askew, is a shear of the affine and no error. Slices that lie twice are counted once; where
one or more lack, the grid keeps their places free. Source: DICOM PS3.3, C.7.6.2.1.1 (image plane).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from domains.base import Array, BadInputError

UNEVEN = 0.1
"""How far, in steps, a slice may be from its place on the grid."""

TILT_DEGREES = 0.1
"""A step that is this much askew of the normal is a tilt of the gantry."""

ORIENTATION = 1e-3
"""Direction cosines that differ by more are other planes."""

_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice: where it is, and what its stored values mean.

    Attributes:
        path: file.
        index: frame of that file.
        uid: SOP instance.
        number: InstanceNumber, or the frame's number.
        slope: value = slope * stored + intercept.
        intercept: see slope.
        rescale_stated: whether the file states both.
        rows_columns: (rows, columns).
        spacing_mm: (between rows, between columns); None if not stated.
        thickness_mm: SliceThickness; None if not stated.
        position: of the first pixel's centre, LPS, mm; None if not stated.
        orientation: (6,) direction of rows, of columns; None if not stated.
    """

    path: Path
    index: int
    uid: str
    number: int
    slope: float
    intercept: float
    rescale_stated: bool
    rows_columns: tuple[int, int]
    spacing_mm: tuple[float, float] | None = None
    thickness_mm: float | None = None
    position: Array | None = None
    orientation: Array | None = None

    @property
    def corner(self) -> Array:
        """Centre of the first pixel, LPS, mm."""
        if self.position is None:
            raise ValueError("a frame that states no position has no corner")
        return self.position

    @property
    def normal(self) -> Array:
        """Unit normal of the plane."""
        if self.orientation is None:
            raise ValueError("a frame that states no orientation has no normal")
        return np.cross(self.orientation[:3], self.orientation[3:])


@dataclass(frozen=True)
class Grid:
    """A series in order.

    Attributes:
        frames: by increasing position along the normal, each place once.
        places: of each frame on the even grid; 0, 1, 2 ... where none is missing.
        doubles: frames left out, and the frame of `frames` each lies on.
        affine: 4x4, RAS mm, of array axes (column, row, place); None where nothing is stated.
        spacing_mm: (z, y, x); None where none is stated.
        tilt_degrees: of the step against the normal; 0 below TILT_DEGREES.
    """

    frames: tuple[Frame, ...]
    places: tuple[int, ...]
    doubles: tuple[tuple[Frame, Frame], ...] = ()
    affine: Array | None = field(default=None, compare=False)
    spacing_mm: tuple[float, float, float] | None = None
    tilt_degrees: float = 0.0

    @property
    def num_places(self) -> int:
        """Slices of the even grid, missing ones counted."""
        return self.places[-1] + 1

    @property
    def missing(self) -> list[int]:
        """Places without a frame."""
        return sorted(set(range(self.num_places)) - set(self.places))


def grid_of(frames: Sequence[Frame], name: Path) -> Grid:
    """Put the frames of one series in order.

    Args:
        frames: of the same size; more than one must state position and orientation.
        name: for messages.

    Raises:
        BadInputError: if they make no grid: unlike planes, or slices unevenly apart.
    """
    first = frames[0]
    if any(f.rows_columns != first.rows_columns for f in frames):
        raise BadInputError(
            f"{name}: its slices differ in size; export them as series of their own"
        )
    if len(frames) == 1:
        return _single(first)
    if all(f.path == first.path and f.position is None for f in frames):
        return replace(_single(first), frames=tuple(frames), places=tuple(range(len(frames))))
    _require_parallel(frames, name)
    along = np.array([f.corner @ first.normal for f in frames])
    order = np.argsort(along, kind="stable")
    kept: list[int] = []
    doubles: list[tuple[Frame, Frame]] = []
    for i in order:
        if kept and _same_place(frames[kept[-1]], frames[i]):
            doubles.append((frames[i], frames[kept[-1]]))
        else:
            kept.append(int(i))
    if len(kept) == 1:
        return _single(frames[kept[0]], tuple(doubles))
    sorted_frames = tuple(frames[i] for i in kept)
    places = _places(along[kept], sorted_frames, name)
    positions = np.array([f.corner for f in sorted_frames])
    step = (positions[-1] - positions[0]) / places[-1]
    _require_line(positions, places, step, name)
    tilt = float(np.degrees(np.arccos(np.clip(step @ first.normal / np.linalg.norm(step), -1, 1))))
    affine = _affine(sorted_frames[0], step)
    return Grid(
        frames=sorted_frames,
        places=places,
        doubles=tuple(doubles),
        affine=affine,
        spacing_mm=_spacing(affine),
        tilt_degrees=tilt if tilt > TILT_DEGREES else 0.0,
    )


def _same_place(a: Frame, b: Frame) -> bool:
    return bool(np.linalg.norm(a.corner - b.corner) < 1e-3)


def _single(frame: Frame, doubles: tuple[tuple[Frame, Frame], ...] = ()) -> Grid:
    """The grid of one slice, as thick as it says."""
    thickness = frame.thickness_mm or 1.0
    if frame.spacing_mm is None:
        return Grid((frame,), (0,), doubles)
    spacing = (thickness, *frame.spacing_mm)
    if frame.position is None or frame.orientation is None:
        return Grid((frame,), (0,), doubles, spacing_mm=spacing)
    affine = _affine(frame, frame.normal * thickness)
    return Grid((frame,), (0,), doubles, affine, _spacing(affine))


def _require_parallel(frames: Sequence[Frame], name: Path) -> None:
    first = frames[0]
    for frame in frames:
        if frame.position is None or frame.orientation is None or frame.spacing_mm is None:
            raise BadInputError(
                f"{name}: a slice states no position, orientation or pixel spacing, so that the "
                "order of the series is not known; export it with the image plane"
            )
        if np.abs(frame.orientation - first.orientation).max() > ORIENTATION:
            raise BadInputError(
                f"{name}: its slices are not parallel; export each orientation as its own series"
            )
        if not np.allclose(frame.spacing_mm, first.spacing_mm or 0, rtol=1e-4):
            raise BadInputError(
                f"{name}: its pixel spacing changes from slice to slice; export each as its own "
                "series"
            )


def _places(along: Array, frames: Sequence[Frame], name: Path) -> tuple[int, ...]:
    """Place of each slice on an even grid, from its distance to the one before."""
    steps = np.diff(along)
    step = float(np.median(steps))
    counts = np.rint(steps / step)
    thicknesses = {round(f.thickness_mm, 3) for f in frames if f.thickness_mm}
    uneven = np.abs(steps - counts * step) > UNEVEN * step
    if (counts < 1).any() or uneven.any() or (len(thicknesses) > 1 and (counts > 1).any()):
        raise BadInputError(
            f"{name}: its slices are {steps.min():.4g} to {steps.max():.4g} mm apart, which is no "
            "even grid; export each part as its own series"
        )
    return (0, *(int(n) for n in np.cumsum(counts)))


def _require_line(positions: Array, places: tuple[int, ...], step: Array, name: Path) -> None:
    """Refuse slices that are shifted against each other within their planes."""
    expected = positions[0] + np.array(places)[:, None] * step
    if np.linalg.norm(positions - expected, axis=1).max() > UNEVEN * np.linalg.norm(step) + 1e-3:
        raise BadInputError(f"{name}: its slices are not on one straight line; export it again")


def _affine(frame: Frame, step: Array) -> Array:
    assert frame.spacing_mm is not None
    assert frame.orientation is not None
    affine = np.eye(4)
    affine[:3, 0] = frame.orientation[:3] * frame.spacing_mm[1]
    affine[:3, 1] = frame.orientation[3:] * frame.spacing_mm[0]
    affine[:3, 2] = step
    affine[:3, 3] = frame.position
    return _TO_RAS @ affine


def _spacing(affine: Array) -> tuple[float, float, float]:
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(z), float(y), float(x)
