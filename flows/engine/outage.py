"""Is it the items, or the storage? One item after the other that fails is not to blame itself."""

from __future__ import annotations

from collections.abc import Iterable

from flows.engine.campaign_parts import PUBLISHING, CampaignError, ItemState
from flows.engine.worker import Failure

MAX_ITEMS_FAILED = 5
"""So many items failed by the storage, and nothing done between: it is not the items."""


class Outage:
    """The items that the storage failed, since it last did what it should.

    An item counts by its first failure alone: the retries of a few items with bad sectors come one
    after the other at the end of a run, and tell no more. Blocks and publishing are told apart:
    where items are put may fail while where work is staged does not.
    """

    def __init__(self) -> None:
        self._blocks: set[str] = set()
        self._publishing: set[str] = set()

    def well(self, index: int) -> None:
        """A block was done, or an item published."""
        self._of(index).clear()

    def blame(
        self, item: ItemState, index: int, failure: Failure, left: Iterable[ItemState]
    ) -> None:
        """Take a failure of the storage into account.

        Args:
            item: that failed.
            index: of the block, or PUBLISHING.
            failure: how.
            left: all items that are open, where this one is about to be given up.

        Raises:
            CampaignError: if too many failed in a row; or all of those left, where there are two or
                more (of one alone nothing is told).
        """
        failed, attempts = self._of(index), item.attempts
        if (attempts[index] if index == PUBLISHING else attempts.total()) == 1:
            failed.add(item.plan.key)
        wanted = {other.plan.key for other in left}
        if len(failed) >= MAX_ITEMS_FAILED or (len(wanted) > 1 and wanted <= failed):
            raise CampaignError(
                f"the storage fails: {len(failed)} items in a row could not be read or written, "
                f"the last because of {failure.reason}; what is done is kept, run it again when "
                "the storage is well"
            )

    def _of(self, index: int) -> set[str]:
        return self._publishing if index == PUBLISHING else self._blocks
