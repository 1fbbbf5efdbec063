"""What the command prints: progress on stderr, answers on stdout, errors in one sentence.

On a terminal long work shows a bar with the time left; piped, it writes plain lines, few of them.
"""

from __future__ import annotations

import errno
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import click

from flows import quiet
from flows.mistakes import mistake_in

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from flows.engine.events import Event

OK, FAILED, BAD_INPUT, QUARANTINED, INTERRUPTED = 0, 1, 2, 3, 130

_THROTTLE_S = 5.0
_BAD_PLACES = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS}
"""What the system says of an output that is a file, or where nothing may be written."""
_LOUD = {"quarantined", "retry", "corrupt", "lost", "done", "warning", "step"}
"""Events that are always a line of their own; the others only move the bar."""


class Terminal:
    """Shows a run's events. Use as a context manager, so that the bar is taken down.

    Args:
        stream: where lines go; default stderr, which leaves stdout to the answer.
        interactive: draw a bar; default: whether the stream is a terminal.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        interactive: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stderr
        self._interactive = self._stream.isatty() if interactive is None else interactive
        self._clock = clock
        self._last_line_s = float("-inf")
        self._bar: Bar | None = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._take_down()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._interactive:
            self._draw(event)
        elif self._due(event):
            self._last_line_s = self._clock()
            self.say(_plain(event))

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            click.echo(line, file=self._stream)

    def _due(self, event: Event) -> bool:
        """Whether a piped run writes a line for the event."""
        if event.kind in _LOUD or (event.total > 0 and event.done >= event.total):
            return True
        return self._clock() - self._last_line_s >= _THROTTLE_S

    def _draw(self, event: Event) -> None:
        if event.kind in _LOUD:
            if event.kind in ("done", "step"):
                self._take_down()
            self.say(event.message)
            return
        bar = self._bar or self._put_up()
        eta = event.facts.get("eta_s")
        bar.update(
            bar.task_ids[0],
            completed=event.done,
            total=event.total or None,
            description=event.message[:60],
            left="" if eta is None else f"{duration(float(eta))} left{_speed(event)}",
        )

    def _put_up(self) -> Bar:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Progress(*columns, console=Console(file=self._stream), transient=True)
        self._bar.add_task("", total=None, left="")
        self._bar.start()
        return self._bar

    def _take_down(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _plain(event: Event) -> str:
    eta = event.facts.get("eta_s")
    count = f"[{event.done}/{event.total}] " if event.total else ""
    left = f" ({duration(float(eta))} left{_speed(event)})" if eta else ""
    return f"{count}{event.message}{left}"


def _speed(event: Event) -> str:
    """Megapixels a second, where a run counts them."""
    speed = event.facts.get("megapixels_per_s")
    return f", {float(speed):.3g} MP/s" if speed else ""


def duration(seconds: float) -> str:
    """Seconds as people say them: 8 s, 2 min 05 s, 3 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float) -> str:
    """Bytes as people say them: 812 B, 3.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns of text, numbers to the right; the same on a terminal and in a pipe."""
    values = [list(row) for row in rows]
    columns = [list(column) for column in zip(*values, strict=True)] or [[] for _ in headers]
    texts = [[str(h), *map(_cell, column)] for h, column in zip(headers, columns, strict=True)]
    padded = [
        _pad(text, right=all(isinstance(v, int | float | None) for v in column))
        for text, column in zip(texts, columns, strict=True)
    ]
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


def _pad(column: list[str], *, right: bool) -> list[str]:
    width = max(map(len, column))
    head, *body = [text.rjust(width) if right else text.ljust(width) for text in column]
    return [head, "-" * width, *body]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def print_json(value: Any) -> None:
    """Write an answer as JSON to stdout."""
    click.echo(json.dumps(jsonable(value), indent=2, sort_keys=False))


def jsonable(value: Any) -> Any:
    """Dataclasses, models, paths and their containers as what JSON knows."""
    from flows.roots import S3Root

    if is_dataclass(value) and not isinstance(value, type):
        return jsonable(asdict(value))
    if hasattr(value, "model_dump"):
        return jsonable(value.model_dump())
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(v) for v in value]
    if isinstance(value, Path | S3Root):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    return value


def explain(error: BaseException, options: Mapping[str, str] | None = None) -> int:
    """Say what went wrong in one sentence on stderr; returns the exit code.

    A user's mistake is 2, a failed run 1. SASHIKO_DEBUG=1 prints the traceback too.

    Args:
        error: that ended the command.
        options: setting -> the option of the command that sets it.
    """
    if quiet.debugging():
        traceback.print_exception(error)
    code, sentence = _verdict(error, options)
    click.echo(f"sashiko: {sentence}", err=True)
    return code


def _verdict(error: BaseException, options: Mapping[str, str] | None) -> tuple[int, str]:
    from pydantic import ValidationError

    from diffusion_core.model import BadModelError
    from domains.base import BadInputError

    if isinstance(error, BadInputError | BadModelError):
        return BAD_INPUT, _one_line(str(error))
    if isinstance(error, ValidationError):
        return BAD_INPUT, mistake_in(error, None, options).sentence
    if isinstance(error, OSError) and error.errno in _BAD_PLACES and error.filename:
        reason = (error.strerror or "it cannot be used").lower()
        return BAD_INPUT, f"{error.filename}: {reason}; give a folder that can be written to"
    reason = _one_line(str(error)) or type(error).__name__
    hint = "" if quiet.debugging() else "; SASHIKO_DEBUG=1 shows where"
    return FAILED, f"the run failed: {type(error).__name__}: {reason}{hint}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
