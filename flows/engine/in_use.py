"""Whether somebody uses a folder that may go when nobody does: locks that end with their process.

    .NAME.lock   beside the folder NAME: shared by all who use it, alone held by who removes it

The lock is the operating system's (flock, over NFS too), so a killed run holds nothing. Whoever is
last removes the lock's file; a lock on a file that is gone counts for nothing and is taken anew.
Where the file system knows no locks, nobody can tell, and only age decides.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class InUse:
    """The mark of one user of a folder; it ends with `end`, with this object, or the process."""

    def __init__(self, folder: Path) -> None:
        """Mark a folder, which need not be there yet; waits while somebody removes it.

        Args:
            folder: its parent is made.

        Raises:
            OSError: if nothing can be written beside it.
        """
        self._path = lock_of(folder)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _hold(self._path, fcntl.LOCK_SH)
        self._close = weakref.finalize(self, os.close, self._file)

    def end(self) -> None:
        """Give the mark up, and its file if nobody else has one."""
        if self._close.alive:
            if _locked(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB) and _stands(
                self._file, self._path
            ):
                self._path.unlink(missing_ok=True)
            self._close()


def lock_of(folder: Path) -> Path:
    """The file that the users of a folder lock."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def alone_with(folder: Path) -> Iterator[bool | None]:
    """Keep users away from a folder, if there are none.

    Yields:
        True if nobody uses it, and nobody will before the caller is done; False if somebody does;
        None where locks cannot be had.
    """
    path = lock_of(folder)
    try:
        file = _hold(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    except FileNotFoundError:  # nor is there a folder that holds it
        yield True
        return
    try:
        free = _locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True if free else None
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(file)


def _hold(path: Path, how: int) -> int:
    """An open file with a lock on it, which is still the one that others find there.

    Raises:
        BlockingIOError: if it was asked for without waiting and is held.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            os.close(file)
            raise
        except OSError:  # no locks here: the file is a mark without force
            return file
        if _stands(file, path):
            return file
        os.close(file)


def _locked(file: int, how: int) -> bool:
    try:
        fcntl.flock(file, how)
    except OSError:
        return False
    return True


def _stands(file: int, path: Path) -> bool:
    """Whether an open file is the one of that path still."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(file))
