"""The training items' views in Zarr: patches are drawn from more data than memory holds.

    runs/NAME/views.zarr/views/NUMBER/INDEX     (c z h w) float32, chunks of (c 1 256 256)

Domains turn an item into views (network units, other axes, coarser scales) as a whole. That is done
once, item by item; afterwards a worker reads the chunks that its patches touch, and keeps the last
ones up to a bound. The samples are those that are drawn from views in memory, bit by bit.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from domains.base import Array
from flows.store import Store
from flows.store_files import StoreWriter, write_array

CHUNK_PX = 256
"""Side of a chunk. A patch of 96 touches two of them, more often than not."""

Index = tuple[int, int, int, int]


class ViewsWriter(StoreWriter):
    """Writes the views of items; see StoreWriter."""

    kind = "sashiko-views"

    def add(self, condition: str, views: Sequence[Array], weight: float) -> None:
        """Add an item's views for a condition, and how often it is picked."""
        number = len(self._entries)
        group = self._group.create_group(f"views/{number}")
        for index, view in enumerate(views):
            c, _, h, w = view.shape
            chunk = (c, 1, min(h, CHUNK_PX), min(w, CHUNK_PX))
            write_array(group, str(index), np.ascontiguousarray(view, np.float32), chunk)
        shapes = [list(view.shape) for view in views]
        self._entries.append({"condition": condition, "weight": weight, "shapes": shapes})


class Views(Store):
    """Views of items, open for reading.

    Args:
        path: of the store.
        cache_bytes: bound of the chunks that are kept in memory.
    """

    kind = ViewsWriter.kind

    def __init__(self, path: Path, cache_bytes: int) -> None:
        super().__init__(path)
        self.cache = ChunkCache(cache_bytes)

    def items(self) -> Iterator[tuple[str, list[StoredView], float]]:
        """(condition, views, weight) of every item, in the order they came in."""
        for number, entry in enumerate(self.manifest["entries"]):
            views = [
                StoredView(tuple(shape), self._reader(number, index))
                for index, shape in enumerate(entry["shapes"])
            ]
            yield entry["condition"], views, entry["weight"]

    def _reader(self, number: int, index: int) -> Callable[[Index], Array]:
        name = f"views/{number}/{index}"

        def read(at: Index) -> Array:
            _, z, y, x = at
            rows, columns = (slice(i * CHUNK_PX, (i + 1) * CHUNK_PX) for i in (y, x))
            where = (slice(None), slice(z, z + 1), rows, columns)
            return self.cache.get((name, at), lambda: self._array(name, where))

        return read


class StoredView:
    """A view (c z h w) of which windows of one slice are read; a patches.View.

    Attributes:
        shape: (c, z, h, w).
    """

    def __init__(self, shape: tuple[int, ...], chunk: Callable[[Index], Array]) -> None:
        self.shape = shape
        self._chunk = chunk

    def __getitem__(self, where: Any) -> Array:
        """view[:, z, y0:y1, x0:x1], as of an array: (c, y1 - y0, x1 - x0)."""
        _, z, rows, columns = where
        window = np.empty(
            (self.shape[0], rows.stop - rows.start, columns.stop - columns.start), np.float32
        )
        for y, x in product(_chunks_of(rows), _chunks_of(columns)):
            chunk = self._chunk((0, int(z), y, x))[:, 0]
            top, left = y * CHUNK_PX, x * CHUNK_PX
            # The part of the chunk inside the window, in the coordinates of the view.
            y0, y1 = max(rows.start, top), min(rows.stop, top + chunk.shape[1])
            x0, x1 = max(columns.start, left), min(columns.stop, left + chunk.shape[2])
            part = chunk[:, y0 - top : y1 - top, x0 - left : x1 - left]
            window[
                :, y0 - rows.start : y1 - rows.start, x0 - columns.start : x1 - columns.start
            ] = part
        return window


class ChunkCache:
    """The arrays used last, up to a number of bytes. Safe to use from several threads.

    Attributes:
        held_bytes: of the arrays now in it.
        num_reads: arrays that were not in it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Any, Array] = OrderedDict()
        self._lock = threading.Lock()
        self.held_bytes = 0
        self.num_reads = 0

    def get(self, key: Any, read: Callable[[], Array]) -> Array:
        """The array of a key, read if it is not here; not to be modified."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        array = read()  # outside the lock: threads wait for the disk side by side
        with self._lock:
            self.num_reads += 1
            if key not in self._kept:
                self._kept[key] = array
                self.held_bytes += array.nbytes
            while self.held_bytes > self._max_bytes:
                self.held_bytes -= self._kept.popitem(last=False)[1].nbytes
        return array


def write_views(
    path: Path, items: Iterable[tuple[str, Sequence[Array], float]], key: dict[str, Any]
) -> None:
    """Write a store of views, one item in memory at a time.

    Args:
        path: of the store; must not exist.
        items: (condition, views, weight).
        key: what the views depend on; see `key_of`.
    """
    with ViewsWriter(path) as writer:
        writer.note("key", key)
        for condition, views, weight in items:
            writer.add(condition, views, weight)


def key_of(path: Path) -> dict[str, Any] | None:
    """What the views of a store were made of; None if there is no whole store."""
    from domains.base import BadInputError
    from flows.store_files import read_manifest

    try:
        return dict(read_manifest(path)["key"])
    except (BadInputError, KeyError):
        return None


def _chunks_of(window: slice) -> range:
    """Numbers of the chunks that a window of pixels touches along an axis."""
    return range(window.start // CHUNK_PX, (window.stop - 1) // CHUNK_PX + 1)
