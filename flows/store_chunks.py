"""Which chunks a store was written with: the sha256 of each as it lies on the disk, by its group.

    records/measurements/ITEM/TASK.json   array/c/0/0/0 -> sha256, of all arrays of the group
    manifest.json                         "records": group -> sha256 of that file

A chunk's own checksum says that it is whole, not that it is this store's: one of another store, or
of another slice, put in its place would be read as if it were. A digest of the array tells, where
all of it is read; a block reads a part. So each chunk is compared when it is read.

The records are no part of a store's digest: the same content has the same digest, whichever version
of the compressor wrote it. Stores without them are read as before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from flows.engine.objects import open_objects
from flows.roots import Root

RECORDS = "records"

_GROUP_PARTS = {"items": 2, "measurements": 3}
_MOST_GROUPS = 16


class OtherChunkError(ValueError):
    """A chunk that is whole, and not the one that was written there."""


class RecordingStore(LocalStore):
    """A local store that notes the sha256 of each chunk that is written. Attributes: written."""

    written: dict[str, str]

    async def set(self, key: str, value: Buffer) -> None:
        """Write a key, and note it if it is a chunk's."""
        if "/c/" in key:
            self.written[key] = hashlib.sha256(value.as_numpy_array().tobytes()).hexdigest()
        await super().set(key, value)


def by_group(written: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Group -> (key within it -> sha256), of the chunks that were written."""
    groups: dict[str, dict[str, str]] = {}
    for key, sha256 in sorted(written.items()):
        group, name = _split(key)
        groups.setdefault(group, {})[name] = sha256
    return groups


def encode(records: Mapping[str, str]) -> bytes:
    """The record of a group, as it is written."""
    return (json.dumps(records, sort_keys=True) + "\n").encode()


def record_key(group: str) -> str:
    """Where the record of a group lies in its store."""
    return f"{RECORDS}/{group}.json"


class ChunkRecords:
    """What a store's chunks should be.

    Args:
        root: of the store.
        digests: group -> sha256 of its record, as the store's manifest has them.
    """

    def __init__(self, root: Root, digests: Mapping[str, str]) -> None:
        self._objects, self._digests = open_objects(root), digests
        self._of = lru_cache(maxsize=_MOST_GROUPS)(self._read)

    def groups(self) -> list[str]:
        """All groups that have a record."""
        return list(self._digests)

    def check(self, key: str, data: bytes | memoryview) -> None:
        """Compare what was read under a key with what was written there.

        Raises:
            OtherChunkError: if it is another chunk, or the record is gone or not the manifest's.
        """
        if not self._digests or "/c/" not in key:
            return
        group, name = _split(key)
        if group in self._digests and self._of(group).get(name) != _sha256(data):
            raise OtherChunkError(f"{key}: not the chunk that was written there")

    def require(self, group: str) -> None:
        """Look at the record of a group.

        Raises:
            FileNotFoundError: if it is gone.
            OtherChunkError: if it is not the manifest's.
        """
        self._read(group)

    def _read(self, group: str) -> Mapping[str, str]:
        data = self._objects.get(record_key(group))
        if _sha256(data) != self._digests[group]:
            raise OtherChunkError(f"{record_key(group)}: not the record that was written")
        return dict(json.loads(data))


def _split(key: str) -> tuple[str, str]:
    """A chunk's key as its group and the rest."""
    parts = key.split("/")
    count = _GROUP_PARTS.get(parts[0], 1)
    return "/".join(parts[:count]), "/".join(parts[count:])


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
