"""Run a plan: compute what is missing, publish what is complete, quarantine what cannot be done.

Resume = plan - manifests - receipts. There is no other memory: a driver killed anywhere is started
again with the same plan, and two drivers at once do some work twice and publish once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from flows.engine.account import Book
from flows.engine.backlog import Backlog, wait_after
from flows.engine.campaign_parts import (
    PUBLISHING,
    CampaignError,
    CampaignResult,
    ItemState,
    Limits,
    figures_of,
    record_plan,
    stops_all,
    told,
)
from flows.engine.event_log import EventLog, log_path, new_run
from flows.engine.events import Event, EventHandler, Progress, ignore
from flows.engine.executor import Executor
from flows.engine.fencing import driving
from flows.engine.objects import StoreError, open_objects
from flows.engine.outage import Outage
from flows.engine.plan import Plan
from flows.engine.publish import (
    DamagedBlocksError,
    Published,
    load_manifest,
    manifest_key,
    publish,
    reject_hollow,
    reject_manifest,
)
from flows.engine.quarantine import (
    MAX_RUNS,
    Quarantined,
    forget,
    load_quarantine,
    record_quarantine,
)
from flows.engine.receipt import each_receipt, reject_receipt
from flows.engine.restored import RestoredEntry, entry_of
from flows.engine.worker import BlockJob, Failure, Outcome
from flows.plural import plural

__all__ = ["CampaignError", "CampaignResult", "run_plan"]

_AT_ONCE = {"input", "result"}
"""Failures that another attempt cannot mend."""


def run_plan(
    plan: Plan,
    executor: Executor,
    on_event: EventHandler | None = None,
    *,
    max_attempts: int = 3,
    max_runs: int = MAX_RUNS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    run: str | None = None,
) -> CampaignResult:
    """Carry out a plan, or what is left of it.

    Args:
        plan: of make_plan; one window of it will do.
        executor: computes the blocks; stays open.
        on_event: told of everything that happens.
        max_attempts: at one block before its item is quarantined.
        max_runs: that give an item up before it is left alone; see quarantine.
        clock: monotonic seconds, for progress and for blocks that wait.
        sleep: waits for so many seconds.
        run: names the log of events; windows of one run share it. None: a run of its own.

    Raises:
        CampaignError: if the disk is full, store or model are gone, or nothing could go well.
    """
    book, heard = Book(), on_event or ignore
    log = EventLog(log_path(plan.output, plan.campaign, run or new_run()))

    def tell(event: Event) -> None:
        book(event)
        log(event)
        heard(event)

    try:
        limits = Limits(max_attempts, max_runs)
        return _Campaign(plan, executor, tell, book, limits, clock, sleep).run()
    except StoreError as error:
        raise CampaignError(f"{error}; what is done is kept, run it again to go on") from error
    finally:
        log.close()


class _Campaign:
    """One run of one plan."""

    def __init__(
        self,
        plan: Plan,
        executor: Executor,
        on_event: EventHandler,
        book: Book,
        limits: Limits,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._book, self._limits = book, limits
        self._plan, self._executor = plan, executor
        self._objects = open_objects(plan.output)
        self._clock, self._start = clock, clock()
        weight = sum(item.cost.seconds * item.num_blocks for item in plan.items)
        self._progress = Progress(plan.num_blocks, weight, on_event, clock)
        self._items = {item.key: ItemState(item) for item in plan.items}
        self._backlog = Backlog(self._in_order(), clock, sleep)
        self._outage = Outage()
        self._published: dict[str, RestoredEntry] = {}
        self._reused: set[str] = set()
        self._quarantined: list[Quarantined] = []
        self._num_computed = self._num_retries = self._num_lost = 0

    def run(self) -> CampaignResult:
        """Do what is missing."""
        with driving(self._objects, self._plan.campaign):
            return self._run()

    def _run(self) -> CampaignResult:
        record_plan(self._objects, self._plan)
        for item in self._items.values():
            self._take_stock(item)
        left = sum(i.plan.num_blocks - len(i.receipts) for i in self._items.values() if i.open)
        self._progress.tell(
            "start",
            f"{plural(len(self._plan.items), 'item')}, {left} of "
            f"{plural(self._plan.num_blocks, 'block')} to compute "
            f"on {plural(self._executor.num_workers, 'worker')}",
            campaign=self._plan.campaign,
            num_workers=self._executor.num_workers,
            num_receipted=sum(len(i.receipts) for i in self._items.values() if i.open),
            predicted_peak_bytes=self._plan.predicted_peak_bytes,
        )
        for item in [i for i in self._items.values() if i.open and i.complete]:
            self._publish(item)
        while self._backlog.wait():
            for outcome in self._executor.run(self._next_job):
                self._settle(outcome)
        return self._result()

    def _take_stock(self, item: ItemState) -> None:
        """See what of an item is done already, and queue the rest."""
        plan = item.plan
        if reject_manifest(self._objects, plan.key):
            self._progress.tell("corrupt", f"{item.label}: its manifest was damaged; made again")
        manifest = load_manifest(self._objects, plan.key)
        if manifest is not None and reject_hollow(self._objects, manifest):
            self._progress.tell("corrupt", f"{item.label}: its pixels are gone; made again")
        elif manifest is not None:
            self._reused.add(plan.key)
            self._close_published(item, manifest)
            self._tell_of("reused", item, "published before", manifest)
            return
        record = load_quarantine(self._objects, plan.key)
        if record is not None and record.num_runs >= self._limits.max_runs:
            self._leave_alone(item, record)
            return
        try:
            for receipt in each_receipt(self._objects, plan):
                item.receipts[receipt.block] = receipt
        except OSError as error:
            if stops_all(error):
                raise
            # Whoever is given one of its blocks looks for the receipt again.
        known = len(item.receipts)
        self._progress.skip(known, known * plan.cost.seconds)

    def _in_order(self) -> Iterator[tuple[ItemState, int]]:
        """Blocks to compute, as the plan has them, listed when they are asked for."""
        for item in self._items.values():
            for index in range(item.plan.num_blocks):
                item.num_listed = index + 1
                if not item.open:
                    break
                if index not in item.receipts:
                    yield item, index

    def _next_job(self) -> BlockJob | None:
        while (block := self._backlog.take()) is not None:
            item, index = block
            if not item.open or index in item.receipts:
                continue
            if index == PUBLISHING:
                self._publish(item)
                continue
            # Another driver may have published meanwhile: its work area is gone then, and so is
            # the need for ours.
            there = self._objects.size(manifest_key(item.plan.key)) is not None
            if there and self._was_overtaken(item):
                continue
            return BlockJob(self._plan.measurements, self._plan.output, item.plan, index)
        return None

    def _settle(self, outcome: Outcome) -> None:
        """Take an outcome into the books."""
        item, index = self._items[outcome.job.item.key], outcome.job.block
        if outcome.failure is not None:
            self._fail(item, index, outcome.failure)
        elif item.open and outcome.receipt is not None:
            self._num_computed += outcome.fresh
            item.deaths_in_a_row = 0
            self._outage.well(index)
            item.receipts[index] = outcome.receipt
            pixels = item.plan.grid.block(index).write.num_pixels
            seconds = outcome.receipt.account.seconds if outcome.fresh else None
            self._progress.advance(item.plan.cost.seconds, pixels, seconds)
            self._progress.tell(
                "block",
                f"restoring {item.label}",
                **item.facts(index),
                **figures_of(outcome.receipt, pixels),
                fresh=outcome.fresh,
            )
            if item.complete:
                self._publish(item)

    def _fail(self, item: ItemState, index: int, failure: Failure) -> None:
        """Try again, or give the item up, or stop."""
        if not item.open or self._was_overtaken(item):
            return
        if failure.kind == "returned":
            self._backlog.put_first((item, index))
            return
        if failure.kind == "lost":
            self._backlog.put_next((item, index))
            self._retry(item, index, failure, "another attempt")
            return
        if failure.kind == "fatal":
            raise CampaignError(f"{failure.reason}; what is done is kept, run it again to go on")
        item.attempts[index] += 1
        attempts = item.attempts[index]
        # Workers take seconds to replace: an item that kills one after the other, whichever block
        # they are at, is given up like a block that fails again and again.
        item.deaths_in_a_row += failure.kind in ("worker", "memory")
        worst = max(attempts, item.deaths_in_a_row)
        last = worst >= self._limits.max_attempts
        if failure.kind == "io":
            others = (other for other in self._items.values() if other.open)
            self._outage.blame(item, index, failure, others if last else ())
        if failure.kind in _AT_ONCE or last:
            self._quarantine(item, index, failure)
            return
        self._backlog.put((item, index), wait_after(attempts) if failure.kind == "io" else 0.0)
        how = f"attempt {attempts + 1} of {self._limits.max_attempts}"
        self._retry(item, index, failure, how)

    def _retry(self, item: ItemState, index: int, failure: Failure, how: str) -> None:
        """Count and tell that a block is tried again."""
        self._num_retries += 1
        self._progress.tell(
            "retry",
            f"{item.label}: {told(index)} failed ({failure.reason}); {how}",
            **item.facts(index),
            failure=failure.kind,
        )

    def _publish(self, item: ItemState) -> None:
        """Publish a complete item, or queue what of it turns out to be damaged."""
        facts = {"num_failed_attempts": item.attempts.total()}
        try:
            done = publish(self._objects, self._plan, item.plan, item.receipts, facts)
        except DamagedBlocksError as error:
            self._recompute(item, error.blocks)
            return
        except OSError as error:
            if stops_all(error):
                raise CampaignError(
                    f"{item.label} cannot be published: {error}; what is done is kept, "
                    "run it again to go on"
                ) from error
            reason = f"it cannot be published: {type(error).__name__}: {error}"
            self._fail(item, PUBLISHING, Failure("io", reason))
            return
        self._outage.well(PUBLISHING)
        self._tell_published(item, done)

    def _tell_published(self, item: ItemState, done: Published) -> None:
        if not done.won:
            self._lose(item, done.manifest)
            return
        self._close_published(item, done.manifest)
        self._tell_of("published", item, "published", done.manifest)

    def _tell_of(self, kind: str, item: ItemState, what: str, manifest: Mapping[str, Any]) -> None:
        """Tell of an item that readers can see."""
        facts = {"seams": manifest.get("seams")}
        places = manifest.get("environments") or {}
        if len(places) > 1:
            what += f"; its blocks were computed in {len(places)} environments, see its manifest"
            facts["num_environments"] = len(places)
        self._progress.tell(kind, f"{item.label}: {what}", **item.facts(), **facts)

    def _recompute(self, item: ItemState, blocks: tuple[int, ...]) -> None:
        if self._was_overtaken(item):
            return
        for index in blocks:
            reject_receipt(self._objects, item.plan, item.receipts[index])
            del item.receipts[index]
            item.attempts[index] += 1
            if item.attempts[index] >= self._limits.max_attempts:
                reason = "staged bytes change on the disk after they were written; check the disk"
                self._quarantine(item, index, Failure("io", reason))
                return
            self._progress.skip(-1, -item.plan.cost.seconds)
            if index < item.num_listed:  # the others' turn comes
                self._backlog.put((item, index))
            self._progress.tell(
                "corrupt",
                f"{item.label}: block {index} changed on the disk after it was written; "
                "computed again",
                **item.facts(index),
                failure="damaged",
            )

    def _was_overtaken(self, item: ItemState) -> bool:
        """Whether another driver has published an item that is open here; closes it if so."""
        manifest = load_manifest(self._objects, item.plan.key) if item.open else None
        if manifest is None:
            return False
        self._lose(item, manifest)
        return True

    def _lose(self, item: ItemState, manifest: Mapping[str, Any]) -> None:
        self._num_lost += 1
        self._close_published(item, manifest)
        self._progress.tell(
            "lost",
            f"{item.label}: another run published it first; nothing of this run's is kept",
            **item.facts(),
        )

    def _close_published(self, item: ItemState, manifest: Mapping[str, Any]) -> None:
        self._published[item.plan.key] = entry_of(self._plan.output, manifest)
        self._close(item)
        self._objects.remove(item.plan.work)
        forget(self._objects, item.plan.key)

    def _close(self, item: ItemState) -> None:
        """No block of the item is wanted any more."""
        left = item.plan.num_blocks - len(item.receipts)
        self._progress.skip(left, left * item.plan.cost.seconds)
        item.open = False
        item.receipts.clear()

    def _leave_alone(self, item: ItemState, record: Quarantined) -> None:
        """Take an item for given up that earlier runs gave up often enough."""
        self._quarantined.append(record)
        self._close(item)
        self._progress.tell(
            "quarantined",
            f"{item.label} stays in quarantine ({record.reason}): {record.num_runs} runs gave it "
            "up; `sashiko quarantine retry` has it tried again",
            **item.facts(),
            failure=record.kind,
        )

    def _quarantine(self, item: ItemState, index: int, failure: Failure) -> None:
        entry = item.given_up(index, failure)
        self._quarantined.append(record_quarantine(self._objects, entry))
        self._close(item)
        self._progress.tell(
            "quarantined",
            f"{item.label} is quarantined: {failure.reason}",
            **item.facts(index),
            failure=failure.kind,
        )

    def _result(self) -> CampaignResult:
        result = CampaignResult(
            campaign=self._plan.campaign,
            published=tuple(
                self._published[i.key] for i in self._plan.items if i.key in self._published
            ),
            reused=frozenset(self._reused),
            quarantined=tuple(self._quarantined),
            num_blocks=self._plan.num_blocks,
            num_computed=self._num_computed,
            num_retries=self._num_retries,
            num_lost=self._num_lost,
            seconds=self._clock() - self._start,
            account=self._book.account(),
        )
        given_up = f", {len(result.quarantined)} quarantined" if result.quarantined else ""
        self._progress.tell(
            "done",
            f"{len(result.published)} of {plural(len(self._plan.items), 'item')} restored"
            f"{given_up}; {plural(result.num_computed, 'block')} computed, "
            f"{plural(result.num_retries, 'retry')}",
            campaign=result.campaign,
        )
        return replace(result, account=self._book.account())
