"""Files handed over, as their provenance knows them: size and sha256 of what stands beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from flows.engine.objects import LocalObjects

FILES = "files"


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file; of a folder those of all its files with their names.

    Raises:
        OSError: if it cannot be read.
    """
    if not path.is_dir():
        return {"file_bytes": path.stat().st_size, "file_sha256": _sha256(path)}
    files = sorted(p for p in path.rglob("*") if p.is_file())
    told = "".join(f"{_sha256(p)}  {p.relative_to(path).as_posix()}\n" for p in files)
    return {
        "file_bytes": sum(p.stat().st_size for p in files),
        "file_sha256": hashlib.sha256(told.encode()).hexdigest(),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance_of(objects: LocalObjects, key: str) -> Mapping[str, Any] | None:
    """What a provenance file says; None if there is none, {} if it cannot be read as one."""
    try:
        told = json.loads(objects.get(key))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def file_of(objects: LocalObjects, key: str, provenance: Mapping[str, Any]) -> str | None:
    """Key of the file that the provenance under a key speaks of; None if there is no such file."""
    name = provenance.get("file")
    if not isinstance(name, str) or PurePosixPath(name).name != name:
        return None
    place = str(PurePosixPath(key).with_name(name))
    return place if objects.exists(place) else None


def is_as_written(objects: LocalObjects, place: str, provenance: Mapping[str, Any]) -> bool:
    """Whether a file is what its provenance says; of what older versions wrote it says nothing.

    Raises:
        OSError: if it cannot be read.
    """
    if "file_sha256" not in provenance:
        return True
    path, size = objects.path(place), provenance.get("file_bytes")
    if path.is_symlink() and not path.exists():  # it leads nowhere
        return False
    if path.is_file() and path.stat().st_size != size:
        return False
    found = fingerprint(path)
    return all(provenance.get(name) == value for name, value in found.items())


def handed_over(objects: LocalObjects) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(key of the file, provenance) of every file handed over that is there still.

    Of a provenance that cannot be read at all there is its own key, and {}.
    """
    for note in sorted(objects.path(FILES).rglob("*.json")):
        key = note.relative_to(objects.root).as_posix()
        if note.name.startswith(".") or note.is_dir():
            continue
        try:
            told = provenance_of(objects, key) or {}
        except OSError:
            yield key, {}
            continue
        place = file_of(objects, key, told)
        if place is not None and "key" in told:
            yield place, told
