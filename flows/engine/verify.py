"""Is an output still what it was: every object hashed again, against what vouches for it.

    manifests/KEY.json     by its own seal
      -> ledger.json       by the manifest
        -> zarr.json, chunks of every level    by the ledger
    .work/KEY/receipts/*   by their own seals
      -> staged chunks     by the receipts
    files/*                that are there still, by their provenance

Nothing is changed, and a campaign may be running: what vanishes because its item is published
meanwhile is no damage.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from flows.engine.events import EventHandler, Progress, ignore
from flows.engine.handed import handed_over, is_as_written
from flows.engine.objects import LocalObjects
from flows.engine.publish import LEDGER, load_manifest, manifest_key
from flows.engine.receipt import Objects, read_receipt, staged_key, unseal

NUM_READERS = 8
"""Threads that read and hash: hashing does not hold the others up, and a network is waited for."""

_BATCH = 256
_KEY = re.compile(r"[0-9a-f]{64}")
_RECEIPT = re.compile(r"(?P<block>\d+)\.json")

Fault = Literal["missing", "altered", "unreadable"]


@dataclass(frozen=True)
class Damage:
    """One object that is not what it should be.

    Attributes:
        file: its key below the output.
        fault: "missing"; "altered": its bytes are not those vouched for; "unreadable": it vouches
            for others and is torn or altered itself, or the disk cannot read it.
        item: what it belongs to, or the item's key where that cannot be told.
        key: of the item.
        next_step: a sentence.
    """

    file: str
    fault: Fault
    item: str
    key: str
    next_step: str


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        damages: in the order they were found.
        num_items: published.
        num_objects: of published items, hashed.
        num_bytes: of them.
        num_staged_blocks: with receipts, not published.
        num_staged_objects: of them, hashed.
        num_staged_bytes: of them.
        num_uncovered: metadata files of published items that an older version wrote: its ledgers
            speak of chunks alone.
    """

    damages: tuple[Damage, ...]
    num_items: int
    num_objects: int
    num_bytes: int
    num_staged_blocks: int
    num_staged_objects: int
    num_staged_bytes: int
    num_uncovered: int

    @property
    def intact(self) -> bool:
        """Whether everything is as it should be."""
        return not self.damages


@dataclass(frozen=True)
class _Claim:
    """An object, what it should be, and what to do if it is not."""

    file: str
    size: int
    sha256: str
    item: str
    key: str
    next_step: str


_AGAIN = (
    "hide the item with `sashiko verify --set-aside`, then give the command again that restored it"
)
_WRITE_AGAIN = "give the command again that restored it: it writes the file anew"
_RERUN = "give the command again that restored it: it sees this, and makes the item anew"
_RECOMPUTE = "nothing is lost: the next run computes the block again"


def verify_output(objects: Objects, on_event: EventHandler | None = None) -> Verification:
    """Hash everything that manifests and receipts name.

    Args:
        objects: the output.
        on_event: told of progress, and of each damage as it is found.
    """
    return _Verifier(objects, on_event or ignore).run()


class _Verifier:
    """One pass over one output."""

    def __init__(self, objects: Objects, on_event: EventHandler) -> None:
        self._objects, self._on_event = objects, on_event
        self._damages: list[Damage] = []
        self._num_uncovered = self._num_blocks = 0
        self._progress = Progress(0, 0.0, on_event)

    def run(self) -> Verification:
        """Check the published, then the staged."""
        names = self._objects.names("manifests")
        keys = [n.removesuffix(".json") for n in names if _KEY.fullmatch(n.removesuffix(".json"))]
        work = [name for name in self._objects.names(".work") if _KEY.fullmatch(name)]
        total = sum(self._count(key) for key in keys)
        self._progress = Progress(total, float(total), self._on_event)
        num_objects, num_bytes = self._check(c for key in keys for c in self._published(key))
        staged = (claim for key in work for claim in self._staged(key))
        num_staged, staged_bytes = self._check(staged)
        self._check_files()
        return Verification(
            tuple(self._damages),
            len(keys),
            num_objects,
            num_bytes,
            self._num_blocks,
            num_staged,
            staged_bytes,
            self._num_uncovered,
        )

    def _count(self, key: str) -> int:
        """Objects of a published item, for the progress."""
        manifest = load_manifest(self._objects, key)
        if manifest is None:
            return 0
        try:
            ledger = unseal(self._objects.get(f"{manifest['path']}/{LEDGER}"))
        except FileNotFoundError:
            return 0
        return len(ledger or ())

    def _published(self, key: str) -> Iterator[_Claim]:
        """What manifest and ledger of an item say of its objects."""
        manifest = load_manifest(self._objects, key)
        if manifest is None:
            if self._objects.exists(manifest_key(key)):
                self._damaged(manifest_key(key), "unreadable", f"{key[:12]}...", key, _RERUN)
            return
        item = f"{manifest['item_id']} ({manifest['task']}, {manifest['method']['name']})"
        path = str(manifest["path"])
        name = f"{path}/{LEDGER}"
        ledger = self._ledger(name, str(manifest["ledger_sha256"]), item, key)
        for file, (size, sha256) in ledger.items():
            yield _Claim(f"{path}/{file}", int(size), str(sha256), item, key, _AGAIN)
        if ledger and "zarr.json" not in ledger:
            self._num_uncovered += 1 + len({file.partition("/")[0] for file in ledger})

    def _ledger(self, name: str, sha256: str, item: str, key: str) -> Mapping[str, Any]:
        try:
            data = self._objects.get(name)
        except FileNotFoundError:
            self._damaged(name, "missing", item, key, _AGAIN)
            return {}
        ledger = unseal(data)
        if ledger is None or hashlib.sha256(data).hexdigest() != sha256:
            self._damaged(name, "unreadable", item, key, _AGAIN)
            return {}
        return ledger

    def _staged(self, key: str) -> Iterator[_Claim]:
        """What the receipts of an unpublished item say of its chunks."""
        work, item = f".work/{key}", f"{key[:12]}... (unpublished)"
        for name in self._objects.names(f"{work}/receipts"):
            file, match = f"{work}/receipts/{name}", _RECEIPT.fullmatch(name)
            if match is None or self._is_over(key):
                continue
            receipt = read_receipt(self._objects, file)
            if receipt is None or (receipt.key, receipt.block) != (key, int(match["block"])):
                if self._objects.exists(file):
                    self._damaged(file, "unreadable", item, key, _RECOMPUTE)
                continue
            self._num_blocks += 1
            for chunk in receipt.chunks:
                place = staged_key(work, receipt.attempt, chunk)
                yield _Claim(place, chunk.size, chunk.sha256, item, key, _RECOMPUTE)

    def _is_over(self, key: str) -> bool:
        """Whether an item whose work is looked at is published: its work goes then."""
        return self._objects.exists(manifest_key(key))

    def _check(self, claims: Iterable[_Claim]) -> tuple[int, int]:
        """Hash what claims speak of, several at a time; returns how many and how many bytes."""
        num_objects = num_bytes = 0
        remaining = iter(claims)
        with ThreadPoolExecutor(NUM_READERS) as readers:
            while batch := list(islice(remaining, _BATCH)):
                found = readers.map(self._look_at, batch)
                for claim, (size, fault) in zip(batch, found, strict=True):
                    num_objects, num_bytes = num_objects + 1, num_bytes + size
                    self._tell(claim)
                    if fault is not None and not self._excused(claim):
                        self._damaged(claim.file, fault, claim.item, claim.key, claim.next_step)
        return num_objects, num_bytes

    def _check_files(self) -> None:
        """Files handed over: their names are free to their owner, who may have taken them away."""
        if not isinstance(self._objects, LocalObjects):
            return
        for place, told in handed_over(self._objects):
            fault: Fault = "altered"
            try:
                if is_as_written(self._objects, place, told):
                    continue
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                fault = "unreadable"
            key = str(told["key"])
            self._damaged(place, fault, str(told.get("item_id", key[:12])), key, _WRITE_AGAIN)

    def _look_at(self, claim: _Claim) -> tuple[int, Fault | None]:
        try:
            data = self._objects.get(claim.file)
        except FileNotFoundError:
            return 0, "missing"
        except OSError as error:
            if error.errno != errno.EIO:  # the store itself does not answer: nothing is known then
                raise
            return 0, "unreadable"
        same = len(data) == claim.size and hashlib.sha256(data).hexdigest() == claim.sha256
        return len(data), None if same else "altered"

    def _excused(self, claim: _Claim) -> bool:
        """Whether a staged chunk is gone because its item was published meanwhile."""
        return claim.file.startswith(".work/") and self._is_over(claim.key)

    def _tell(self, claim: _Claim) -> None:
        if not claim.file.startswith(".work/"):
            self._progress.advance(1.0, 0)
        self._progress.tell("verified", f"hashing {claim.item}")

    def _damaged(self, file: str, fault: Fault, item: str, key: str, next_step: str) -> None:
        self._damages.append(Damage(file, fault, item, key, next_step))
        self._progress.tell("damaged", f"{file} is {fault}; {next_step}")
