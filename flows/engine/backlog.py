"""Blocks still to do: in order, but for those that failed on their way to or from the storage.

Storage that fails fails for a while: a block that is tried again at once fails again, and uses up
its attempts before the file server is back. So it waits, and others go first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0


def wait_after(num_failures: int) -> float:
    """Seconds to leave a block alone after so many failures of the storage: 1, 4, 16, ... 60."""
    return min(FIRST_WAIT_S * 4.0 ** (num_failures - 1), LONGEST_WAIT_S)


class Backlog(Generic[T]):
    """Blocks in the order of the plan, then those that are tried again.

    Args:
        fresh: the plan's, listed when they are asked for.
        clock: monotonic seconds.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        fresh: Iterator[T],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._fresh, self._clock, self._sleep = fresh, clock, sleep
        self._first: deque[T] = deque()
        self._again: deque[T] = deque()
        self._waiting: list[tuple[float, T]] = []

    def put_first(self, block: T) -> None:
        """Add behind those that came back like this before, and before all others."""
        self._first.append(block)

    def put_next(self, block: T) -> None:
        """Add before all others that are tried again."""
        self._again.appendleft(block)

    def put(self, block: T, wait_s: float = 0.0) -> None:
        """Add at the end, to be done no sooner than in `wait_s` seconds."""
        if wait_s > 0:
            self._waiting.append((self._clock() + wait_s, block))
        else:
            self._again.append(block)

    def take(self) -> T | None:
        """The next block; None if there is none, or those that are left still wait."""
        if self._first:
            return self._first.popleft()
        fresh = next(self._fresh, None)
        if fresh is not None:
            return fresh
        now = self._clock()
        self._again.extend(block for due, block in self._waiting if due <= now)
        self._waiting = [entry for entry in self._waiting if entry[0] > now]
        return self._again.popleft() if self._again else None

    def wait(self) -> bool:
        """Wait until there is something to take; False at once if there never will be."""
        if not self._first and (fresh := next(self._fresh, None)) is not None:
            self._first.append(fresh)
        if self._first or self._again:
            return True
        if self._waiting:
            self._sleep(max(0.0, min(due for due, _ in self._waiting) - self._clock()))
        return bool(self._waiting)
