"""The quantised coefficients of a JPEG file, as its entropy code holds them.

Decoders hand out pixels: rounded to 8 bits, clipped, colours converted, chrominance enlarged. What
the file knows exactly are the integers before all that. Read are Huffman-coded files of 8 bits,
baseline, extended and progressive, of any subsampling; not arithmetic, lossless or 12-bit ones.

Source: ITU-T T.81: B (markers), C and F.2 (Huffman codes, sequential), G.2 (progressive); tables
    and figures are named where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from domains.base import Array

_ZIGZAG = np.array([
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59,
    52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
])  # fmt: skip
"""Place in the block (row * 8 + column) of each coefficient in the file's order; Figure A.6."""

_SOF = {0xC0: False, 0xC1: False, 0xC2: True}
"""Frames that are read, and whether they are progressive."""
_MOST_BLOCKS = 2**21
"""Of a component: 134 megapixels, a gigabyte while they are read."""


class JPEGError(ValueError):
    """A file whose coefficients cannot be read, in a few words."""


@dataclass
class Component:
    """One colour of a file.

    Attributes:
        sampling: (horizontal, vertical) samples, relative to the other components'.
        table: (8 8) quantisation steps, row = vertical frequency.
        coefficients: (rows, columns, 8, 8) int16 of the blocks that the picture reaches, in steps.
    """

    sampling: tuple[int, int]
    table: Array
    coefficients: Array


@dataclass
class JPEGFile:
    """What a file holds.

    Attributes:
        size: (height, width) of the picture.
        components: 1 (brightness), or 3.
        is_ycc: whether three components are brightness and two chrominances (else RGB).
    """

    size: tuple[int, int]
    components: list[Component]
    is_ycc: bool


class _Code(NamedTuple):
    """A Huffman code by its first 16 bits: lengths (0: none such) and symbols."""

    lengths: list[int]
    symbols: list[int]


@dataclass
class _Plane:
    """A component while it is read: its blocks as flat lists of 64, in the order of the file."""

    identifier: int
    h: int
    v: int
    table_id: int
    rows: int = 0  # blocks that the picture reaches
    columns: int = 0
    wide: int = 0  # blocks a stored row, whole MCUs
    blocks: list[list[int]] = field(default_factory=list)
    table: Array | None = None


@dataclass
class _Scan:
    """The numbers of a scan's header, and its planes with their codes."""

    planes: list[tuple[_Plane, int, int]]
    first: int
    last: int
    high: int
    low: int


class _Bits:
    """Bits of an entropy-coded segment, its stuffed bytes taken out; zeros beyond its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data + b"\0" * 8
        self._length = 8 * len(data)
        self.place = 0

    def peek(self) -> int:
        """The next 16 bits."""
        byte, bit = divmod(self.place, 8)
        window = int.from_bytes(self._data[byte : byte + 3], "big")
        return (window >> (8 - bit)) & 0xFFFF

    def take(self, count: int) -> int:
        """The next bits, 0 to 16, as a number."""
        value = self.peek() >> (16 - count)
        self.place += count
        if self.place > self._length + 64:
            raise JPEGError("its data end too early")
        return value

    def symbol(self, code: _Code) -> int:
        """The symbol of the next code word."""
        word = self.peek()
        length = code.lengths[word]
        if not length:
            raise JPEGError("a code word is none of its table")
        self.place += length
        if self.place > self._length + 64:
            raise JPEGError("its data end too early")
        return code.symbols[word]

    def signed(self, size: int) -> int:
        """A number of so many bits, its sign in the first; F.2.2.1, EXTEND."""
        if not size:
            return 0
        value = self.take(size)
        return value if value >> (size - 1) else value - (1 << size) + 1


def read_coefficients(data: bytes) -> JPEGFile:
    """Read the coefficients of a JPEG file.

    Args:
        data: the whole file.

    Raises:
        JPEGError: if it is no such file, damaged, or of a kind that is not read.
    """
    try:
        return _Reader(data).read()
    except (IndexError, KeyError, OverflowError) as error:
        raise JPEGError("its markers or codes are damaged") from error


class _Reader:
    def __init__(self, data: bytes) -> None:
        if data[:2] != b"\xff\xd8":
            raise JPEGError("it does not begin as a JPEG file")
        self._data = data
        self._tables: dict[int, Array] = {}
        self._codes: dict[tuple[int, int], _Code] = {}
        self._planes: list[_Plane] = []
        self._size = (0, 0)
        self._progressive = False
        self._restart = 0
        self._adobe: int | None = None
        self._jfif = False

    def read(self) -> JPEGFile:
        """All segments, to the end of the image."""
        place = 2
        while True:
            place = self._data.find(b"\xff", place)
            if place < 0 or place + 1 >= len(self._data):
                break
            marker = self._data[place + 1]
            if marker in {0x00, 0x01, 0xFF} or 0xD0 <= marker <= 0xD8:
                place += 1 if marker == 0xFF else 2
                continue
            if marker == 0xD9:  # EOI
                break
            length = int.from_bytes(self._data[place + 2 : place + 4], "big")
            segment = self._data[place + 4 : place + 2 + length]
            if length < 2 or len(segment) != length - 2:
                raise JPEGError("it ends within a marker")
            place += 2 + length
            if marker == 0xDA:  # SOS
                place = self._scan(segment, place)
            else:
                self._segment(marker, segment)
        return self._file()

    def _segment(self, marker: int, segment: bytes) -> None:
        if marker == 0xDB:
            self._quantisation(segment)
        elif marker == 0xC4:
            self._huffman(segment)
        elif marker == 0xDD:
            self._restart = int.from_bytes(segment[:2], "big")
        elif marker == 0xE0 and segment[:4] == b"JFIF":
            self._jfif = True
        elif marker == 0xEE and segment[:5] == b"Adobe" and len(segment) >= 12:
            self._adobe = segment[11]
        elif marker in _SOF:
            self._frame(segment, progressive=_SOF[marker])
        elif 0xC3 <= marker <= 0xCF and marker not in {0xC8, 0xCC}:
            raise JPEGError("it is coded losslessly, arithmetically or in a hierarchy")

    def _quantisation(self, segment: bytes) -> None:
        while segment:
            wide, number = segment[0] >> 4, segment[0] & 15
            steps = np.frombuffer(segment[1 : 1 + 64 * (1 + wide)], ">u2" if wide else np.uint8)
            if wide > 1 or len(steps) != 64 or not steps.all():
                raise JPEGError("a quantisation table is damaged")
            table = np.empty(64, np.int64)
            table[_ZIGZAG] = steps
            self._tables[number] = table.reshape(8, 8)
            segment = segment[1 + 64 * (1 + wide) :]

    def _huffman(self, segment: bytes) -> None:
        while segment:
            counts, key = list(segment[1:17]), (segment[0] >> 4, segment[0] & 15)
            num = sum(counts)
            if len(counts) != 16 or len(segment) < 17 + num:
                raise JPEGError("a Huffman table is damaged")
            self._codes[key] = _code_of(counts, segment[17 : 17 + num])
            segment = segment[17 + num :]

    def _frame(self, segment: bytes, *, progressive: bool) -> None:
        if self._planes:
            raise JPEGError("it holds more than one frame")
        precision, height, width, count = (
            segment[0],
            int.from_bytes(segment[1:3], "big"),
            int.from_bytes(segment[3:5], "big"),
            segment[5],
        )
        if precision != 8 or count not in {1, 3} or not height or not width:
            raise JPEGError("it is not of 8 bits and one or three components")
        planes = [
            _Plane(identifier, sampling >> 4, sampling & 15, table_id)
            for identifier, sampling, table_id in zip(*[iter(segment[6 : 6 + 3 * count])] * 3,
                                                      strict=True)
        ]  # fmt: skip
        if len(planes) != count or not all(1 <= p.h <= 4 and 1 <= p.v <= 4 for p in planes):
            raise JPEGError("its frame header is damaged")
        if count == 1:  # no interleaving, no subsampling; A.2.2
            planes[0].h = planes[0].v = 1
        h_max, v_max = max(p.h for p in planes), max(p.v for p in planes)
        self._mcus = _upwards(height, 8 * v_max), _upwards(width, 8 * h_max)
        for plane in planes:
            plane.rows = _upwards(_upwards(height * plane.v, v_max), 8)
            plane.columns = _upwards(_upwards(width * plane.h, h_max), 8)
            plane.wide = self._mcus[1] * plane.h
            num_blocks = self._mcus[0] * plane.v * plane.wide
            if num_blocks > _MOST_BLOCKS:
                raise JPEGError("it is too large")
            plane.blocks = [[0] * 64 for _ in range(num_blocks)]
        self._size, self._planes, self._progressive = (height, width), planes, progressive

    def _scan(self, segment: bytes, place: int) -> int:
        """Decode one scan; returns where the next marker stands."""
        count = segment[0]
        chosen = []
        for i in range(count):
            identifier, codes = segment[1 + 2 * i], segment[2 + 2 * i]
            plane = next((p for p in self._planes if p.identifier == identifier), None)
            if plane is None:
                raise JPEGError("a scan is of a component that there is not")
            if plane.table is None:
                plane.table = self._tables[plane.table_id]
            chosen.append((plane, codes >> 4, codes & 15))
        first, last, approximation = segment[1 + 2 * count : 4 + 2 * count]
        scan = _Scan(chosen, first, last, approximation >> 4, approximation & 15)
        if not (first <= last < 64 and scan.low <= 13 and chosen):
            raise JPEGError("a scan's header is damaged")
        if self._progressive and first and count > 1:
            raise JPEGError("a scan's header is damaged")
        parts, end = self._entropy_coded(place)
        self._decode(scan, parts)
        return end

    def _entropy_coded(self, place: int) -> tuple[list[bytes], int]:
        """The segments between restart markers, and where the next other marker stands."""
        parts, start = [], place
        while True:
            place = self._data.find(b"\xff", place)
            if place < 0 or place + 1 >= len(self._data):
                place = len(self._data)
                break
            marker = self._data[place + 1]
            if 0xD0 <= marker <= 0xD7:
                parts.append(self._data[start:place])
                start = place + 2
            elif marker not in {0x00, 0xFF}:
                break
            place += 2 if marker != 0xFF else 1
        parts.append(self._data[start:place])
        return [part.replace(b"\xff\x00", b"\xff") for part in parts], place

    def _decode(self, scan: _Scan, parts: Sequence[bytes]) -> None:
        """All MCUs of a scan, a segment after the other."""
        units = list(self._units(scan))
        step = self._restart or len(units)
        for number, start in enumerate(range(0, len(units), step)):
            if number >= len(parts):
                raise JPEGError("its data end too early")
            decoder = _Decoder(_Bits(parts[number]), scan, self._codes)
            decode = decoder.method(progressive=self._progressive)
            for unit in units[start : start + step]:
                for index, block in unit:
                    decode(index, block)

    def _units(self, scan: _Scan) -> Iterator[list[tuple[int, list[int]]]]:
        """MCUs in their order: (number of the plane in the scan, block); A.2."""
        if len(scan.planes) == 1:
            plane = scan.planes[0][0]
            for row in range(plane.rows):
                for column in range(plane.columns):
                    yield [(0, plane.blocks[row * plane.wide + column])]
            return
        for row in range(self._mcus[0]):
            for column in range(self._mcus[1]):
                yield [
                    (i, p.blocks[(row * p.v + y) * p.wide + column * p.h + x])
                    for i, (p, _, _) in enumerate(scan.planes)
                    for y in range(p.v)
                    for x in range(p.h)
                ]

    def _file(self) -> JPEGFile:
        if not self._planes or any(p.table is None for p in self._planes):
            raise JPEGError("it holds no picture")
        components = []
        for plane in self._planes:
            flat = np.array(plane.blocks, np.int64).reshape(-1, plane.wide, 64)
            ordered = np.empty((plane.rows, plane.columns, 64), np.int64)
            ordered[..., _ZIGZAG] = flat[: plane.rows, : plane.columns]
            if np.abs(ordered).max(initial=0) > np.iinfo(np.int16).max:
                raise JPEGError("a coefficient is out of range")
            blocks = ordered.reshape(plane.rows, plane.columns, 8, 8).astype(np.int16)
            components.append(Component((plane.h, plane.v), np.asarray(plane.table), blocks))
        return JPEGFile(self._size, components, self._is_ycc())

    def _is_ycc(self) -> bool:
        """As libjpeg takes it: JFIF, then Adobe's marker, then the components' names."""
        if len(self._planes) == 1 or self._jfif:
            return True
        if self._adobe is not None:
            return self._adobe != 0
        return [p.identifier for p in self._planes] != [ord(c) for c in "RGB"]


def _upwards(count: int, step: int) -> int:
    """Steps that hold a count."""
    return -(-count // step)


def _code_of(counts: Sequence[int], symbols: bytes) -> _Code:
    """A Huffman table; C.2."""
    lengths, values = [0] * 65536, [0] * 65536
    code = index = 0
    for length, count in enumerate(counts, start=1):
        for _ in range(count):
            start, width = code << (16 - length), 1 << (16 - length)
            if start + width > 65536:
                raise JPEGError("a Huffman table is damaged")
            lengths[start : start + width] = [length] * width
            values[start : start + width] = [symbols[index]] * width
            code, index = code + 1, index + 1
        code <<= 1
    return _Code(lengths, values)


class _Decoder:
    """Blocks of one segment, with what lives from one restart to the next."""

    def __init__(self, bits: _Bits, scan: _Scan, codes: dict[tuple[int, int], _Code]) -> None:
        self.bits, self.scan = bits, scan
        self.before = [0] * len(scan.planes)
        self.run = 0  # blocks still at their end of band
        needs_dc, needs_ac = scan.first == 0 and not scan.high, scan.last > 0
        nothing = _Code([], [])
        self.dc = [codes[0, dc] if needs_dc else nothing for _, dc, _ in scan.planes]
        self.ac = [codes[1, ac] if needs_ac else nothing for _, _, ac in scan.planes]

    def method(self, *, progressive: bool) -> Callable[[int, list[int]], None]:
        """What decodes a block of this scan."""
        if not progressive:
            return self.sequential
        if self.scan.first == 0:
            return self.refine_dc if self.scan.high else self.first_dc
        return self.refine_ac if self.scan.high else self.first_ac

    def sequential(self, index: int, block: list[int]) -> None:
        """F.2.2."""
        bits, code = self.bits, self.ac[index]
        self.before[index] += bits.signed(min(bits.symbol(self.dc[index]), 16))
        block[0] = self.before[index]
        k = 1
        while k < 64:
            symbol = bits.symbol(code)
            size = symbol & 15
            if size:
                k += symbol >> 4
                block[k] = bits.signed(size)
                k += 1
            elif symbol == 0xF0:
                k += 16
            else:
                break

    def first_dc(self, index: int, block: list[int]) -> None:
        """G.2, the first scan of a constant term."""
        self.before[index] += self.bits.signed(min(self.bits.symbol(self.dc[index]), 16))
        block[0] = self.before[index] << self.scan.low

    def refine_dc(self, index: int, block: list[int]) -> None:
        """G.2, a further bit of it."""
        del index
        block[0] |= self.bits.take(1) << self.scan.low

    def first_ac(self, index: int, block: list[int]) -> None:
        """G.2, the first scan of a band; runs of blocks that end with it."""
        if self.run:
            self.run -= 1
            return
        bits, code = self.bits, self.ac[index]
        k = self.scan.first
        while k <= self.scan.last:
            symbol = bits.symbol(code)
            run, size = symbol >> 4, symbol & 15
            if size:
                k += run
                block[k] = bits.signed(size) * (1 << self.scan.low)
                k += 1
            elif run == 15:
                k += 16
            else:
                self.run = (1 << run) + bits.take(run) - 1
                break

    def refine_ac(self, index: int, block: list[int]) -> None:
        """G.2, a further bit of a band, Figure G.7: what is not 0 is corrected on the way."""
        bits, code, last = self.bits, self.ac[index], self.scan.last
        bit = 1 << self.scan.low
        k = self.scan.first
        if not self.run:
            while k <= last:
                symbol = bits.symbol(code)
                run, size = symbol >> 4, symbol & 15
                value = 0
                if size:
                    value = bit if bits.take(1) else -bit
                elif run < 15:
                    self.run = (1 << run) + bits.take(run)
                    break
                while k <= last:
                    if block[k]:
                        self._correct(block, k, bit)
                    elif run == 0:
                        if value:
                            block[k] = value
                        k += 1
                        break
                    else:
                        run -= 1
                    k += 1
        if self.run:
            while k <= last:
                if block[k]:
                    self._correct(block, k, bit)
                k += 1
            self.run -= 1

    def _correct(self, block: list[int], k: int, bit: int) -> None:
        if self.bits.take(1):
            block[k] += bit if block[k] > 0 else -bit
