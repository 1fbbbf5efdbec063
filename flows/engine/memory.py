"""How much memory there is, and how much this process holds at most: a block at a time on Linux."""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
TRIM_BYTES = 2**20
"""Freed memory is given back after results of so many bytes."""

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def machine_bytes() -> int:
    """Memory of this machine in bytes, or of the container that we are in where that is less."""
    import psutil

    limits = [psutil.virtual_memory().total]
    for path in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(path.read_text()))
    return int(min(limits))


@dataclass(eq=False)
class _Record:
    """The highest resident memory of one measurement so far, in bytes."""

    highest: int = 0


_lock = threading.Lock()
_open: list[_Record] = []
_untrimmed = 0


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Measure the highest resident memory from here on, in bytes, files mapped included.

    Linux can be told to start its record anew; elsewhere the figure is that of the process's life.
    Threads may measure at the same time: before the record starts anew, those who go on note it.
    """
    mine = _Record()
    with _lock:
        seen = peak_bytes() if _open else 0
        for record in _open:
            record.highest = max(record.highest, seen)
        with suppress(OSError):
            _RESET.write_text("5")  # "5": reset the peak resident set size, see proc(5)
        _open.append(mine)
    try:
        yield lambda: max(mine.highest, peak_bytes())
    finally:
        with _lock:
            _open.remove(mine)


def give_back(num_bytes: int) -> None:
    """Return to the system what the C library keeps of freed memory.

    Threads have heaps of their own, and what one has freed is of no use to the other: a worker's
    memory was a quarter larger. It takes a millisecond, so small blocks are counted until there
    are TRIM_BYTES of them. Elsewhere than with glibc nothing is done.

    Args:
        num_bytes: of the result that was let go; what was needed to compute it was far more.
    """
    global _untrimmed
    with _lock:
        _untrimmed += num_bytes
        if _untrimmed < TRIM_BYTES:
            return
        _untrimmed = 0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak_bytes() -> int:
    """Highest resident memory on record, in bytes."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else 1024 * used
    peak = next(line for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(peak.split()[1])
