"""What a photograph says beside its pixels: EXIF, colour profile, resolution; and its orientation.

EXIF is kept byte for byte, so that makers' notes with offsets of their own stay whole, but for
what would be wrong in a restored picture: the orientation becomes 1, for its pixels are upright;
the size becomes the picture's; the thumbnail goes, which shows what it was before. Tags that name
people or hold free text are blanked as soon as they are read: records keep no names.

Source: EXIF 2.32 (CIPA DC-008), section 4.6; PNG, third edition, 11.3.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from domains.base import Array

MAX_BYTES = 4 * 2**20
"""Most bytes of EXIF or profile that are kept: real ones are thousands of times smaller."""

_ORIENTATION, _EXIF_IFD = 0x0112, 0x8769
_THUMBNAIL, _THUMBNAIL_BYTES = 0x0201, 0x0202
_WIDTHS, _HEIGHTS = (0x0100, 0xA002), (0x0101, 0xA003)
_NAMING = frozenset(
    # Description, artist, host; XP title, comment, author, keywords, subject; comment, owner.
    {0x010E, 0x013B, 0x013C, 0x9C9B, 0x9C9C, 0x9C9D, 0x9C9E, 0x9C9F, 0x9286, 0xA430}
)
_SHORT, _LONG = 3, 4
_PREFIX = b"Exif\0\0"

_PLACES = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
"""Orientation -> what turns rows and columns as stored into the upright picture."""


def upright(image: Array, orientation: int) -> Array:
    """Pixels (h w ...) as they are to be seen; a view."""
    return np.asarray(_PLACES.get(orientation, _PLACES[1])(image))


@dataclass(frozen=True)
class _Entry:
    """An entry of a directory: where it lies, and what it says in one number."""

    place: int
    tag: int
    kind: int
    count: int
    value: int


class _Exif:
    """A block of EXIF, a small TIFF file, open for changes that move nothing."""

    def __init__(self, data: bytes) -> None:
        """Raises ValueError, struct.error if it is none."""
        orders = {b"II": "<", b"MM": ">"}
        if data[:2] not in orders:
            raise ValueError("neither II nor MM")
        self.data, self.order = bytearray(data), orders[data[:2]]
        self.first = self._number("I", 4)

    def _number(self, kind: str, place: int) -> int:
        return int(struct.unpack_from(self.order + kind, self.data, place)[0])

    def entries(self, directory: int) -> Iterator[_Entry]:
        """Those of the directory at a place."""
        for index in range(self._number("H", directory)):
            place = directory + 2 + 12 * index
            tag, kind = self._number("H", place), self._number("H", place + 2)
            value = self._number("H" if kind == _SHORT else "I", place + 8)
            yield _Entry(place, tag, kind, self._number("I", place + 4), value)

    def find(self, directory: int, tag: int) -> _Entry | None:
        """The entry of a tag."""
        return next((e for e in self.entries(directory) if e.tag == tag), None)

    def next_directory(self, directory: int) -> tuple[int, int]:
        """(where it is told, what is told) of the directory that follows."""
        place = directory + 2 + 12 * self._number("H", directory)
        return place, self._number("I", place)

    def put(self, entry: _Entry, value: int) -> None:
        """Give an entry one number: SHORT if it was and fits, else LONG."""
        if entry.kind == _SHORT and value < 2**16:
            struct.pack_into(self.order + "HIHH", self.data, entry.place + 2, _SHORT, 1, value, 0)
        else:
            struct.pack_into(self.order + "HII", self.data, entry.place + 2, _LONG, 1, value)

    def directories(self) -> list[int]:
        """The places of the first directory and of the camera's."""
        inner = self.find(self.first, _EXIF_IFD)
        return [self.first, *([inner.value] if inner else [])]

    def blank(self, entry: _Entry) -> None:
        """Write zeros over a text, or numbers of one byte."""
        start = entry.place + 8 if entry.count <= 4 else entry.value
        stop = min(start + entry.count, len(self.data))
        if start >= 8:
            self.data[start:stop] = bytes(max(stop - start, 0))

    def drop_thumbnail(self) -> None:
        """Blank the small picture, and let no directory follow the first."""
        told, directory = self.next_directory(self.first)
        if not directory:
            return
        start, length = (self.find(directory, t) for t in (_THUMBNAIL, _THUMBNAIL_BYTES))
        struct.pack_into(self.order + "I", self.data, told, 0)
        if start and length:
            stop = start.value + length.value
            if stop >= len(self.data):
                del self.data[start.value :]
            else:
                self.data[start.value : stop] = bytes(length.value)


def orientation_of(exif: bytes) -> int:
    """How the pixels lie, 1 to 8; 1 where nothing readable says it."""
    try:
        block = _Exif(exif.removeprefix(_PREFIX))
        entry = block.find(block.first, _ORIENTATION)
    except (ValueError, struct.error):
        return 1
    return entry.value if entry is not None and entry.value in _PLACES else 1


def nameless(exif: bytes) -> bytes:
    """EXIF without thumbnail, names of people and free text; b"" if it is damaged."""
    try:
        block = _Exif(exif.removeprefix(_PREFIX))
        block.drop_thumbnail()
        for directory in block.directories():
            for entry in block.entries(directory):
                if entry.tag in _NAMING:
                    block.blank(entry)
    except (ValueError, struct.error):
        return b""
    return bytes(block.data)


def corrected(exif: bytes, height: int, width: int) -> bytes:
    """EXIF of the upright picture of a size; b"" if it is damaged."""
    try:
        block = _Exif(exif.removeprefix(_PREFIX))
        for directory in block.directories():
            for entry in list(block.entries(directory)):
                if entry.tag == _ORIENTATION:
                    block.put(entry, 1)
                elif entry.tag in _WIDTHS:
                    block.put(entry, width)
                elif entry.tag in _HEIGHTS:
                    block.put(entry, height)
    except (ValueError, struct.error):
        return b""
    return bytes(block.data)


def kept_of(info: Mapping[str, Any]) -> dict[str, str]:
    """EXIF, profile and resolution out of what Pillow found, as text for a record's `meta`."""
    parts: dict[str, bytes] = {}
    exif, profile = info.get("exif"), info.get("icc_profile")
    if isinstance(exif, bytes) and (told := nameless(exif)):
        parts["exif"] = told
    if isinstance(profile, bytes) and profile:
        parts["icc"] = profile
    kept = {name: _text(data) for name, data in parts.items() if len(data) <= MAX_BYTES}
    dpi = info.get("dpi")
    if dpi and all(np.isfinite(float(d)) and 0 < float(d) < 1e6 for d in dpi):
        kept["dpi"] = f"{float(dpi[0])!r} {float(dpi[1])!r}"
    return kept


def exif_to_write(kept: Mapping[str, str], height: int, width: int) -> bytes:
    """The kept EXIF, corrected for a picture of this size; b"" if there is none."""
    return corrected(_bytes(kept["exif"]), height, width) if "exif" in kept else b""


def profile_to_write(kept: Mapping[str, str]) -> bytes:
    """The kept colour profile; b"" if there is none."""
    return _bytes(kept["icc"]) if "icc" in kept else b""


def resolution_to_write(kept: Mapping[str, str]) -> tuple[float, float] | None:
    """Dots an inch across and down, or None."""
    if "dpi" not in kept:
        return None
    across, down = kept["dpi"].split()
    return float(across), float(down)


def png_parts(kept: Mapping[str, str], height: int, width: int) -> bytes:
    """The chunks that follow the header of a PNG: profile, resolution, EXIF."""
    parts = b""
    profile, exif = profile_to_write(kept), exif_to_write(kept, height, width)
    if profile:
        parts += png_part(b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile, 9))
    dots = resolution_to_write(kept)
    if dots:
        per_metre = [round(d / 0.0254) for d in dots]
        parts += png_part(b"pHYs", struct.pack(">IIB", *per_metre, 1))
    if exif:
        parts += png_part(b"eXIf", exif)
    return parts


def png_part(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def _text(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _bytes(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))
