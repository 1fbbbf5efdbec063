"""Raw k-space as files hold it: NumPy arrays, BART's .cfl and .hdr; HDF5 is read next door.

Whatever the file, a scan is (z coils h w) complex64 with the zero frequency at [0, 0], zeros where
nothing was measured. Scanners and formats put the zero frequency at n // 2; of a NumPy array, which
says nothing, the energy tells: if its zero frequency stands first, its image is taken to be as it
is, else to have its middle at n // 2 as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from domains.base import Array, BadInputError
from domains.files import fault_in_words, file_digest, files_digest, require_file, require_size

NUMPY, BART, HDF5 = (".npy",), (".cfl",), (".h5", ".hdf5", ".mrd")
SUFFIXES = (*NUMPY, *BART, *HDF5)

MAX_SAMPLES = 2**28
"""Most complex samples that one scan may hold (2 GB); checked on the header."""
MAX_COILS = 256
_BART_DIMS = {"readout": 0, "phase 1": 1, "phase 2": 2, "coils": 3, "slices": 13}
_HDR_BYTES = 1 << 20


@dataclass(frozen=True)
class RawScan:
    """What a scanner measured of one volume.

    Attributes:
        k: (z coils h w) complex64, zero frequency at [0, 0], 0 where nothing was measured.
        source_format: "npy", "bart", "fastmri", "ismrmrd".
        digest: sha256 of the file's bytes.
        noise: (coils samples) complex64 of a scan without excitation, if there is one.
        noise_gain: standard deviation of the noise of `k` over that of `noise`.
        spacing_mm: (z, y, x), or None where the file does not say.
        affine: RAS, of array axes (x, y, z), or None.
        rows: of the reconstructed image: fewer than h where the readout (along h) is oversampled.
    """

    k: Array
    source_format: str
    digest: str
    noise: Array | None = None
    noise_gain: float = 1.0
    spacing_mm: tuple[float, float, float] | None = None
    affine: tuple[tuple[float, ...], ...] | None = field(default=None, repr=False)
    rows: int | None = None


def read_scan(path: Path) -> RawScan:
    """Read a file of raw k-space.

    Raises:
        BadInputError: if it cannot be used.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise BadInputError(f"{path}: not a file of raw k-space; expected one of {known}")
    require_file(path)
    try:
        scan = _read(path)
    except BadInputError:
        raise
    except Exception as error:
        # The libraries' own words quote paths and headers, which name patients.
        raise BadInputError(
            f"{path}: not a readable {suffix} file ({fault_in_words(error)}); export it again"
        ) from error
    _require_signal(path, scan.k)
    return scan


def _read(path: Path) -> RawScan:
    suffix = path.suffix.lower()
    if suffix in HDF5:
        from domains.mri.kspace_hdf5 import read_hdf5

        return read_hdf5(path)
    return _read_numpy(path) if suffix in NUMPY else _read_bart(path)


def companions(path: Path) -> tuple[Path, ...]:
    """The header beside a .cfl file."""
    return (path.with_suffix(".hdr"),) if path.suffix.lower() in BART else ()


def require_scan(path: Path, shape: Sequence[int]) -> None:
    """Refuse the shape (z coils h w) of a scan that cannot be restored, before it is read.

    Raises:
        BadInputError: naming the file.
    """
    size = " x ".join(str(n) for n in shape)
    if math.prod(shape) > MAX_SAMPLES:
        raise BadInputError(f"{path}: {size} is over the limit of {MAX_SAMPLES} samples; split it")
    z, coils, h, w = shape
    require_size(path, (z, h, w), (h, w))
    if not 1 <= coils <= MAX_COILS:
        raise BadInputError(
            f"{path}: {size} would be {coils} coils; save it as coils x rows x columns, "
            "or slices x coils x rows x columns"
        )


def centred(k: Array) -> bool:
    """Whether the zero frequency of k (... h w) stands at n // 2, not at 0: where the energy is."""
    energy = np.zeros(k.shape[-2:])
    for plane in k.reshape(-1, *k.shape[-2:]):
        energy += np.abs(plane) ** 2
    h, w = energy.shape
    middle = slice(h // 4, h - h // 4), slice(w // 4, w - w // 4)
    return bool(energy[middle].sum() >= np.fft.fftshift(energy)[middle].sum())


def transform_of_centred(k: Array) -> Array:
    """fft2 of the image whose centred k-space is k (... h w): what n // 2 is to both becomes 0.

    Centred, zero frequency and middle of the image stand at n // 2. Of the result the zero
    frequency is at [0, 0], and its ifft2 has the middle of the image where it was.
    """
    ramps = [np.exp(-2j * np.pi * np.fft.fftfreq(n) * (n // 2)) for n in k.shape[-2:]]
    ramp = (ramps[0][:, None] * ramps[1]).astype(np.complex64)
    transform: Array = np.fft.ifftshift(k, axes=(-2, -1)) * ramp
    return transform


def _read_numpy(path: Path) -> RawScan:
    """(h w), (coils h w) or (z coils h w), complex."""
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    size = " x ".join(str(n) for n in stored.shape)
    if stored.dtype.kind != "c":
        raise BadInputError(
            f"{path}: {stored.dtype} numbers; raw k-space is complex: save it as complex64"
        )
    if not 2 <= stored.ndim <= 4:
        raise BadInputError(
            f"{path}: {size} is no scan; save it as coils x rows x columns, or slices x coils x "
            "rows x columns"
        )
    shape = (1,) * (4 - stored.ndim) + stored.shape
    if shape[1] > 32 > 2 * shape[3]:
        raise BadInputError(
            f"{path}: {size} seems to have its coils last; save it as coils x rows x columns"
        )
    require_scan(path, shape)
    k = np.asarray(stored).reshape(shape).astype(np.complex64)
    k = transform_of_centred(k) if centred(k) else k
    return RawScan(k, "npy", file_digest(path))


def _read_bart(path: Path) -> RawScan:
    """A .cfl file (complex64, first dimension fastest) with its .hdr.

    A scan with a second phase-encode direction becomes slices across its readout, which must be
    measured in full: each is then a plane of its own.
    """
    header = path.with_suffix(".hdr")
    if not header.is_file() or header.stat().st_size > _HDR_BYTES:
        raise BadInputError(
            f"{path}: its header of the same name, .hdr, is not there; put it beside it"
        )
    dims = _bart_dims(path, header)
    size = " x ".join(str(n) for n in dims)
    more = [n for i, n in enumerate(dims) if n > 1 and i not in _BART_DIMS.values()]
    if more:
        raise BadInputError(
            f"{path}: {size} holds several contrasts, frames or maps; save one of them (bart slice)"
        )
    if path.stat().st_size != 8 * math.prod(dims):
        raise BadInputError(f"{path}: its size is not that of the {size} samples of its header")
    x, y, z, coils, slices = (dims[i] for i in _BART_DIMS.values())
    if z > 1 and slices > 1:
        raise BadInputError(f"{path}: {size} is a stack of volumes; save one of them (bart slice)")
    require_scan(path, (x, coils, y, z) if z > 1 else (slices, coils, x, y))
    stored = np.fromfile(path, np.dtype("<c8")).reshape((slices, coils, z, y, x))
    digest = files_digest([path, header])
    if z > 1:
        return RawScan(across_readout(path, stored[0].transpose(0, 3, 2, 1)), "bart", digest)
    k = stored[:, :, 0].swapaxes(-2, -1)
    return RawScan(transform_of_centred(k), "bart", digest)


def _bart_dims(path: Path, header: Path) -> list[int]:
    """The sixteen (or fewer) dimensions that a .hdr file states; all at least 1."""
    lines = header.read_text(encoding="utf-8", errors="replace").splitlines()
    starts = [i for i, line in enumerate(lines) if line.strip().lower() == "# dimensions"]
    words = lines[starts[0] + 1].split() if starts and starts[0] + 1 < len(lines) else []
    if not 2 <= len(words) <= 16 or not all(w.isdecimal() and 0 < int(w) < 2**31 for w in words):
        raise BadInputError(f"{path}: its header states no dimensions; write it with BART again")
    return [int(word) for word in words] + [1] * (16 - len(words))


def across_readout(path: Path, k: Array) -> Array:
    """A 3-D scan (coils x y z), centred, as planes (x coils y z), zero frequency at [0, 0].

    Raises:
        BadInputError: if the readout (x) was not measured in full wherever anything was.
    """
    sampled = (k != 0).any(axis=0)
    if (sampled.any(axis=0) != sampled.all(axis=0)).any():
        raise BadInputError(
            f"{path}: the readout of this 3-D scan was not measured in full; reconstruct it along "
            "the readout first, and save the slices"
        )
    shifted = np.fft.ifftshift(k, axes=1)
    hybrid = np.fft.fftshift(np.fft.ifft(shifted, axis=1, norm="ortho"), axes=1)
    # Where the transform leaves rounding in place of 0, nothing was measured all the same.
    planes = (hybrid * sampled.any(axis=0)).swapaxes(0, 1).astype(np.complex64)
    return transform_of_centred(planes)


def _require_signal(path: Path, k: Array) -> None:
    """Refuse NaN, infinity and scans of zeros."""
    num_bad = int(k.size - np.count_nonzero(np.isfinite(k)))
    if num_bad:
        raise BadInputError(
            f"{path}: {num_bad} samples are NaN or infinite; write 0 for what was not measured"
        )
    if not k.any():
        raise BadInputError(f"{path}: every sample is 0: nothing was measured; export it again")
