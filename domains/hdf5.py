"""HDF5 files of others: bounds before anything is read.

HDF5 can name other files (external links, virtual and external data sets), inflate without end, and
takes the memory that a text of variable length claims before it looks: none of it is followed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from domains.base import BadInputError

MAX_HEADER_BYTES = 16 << 20
MAX_INFLATION = 200
"""Of compressed samples; those of every eighth line, the others 0, inflate 10 to 20 times."""

_REFERENCE_BYTES = 16
"""Of a text of variable length: its length (32 bits), the place of its heap, its number there."""


def own_dataset(path: Path, group: Any, name: str) -> Any:
    """A data set that lies in this very file, or None if there is none of the name.

    Raises:
        BadInputError: if the name leads to another file.
    """
    import h5py

    link = group.get(name, getlink=True)
    if link is None:
        return None
    found = group.get(name) if isinstance(link, h5py.HardLink) else None
    inside = isinstance(found, h5py.Dataset) and not found.is_virtual and not found.external
    if not inside:
        raise BadInputError(f"{path}: its '{name}' is no data set of this file; export it as one")
    return found


def require_stored(path: Path, dataset: Any, num_bytes: int) -> None:
    """Refuse a data set most of which is not there: it would be made up of fill values.

    Measured numbers hardly compress; what inflates a hundredfold holds none.

    Args:
        path: for the message.
        dataset: asked how much of it lies in the file.
        num_bytes: that it has when it is read.

    Raises:
        BadInputError: naming the file.
    """
    stored = dataset.id.get_storage_size()
    least = num_bytes if dataset.compression is None else num_bytes / MAX_INFLATION
    if dataset.size and (stored == 0 or stored < least):
        raise BadInputError(f"{path}: its samples are not all stored; copy the file again")


def require_lengths(path: Path, dataset: Any, places: Mapping[int, int]) -> None:
    """Refuse parts of variable length that are longer than the file: HDF5 takes their memory first.

    Args:
        path: of the file.
        dataset: whose elements hold such parts.
        places: byte of an element where a part's reference stands, which begins with its length as
            32 bits -> bytes of what the length counts.

    Raises:
        BadInputError: naming the file.
    """
    total, size = 0, dataset.id.get_type().get_size()
    with path.open("rb") as file:
        for offset, length in _stored_at(path, dataset):
            file.seek(offset)
            raw = np.frombuffer(file.read(length), np.uint8)
            elements = raw[: len(raw) // size * size].reshape(-1, size)
            for place, unit in places.items():
                words = np.ascontiguousarray(elements[:, place : place + 4]).view("<u4")
                total += unit * int(words.sum(dtype=np.int64))
    if total > path.stat().st_size:
        raise BadInputError(f"{path}: its parts are longer than the file; copy the file again")


def _stored_at(path: Path, dataset: Any) -> list[tuple[int, int]]:
    """(first byte, bytes) of every piece of a data set that no filter has changed."""
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        return [] if offset is None else [(int(offset), int(dataset.id.get_storage_size()))]
    if dataset.id.get_create_plist().get_nfilters():
        raise BadInputError(f"{path}: its headers are compressed; export it without compression")
    infos = [dataset.id.get_chunk_info(i) for i in range(dataset.id.get_num_chunks())]
    return [(int(info.byte_offset), int(info.size)) for info in infos]


def text_attribute(path: Path, holder: Any, name: str) -> str | None:
    """An attribute that is one text, or None if there is none of the name.

    Args:
        path: of the file.
        holder: data set or file that has it.
        name: of the attribute.

    Raises:
        BadInputError: if it is no text, or longer than its file has room for.
    """
    if name not in holder.attrs:
        return None
    stored = holder.attrs.get_id(name)
    text, kind = None, stored.dtype.kind
    if stored.shape == () and kind in "SO" and stored.get_storage_size() <= MAX_HEADER_BYTES:
        if kind == "O":
            _require_text_length(path, holder, name)
        text = holder.attrs[name]
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if not isinstance(text, str):
        raise BadInputError(f"{path}: its attribute '{name}' is not one text; write it as such")
    return text


def _require_text_length(path: Path, holder: Any, name: str) -> None:
    """Refuse a text attribute whose length cannot be, or cannot be seen, in its object's header.

    Source: HDF5 file format specification, IV.A.2.m (attribute message, versions 1 to 3).
    """
    import h5py

    info = h5py.h5o.get_info(holder.id)
    with path.open("rb") as file:
        file.seek(info.addr)
        header = file.read(min(info.hdr.space.total + 64, MAX_HEADER_BYTES))
    found = header.find(name.encode() + b"\0")
    starts = {found - 8: (1, 2), found - 9: (3,)}
    for start, versions in starts.items():
        if start < 0 or header[start] not in versions:
            continue
        sizes = struct.unpack("<3H", header[start + 2 : start + 8])
        if sizes[0] != len(name) + 1:
            continue
        padded = sum(-(-size // 8) * 8 if header[start] == 1 else size for size in sizes)
        reference = header[found + padded : found + padded + _REFERENCE_BYTES]
        if len(reference) == _REFERENCE_BYTES:
            (length,) = struct.unpack("<I", reference[:4])
            if length <= min(path.stat().st_size, MAX_HEADER_BYTES):
                return
    raise BadInputError(
        f"{path}: its attribute '{name}' is longer than the file, or lies out of sight; write it "
        "as a file beside it"
    )
