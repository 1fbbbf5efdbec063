"""Published items as files of the domain's own formats, for the tools outside.

    OUTPUT/files/PLACE.png        the restored image; PLACE is its source's name, or its item's
    OUTPUT/files/PLACE.json       where its pixels come from

Files appear whole, provenance first, under names that are free; nothing is ever overwritten.
Another result for the same place (another model, say) stands beside the first as
PLACE--METHOD-KEY.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from domains.base import Array, Item
from domains.registry import load_domain
from flows.engine.cost import LARGE_ITEM_BYTES
from flows.engine.objects import LocalObjects
from flows.engine.restored import RestoredEntry, open_restored

FILES = "files"


def hand_over(
    output: Path, entry: RestoredEntry, places: Sequence[str], source: Path | None = None
) -> list[Path]:
    """Write a published item in its source's format, once for each of its places.

    Args:
        output: root of the results.
        entry: the item.
        places: names under OUTPUT/files, without suffix.
        source: the file that it was read from, beside which some domains write; None if unknown.

    Returns:
        The files, old or new.

    Raises:
        BadInputError: if the domain cannot write the item.
    """
    objects = LocalObjects(output)
    return [_hand_over(objects, output, entry, place, source) for place in places]


def place_of(entry: RestoredEntry) -> str:
    """The place of an item that came from a measurement store."""
    return f"{entry.task}/{entry.item_id}"


def _hand_over(
    objects: LocalObjects, output: Path, entry: RestoredEntry, place: str, source: Path | None
) -> Path:
    key, owner = f"{FILES}/{place}", _owner(objects, f"{FILES}/{place}.json")
    if owner not in (None, entry.key):
        key = f"{key}--{entry.method}-{entry.key[:8]}"
        owner = _owner(objects, f"{key}.json")
    if owner is not None:
        finished = _finished(objects, key)
        if finished is not None:
            return finished
    return _write(objects, output, entry, key, source)


def _owner(objects: LocalObjects, key: str) -> str | None:
    """Key of the item that a provenance file speaks of; None if there is no such file."""
    try:
        return str(json.loads(objects.get(key))["key"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError):
        return ""


def _finished(objects: LocalObjects, key: str) -> Path | None:
    """The file that a provenance names, unless its writer died between the two."""
    file = json.loads(objects.get(f"{key}.json"))["file"]
    place = str(PurePosixPath(key).with_name(file))
    return objects.path(place) if objects.exists(place) else None


def _write(
    objects: LocalObjects, output: Path, entry: RestoredEntry, key: str, source: Path | None
) -> Path:
    """Write into a folder of this attempt's own, then let provenance and image appear."""
    draft = f".work/{FILES}-{uuid.uuid4().hex}"
    folder = objects.path(draft)
    folder.mkdir(parents=True)
    try:
        written = _written(output, entry, folder / PurePosixPath(key).name, source)
        target = str(PurePosixPath(key).with_name(written.name))
        provenance = {"file": written.name, **entry.facts}
        objects.create(f"{key}.json", (json.dumps(provenance, indent=1) + "\n").encode())
        if written.is_dir():
            objects.adopt(f"{draft}/{written.name}", target)
        elif not objects.exists(target):
            objects.link(f"{draft}/{written.name}", target)
    finally:
        objects.remove(draft)
    return objects.path(target)


def _written(output: Path, entry: RestoredEntry, stem: Path, source: Path | None) -> Path:
    """The item beside its source; or as a file, part by part if it is large, else at once."""
    restored, domain = open_restored(output), load_domain(entry.record.domain)

    def read(z: slice, y: slice, x: slice) -> Array:
        return restored.read(entry, z, plane=(y, x))

    if source is not None:
        beside = domain.write_back(entry.record, read, stem, source, entry.facts)
        if beside is not None:
            return beside
    if 4 * math.prod(entry.record.shape) > LARGE_ITEM_BYTES:
        path = domain.write_large(entry.record, read, stem)
        if path is not None:
            return path
    return domain.write(Item(np.asarray(restored.read(entry)), entry.record), stem)
