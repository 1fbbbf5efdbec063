"""Whether a dataset or a store of measurements is still what was written: every array read again.

A chunk carries a checksum, an array a sha256 in the manifest, and the manifest one of its own.
Arrays are read one after the other, so that one item at most is in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flows.engine.events import EventHandler, Progress, ignore
from flows.engine.objects import StoreError
from flows.engine.verify import Damage, Fault, Verification
from flows.store import GUIDE, Dataset, Measurements
from flows.store_chunks import record_key
from flows.store_files import array_digest

AGAIN = "make the store again: `sashiko ingest` or `sashiko simulate`"

_DAMAGE = (OSError, KeyError, RuntimeError, ValueError)


def verify_store(
    store: Dataset | Measurements, on_event: EventHandler | None = None
) -> Verification:
    """Read every array of a store, and compare it with its digest.

    Args:
        store: open; its manifest is checked by opening it.
        on_event: told of progress.

    Raises:
        StoreError: if the storage does not answer.
    """
    arrays = list(_arrays(store))
    progress = Progress(len(arrays), float(len(arrays)), on_event or ignore)
    damages: list[Damage] = []
    num_bytes = 0
    for group in store.records.groups():
        damages += _record_damage(store, group)
    for name, item_id, digest in arrays:
        size, damaged = _look_at(store, name, digest)
        num_bytes += size
        damages += [
            Damage(file, "missing" if gone else "altered", item_id, "", AGAIN)
            for file, gone in damaged.items()
        ]
        progress.advance(1.0, 0)
        progress.tell("verified", f"reading {item_id}")
    num_items = len(store.manifest["entries"])
    return Verification(tuple(damages), num_items, len(arrays), num_bytes, 0, 0, 0, 0)


def _record_damage(store: Dataset | Measurements, group: str) -> list[Damage]:
    """What is wrong with the record of a group's chunks: at most one thing."""
    try:
        store.records.require(group)
    except StoreError:
        raise
    except _DAMAGE as error:
        fault: Fault = "missing" if isinstance(error, FileNotFoundError) else "altered"
        return [Damage(record_key(group), fault, group.split("/")[1], "", AGAIN)]
    return []


def _arrays(store: Dataset | Measurements) -> Iterator[tuple[str, str, str]]:
    """(name in the store, item, sha256) of every array."""
    for entry in store.manifest["entries"]:
        item_id = entry["record"]["item_id"]
        if isinstance(store, Dataset):
            yield f"items/{item_id}/pixels", item_id, entry["pixels_digest"]
            for name, digest in entry.get("guides", {}).items():
                yield f"items/{item_id}/{GUIDE}{name}", item_id, digest
        else:
            place = f"measurements/{item_id}/{entry['task']}"
            for name, digest in entry["arrays"].items():
                yield f"{place}/{name}", f"{item_id} ({entry['task']})", digest


def _look_at(
    store: Dataset | Measurements, name: str, digest: str
) -> tuple[int, Mapping[str, bool]]:
    """Bytes of an array, and its damaged files: whether each is gone."""
    array: Any = None
    try:
        array = store.open_array(name)
        values = np.asarray(array[...])
    except StoreError:
        raise
    except _DAMAGE:
        return 0, {f"{name}/zarr.json": False} if array is None else _damaged_chunks(array, name)
    return values.nbytes, {} if array_digest(values) == digest else {name: False}


def _damaged_chunks(array: Any, name: str) -> dict[str, bool]:
    """The files of an array's chunks that cannot be read."""
    counts = [-(-n // size) for n, size in zip(array.shape, array.chunks, strict=True)]
    found = {}
    for index in itertools.product(*map(range, counts)):
        box = (slice(i * n, (i + 1) * n) for i, n in zip(index, array.chunks, strict=True))
        try:
            array[tuple(box)]
        except StoreError:
            raise
        except _DAMAGE as error:
            found["/".join([name, "c", *map(str, index)])] = isinstance(error, FileNotFoundError)
    return found
