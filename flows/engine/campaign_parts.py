"""The nouns of a campaign: what it takes, what it keeps of each item, what it answers."""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from flows.engine.account import RunAccount
from flows.engine.objects import StoreError
from flows.engine.plan import ItemPlan, Plan
from flows.engine.quarantine import Quarantined
from flows.engine.receipt import Objects, Receipt
from flows.engine.receipt_book import ReceiptBook
from flows.engine.restored import RestoredEntry
from flows.engine.worker import Failure

PUBLISHING = -1
"""In place of a block's index: not a block of the item failed, but publishing it."""

_ENDS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def stops_all(error: OSError) -> bool:
    """Whether a failure of publishing one item would be that of any other too."""
    return isinstance(error, StoreError) or error.errno in _ENDS


def told(block: int) -> str:
    """What people call a block, or what is done after the last."""
    return "publishing" if block == PUBLISHING else f"block {block}"


class CampaignError(RuntimeError):
    """The run cannot go on: no block could go well. What is receipted stays."""


@dataclass(frozen=True)
class CampaignResult:
    """What a run did.

    Attributes:
        campaign: its id.
        published: every item of the plan that readers can see now.
        reused: keys of those that had been published before.
        quarantined: items given up.
        num_blocks: of the plan.
        num_computed: blocks computed by this run, failed attempts not counted.
        num_retries: attempts that failed and were made again.
        num_lost: items that another driver published first.
        seconds: wall time.
        account: what it took; see RunAccount.
    """

    campaign: str
    published: tuple[RestoredEntry, ...]
    reused: frozenset[str]
    quarantined: tuple[Quarantined, ...]
    num_blocks: int
    num_computed: int
    num_retries: int
    num_lost: int
    seconds: float
    account: RunAccount


@dataclass(frozen=True)
class Limits:
    """Patience: attempts at a block, and runs with an item."""

    max_attempts: int
    max_runs: int


@dataclass
class ItemState:
    """The state of one item of the plan during a run."""

    plan: ItemPlan
    receipts: MutableMapping[int, Receipt] = field(init=False)
    attempts: Counter[int] = field(default_factory=Counter)
    deaths_in_a_row: int = 0
    open: bool = True
    num_listed: int = 0

    def __post_init__(self) -> None:
        self.receipts = ReceiptBook(self.plan)

    @property
    def complete(self) -> bool:
        """Whether there is a receipt for every block."""
        return len(self.receipts) == self.plan.num_blocks

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{self.plan.item_id} ({self.plan.task}, {self.plan.method.name})"

    def facts(self, block: int | None = None) -> dict[str, Any]:
        """What events tell of it, or of one of its blocks."""
        facts: dict[str, Any] = {
            "item_id": self.plan.item_id,
            "task": self.plan.task,
            "method": self.plan.method.name,
            "key": self.plan.key,
        }
        return facts if block in (None, PUBLISHING) else {**facts, "block": block}

    def given_up(self, block: int, failure: Failure) -> Quarantined:
        """What quarantine says of it."""
        return Quarantined(
            item_id=self.plan.item_id,
            task=self.plan.task,
            method=self.plan.method.name,
            reason=failure.reason,
            kind=failure.kind,
            attempts=max(self.attempts[block], self.deaths_in_a_row),
            key=self.plan.key,
            input_digest=self.plan.input_digest,
            source_digest=self.plan.record.source_digest,
        )


def figures_of(receipt: Receipt, num_pixels: int) -> dict[str, Any]:
    """What a block took, by its receipt."""
    account = receipt.account
    return {
        "seconds": account.seconds,
        "nfe": account.nfe,
        "num_pixels": num_pixels,
        "num_bytes": sum(chunk.size for chunk in receipt.chunks),
        "peak_bytes": account.peak_bytes,
    }


def record_plan(objects: Objects, plan: Plan) -> None:
    """Keep the immutable plan beside its results; the first driver's record stands."""
    key = f"campaigns/{plan.campaign}.json"
    if not objects.exists(key):
        objects.create(key, (json.dumps(plan.to_json(), indent=1) + "\n").encode())
