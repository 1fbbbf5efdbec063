"""The header of an NRRD file, and the check that its data are what the header says.

pynrrd inflates compressed data to the end whatever the header states, and follows headers to other
files: both are refused here, before it reads a pixel.
"""

from __future__ import annotations

import bz2
import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from domains.base import BadInputError
from domains.files import MAX_PIXELS, require_held

DTYPES = {
    "signed char": "i1", "int8": "i1", "int8_t": "i1", "uchar": "u1", "unsigned char": "u1",
    "uint8": "u1", "uint8_t": "u1", "short": "i2", "short int": "i2", "signed short": "i2",
    "signed short int": "i2", "int16": "i2", "int16_t": "i2", "ushort": "u2",
    "unsigned short": "u2", "unsigned short int": "u2", "uint16": "u2", "uint16_t": "u2",
    "int": "i4", "signed int": "i4", "int32": "i4", "int32_t": "i4", "uint": "u4",
    "unsigned int": "u4", "uint32": "u4", "uint32_t": "u4", "longlong": "i8", "long long": "i8",
    "long long int": "i8", "signed long long": "i8", "signed long long int": "i8",
    "int64": "i8", "int64_t": "i8", "ulonglong": "u8", "unsigned long long": "u8",
    "unsigned long long int": "u8", "uint64": "u8", "uint64_t": "u8", "float": "f4",
    "double": "f8",
}  # fmt: skip
"""The names of the NRRD format definition, section 5."""

_LPS, _RAS, _LAS = (-1, -1, 1), (1, 1, 1), (-1, 1, 1)
SPACES = {
    None: _LPS, "left-posterior-superior": _LPS, "lps": _LPS, "right-anterior-superior": _RAS,
    "ras": _RAS, "left-anterior-superior": _LAS, "las": _LAS,
}  # fmt: skip
"""The anatomical spaces, section 5.2, and what turns them to R, A, S; unnamed is LPS, as in ITK."""
MM_PER = {"mm": 1.0, "um": 1e-3, "\u00b5m": 1e-3, "\u03bcm": 1e-3, "cm": 10.0, "m": 1e3}
"""Millimetres in the units of length that are known; what names none is in mm."""

GZIP = ("gz", "gzip")
COMPRESSED = (*GZIP, "bz2", "bzip2")

BLOCK_BYTES = 1 << 20
WIDEST = 8


@dataclass(frozen=True)
class NrrdHeader:
    """What a file says of its values and of where they lie.

    Attributes:
        shape: sizes, fastest axis first.
        dtype: of the values.
        compressed: whether they are.
        to_ras_mm: what coordinates are multiplied by to be R, A and S in mm.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    compressed: bool
    to_ras_mm: tuple[float, float, float]


def read(path: Path) -> NrrdHeader:
    """Read the header of a file whose data follow it.

    Raises:
        BadInputError: if the data are elsewhere, not of the size stated, or have no geometry.
        Exception: whatever pynrrd raises on a header it cannot read.
    """
    import nrrd

    with path.open("rb") as file:
        header = nrrd.read_header(file)
        if "data file" in header or "datafile" in header:
            raise BadInputError(
                f"{path}: its data are in another file; save header and data as one"
            )
        if "space directions" not in header:
            raise BadInputError(f"{path}: it states no 'space directions'; export it with spacing")
        to_ras_mm = _to_ras_mm(path, header)
        if int(header.get("line skip", 0)) or int(header.get("byte skip", 0)) not in (0, -1):
            raise BadInputError(f"{path}: its data do not follow its header; save it without skips")
        shape = tuple(int(n) for n in header["sizes"])
        dtype = np.dtype(DTYPES[header["type"]])
        num_bytes = math.prod(shape) * dtype.itemsize
        compressed = header["encoding"] in COMPRESSED
        bounded = 0 < num_bytes <= MAX_PIXELS * WIDEST  # if not, the size itself is refused
        if bounded:
            require_held(path, num_bytes, compressed=compressed)
        if bounded and not _inflates_to(num_bytes, file, header["encoding"]):
            raise BadInputError(
                f"{path}: its data are not of the size that the header states; export it again"
            )
    return NrrdHeader(shape, dtype, compressed, to_ras_mm)


def _to_ras_mm(path: Path, header: dict[str, Any]) -> tuple[float, float, float]:
    """The factors of a header's space and of its units."""
    space = header.get("space")
    signs = SPACES.get(space if space is None else str(space).strip().lower())
    if signs is None:
        raise BadInputError(
            f"{path}: its 'space' does not say which side of the patient is left; save it as "
            "left-posterior-superior"
        )
    units = [str(unit).strip() for unit in header.get("space units") or ()] or ["mm"]
    if len(set(units)) > 1 or units[0] not in {*MM_PER, "", "none", "???"}:
        raise BadInputError(f"{path}: its 'space units' are no length that is known; save it in mm")
    mm = MM_PER.get(units[0], 1.0)
    x, y, z = signs
    return x * mm, y * mm, z * mm


def _inflates_to(num_bytes: int, file: IO[bytes], encoding: str) -> bool:
    """Whether the rest of a file inflates to a size; reads at most one block more."""
    if encoding in GZIP:
        stream: gzip.GzipFile | bz2.BZ2File = gzip.GzipFile(fileobj=file)
    elif encoding in COMPRESSED:
        stream = bz2.BZ2File(file)
    else:
        return True
    left = num_bytes
    while left >= 0 and (block := stream.read(BLOCK_BYTES)):
        left -= len(block)
    return left == 0
