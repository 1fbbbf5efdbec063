"""Is it the items, or the storage? One item after the other that fails is not to blame itself."""

from __future__ import annotations

from collections.abc import Iterable

MAX_ITEMS_FAILED = 5
"""So many items failed by the storage, and nothing done between: it is not the items."""


class Outage:
    """The items that the storage failed, since it last did what it should.

    An item counts by its first failure alone: the retries of a few items with bad sectors come one
    after the other at the end of a run, and tell no more.
    """

    def __init__(self) -> None:
        self._failed: set[str] = set()

    def well(self) -> None:
        """The storage did what it should."""
        self._failed.clear()

    def failed(self, key: str) -> None:
        """The storage failed an item, for the first time."""
        self._failed.add(key)

    @property
    def likely(self) -> bool:
        """Whether so many failed in a row that it is not the items."""
        return len(self._failed) >= MAX_ITEMS_FAILED

    def is_of_all(self, keys: Iterable[str]) -> bool:
        """Whether it failed all of these, and two at the least: of one alone nothing is told."""
        wanted = set(keys)
        return len(wanted) > 1 and wanted <= self._failed

    def sentence(self, reason: str) -> str:
        """What to tell when it stops a run."""
        return (
            f"the storage fails: {len(self._failed)} items in a row could not be read or "
            f"written, the last because of {reason}; what is done is kept, run it again when the "
            "storage is well"
        )
