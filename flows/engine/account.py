"""The account of a run: what it took, folded from its events and from nothing else.

The same events go to the terminal, to the progress artifact and, line by line, into
OUTPUT/campaigns/CAMPAIGN/events-RUN.jsonl; whoever folds that file gets the same account.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flows.engine.events import Event


@dataclass(frozen=True)
class WorstSeam:
    """The item with the most visible seams of those that were cut; see seams.Seams."""

    item_id: str
    ratio: float
    standard_error: float
    z: float


@dataclass(frozen=True)
class RunAccount:
    """What a run took.

    Attributes:
        seconds: wall time of computing and publishing.
        device_seconds: of the blocks computed, summed over workers; failed attempts not counted.
        num_computed: blocks computed by this run.
        num_receipted: blocks found done by an earlier run of the same campaign.
        num_reused: items found published before.
        num_published: items published by this run.
        num_quarantined: items given up.
        num_pixels: computed, slices counted, channels not.
        num_bytes: of the chunks written at full resolution, compressed.
        peak_bytes: highest resident memory of a worker.
        retries: kind of failure -> attempts made again; "damaged" for bytes that changed on disk.
        num_mixed: items, new or reused, whose blocks were computed with different libraries or on
            different kinds of processor: other bits than in one place.
        num_cut: items, new or reused, that were cut into tiles and had their seams measured.
        worst_seam: of these the one with the largest z; None if there are none.
    """

    seconds: float = 0.0
    device_seconds: float = 0.0
    num_computed: int = 0
    num_receipted: int = 0
    num_reused: int = 0
    num_published: int = 0
    num_quarantined: int = 0
    num_pixels: int = 0
    num_bytes: int = 0
    peak_bytes: int = 0
    retries: Mapping[str, int] = field(default_factory=dict)
    num_mixed: int = 0
    num_cut: int = 0
    worst_seam: WorstSeam | None = None

    @property
    def megapixels_per_s(self) -> float:
        """Throughput over the wall time."""
        return self.num_pixels / 1e6 / self.seconds if self.seconds > 0 else 0.0


def add_accounts(accounts: Iterable[RunAccount]) -> RunAccount:
    """The account of several runs, one after the other, as of one."""
    total = RunAccount()
    for account in accounts:
        sums = {
            name: getattr(total, name) + getattr(account, name)
            for name, value in vars(account).items()
            if isinstance(value, int | float) and name != "peak_bytes"
        }
        total = replace(
            total,
            **sums,
            peak_bytes=max(total.peak_bytes, account.peak_bytes),
            retries=dict(Counter(total.retries) + Counter(account.retries)),
            worst_seam=_worse(total.worst_seam, account.worst_seam),
        )
    return total


class Book:
    """Keeps the account while the events come in."""

    def __init__(self) -> None:
        self._account = RunAccount()

    def __call__(self, event: Event) -> None:
        """Enter one event."""
        facts = event.facts
        elapsed = float(facts.get("elapsed_s") or 0.0)
        changes = self._changes(event.kind, facts)
        seconds = max(self._account.seconds, elapsed)
        self._account = replace(self._account, seconds=seconds, **changes)

    def account(self) -> RunAccount:
        """The account as it stands."""
        return self._account

    def _changes(self, kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        now = self._account
        if kind == "start":
            return {"num_receipted": int(facts.get("num_receipted", 0))}
        if kind == "block" and facts.get("fresh", True):
            return {
                "num_computed": now.num_computed + 1,
                "device_seconds": now.device_seconds + facts["seconds"],
                "num_pixels": now.num_pixels + facts["num_pixels"],
                "num_bytes": now.num_bytes + facts["num_bytes"],
                "peak_bytes": max(now.peak_bytes, facts["peak_bytes"]),
            }
        if kind in ("retry", "corrupt") and "failure" in facts:
            return {"retries": dict(Counter(now.retries) + Counter([facts["failure"]]))}
        if kind == "quarantined":
            return {"num_quarantined": now.num_quarantined + 1}
        if kind in ("published", "reused"):
            name = f"num_{kind}"
            mixed = now.num_mixed + (int(facts.get("num_environments") or 1) > 1)
            return {name: getattr(now, name) + 1, "num_mixed": mixed, **self._seam(facts)}
        return {}

    def _seam(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        seams = facts.get("seams")
        if seams is None:
            return {}
        seam = WorstSeam(str(facts["item_id"]), seams["ratio"], seams["standard_error"], seams["z"])
        worst = _worse(self._account.worst_seam, seam)
        return {"num_cut": self._account.num_cut + 1, "worst_seam": worst}


def fold(events: Iterable[Event]) -> RunAccount:
    """The account that a run's events add up to."""
    book = Book()
    for event in events:
        book(event)
    return book.account()


def _worse(one: WorstSeam | None, other: WorstSeam | None) -> WorstSeam | None:
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda seam: seam.z)
