"""The events of a run as JSON lines in the output, for whoever looks later or from outside.

    OUTPUT/campaigns/CAMPAIGN/events-RUN.jsonl      one file a run, lines only ever added

S3 cannot add to an object: the log of a run whose output is there stands under the home folder of
its driver (SASHIKO_HOME), in campaigns/CAMPAIGN/.

A line is one write, so a killed driver leaves whole lines, but perhaps the last; a reader leaves
out what is torn. The log is a record and never the ledger: nothing is resumed from it, and a disk
that takes no more lines ends the log and not the run.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.config import Home
from flows.engine.events import Event
from flows.roots import Root

_LOG = logging.getLogger(__name__)


def new_run() -> str:
    """A name for a run that sorts by time and that no other run has."""
    return f"{datetime.now(UTC).strftime('%Y%m%dT%H%M%SZ')}-{uuid.uuid4().hex[:8]}"


def log_path(output: Root, campaign: str, run: str) -> Path:
    """Where the events of a run are kept."""
    folder = output if isinstance(output, Path) else Home().home.resolve()
    return folder / "campaigns" / campaign / f"events-{run}.jsonl"


class EventLog:
    """Adds each event to a run's file; never a reason to fail."""

    def __init__(self, path: Path) -> None:
        """Open the file, for adding to what an earlier window of the run wrote."""
        self.path = path
        self._descriptor: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            self._give_up(error)

    def __call__(self, event: Event) -> None:
        """Add one line."""
        if self._descriptor is None:
            return
        data = line_of(event).encode()
        try:
            if os.write(self._descriptor, data) != len(data):
                raise OSError("the disk took half a line")  # noqa: TRY301
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Make what was written last; may be called twice."""
        if self._descriptor is not None:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                _LOG.warning("the log of events was not flushed (%s)", error)
            os.close(self._descriptor)
            self._descriptor = None

    def _give_up(self, error: OSError) -> None:
        _LOG.warning("no further events are logged (%s); the work goes on", error)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def line_of(event: Event) -> str:
    """One event as a line of JSON, with the time of day; figures to six digits."""
    facts = {name: _short(value) for name, value in event.facts.items()}
    values = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "kind": event.kind,
        "done": event.done,
        "total": event.total,
        "message": event.message,
        "facts": facts,
    }
    return json.dumps(values, separators=(",", ":")) + "\n"


def read_events(path: Path) -> Iterator[Event]:
    """The events of a log, one at a time; a line that a kill tore is left out."""
    with Path(path).open("rb") as file:
        for line in file:
            values = _whole(line)
            if values is not None:
                yield Event(
                    values["kind"],
                    values["done"],
                    values["total"],
                    values["message"],
                    values["facts"],
                )


def _whole(line: bytes) -> Mapping[str, Any] | None:
    try:
        return dict(json.loads(line))
    except ValueError:
        return None


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
