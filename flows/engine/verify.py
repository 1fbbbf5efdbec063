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
from flows.engine.lost import lost_manifests
from flows.engine.objects import LocalObjects, StoreError
from flows.engine.publish import LEDGER, manifest_key, parse_manifest
from flows.engine.receipt import Objects, parse_receipt, staged_key, unseal

NUM_READERS = 8
"""Threads that read and hash: hashing does not hold the others up, and a network is waited for."""

_BATCH = 256
_KEY = re.compile(r"[0-9a-f]{64}")
_RECEIPT = re.compile(r"(?P<block>\d+)\.json")

_NOTHING_IS_KNOWN = {
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENODEV,
}  # fmt: skip
"""Errors that tell of the machine or of the file server, not of the object that was asked for."""

Fault = Literal["missing", "altered", "unreadable"]


@dataclass(frozen=True)
class Damage:
    """One object that is not what it should be.

    Attributes:
        file: its key below the output.
        fault: "missing"; "altered": its bytes are not those vouched for; "unreadable": it vouches
            for others and is torn or altered itself, or it cannot be read.
        item: what it belongs to, or the item's key where that cannot be told.
        key: of the item, "" if that is not known.
        next_step: a sentence.
        manifest_sha256: of the item's manifest as it was when the item was judged; "" of what is
            not published, or where it cannot be read.
    """

    file: str
    fault: Fault
    item: str
    key: str
    next_step: str
    manifest_sha256: str = ""


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
    manifest_sha256: str = ""


_AGAIN = (
    "hide the item with `sashiko verify --set-aside`, then give the command again that restored it"
)
_WRITE_AGAIN = "give the command again that restored it: it writes the file anew"
_RERUN = "give the command again that restored it: it sees this, and makes the item anew"
_LOST = (
    "its pixels lie in {}, where no reader sees them: bring the manifest back from a copy, or give "
    "the command again that restored it; `sashiko gc` leaves them until then"
)
_MEND = "see who may read it, and whether the disk is well"
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
        self._unlisted: set[str] = set()
        self._num_uncovered = self._num_blocks = 0
        self._progress = Progress(0, 0.0, on_event)

    def run(self) -> Verification:
        """Check the published, then the staged."""
        names = self._names("manifests")
        keys = [n.removesuffix(".json") for n in names if _KEY.fullmatch(n.removesuffix(".json"))]
        work = [name for name in self._names(".work") if _KEY.fullmatch(name)]
        total = sum(self._count(key) for key in keys)
        self._progress = Progress(total, float(total), self._on_event)
        num_objects, num_bytes = self._check(c for key in keys for c in self._published(key))
        staged = (claim for key in work for claim in self._staged(key))
        num_staged, staged_bytes = self._check(staged)
        if not self._unlisted & {"manifests", ".work"}:
            for lost in lost_manifests(self._objects, self._names):
                item = lost.path.split("/")[1]
                self._damaged(lost.manifest, "missing", item, lost.key, _LOST.format(lost.path))
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
        data, _ = self._read(manifest_key(key))
        manifest = None if data is None else parse_manifest(data, key)
        if manifest is None:
            return 0
        ledger, _ = self._read(f"{manifest['path']}/{LEDGER}")
        return len((unseal(ledger) if ledger is not None else None) or ())

    def _published(self, key: str) -> Iterator[_Claim]:
        """What manifest and ledger of an item say of its objects."""
        data, fault = self._read(manifest_key(key))
        manifest = None if data is None else parse_manifest(data, key)
        if data is None or manifest is None:
            if fault != "missing" or self._objects.exists(manifest_key(key)):
                self._damaged(manifest_key(key), "unreadable", f"{key[:12]}...", key, _RERUN)
            return
        sealed = hashlib.sha256(data).hexdigest()
        item = f"{manifest['item_id']} ({manifest['task']}, {manifest['method']['name']})"
        path = str(manifest["path"])
        name = f"{path}/{LEDGER}"
        ledger = self._ledger(name, str(manifest["ledger_sha256"]), item, key, sealed)
        for file, (size, sha256) in ledger.items():
            yield _Claim(f"{path}/{file}", int(size), str(sha256), item, key, _AGAIN, sealed)
        if ledger and "zarr.json" not in ledger:
            self._num_uncovered += 1 + len({file.partition("/")[0] for file in ledger})

    def _ledger(
        self, name: str, sha256: str, item: str, key: str, sealed: str
    ) -> Mapping[str, Any]:
        data, fault = self._read(name)
        ledger = None if data is None else unseal(data)
        if data is None or ledger is None or hashlib.sha256(data).hexdigest() != sha256:
            self._damaged(name, fault or "unreadable", item, key, _AGAIN, sealed)
            return {}
        return ledger

    def _names(self, prefix: str) -> list[str]:
        """Names directly under a prefix; none, and that it is damaged, if they cannot be listed."""
        try:
            return self._objects.names(prefix)
        except OSError as error:
            if _of_the_store(error):
                raise
            if prefix not in self._unlisted:
                self._unlisted.add(prefix)
                self._damaged(prefix, "unreadable", "all that is in it", "", _MEND)
            return []

    def _read(self, key: str) -> tuple[bytes | None, Fault | None]:
        """An object, or what is wrong with it."""
        try:
            return self._objects.get(key), None
        except FileNotFoundError:
            return None, "missing"
        except OSError as error:
            if _of_the_store(error):
                raise
            return None, "unreadable"

    def _staged(self, key: str) -> Iterator[_Claim]:
        """What the receipts of an unpublished item say of its chunks."""
        work, item = f".work/{key}", f"{key[:12]}... (unpublished)"
        for name in self._names(f"{work}/receipts"):
            file, match = f"{work}/receipts/{name}", _RECEIPT.fullmatch(name)
            if match is None or self._is_over(key):
                continue
            data, _ = self._read(file)
            receipt = None if data is None else parse_receipt(data, file)
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
                        about = claim.item, claim.key, claim.next_step, claim.manifest_sha256
                        self._damaged(claim.file, fault, *about)
        return num_objects, num_bytes

    def _check_files(self) -> None:
        """Files handed over: their names are free to their owner, who may have taken them away."""
        if not isinstance(self._objects, LocalObjects):
            return
        for place, told in handed_over(self._objects):
            fault: Fault = "altered"
            try:
                if told and is_as_written(self._objects, place, told):
                    continue
                fault = "altered" if told else "unreadable"
            except FileNotFoundError:
                continue
            except OSError as error:
                if _of_the_store(error):
                    raise
                fault = "unreadable"
            key = str(told.get("key", ""))
            item = str(told.get("item_id", key[:12] or "an item"))
            self._damaged(place, fault, item, key, _WRITE_AGAIN)

    def _look_at(self, claim: _Claim) -> tuple[int, Fault | None]:
        data, fault = self._read(claim.file)
        if data is None:
            return 0, fault
        same = len(data) == claim.size and hashlib.sha256(data).hexdigest() == claim.sha256
        return len(data), None if same else "altered"

    def _excused(self, claim: _Claim) -> bool:
        """Whether a staged chunk is gone because its item was published meanwhile."""
        return claim.file.startswith(".work/") and self._is_over(claim.key)

    def _tell(self, claim: _Claim) -> None:
        if not claim.file.startswith(".work/"):
            self._progress.advance(1.0, 0)
        self._progress.tell("verified", f"hashing {claim.item}")

    def _damaged(
        self, file: str, fault: Fault, item: str, key: str, next_step: str, sealed: str = ""
    ) -> None:
        self._damages.append(Damage(file, fault, item, key, next_step, sealed))
        self._progress.tell("damaged", f"{file} is {fault}; {next_step}")


def _of_the_store(error: OSError) -> bool:
    """Whether it is the store itself that does not answer: nothing is known then."""
    return isinstance(error, StoreError) or error.errno in _NOTHING_IS_KNOWN
