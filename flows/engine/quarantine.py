"""What was given up, and why: one record an item (or file), counted over runs.

    quarantine/KEY.json          an item, by the key of its plan
    quarantine/input-CODE.json   a file that did not become one, by a keyed hash of its place

A later run tries an item again, since most reasons are mended outside: a server that was down, a
machine with more memory, a newer version. A run that gives it up again counts; after `max_runs` of
them it is left alone until somebody asks for it (`sashiko quarantine retry`), so that a hopeless
item does not cost its attempts every night. A run that succeeds removes the record.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.engine.receipt import Objects, get_sound
from flows.engine.worker import FailureKind

MAX_RUNS = 3
"""Runs that give an item up before it is left alone."""


@dataclass(frozen=True)
class Quarantined:
    """An item that was given up, and why.

    Attributes:
        item_id: of the item, or the code of a file that did not become one.
        task: of the measurement.
        method: how it was to be restored.
        reason: a sentence.
        attempts: made at the block that failed, or workers lost in a row, in the last run.
        key: of the item's plan, "" for a file.
        input_digest: content digest of the measurement; of a file its sha256.
        source_digest: of the image that the item was read from, "" if it is not known.
        kind: of the failure, as worker.FailureKind has it.
        num_runs: that gave it up.
        when: of the last of them, UTC.
        source: the file, for the person who gave it; never recorded.
    """

    item_id: str
    task: str
    method: str
    reason: str
    attempts: int = 1
    key: str = ""
    input_digest: str = ""
    source_digest: str = ""
    kind: FailureKind = "input"
    num_runs: int = 1
    when: str = ""
    source: Path | None = None

    @property
    def may_mend(self) -> bool:
        """Whether it may go well another time: the failure was not of the data."""
        return self.kind in ("worker", "memory", "io", "transient")

    @property
    def name(self) -> str:
        """Of the record."""
        return self.key or self.item_id


def record_quarantine(objects: Objects, entry: Quarantined) -> Quarantined:
    """Keep the reason, and count the run; returns what is recorded."""
    before = load_quarantine(objects, entry.name)
    entry = replace(
        entry,
        num_runs=1 if before is None else before.num_runs + 1,
        when=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    values = asdict(entry)
    del values["source"]
    objects.replace(_key(entry.name), (json.dumps(values, indent=1) + "\n").encode())
    return entry


def load_quarantine(objects: Objects, name: str) -> Quarantined | None:
    """The record of a name; None if there is none that can be read."""
    data = get_sound(objects, _key(name))
    try:
        return None if data is None else _parse(json.loads(data))
    except (ValueError, TypeError, AttributeError):
        return None


def list_quarantine(objects: Objects) -> list[Quarantined]:
    """All records, the latest first."""
    names = [n.removesuffix(".json") for n in objects.names("quarantine") if n.endswith(".json")]
    found = [entry for name in names if (entry := load_quarantine(objects, name)) is not None]
    return sorted(found, key=lambda entry: (entry.when, entry.name), reverse=True)


def release(objects: Objects, wanted: Sequence[str]) -> tuple[list[Quarantined], list[str]]:
    """Remove records, so that the next run tries these items as if for the first time.

    Args:
        objects: the output.
        wanted: item ids, codes of files, or beginnings of keys (8 digits or more); none: all.

    Returns:
        What was released, and which of `wanted` are not in quarantine.
    """
    entries = list_quarantine(objects)
    chosen = [e for e in entries if not wanted or any(_is_meant(e, name) for name in wanted)]
    unknown = [name for name in wanted if not any(_is_meant(e, name) for e in entries)]
    for entry in chosen:
        objects.remove(_key(entry.name))
    return chosen, unknown


def forget(objects: Objects, key: str) -> None:
    """Remove the record of an item that is published; there may be none."""
    objects.remove(_key(key))


def _is_meant(entry: Quarantined, name: str) -> bool:
    return name == entry.item_id or (len(name) >= 8 and entry.key.startswith(name))


def _parse(values: dict[str, Any]) -> Quarantined:
    """A record of this version or an older one, which knows less."""
    known = {field.name for field in fields(Quarantined)} - {"source"}
    return Quarantined(**{name: value for name, value in values.items() if name in known})


def _key(name: str) -> str:
    return f"quarantine/{name}.json"
