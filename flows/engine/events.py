"""What a run tells while it runs: one stream of events, for bars, logs and artifacts alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something happened.

    Attributes:
        kind: "plan", "start", "block", "published", "reused", "retry", "corrupt", "quarantined",
            "lost" (another driver published first), "file" or "done".
        done: blocks (or files) finished so far.
        total: blocks (or files) of the run.
        message: one plain line.
        facts: JSON-able figures: elapsed_s, eta_s, megapixels_per_s, item_id, task, method ...
    """

    kind: str
    done: int
    total: int
    message: str
    facts: Mapping[str, Any] = field(default_factory=dict)


EventHandler = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing."""


class Progress:
    """Counts work done against work planned and foretells the rest.

    Work is weighed by predicted seconds, so that the estimate does not jump where heavy items
    follow light ones. Blocks finished by an earlier run count as done but not towards the speed,
    and no more does the time until the first block was begun, in which workers start.
    """

    def __init__(
        self,
        total: int,
        weight: float,
        emit: EventHandler,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            total: blocks of the run.
            weight: their predicted seconds, together.
            emit: who listens.
            clock: monotonic seconds.
        """
        self.total, self.done = total, 0
        self._left, self._worked, self._pixels = weight, 0.0, 0
        self._emit, self._clock, self._start = emit, clock, clock()
        self._begun_s, self._num_timed = self._start, 0

    def skip(self, blocks: int, weight: float) -> None:
        """Count blocks that need no work (any more): receipted before, or given up."""
        self.done += blocks
        self._left -= weight

    def advance(self, weight: float, pixels: int, seconds: float | None = None) -> None:
        """Count one block computed just now.

        Args:
            weight: its predicted seconds.
            pixels: in it.
            seconds: that it took; None if that is not known.
        """
        if seconds is not None and not self._num_timed:
            self._begun_s = max(self._clock() - seconds, self._start)
        self._num_timed += 1
        self.done += 1
        self._left -= weight
        self._worked += weight
        self._pixels += pixels

    def facts(self) -> dict[str, float | None]:
        """elapsed_s, eta_s (None until two blocks are done), megapixels_per_s."""
        now = self._clock()
        elapsed = now - self._start
        eta = None
        if self._worked > 0 and self._num_timed > 1:
            eta = (now - self._begun_s) / self._worked * max(self._left, 0.0)
        speed = self._pixels / 1e6 / elapsed if elapsed > 0 else 0.0
        return {"elapsed_s": elapsed, "eta_s": eta, "megapixels_per_s": speed}

    def tell(self, kind: str, message: str, **facts: Any) -> None:
        """Send an event with the figures of the moment."""
        self._emit(Event(kind, self.done, self.total, message, {**self.facts(), **facts}))
