"""What nobody can ever need of an output: found, and removed.

    items/I/T/NAME.ome.zarr     that no manifest names: its publisher lost, or died (see lost.py)
    .work/publishing/ATTEMPT    of a publisher that died
    .work/KEY                   of an item that is published
    .work/KEY/stage/ATTEMPT.*   that no receipt names: its worker died, or came second
    *.corrupt-N  .*.partial     set aside; torn
    .work/files-* .work/.gone-* left by a driver that died
    .work/given-*               measurements of images, which no run uses: they are made again
    leases, fences, quarantine  of drivers that are gone, of items that are published

Never touched: what a manifest names, receipts and the chunks that they name of an item that is not
published (the next run goes on from them), the user's measurements, plans, files handed over, and
all that is younger than the oldest living driver or than asked. Who was stopped for so long that
he passed for dead, and then goes on, finds his block or his publication failed, and does it again:
see fencing.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from flows.engine.events import Event, EventHandler, ignore
from flows.engine.fencing import (
    DRIVERS,
    FENCES,
    PUBLISHING,
    SILENCE_S,
    Attempt,
    Driver,
    holder_of,
    living_drivers,
    take_fence,
)
from flows.engine.in_use import alone_with
from flows.engine.lost import FOLDER, is_lost
from flows.engine.objects import LocalObjects
from flows.engine.publish import load_manifest
from flows.engine.receipt import Objects, read_receipt

DAY_S = 86400.0

_KEY = re.compile(r"[0-9a-f]{64}")
_ATTEMPT = re.compile(r"(?P<key>[0-9a-f]{12})-(?P<id>[0-9a-f]{8})")
_MANIFEST = re.compile(r"(?P<key>[0-9a-f]{64})\.json")
_GIVEN = re.compile(r"given-[0-9a-f]{16}")
_CORRUPT = re.compile(r".*\.json\.corrupt-\d+")
_SCRAP = re.compile(r"(\..*\.partial|\.gone-.*)")


@dataclass(frozen=True)
class Garbage:
    """One thing that nobody can need.

    Attributes:
        kind: a few words.
        keys: of its objects or folders.
        num_bytes: that it takes; chunks shared with what is published count too.
    """

    kind: str
    keys: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True)
class Collection:
    """What was found.

    Attributes:
        garbage: what was removed, or would have been.
        stuck: keys that could not be removed.
        notes: sentences about what was left where it is, and why.
        num_living: drivers at work; what is younger than the oldest of them was left.
        num_unfinished: items that are begun and not published; the next run goes on with them.
        unfinished_bytes: of their receipted chunks.
    """

    garbage: tuple[Garbage, ...]
    stuck: tuple[str, ...]
    notes: tuple[str, ...]
    num_living: int
    num_unfinished: int
    unfinished_bytes: int


def collect_garbage(
    objects: Objects,
    *,
    min_age_s: float = DAY_S,
    dry_run: bool = False,
    silence_s: float = SILENCE_S,
    on_event: EventHandler | None = None,
) -> Collection:
    """Find what nobody can need, and remove it.

    Args:
        objects: the output.
        min_age_s: what is younger stays, by the store's own clock.
        dry_run: find, and remove nothing.
        silence_s: a driver that has not been heard of for so long is taken for dead.
        on_event: told of each thing found.
    """
    return _Collector(objects, min_age_s, silence_s, dry_run, on_event or ignore).run()


class _Collector:
    """One pass over one output."""

    def __init__(
        self,
        objects: Objects,
        min_age_s: float,
        silence_s: float,
        dry_run: bool,
        on_event: EventHandler,
    ) -> None:
        self._objects, self._dry_run, self._on_event = objects, dry_run, on_event
        # The clock first: a driver whose lease is not there yet writes all it writes after this.
        now = objects.now()
        self._living: list[Driver] = living_drivers(objects, silence_s)
        self._before_s = min([now - min_age_s, *(driver.started_s for driver in self._living)])
        self._paths = self._read_manifests("")
        self._notes: list[str] = []
        self._num_unfinished = self._unfinished_bytes = 0

    def run(self) -> Collection:
        """Find and remove."""
        found, stuck = [], []
        for garbage in self._find():
            found.append(garbage)
            self._on_event(Event("garbage", len(found), 0, f"{garbage.kind}: {garbage.keys[0]}"))
            for key in () if self._dry_run else garbage.keys:
                self._objects.remove(key)
                if self._objects.exists(key):
                    stuck.append(key)
        return Collection(
            tuple(found),
            tuple(stuck),
            tuple(dict.fromkeys(self._notes)),
            len(self._living),
            self._num_unfinished,
            self._unfinished_bytes,
        )

    def _find(self) -> Iterator[Garbage]:
        yield from self._unnamed_folders()
        yield from self._dead_drafts()
        for name in self._objects.names(".work"):
            if _KEY.fullmatch(name):
                yield from self._work(name)
            elif name.startswith("files-"):
                yield from self._old("draft of a file", f".work/{name}")
            elif _GIVEN.fullmatch(name):
                yield from self._measured(f".work/{name}")
        yield from self._scraps()
        yield from self._records()

    def _old(self, kind: str, *keys: str) -> Iterator[Garbage]:
        """The garbage under keys, if there is something and all of it is old enough."""
        usages = [usage for key in keys if (usage := self._objects.usage(key)) is not None]
        if len(usages) == len(keys) and all(u.modified_s < self._before_s for u in usages):
            yield Garbage(kind, keys, sum(usage.num_bytes for usage in usages))

    # --- publish attempts ------------------------------------------------------------------------

    def _unnamed_folders(self) -> Iterator[Garbage]:
        named = set(self._paths.values())
        for item in self._objects.names("items"):
            for task in self._objects.names(f"items/{item}"):
                for name in self._objects.names(f"items/{item}/{task}"):
                    place, match = f"items/{item}/{task}/{name}", FOLDER.fullmatch(name)
                    if match and place not in named:
                        yield from self._attempt("folder without manifest", place, match)

    def _dead_drafts(self) -> Iterator[Garbage]:
        for name in self._objects.names(PUBLISHING):
            if match := _ATTEMPT.fullmatch(name):
                yield from self._attempt("draft of an item", f"{PUBLISHING}/{name}", match)

    def _attempt(self, kind: str, place: str, match: re.Match[str]) -> Iterator[Garbage]:
        for garbage in self._old(kind, place):
            if self._is_free(place, Attempt(match["key"], match["id"])):
                yield garbage

    def _is_free(self, place: str, attempt: Attempt) -> bool:
        """Whether no manifest names the place of an attempt, and none ever will."""
        named = self._read_manifests(attempt.key).values()
        if named:
            return self._is_elsewhere(place, attempt, list(named))
        if place.startswith("items/") and is_lost(self._objects, place, attempt.key):
            self._notes.append(
                f"{place}: left where it is, its manifest is gone; bring that back, or restore the "
                "item again"
            )
            return False
        if self._dry_run:
            return holder_of(self._objects, attempt) != "publisher"
        ours = take_fence(self._objects, attempt, "gc")
        if not ours and holder_of(self._objects, attempt) == "publisher":
            self._notes.append(f"{place}: its publisher may be at it; the next run of it decides")
            return False
        # Its publisher may have come to its end, and let the fence go, before we took it.
        return self._is_elsewhere(place, attempt, list(self._read_manifests(attempt.key).values()))

    def _is_elsewhere(self, place: str, attempt: Attempt, named: list[str | None]) -> bool:
        if None in named:
            self._notes.append(
                f"{place}: left where it is, the manifest {attempt.key}... may name it and is "
                "damaged; restore the item again first"
            )
        return place not in named and None not in named

    def _read_manifests(self, start: str) -> dict[str, str | None]:
        """Key -> the path that its manifest names (None: it is damaged), for keys that begin so."""
        found: dict[str, str | None] = {}
        for name in self._objects.names("manifests"):
            match = _MANIFEST.fullmatch(name)
            if match and name.startswith(start):
                manifest = load_manifest(self._objects, match["key"])
                if manifest is not None or self._objects.exists(f"manifests/{name}"):
                    found[match["key"]] = None if manifest is None else str(manifest["path"])
        return found

    # --- work ------------------------------------------------------------------------------------

    def _work(self, key: str) -> Iterator[Garbage]:
        """What is garbage of one item's work: all of it once it is published."""
        work = f".work/{key}"
        if self._is_published(key):
            yield from self._old("work of a published item", work)
            return
        usage = self._objects.usage(work)
        if usage is not None and not usage.num_objects:
            yield from self._old("empty folder", work)
        elif usage is not None:
            self._num_unfinished += 1
            yield from self._staged(work)
            yield from self._corrupt(f"{work}/receipts")

    def _is_published(self, key: str) -> bool:
        return self._paths.get(key) is not None and load_manifest(self._objects, key) is not None

    def _staged(self, work: str) -> Iterator[Garbage]:
        """Staged attempts that no receipt names."""
        names = self._objects.names(f"{work}/stage")  # before the receipts: these come later
        attempts, unclear = self._receipted(work)
        for attempt, chunks in groupby(names, key=lambda name: name.partition(".")[0]):
            keys = tuple(f"{work}/stage/{name}" for name in chunks)
            if attempt not in attempts and attempt.partition("-")[0] not in unclear:
                yield from self._old("attempt without receipt", *keys)

    def _receipted(self, work: str) -> tuple[set[str], set[str]]:
        """The attempts that receipts name, and the blocks whose receipts cannot be read."""
        attempts, unclear = set(), set()
        for name in self._objects.names(f"{work}/receipts"):
            block, _, suffix = name.partition(".")
            if suffix != "json":
                continue
            receipt = read_receipt(self._objects, f"{work}/receipts/{name}")
            if receipt is None:
                unclear.add(block)
            else:
                attempts.add(receipt.attempt)
                self._unfinished_bytes += sum(chunk.size for chunk in receipt.chunks)
        return attempts, unclear

    # --- the rest --------------------------------------------------------------------------------

    def _measured(self, key: str) -> Iterator[Garbage]:
        """Measurements made of images; runs that want them wait until they are removed."""
        if not isinstance(self._objects, LocalObjects):
            return  # they are made on a machine's own disk
        with alone_with(self._objects.path(key)) as alone:
            if alone is not False:
                yield from self._old("measurements of images that no run uses", key)

    def _scraps(self) -> Iterator[Garbage]:
        for prefix in (".work", "manifests", "campaigns", "quarantine", "files"):
            for key in self._objects.hidden(prefix):
                if _SCRAP.fullmatch(key.rpartition("/")[2]):
                    yield from self._old("torn or unfinished write", key)
        yield from self._corrupt("manifests")

    def _corrupt(self, prefix: str) -> Iterator[Garbage]:
        for name in self._objects.names(prefix):
            if _CORRUPT.fullmatch(name):
                yield from self._old("set aside as corrupt", f"{prefix}/{name}")

    def _records(self) -> Iterator[Garbage]:
        """Leases of the dead, fences and quarantine of the published."""
        living = {driver.lease for driver in self._living}
        for name in self._objects.names(DRIVERS):
            if f"{DRIVERS}/{name}" not in living:
                yield from self._old("lease or fence", f"{DRIVERS}/{name}")
        published = {key[:12] for key, path in self._paths.items() if path is not None}
        for name in self._objects.names(FENCES):
            match = _ATTEMPT.fullmatch(name)
            if match and match["key"] in published:
                yield from self._old("lease or fence", f"{FENCES}/{name}")
        for name in self._objects.names("quarantine"):
            match = _MANIFEST.fullmatch(name)
            if match and self._is_published(match["key"]):
                yield from self._old("quarantine of a published item", f"quarantine/{name}")
