"""Datasets of items and stores of measurements, in Zarr v3.

One chunk is one slice of one item (all its channels), or a piece of it where slices are so large
that they are cut: a block of a run reads only what it needs. Stores are immutable and named by
their content; store_files.py says how they are published.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import zarr

from domains.base import Array, BadInputError, Item, ItemRecord, Measurement
from domains.guides import guide_names
from flows.engine.grid import MAX_CANVAS_PX, MAX_CHUNK_PX
from flows.roots import Root
from flows.store_chunks import RECORDS, ChunkRecords
from flows.store_files import StoreWriter, array_digest, read_manifest, strict_store, write_array
from flows.store_records import (
    MeasurementEntry,
    entry_from_json,
    measurement_to_json,
    named_arrays,
    record_from_json,
    record_to_json,
    shared_names,
)

__all__ = [
    "Dataset",
    "DatasetWriter",
    "MeasurementEntry",
    "MeasurementWriter",
    "Measurements",
    "Store",
    "open_store",
    "record_from_json",
    "record_to_json",
]

ALL = slice(None)
GUIDE = "guide-"
"""Of an item's guides in a dataset, before their names."""

_MOST_OPEN = 64
"""Arrays whose metadata are kept: reading them anew would be half of a small block's time."""

_DAMAGE = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    KeyError,
    RuntimeError,
    ValueError,
)
"""What a store that lacks or garbles something fails with; another OSError is of the storage."""


class DatasetWriter(StoreWriter):
    """Writes a dataset of items; see StoreWriter."""

    kind = "sashiko-dataset"

    def add(self, item: Item) -> None:
        """Add an item.

        Raises:
            BadInputError: if the dataset has one of that name.
        """
        values = record_to_json(item.record)
        item_id = item.record.item_id
        if any(e["record"]["item_id"] == item_id for e in self._entries):
            raise BadInputError(f"{item_id}: the dataset holds it already; leave one out")
        c, _, h, w = item.pixels.shape
        group = self._group.create_group(f"items/{item_id}", attributes={"record": values})
        write_array(group, "pixels", item.pixels, (c, 1, h, w))
        entry: dict[str, Any] = {"record": values, "pixels_digest": array_digest(item.pixels)}
        for name, guide in item.guides.items():
            write_array(group, f"{GUIDE}{name}", guide, (1, 1, h, w))
        if item.guides:
            entry["guides"] = {name: array_digest(g) for name, g in item.guides.items()}
        self._entries.append(entry)


class MeasurementWriter(StoreWriter):
    """Writes measurements of any items and tasks; see StoreWriter."""

    kind = "sashiko-measurements"

    def add(self, measurement: Measurement) -> None:
        """Add a measurement.

        Raises:
            BadInputError: if the store has one of that item and task.
        """
        arrays = named_arrays(measurement)
        values = measurement_to_json(measurement, arrays)
        item_id, task = measurement.record.item_id, measurement.task
        if any((e["record"]["item_id"], e["task"]) == (item_id, task) for e in self._entries):
            raise BadInputError(f"{item_id}: the store holds its {task} already; leave one out")
        group = self._group.create_group(f"measurements/{item_id}/{task}", attributes=values)
        shared = shared_names(measurement.params)
        for name, array in arrays.items():
            chunk = array.shape if name in shared else _chunk(array, measurement.record)
            write_array(group, name, array, chunk)
        self._entries.append(values)


class Store:
    """A finished store, open for reading.

    Attributes:
        path: its folder, or its prefix on S3.
        manifest: as it stands, facts noted by the writer included.
        content_digest: sha256 of the content: the same entries give the same digest anywhere.
        records: what its chunks should be.
    """

    kind: ClassVar[str]

    def __init__(self, path: Root, manifest: dict[str, Any] | None = None) -> None:
        """Open a store; `manifest` if it has been read already.

        Raises:
            BadInputError: if there is none of this kind at the path.
        """
        self.path = path
        self.manifest = read_manifest(path) if manifest is None else manifest
        if self.manifest["kind"] != self.kind:
            raise BadInputError(f"{path}: not a {self.kind} but a {self.manifest['kind']} store")
        self.content_digest: str = self.manifest["digest"]
        self.records = ChunkRecords(path, self.manifest.get(RECORDS) or {})
        group = zarr.open_group(strict_store(path, self.records.check), mode="r", zarr_format=3)
        self._opened = lru_cache(maxsize=_MOST_OPEN)(group.__getitem__)

    def open_array(self, name: str) -> Any:
        """An array of the Zarr group, for reading; an absent chunk is an error."""
        return self._opened(name)

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of an array; () if it is damaged, which reading it will tell."""
        try:
            array: Any = self._opened(name)
            return tuple(array.shape)
        except _DAMAGE:
            return ()

    def _array(self, name: str, where: Any) -> Array:
        """A part of an array; only the chunks it touches are read.

        Raises:
            BadInputError: if one is missing, or fails its checksum.
            OSError: if the storage fails, which says nothing of the data.
        """
        try:
            return np.asarray(self._opened(name)[where])
        except _DAMAGE as error:
            raise BadInputError(
                f"{self.path}: a chunk of {name} is damaged or missing; make the store again"
            ) from error


class Dataset(Store):
    """A dataset, open for reading."""

    kind = DatasetWriter.kind

    def __init__(self, path: Root, manifest: dict[str, Any] | None = None) -> None:
        super().__init__(path, manifest)
        records = [record_from_json(e["record"]) for e in self.manifest["entries"]]
        self._records = {record.item_id: record for record in records}
        self._digests = {
            e["record"]["item_id"]: str(e["pixels_digest"]) for e in self.manifest["entries"]
        }

    @property
    def digest(self) -> str:
        """Sha256 of the content: the same items give the same digest anywhere."""
        return self.content_digest

    def items(self) -> list[ItemRecord]:
        """Records of all items, in the order they came in."""
        return list(self._records.values())

    def record(self, item_id: str) -> ItemRecord:
        """The record of one item.

        Raises:
            BadInputError: if the dataset has no such item.
        """
        if item_id not in self._records:
            raise BadInputError(f"{self.path}: holds no item '{item_id}'; choose one of its items")
        return self._records[item_id]

    def pixels_digest(self, item_id: str) -> str:
        """Sha256 of one item's pixels."""
        self.record(item_id)
        return self._digests[item_id]

    def read(self, item_id: str, z: slice = ALL) -> Item:
        """Read an item, or the slices z of it.

        Raises:
            BadInputError: if the dataset has no such item, or a chunk is damaged.
        """
        record = self.record(item_id)
        start, stop = _bounds(z, record.shape[1])
        where = (ALL, slice(start, stop))
        pixels = self._array(f"items/{item_id}/pixels", where)
        guides = {
            name: self._array(f"items/{item_id}/{GUIDE}{name}", where)
            for name in guide_names(record)
        }
        return Item(pixels, record.slices(start, stop), guides)


class Measurements(Store):
    """A store of measurements, open for reading."""

    kind = MeasurementWriter.kind

    def __init__(self, path: Root, manifest: dict[str, Any] | None = None) -> None:
        super().__init__(path, manifest)
        entries = [entry_from_json(e) for e in self.manifest["entries"]]
        self._by_key = {(e.item_id, e.task): e for e in entries}

    def entries(self) -> list[MeasurementEntry]:
        """All measurements, in the order they came in."""
        return list(self._by_key.values())

    def entry(self, item_id: str, task: str) -> MeasurementEntry:
        """One measurement's entry.

        Raises:
            BadInputError: if the store has no such measurement.
        """
        if (item_id, task) not in self._by_key:
            raise BadInputError(f"{self.path}: holds no {task} of '{item_id}'; simulate it first")
        return self._by_key[item_id, task]

    def digest(self, item_id: str, task: str) -> str:
        """Sha256 of the content of one measurement."""
        return self.entry(item_id, task).digest

    def find_digest(self, item_id: str, task: str) -> str | None:
        """The same; None if the store has no such measurement."""
        entry = self._by_key.get((item_id, task))
        return None if entry is None else entry.digest

    def read(
        self, item_id: str, task: str, z: slice = ALL, plane: tuple[slice, slice] = (ALL, ALL)
    ) -> Measurement:
        """Read a measurement, or that of the slices z, or of a window of their planes.

        Args:
            item_id: of the item.
            task: that it was measured for.
            z: slices wanted.
            plane: rows and columns wanted of the arrays whose last two axes are the image's; the
                record tells of whole planes still.

        Raises:
            BadInputError: if the store has no such measurement, a chunk is damaged, or an array
                that is read whole is not the one of the manifest.
            OSError: if the storage fails.
        """
        entry = self.entry(item_id, task)
        start, stop = _bounds(z, entry.num_slices)
        shared = shared_names(entry.params)
        size = entry.record.shape[2:]
        arrays = {}
        for name in entry.arrays:
            path = f"measurements/{item_id}/{task}/{name}"
            first = () if name in shared else (slice(start, stop),)
            shape = self._shape(path)
            window = plane if shape[-2:] == size else ()
            array = self._array(path, (*first, ..., *window))
            if array.shape == shape and array_digest(array) != entry.arrays[name]:
                raise BadInputError(
                    f"{self.path}: {path} is not what was written; make the store again"
                )
            arrays[name] = array
        return Measurement(
            record=entry.record.slices(start, stop),
            task=task,
            operator=entry.operator,
            params=entry.params,
            noise=entry.noise,
            y=arrays.pop("y"),
            arrays={name.removeprefix("array-"): array for name, array in arrays.items()},
            truth_digest=entry.truth_digest,
            seed=entry.seed,
        )


def _chunk(array: Array, record: ItemRecord) -> tuple[int, ...]:
    """One slice; of planes that will be cut a piece, so that a block reads little else."""
    h, w = record.shape[2:]
    if array.shape[-2:] != (h, w) or h * w <= MAX_CANVAS_PX:
        return (1, *array.shape[1:])
    return (1, *array.shape[1:-2], min(h, MAX_CHUNK_PX), min(w, MAX_CHUNK_PX))


def _bounds(z: slice, num_slices: int) -> tuple[int, int]:
    """First and end of a slice object without steps."""
    start, stop, step = z.indices(num_slices)
    if step != 1:
        raise ValueError("stores are read in steps of one slice")
    return start, max(start, stop)


def open_store(path: Root) -> Dataset | Measurements:
    """Open a store of either kind.

    Raises:
        BadInputError: if the path holds neither.
    """
    kinds: dict[str, type[Dataset | Measurements]] = {
        Dataset.kind: Dataset,
        Measurements.kind: Measurements,
    }
    manifest = read_manifest(path)
    kind = manifest["kind"]
    if kind not in kinds:
        raise BadInputError(f"{path}: a {kind} store is not known here; update sashiko")
    return kinds[kind](path, manifest)
