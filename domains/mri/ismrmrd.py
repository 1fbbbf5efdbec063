"""ISMRMRD: acquisitions, a readout each, sorted into k-space by their counters.

Source: Inati et al. 2017, doi:10.1002/mrm.26089; the format's header ismrmrd.h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domains.base import Array, BadInputError
from domains.files import file_digest
from domains.hdf5 import own_dataset, require_lengths, require_stored
from domains.mri.kspace import MAX_SAMPLES, RawScan, across_readout, require_scan
from domains.mri.kspace import transform_of_centred as transform
from domains.mri.kspace_hdf5 import Encoding, read_encoding

_HEAD_BYTES = 340
"""Of an acquisition's header, of any version."""
NOISE, CALIBRATION, REVERSE = 19, 20, 22
NOT_IMAGING = (23, 24, 26, 27, 28, 29, 30, 31)
"""Navigators, phase correction, feedback, dummies, coil correction, phase stabilisation."""
ALIKE = ("contrast", "phase", "repetition", "set")
"""Counters of which an image has one value only."""
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class _Line:
    """Where a readout goes.

    Attributes:
        index: of the acquisition in the file.
        place: slice.
        step1: phase-encode index.
        step2: of the second direction.
        start: index along the readout of its first sample.
        kept: the samples that count, once turned round if `reverse`.
        reverse: whether it was read backwards.
    """

    index: int
    place: int
    step1: int
    step2: int
    start: int
    kept: slice
    reverse: bool


def read_ismrmrd(path: Path, group: Any) -> RawScan:
    """Read the group of an ISMRMRD file.

    Several averages of a line are averaged. Calibration lines that are no imaging ones stand in for
    those that are missing.

    Raises:
        BadInputError: if it is not one Cartesian scan.
    """
    xml, data = own_dataset(path, group, "xml"), own_dataset(path, group, "data")
    encoding = read_encoding(path, xml)
    if encoding.trajectory != "cartesian":
        raise BadInputError(
            f"{path}: its trajectory is '{_known(encoding.trajectory)}'; only Cartesian scans can "
            "be restored"
        )
    names = set(data.dtype.names or ())
    if not {"head", "traj", "data"} <= names or data.ndim != 1 or not data.size:
        raise BadInputError(f"{path}: its acquisitions are not those of ISMRMRD; export it again")
    require_stored(path, data, _HEAD_BYTES * data.size)
    kind = data.id.get_type()
    parts = [kind.get_member_offset(kind.get_member_index(name)) for name in (b"traj", b"data")]
    require_lengths(path, data, dict.fromkeys(parts, 4))
    heads = data.fields("head")[:]
    flags = heads["flags"].astype(np.uint64)
    noise = _flagged(flags, NOISE)
    wanted = ~noise & (heads["encoding_space_ref"] == 0)
    for bit in NOT_IMAGING:
        wanted &= ~_flagged(flags, bit)
    if not wanted.any():
        raise BadInputError(f"{path}: holds no imaging readouts; export the scan itself")
    _require_one_image(path, heads[wanted])
    channels = {int(n) for n in heads["active_channels"][wanted]}
    if len(channels) != 1:
        raise BadInputError(f"{path}: its readouts are of different coils; export one scan a file")
    coils = channels.pop()
    total = heads["number_of_samples"].astype(np.int64) * heads["active_channels"]
    if int(total.sum()) > MAX_SAMPLES:
        raise BadInputError(f"{path}: over the limit of {MAX_SAMPLES} samples; split it")
    lines = [_line_of(path, int(i), heads[i], encoding) for i in np.flatnonzero(wanted)]
    num_slices = max(line.place for line in lines) + 1
    x, y, z = encoding.matrix
    require_scan(path, (x, coils, y, z) if z > 1 else (num_slices, coils, x, y))
    if z > 1 and num_slices > 1:
        raise BadInputError(f"{path}: several slabs; export one slab a file")
    calibration = _flagged(flags, CALIBRATION)
    k, averages = _sorted(path, data, heads, lines, calibration, (num_slices, coils, x, y, z))
    gain = _noise_gain(heads, noise, wanted, encoding) / np.sqrt(averages)
    samples = _noise_samples(path, data, heads, np.flatnonzero(noise), coils)
    spacing, affine = _geometry(heads[wanted], encoding)
    return RawScan(
        across_readout(path, k[0]) if z > 1 else transform(k[..., 0]),
        "ismrmrd",
        file_digest(path),
        noise=samples,
        noise_gain=float(gain),
        spacing_mm=spacing,
        affine=affine,
        rows=None if z > 1 else encoding.rows(x),
    )


def _known(trajectory: str) -> str:
    """A trajectory's name if the format has it: headers are not quoted."""
    kinds = ("epi", "radial", "goldenangle", "spiral", "other")
    return trajectory if trajectory in kinds else "unknown"


def _flagged(flags: Array, bit: int) -> Array:
    found: Array = (flags >> np.uint64(bit - 1)) & np.uint64(1) != 0
    return found


def _require_one_image(path: Path, heads: Array) -> None:
    several = [name for name in ALIKE if len(np.unique(heads["idx"][name])) > 1]
    if several:
        raise BadInputError(
            f"{path}: several images in one ({', '.join(several)}); export one contrast and one "
            "repetition a file"
        )


def _line_of(path: Path, index: int, head: Any, encoding: Encoding) -> _Line:
    """Where the readout of a header goes; its centre sample falls on x // 2."""
    x, y, z = encoding.matrix
    count, centre = int(head["number_of_samples"]), int(head["center_sample"])
    first, last = int(head["discard_pre"]), count - int(head["discard_post"])
    reverse = bool(_flagged(head["flags"].astype(np.uint64), REVERSE))
    if reverse:
        first, last, centre = count - last, count - first, count - 1 - centre
    start = x // 2 - centre + first
    step1 = int(head["idx"]["kspace_encode_step_1"]) - encoding.centres[0] + y // 2
    step2 = int(head["idx"]["kspace_encode_step_2"]) - encoding.centres[1] + z // 2
    inside = 0 <= step1 < y and 0 <= step2 < z and start >= 0 and start + last - first <= x
    if not inside or first >= last:
        raise BadInputError(
            f"{path}: a readout lies outside of the {x} x {y} x {z} samples of its header; export "
            "it again"
        )
    return _Line(index, int(head["idx"]["slice"]), step1, step2, start, slice(first, last), reverse)


def _sorted(
    path: Path,
    data: Any,
    heads: Array,
    lines: Sequence[_Line],
    calibration: Array,
    shape: tuple[int, int, int, int, int],
) -> tuple[Array, int]:
    """k (z coils x y z2), centred, and how many averages every line of it is the mean of.

    As many as every line has: what some have more would make their noise weaker.
    """
    by_place: dict[tuple[int, int, int], list[_Line]] = {}
    for spare in (False, True):
        for line in lines:
            if bool(calibration[line.index]) == spare:
                key = (line.place, line.step1, line.step2)
                if not spare or key not in by_place or calibration[by_place[key][0].index]:
                    by_place.setdefault(key, []).append(line)
    averages = min(len(same) for same in by_place.values())
    k = np.zeros(shape, np.complex64)
    for (place, step1, step2), same in by_place.items():
        for line in same[:averages]:
            samples = _readout(path, data, heads, line.index)
            samples = samples[:, ::-1] if line.reverse else samples
            kept = samples[:, line.kept]
            stop = line.start + kept.shape[1]
            k[place, :, line.start : stop, step1, step2] += kept / averages
    return k, averages


def _readout(path: Path, data: Any, heads: Array, index: int) -> Array:
    """The samples (coils n) of one readout, each float32 pair one."""
    head = heads[index]
    coils, count = int(head["active_channels"]), int(head["number_of_samples"])
    values = np.asarray(data[index]["data"])
    if values.dtype != np.float32 or values.size != 2 * coils * count:
        raise BadInputError(f"{path}: a readout has fewer samples than it states; copy it again")
    samples: Array = values.view(np.complex64).reshape(coils, count)
    return samples


def _noise_samples(path: Path, data: Any, heads: Array, indices: Array, coils: int) -> Array | None:
    """(coils n) of the noise readouts of as many coils; None without any."""

    def readouts() -> Iterator[Array]:
        for index in indices:
            if int(heads[index]["active_channels"]) == coils:
                yield _readout(path, data, heads, int(index))

    found = list(readouts())
    return np.concatenate(found, axis=1) if found else None


def _noise_gain(heads: Array, noise: Array, wanted: Array, encoding: Encoding) -> float:
    """Standard deviation of the scan's noise over that of the noise readouts: by bandwidth.

    Source: Kellman and McVeigh 2005, doi:10.1002/mrm.20713.
    """
    if not noise.any():
        return 1.0
    dwell_noise = float(heads["sample_time_us"][noise][0])
    dwell = float(heads["sample_time_us"][wanted][0])
    if min(dwell_noise, dwell) <= 0:
        return 1.0
    return float(np.sqrt(dwell_noise / (dwell * encoding.noise_bandwidth)))


def _geometry(
    heads: Array, encoding: Encoding
) -> tuple[tuple[float, float, float] | None, tuple[tuple[float, ...], ...] | None]:
    """Spacing (z, y, x) and RAS affine of the image (z = slices, h = readout, w = phase).

    Of a 3-D scan the image has z = readout, h = phase 1, w = phase 2.
    """
    if min(encoding.matrix) < 1 or min(encoding.fov_mm) <= 0:
        return None, None
    x, y, z = encoding.matrix
    steps = [fov / n for fov, n in zip(encoding.fov_mm, encoding.matrix, strict=True)]
    first = heads[int(np.argmin(heads["idx"]["slice"]))]
    read, phase, across = (
        first[f"{name}_dir"].astype(float) for name in ("read", "phase", "slice")
    )
    position = first["position"].astype(float)
    if z > 1:
        columns = [across * steps[2], phase * steps[1], read * steps[0]]
        middle = np.array([z // 2, y // 2, x // 2], float)
    else:
        rows = encoding.rows(x) or x
        columns = [phase * steps[1], read * steps[0], _slice_step(heads, across * steps[2])]
        middle = np.array([y // 2, rows // 2, 0.0])
    matrix = np.stack(columns, axis=1)
    spacing = tuple(float(np.linalg.norm(column)) for column in reversed(columns))
    if min(spacing) <= 0 or abs(np.linalg.det(matrix)) < 0.5 * np.prod(spacing):
        plain = (steps[0], steps[1], steps[2]) if z > 1 else (steps[2], steps[0], steps[1])
        return plain, None
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ matrix
    affine[:3, 3] = LPS_TO_RAS @ (position - matrix @ middle)
    rows_of = tuple(tuple(float(v) for v in row) for row in affine)
    return (spacing[0], spacing[1], spacing[2]), rows_of


def _slice_step(heads: Array, thickness: Array) -> Array:
    """From one slice to the next (mm, LPS), where they are evenly spaced; else their thickness."""
    numbers = np.unique(heads["idx"]["slice"])
    places = [heads["position"][heads["idx"]["slice"] == n][0].astype(float) for n in numbers]
    gaps = np.diff(places, axis=0)
    if not len(gaps) or not np.allclose(gaps, gaps[0], atol=0.01) or not gaps[0].any():
        return thickness
    step: Array = gaps[0]
    return step
