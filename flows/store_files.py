"""The ground under flows/store.py: checksummed arrays, digests, and publishing by rename.

A store is a folder: a Zarr v3 group with the arrays, and manifest.json, which says what is in it
and with which sha256. It is written into a staging folder beside its final place, flushed to
disk, and renamed once the manifest is in it: a killed writer leaves no store, and of two writers
one wins. Every chunk carries a checksum (zstd's), so that a flipped bit is found on reading.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Hashable
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self
from uuid import uuid4

import numpy as np
import psutil
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from diffusion_core.disk import sync
from domains.base import Array, BadInputError
from flows.engine.objects import open_objects
from flows.roots import Root
from flows.store_chunks import RECORDS, RecordingStore, by_group, encode, record_key

Check = Callable[[str, memoryview], None]
"""Key and bytes of what was read."""

MANIFEST = "manifest.json"
FORMAT = 1
COMPRESSION_LEVEL = 3


def array_digest(array: Array) -> str:
    """Sha256 of an array: dtype, shape, and values in C order, little-endian."""
    values = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    code = hashlib.sha256(f"{values.dtype.name}{values.shape}".encode())
    code.update(values.reshape(-1).view(np.uint8).data)
    return code.hexdigest()


def json_digest(value: Any) -> str:
    """Sha256 of a JSON-able value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def entries_digest(entries: list[dict[str, Any]]) -> str:
    """Sha256 of all entries of a manifest; their order does not matter."""
    return json_digest(sorted(json_digest(entry) for entry in entries))


def write_array(group: zarr.Group, name: str, values: Array, chunk: tuple[int, ...]) -> None:
    """Write one array with checksummed zstd chunks."""
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=tuple(max(n, 1) for n in chunk),
        dtype=values.dtype,
        compressors=[ZstdCodec(level=COMPRESSION_LEVEL, checksum=True)],
        config={"write_empty_chunks": True},  # so that StrictStore may take absence for damage
    )
    array[...] = values


class StrictStore(LocalStore):
    """A local store in which an absent chunk is an error: to zarr it is a chunk of zeros.

    Attributes:
        check: told of each chunk that is read; raises if it is not the one that was written.
    """

    check: Check | None = None

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Read a key as zarr asks for it.

        Raises:
            FileNotFoundError: if it is a chunk and not there.
        """
        data = await super().get(key, prototype, byte_range)
        if data is None and "/c/" in key:
            raise FileNotFoundError(key)
        if data is not None and self.check is not None and byte_range is None:
            self.check(key, memoryview(data.to_bytes()))
        return data


def require_new(path: Path) -> None:
    """Refuse a place for a store that holds something.

    Raises:
        BadInputError: if it does.
    """
    if path.exists():
        raise BadInputError(
            f"{path}: it exists already and stores never change; choose another name or remove it"
        )


def strict_store(root: Root, check: Check | None = None) -> Store:
    """The zarr store under a root, for reading only, in which an absent chunk is an error.

    Args:
        root: of the store.
        check: told of each chunk that is read; raises if it is not the one that was written.
    """
    if isinstance(root, Path):
        store = StrictStore(root, read_only=True)
        store.check = check
        return store
    from flows.engine.s3_zarr import open_strict

    return open_strict(root, check)


def has_manifest(path: Root) -> bool:
    """Whether there is a finished store of ours."""
    if isinstance(path, Path):
        return (path / MANIFEST).is_file()
    return open_objects(path).size(MANIFEST) is not None


def manifest_stamp(path: Root) -> Hashable:
    """What tells a store's manifest from another that was put in its place; None if it is gone.

    Stores never change, but a path may be given to another store, under a process that reads.
    """
    if not isinstance(path, Path):
        return open_objects(path).usage(MANIFEST)
    try:
        stat = (path / MANIFEST).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def read_manifest(path: Root) -> dict[str, Any]:
    """The manifest of a finished store.

    Raises:
        BadInputError: if there is none, or it cannot be read.
    """
    file = path / MANIFEST
    try:
        text = open_objects(path).get(MANIFEST).decode()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise BadInputError(
            f"{path}: not a store of ours, or an unfinished one (no {MANIFEST}); "
            "make it with `sashiko ingest` or `sashiko simulate`"
        ) from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"{file}: the manifest is damaged; make the store again") from error
    try:
        manifest = json.loads(text)
        entries, kind, version = manifest["entries"], manifest["kind"], manifest["format"]
        whole = manifest["digest"] == entries_digest(entries) and kind.startswith("sashiko-")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(f"{file}: the manifest is damaged; make the store again") from error
    if version != FORMAT:
        raise BadInputError(f"{file}: format {version} is not known here; update sashiko")
    if not whole:
        raise BadInputError(f"{file}: the manifest is damaged; make the store again")
    return dict(manifest)


class StoreWriter:
    """Writes one store: a context manager that publishes on a clean exit and else removes all.

    Attributes:
        path: where the store appears; must not exist.
    """

    kind: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._entries: list[dict[str, Any]] = []
        self._facts: dict[str, Any] = {}
        self._chunks: dict[str, str] = {}

    def __enter__(self) -> Self:
        require_new(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.path)
        owner = f"{_processes()}@{os.getpid()}"
        self._staging = self.path.with_name(f"{_staging_prefix(self.path)}{owner}@{uuid4().hex}")
        store = RecordingStore(self._staging)
        store.written = self._chunks
        self._group = zarr.create_group(store, zarr_format=3)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._publish()
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)

    def note(self, name: str, value: Any) -> None:
        """Keep a JSON-able fact in the manifest, outside the digest."""
        self._facts[name] = value

    def _publish(self) -> None:
        """Write records and manifest, flush everything to disk, and rename into place."""
        records = {group: encode(chunks) for group, chunks in by_group(self._chunks).items()}
        for group, data in records.items():
            path = self._staging / record_key(group)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        manifest = {
            **self._facts,
            RECORDS: {group: hashlib.sha256(data).hexdigest() for group, data in records.items()},
            "kind": self.kind,
            "format": FORMAT,
            "digest": entries_digest(self._entries),
            "entries": self._entries,
        }
        with (self._staging / MANIFEST).open("x", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, sort_keys=True)
        _flush_tree(self._staging)
        try:
            self._staging.rename(self.path)  # fails if a folder with content is there
        except OSError as error:
            if not self.path.exists():
                raise
            raise BadInputError(
                f"{self.path}: another process made it meanwhile; that one is whole and stays"
            ) from error
        sync(self.path.parent)


def _staging_prefix(path: Path) -> str:
    return f".{path.name}.staging@"


def _processes() -> str:
    """Names those whose processes we can see, and tell by number whether they live.

    A host's name does not: containers may share one, and each counts its processes from 1. On
    Linux it is the boot of the kernel and the namespace of the numbers.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}.{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def remove_abandoned(path: Path) -> None:
    """Remove what killed writers of this store left behind on this machine."""
    for folder in path.parent.glob(f"{_staging_prefix(path)}*"):
        place, pid, _ = folder.name.removeprefix(_staging_prefix(path)).split("@")
        if place == _processes() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _flush_tree(folder: Path) -> None:
    """Flush every file and folder below to disk, so that a power cut cannot tear a store."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
