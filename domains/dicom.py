"""DICOM files, kept at arm's length: bounds before decoding, errors that quote no header.

A header names the patient, so nothing of one is passed on but what this module returns: pydicom's
own warnings and errors quote values, and are not let through. What a file claims to hold is
bounded by Rows x Columns x Frames, by what a deflated file inflates to, and by what a compressed
frame says of itself, before anything is decoded.

    dicom.py         one file: is it one, its header, its frames' stored values
    dicom_grid.py    frames to a grid: sorted by position, duplicates, gaps, tilt
    dicom_series.py  files to series, a series to an Item
    dicom_writer.py  an Item back to a derived series
"""

from __future__ import annotations

import logging
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import Array, BadInputError
from domains.files import fault_in_words, require_file

if TYPE_CHECKING:
    from pydicom import Dataset

SUFFIXES = (".dcm", ".dicom", ".ima")
"""Usual names; files without any are known by their first bytes."""

MAX_FRAME_PIXELS = 2**26
"""Most pixels of one frame, 8192 x 8192: detectors have fewer."""

MAX_FILE_PIXELS = 2**30
MAX_INFLATED_BYTES = 2**29
"""Most bytes that a file of the deflated transfer syntax may inflate to."""

_MAGIC_AT = 128
_DEFLATED = "1.2.840.10008.1.2.1.99"
_LOSSLESS_JPEG = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
_EXTENDED_JPEG = "1.2.840.10008.1.2.4.51"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Stored:
    """How a file holds its values.

    Attributes:
        bits: BitsStored.
        bits_allocated: of each value.
        signed: two's complement.
    """

    bits: int
    bits_allocated: int
    signed: bool

    @property
    def low(self) -> int:
        """Lowest value that can be stored."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """Highest value that can be stored."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1


def is_dicom(path: Path) -> bool:
    """Whether a file is named as DICOM, or has no suffix that we know and begins as DICOM does.

    A DICOMDIR is a list of files, not an image, and is never followed.
    """
    name = path.name.lower()
    if name.startswith("dicomdir"):
        return False
    if name.endswith(SUFFIXES):
        return True
    try:
        with path.open("rb") as file:
            return file.read(_MAGIC_AT + 4)[_MAGIC_AT:] == b"DICM"
    except OSError:
        return False


@contextmanager
def discreet() -> Iterator[None]:
    """Keep pydicom's warnings and log lines, which quote headers, to itself."""
    logger = logging.getLogger("pydicom")
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def read_header(path: Path, tags: list[str] | None = None) -> Dataset:
    """Read everything before the pixels, or some elements of it.

    Args:
        path: of the file.
        tags: keywords of the elements wanted; None for all.

    Raises:
        BadInputError: if it is no readable DICOM file.
    """
    return _read(path, stop_before_pixels=True, specific_tags=tags)


def read_whole(path: Path) -> Dataset:
    """Read a file with its pixels, still encoded.

    Raises:
        BadInputError: if it is no readable DICOM file.
    """
    return _read(path)


def _read(path: Path, **options: Any) -> Dataset:
    import pydicom

    require_file(path)
    try:
        with discreet():
            _require_bounded(path)
            return pydicom.dcmread(path, **options)
    except BadInputError:
        raise
    except Exception as error:
        raise BadInputError(
            f"{path}: not a readable DICOM file ({fault_in_words(error, path)}); export it again"
        ) from None if _quotes(error) else error


def _quotes(error: Exception) -> bool:
    """Whether an error of pydicom may quote the header: all but those of the system."""
    return not isinstance(error, OSError | MemoryError)


def _require_bounded(path: Path) -> None:
    """Refuse a deflated file that inflates to more than a file may hold."""
    from pydicom.filereader import read_file_meta_info, read_preamble

    with path.open("rb") as file:
        read_preamble(file, force=False)
    if str(read_file_meta_info(path).get("TransferSyntaxUID", "")) != _DEFLATED:
        return
    with path.open("rb") as file:
        file.seek(_dataset_start(path))
        stream, count = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while block := (stream.unconsumed_tail or file.read(_BLOCK_BYTES)):
            count += len(stream.decompress(block, _BLOCK_BYTES))
            if count > MAX_INFLATED_BYTES:
                raise BadInputError(
                    f"{path}: it inflates to more than {MAX_INFLATED_BYTES} bytes; save it "
                    "uncompressed"
                )
            if stream.eof:
                return


def _dataset_start(path: Path) -> int:
    """Where the dataset begins: after the preamble, DICM, and the group 2 of a stated length."""
    with path.open("rb") as file:
        file.seek(_MAGIC_AT + 4)
        element = file.read(12)
    if len(element) < 12 or element[:4] != b"\x02\x00\x00\x00":
        raise BadInputError(f"{path}: its file meta information states no length; export it again")
    return _MAGIC_AT + 4 + 12 + int(struct.unpack("<I", element[8:12])[0])


def num_frames(header: Dataset) -> int:
    """Frames of a file; 1 where it does not say."""
    return int(header.get("NumberOfFrames") or 1)


def stored_of(path: Path, header: Dataset) -> Stored:
    """How a grey image is stored.

    Raises:
        BadInputError: if it is no grey image of whole numbers within the bounds.
    """
    try:
        rows, columns, frames = int(header.Rows), int(header.Columns), num_frames(header)
        samples = int(header.get("SamplesPerPixel", 1))
        stored = Stored(
            bits=int(header.BitsStored),
            bits_allocated=int(header.BitsAllocated),
            signed=bool(int(header.get("PixelRepresentation") or 0)),
        )
    except (AttributeError, TypeError, ValueError):
        raise BadInputError(
            f"{path}: it does not say how its pixels are stored; it is no image, or damaged"
        ) from None
    if samples != 1 or "PALETTE" in str(header.get("PhotometricInterpretation", "")):
        raise BadInputError(f"{path}: a colour image; give grey ones, with one value a pixel")
    if min(rows, columns, frames) < 1:
        raise BadInputError(
            f"{path}: {rows} x {columns} x {frames} pixels is no image; export it again"
        )
    if rows * columns > MAX_FRAME_PIXELS or rows * columns * frames > MAX_FILE_PIXELS:
        raise BadInputError(
            f"{path}: {rows} x {columns} x {frames} is over the limit of {MAX_FRAME_PIXELS} pixels "
            f"a frame and {MAX_FILE_PIXELS} a file; split it"
        )
    if stored.bits_allocated not in (8, 16, 32) or not 1 < stored.bits <= stored.bits_allocated:
        raise BadInputError(
            f"{path}: {stored.bits} of {stored.bits_allocated} bits a pixel are not supported; "
            "export it with 8 or 16"
        )
    return stored


def decode(path: Path, dataset: Dataset) -> Array:
    """Stored values of a grey file, whole numbers (frames rows columns), unused bits taken off.

    Args:
        path: for messages.
        dataset: of read_whole; see stored_of for its bounds, which are checked here.

    Raises:
        BadInputError: if the transfer syntax cannot be decoded here, or the data are damaged.
    """
    stored_of(path, dataset)
    _require_decoder(path, dataset)
    rows, columns, frames = int(dataset.Rows), int(dataset.Columns), num_frames(dataset)
    try:
        with discreet():
            _require_stated_size(path, dataset)
            pixels = np.asarray(dataset.pixel_array)
    except BadInputError:
        raise
    except Exception as error:
        raise BadInputError(
            f"{path}: the pixels cannot be decoded ({fault_in_words(error)}); export it again"
        ) from None
    if pixels.size != rows * columns * frames or pixels.dtype.kind not in "iu":
        raise BadInputError(f"{path}: its pixels are not of the size that it states")
    return pixels.reshape(frames, rows, columns)


def _require_decoder(path: Path, dataset: Dataset) -> None:
    """Refuse a transfer syntax that nothing here can decode, in one sentence."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    uid = UID(str(dataset.file_meta.get("TransferSyntaxUID", "")))
    if not uid:
        raise BadInputError(f"{path}: it states no transfer syntax; export it again")
    if not uid.is_transfer_syntax:
        raise BadInputError(f"{path}: its transfer syntax is not one of DICOM's; export it again")
    if not uid.is_encapsulated:
        return
    name = uid.name.split(" (")[0].split(",")[0]
    try:
        decoder = get_decoder(uid)
    except NotImplementedError:
        decoder = None
    if decoder is None or not decoder.is_available:
        step = "decompress it first (e.g. with gdcmconv --raw)"
        if uid in (*_LOSSLESS_JPEG, _EXTENDED_JPEG):
            step = "install the decoder with `pip install pylibjpeg-libjpeg`, or " + step
        raise BadInputError(f"{path}: its compression, {name}, cannot be decoded here; {step}")


def _require_stated_size(path: Path, dataset: Dataset) -> None:
    """Refuse compressed frames that say another size of themselves than the header does."""
    from pydicom.encaps import generate_frames

    uid = dataset.file_meta.TransferSyntaxUID
    if not uid.is_encapsulated or uid == "1.2.840.10008.1.2.5":  # runs of bytes state no size
        return
    stated = (int(dataset.Rows), int(dataset.Columns))
    for frame in generate_frames(dataset.PixelData, number_of_frames=num_frames(dataset)):
        size = codestream_size(frame)
        if size is not None and math.prod(size) != math.prod(stated):
            raise BadInputError(
                f"{path}: a compressed frame is of {size[0]} x {size[1]} pixels where the header "
                f"states {stated[0]} x {stated[1]}; export it again"
            )


def codestream_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 codestream states; None if it does not."""
    start = frame.find(b"\xff\x4f\xff\x51")
    if start >= 0:  # JPEG 2000: SOC, SIZ; x and y of the far and the near corner
        x1, y1, x0, y0 = struct.unpack_from(">4I", frame, start + 8)
        return y1 - y0, x1 - x0
    place = 2
    while place + 9 <= len(frame) and frame[place] == 0xFF:
        marker, length = frame[place + 1], struct.unpack_from(">H", frame, place + 2)[0]
        is_frame = 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)
        if is_frame or marker == 0xF7:  # SOF of JPEG, of JPEG-LS
            rows, columns = struct.unpack_from(">2H", frame, place + 5)
            return rows, columns
        place += 2 + length
    return None
