"""Items whose manifest is gone: pixels that were published, and that no reader finds any more.

A folder that no manifest names is garbage where its publisher died or lost: then it is not whole,
or its work is there still, or a manifest that names another folder, or one that was set aside. Else
somebody removed the manifest, or the disk lost it: `verify` names it, and `gc` leaves its pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flows.engine.publish import LEDGER
from flows.engine.receipt import Objects

FOLDER = re.compile(r"[a-z0-9-]+-(?P<key>[0-9a-f]{12})-(?P<id>[0-9a-f]{8})\.ome\.zarr")
"""Name of the folder of one attempt at publishing one item."""

Names = Callable[[str], list[str]]
"""Names directly under a prefix."""


@dataclass(frozen=True)
class Lost:
    """An item whose manifest is gone.

    Attributes:
        manifest: object key of the manifest, or its beginning.
        key: of the item, or its first 12 digits.
        path: of the folder.
    """

    manifest: str
    key: str
    path: str


def lost_manifests(objects: Objects, names: Names) -> list[Lost]:
    """The items of an output whose manifests are gone, by their folders.

    Args:
        objects: the output.
        names: lists what is under a prefix, of the items; decides what becomes of errors.

    Raises:
        OSError: if manifests or work cannot be listed.
    """
    told = _told_of(objects)
    unnamed = [(path, key) for path, key in item_folders(names) if key not in told]
    told = _told_of(objects) if unnamed else told  # a run may have begun or published them since
    return [
        Lost(f"manifests/{key}...json", key, path)
        for path, key in unnamed
        if key not in told and _is_whole(objects, path)
    ]


def item_folders(names: Names) -> Iterator[tuple[str, str]]:
    """(path, first 12 digits of the item's key) of every folder of an attempt at publishing."""
    for item in names("items"):
        for task in names(f"items/{item}"):
            for name in names(f"items/{item}/{task}"):
                if match := FOLDER.fullmatch(name):
                    yield f"items/{item}/{task}/{name}", match["key"]


def is_lost(objects: Objects, path: str, key: str) -> bool:
    """Whether a folder is whole, and nothing speaks of its item any more.

    Args:
        objects: the output.
        path: of the folder.
        key: first 12 digits of the item's key.
    """
    return _is_whole(objects, path) and key not in _told_of(objects)


def _is_whole(objects: Objects, path: str) -> bool:
    """Whether a folder was put together to its end: the ledger comes last."""
    return objects.exists(f"{path}/{LEDGER}")


def _told_of(objects: Objects) -> set[str]:
    """Beginnings of the keys of which there is a manifest, set aside or not, or work."""
    work = objects.names(".work")  # first: it is removed after the manifest is there
    return {name[:12] for name in (*work, *objects.names("manifests"))}
