"""What is alive, and who may still finish: leases of running drivers, fences of publish attempts.

    .work/drivers/CAMPAIGN-ID.json   a driver's lease, written anew every BEAT_S while it runs
    .work/publishing/KEY-ATTEMPT/    an item's folder while one attempt puts it together
    .work/fences/KEY-ATTEMPT         whoever creates it first decides about the attempt

A lease saves work: `gc` leaves alone whatever is younger than the oldest driver that still beats.
It proves nothing, for a driver can be stopped for a week and then go on. A fence does: a publisher
takes its attempt's fence between putting the folder in place and creating the manifest, `gc` before
it removes a folder that no manifest names. One of the two gets it. A publisher that comes second
begins another attempt; a `gc` that comes second leaves the folder alone until a manifest of the
same item names another. So no manifest ever names a folder that somebody has been clearing away.

An attempt's folder is touched by nobody but its publisher and the holder of its fence.
"""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from flows.engine.receipt import Objects

BEAT_S = 30.0
SILENCE_S = 900.0
"""A driver that has not beaten for so long counts as dead: many beats, for stores can be slow."""

DRIVERS, FENCES, PUBLISHING = ".work/drivers", ".work/fences", ".work/publishing"

Holder = Literal["publisher", "gc"]
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One attempt at publishing one item.

    Attributes:
        key: first 12 digits of the item's key.
        id: of the attempt, 8 hexadecimal digits.
    """

    key: str
    id: str

    @classmethod
    def new(cls, key: str) -> Attempt:
        """An attempt at publishing the item of a (full) key."""
        return cls(key[:12], uuid.uuid4().hex[:8])

    def __str__(self) -> str:
        return f"{self.key}-{self.id}"

    @property
    def draft(self) -> str:
        """Key prefix of the folder while it is put together."""
        return f"{PUBLISHING}/{self}"

    @property
    def fence(self) -> str:
        """Object key of the fence."""
        return f"{FENCES}/{self}"


def take_fence(objects: Objects, attempt: Attempt, holder: Holder) -> bool:
    """Become the one who decides about an attempt; False if somebody else does already."""
    return objects.create(attempt.fence, holder.encode(), durable=holder == "gc")


def holder_of(objects: Objects, attempt: Attempt) -> Holder | None:
    """Who decides about an attempt: nobody yet, or its publisher where that cannot be read."""
    try:
        return "gc" if objects.get(attempt.fence) == b"gc" else "publisher"
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class Driver:
    """A driver that has been heard of lately.

    Attributes:
        lease: object key.
        started_s: when it began, by the store's clock.
    """

    lease: str
    started_s: float


@contextmanager
def driving(objects: Objects, campaign: str, beat_s: float = BEAT_S) -> Iterator[None]:
    """Hold a lease while the caller works: what it writes from now on is not garbage.

    Args:
        objects: the output.
        campaign: that is being run.
        beat_s: seconds between beats.
    """
    lease = f"{DRIVERS}/{campaign[:12]}-{uuid.uuid4().hex}.json"
    data = json.dumps({"campaign": campaign, "started_s": objects.now()}).encode()
    objects.replace(lease, data)
    over = threading.Event()
    beats = threading.Thread(target=_beat, args=(objects, lease, data, over, beat_s), daemon=True)
    beats.start()
    try:
        yield
    finally:
        over.set()
        beats.join()
        objects.remove(lease)


def living_drivers(objects: Objects, silence_s: float = SILENCE_S) -> list[Driver]:
    """Drivers that have beaten within the last `silence_s` seconds of the store's clock."""
    now = objects.now()
    leases = [f"{DRIVERS}/{name}" for name in objects.names(DRIVERS)]
    found = []
    for lease in leases:
        usage = objects.usage(lease)
        # One from the future is of a clock that was set back since; if its driver lives, it will
        # beat by the new clock.
        if usage is not None and abs(now - usage.modified_s) < silence_s:
            started = _started_s(objects, lease)
            # Begun after its last beat: by a clock that was set back. What it wrote has any age.
            back = started > usage.modified_s + BEAT_S
            found.append(Driver(lease, 0.0 if back else started))
    return found


def _started_s(objects: Objects, lease: str) -> float:
    """When a driver began; the beginning of time if its lease is being written at this moment."""
    try:
        return float(json.loads(objects.get(lease))["started_s"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0.0


def _beat(objects: Objects, lease: str, data: bytes, over: threading.Event, beat_s: float) -> None:
    while not over.wait(beat_s):
        try:
            objects.replace(lease, data)
        except OSError:  # a full disk: the blocks will tell of it
            _LOG.warning("cannot write the lease %s", lease, exc_info=True)
