"""Published items as files of the domain's own formats, for the tools outside.

    OUTPUT/files/PLACE.png        the restored image; PLACE is its source's name, or its item's
    OUTPUT/files/PLACE.json       where its pixels come from, what was said to be wrong ("given"),
                                  and sha256 and size of the image

Files appear whole, provenance first, under names that are free; nothing is ever overwritten.
Another result for the same place (another model, say) stands beside the first as
PLACE--METHOD-KEY. An image that is no longer what its provenance says is written anew, and what
stood there is kept as NAME.altered-ID.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from domains.base import Array, BadInputError, Item
from domains.registry import load_domain
from flows.engine.cost import LARGE_ITEM_BYTES
from flows.engine.handed import FILES, file_of, fingerprint, is_as_written, provenance_of
from flows.engine.objects import LocalObjects
from flows.engine.restored import RestoredEntry, open_restored


def hand_over(
    output: Path,
    entry: RestoredEntry,
    places: Sequence[str],
    source: Path | None = None,
    given: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a published item in its source's format, once for each of its places.

    Args:
        output: root of the results.
        entry: the item.
        places: names under OUTPUT/files, without suffix.
        source: the file that it was read from, beside which some domains write; None if unknown.
        given: what its user said to be wrong with it (damage.given_of), kept in its provenance.

    Returns:
        The files, old or new.

    Raises:
        BadInputError: if the domain cannot write the item, or something else has its names.
    """
    objects = LocalObjects(output)
    for place in places:
        _require_inside(objects, f"{FILES}/{place}")
    return [_hand_over(objects, output, entry, place, source, given or {}) for place in places]


def _require_inside(objects: LocalObjects, key: str) -> None:
    """Refuse a place that a link leads out of the output.

    Raises:
        BadInputError: if one does.
    """
    folder = objects.path(key).parent
    if not folder.resolve().is_relative_to(objects.root):
        raise BadInputError(
            f"{FILES}/ leads out of the output by a link; put a folder there, or give --output the "
            "place that it leads to"
        )


def place_of(entry: RestoredEntry) -> str:
    """The place of an item that came from a measurement store."""
    return f"{entry.task}/{entry.item_id}"


def _hand_over(
    objects: LocalObjects,
    output: Path,
    entry: RestoredEntry,
    place: str,
    source: Path | None,
    given: Mapping[str, Any],
) -> Path:
    """Under the place itself, or beside another result that has it."""
    own = f"{FILES}/{place}--{entry.method}-{entry.key[:8]}"
    for key in (f"{FILES}/{place}", own):
        owner = _owner(objects, key)
        if owner in (None, entry.key) or (owner == "" and key == own):
            path = _finished(objects, key, entry)
            path = path or _write(objects, output, entry, key, source, given)
            if path is not None:
                return path
    raise BadInputError(f"something else stands at its place in {FILES}/; move it away")


def _owner(objects: LocalObjects, key: str) -> str | None:
    """Key of the item that has a place; None if nobody has, "" if that cannot be read."""
    told = provenance_of(objects, f"{key}.json")
    return None if told is None else str(told.get("key", ""))


def _finished(objects: LocalObjects, key: str, entry: RestoredEntry) -> Path | None:
    """The item's file, if it is there and as its provenance says."""
    told = provenance_of(objects, f"{key}.json") or {}
    place = file_of(objects, key, told) if told.get("key") == entry.key else None
    if place is None or not is_as_written(objects, place, told):
        return None
    return objects.path(place)


def _write(
    objects: LocalObjects,
    output: Path,
    entry: RestoredEntry,
    key: str,
    source: Path | None,
    given: Mapping[str, Any],
) -> Path | None:
    """Write into a folder of this attempt's own, then let provenance and image appear.

    Returns:
        The image; None if something else has its place by now.
    """
    draft = f".work/{FILES}-{uuid.uuid4().hex}"
    folder = objects.path(draft)
    folder.mkdir(parents=True)
    try:
        written = _written(output, entry, folder / PurePosixPath(key).name, source)
        target = str(PurePosixPath(key).with_name(written.name))
        if _owner(objects, key) is None and objects.exists(target):
            return None
        told = {"given": dict(given)} if given else {}
        provenance = {**entry.facts, **told, "file": written.name, **fingerprint(written)}
        note = (json.dumps(provenance, indent=1) + "\n").encode()
        if not objects.create(f"{key}.json", note):
            if _owner(objects, key) not in (entry.key, ""):
                return None
            objects.put(f"{draft}/provenance", note)
            objects.rename(f"{draft}/provenance", f"{key}.json")
        _place(objects, f"{draft}/{written.name}", target, provenance)
    finally:
        objects.remove(draft)
    return objects.path(target)


def _place(objects: LocalObjects, draft: str, target: str, provenance: Mapping[str, Any]) -> None:
    """Let the image appear; what has been altered is moved aside, what is the same stays."""
    if objects.exists(target):
        if is_as_written(objects, target, provenance):
            return
        objects.rename(target, f"{target}.altered-{uuid.uuid4().hex[:8]}")
    if objects.path(draft).is_dir():
        objects.adopt(draft, target)
    else:
        objects.link(draft, target)


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
