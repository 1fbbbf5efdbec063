"""The places of a pool of Ray actors: who sits there, what is in their hands, how they died."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from flows.engine.worker import OUT_OF_MEMORY, BlockJob, Failure, Outcome

MAX_NODE_LOSSES = 3
"""Times that a block may be in the hands of a worker whose machine goes before it is suspected."""

SOON_S = 60.0
"""An actor is expected to start within this time; later it may be waiting for a place."""

_RETURNED = Failure("returned", "its worker died while it was at another block")
_NODE_LOST = "the machine that it was computed on is gone, or cannot be reached"
_UNCLEAR = "its worker died with blocks of several items in hand; each is tried alone"


@dataclass(eq=False)
class Seat:
    """One place in the pool: its actor and the jobs in its hands, oldest first.

    Attributes:
        actor: handle of the actor.
        starting: its answer to `ready`, until that has come.
        queue: answers to come, and their jobs.
        alone: whether its one job is to have no other beside it.
        since: monotonic seconds at which the actor was asked for.
    """

    actor: Any
    starting: Any
    queue: deque[tuple[Any, BlockJob]] = field(default_factory=deque)
    alone: bool = False
    since: float = field(default_factory=time.monotonic)

    @property
    def starting_soon(self) -> bool:
        """Whether the actor is about to be up, as far as one can tell."""
        return self.starting is not None and time.monotonic() - self.since < SOON_S

    def give(self, job: BlockJob, *, alone: bool) -> None:
        """Put a job into its hands."""
        self.queue.append((self.actor.attempt.remote(job), job))
        self.alone = alone

    def take(self, ref: Any) -> BlockJob:
        """The job of an answer that has come; it is in its hands no more."""
        entry = next(entry for entry in self.queue if entry[0] == ref)
        self.queue.remove(entry)
        self.alone = False
        return entry[1]

    def move_in(self, other: Seat) -> None:
        """Put another's actor in the dead one's place."""
        import ray

        with suppress(Exception):
            ray.kill(self.actor)
        self.actor, self.starting, self.queue = other.actor, other.starting, other.queue
        self.alone, self.since = other.alone, other.since


class Suspicions:
    """Which block a dead worker died of, as far as that can be told.

    A worker has several blocks in its hands. If all are of one item, that item is to blame, as
    items are what is given up. If not, each is tried alone: whoever dies alone is to blame. If the
    machine went, none is, unless it happens again and again.
    """

    def __init__(self) -> None:
        self._suspects: set[tuple[str, int]] = set()
        self._node_losses: Counter[tuple[str, int]] = Counter()

    def has(self, job: BlockJob) -> bool:
        """Whether a job must be tried alone."""
        return _name(job) in self._suspects

    def acquit(self, job: BlockJob) -> None:
        """An answer has come: the block kills nobody."""
        self._suspects.discard(_name(job))
        self._node_losses.pop(_name(job), None)

    def outcomes(self, jobs: list[BlockJob], error: Exception) -> list[Outcome]:
        """What is told of the jobs in the hands of a worker that died.

        Args:
            jobs: oldest first, at least one.
            error: Ray's.
        """
        first = self._verdict(jobs, error)
        others = [Outcome(job, failure=_RETURNED) for job in jobs[1:]]
        return [Outcome(jobs[0], failure=first), *others]

    def _verdict(self, jobs: list[BlockJob], error: Exception) -> Failure:
        names = [_name(job) for job in jobs]
        if with_its_node(error):
            self._node_losses.update(names)
            if max(self._node_losses[name] for name in names) <= MAX_NODE_LOSSES:
                return Failure("lost", _NODE_LOST)
        if len({job.item.key for job in jobs}) > 1:
            self._suspects.update(names)
            return Failure("lost", _UNCLEAR)
        if for_its_memory(error):
            return Failure("memory", f"its worker was killed, {OUT_OF_MEMORY}")
        reason = f"its worker died ({type(error).__name__}): killed, or out of memory"
        return Failure("worker", reason)


def with_its_node(error: Exception) -> bool:
    """Whether Ray says that an actor is gone because its machine is, or cannot be reached."""
    from ray.exceptions import ActorUnavailableError

    # Before a node's death is known, its actors are "unavailable".
    return isinstance(error, ActorUnavailableError) or "node has died" in str(error)


def for_its_memory(error: Exception) -> bool:
    """Whether Ray says that it killed an actor because its machine's memory ran out."""
    from ray.exceptions import OutOfMemoryError

    # Of any killed worker Ray says that memory may be why; this it says where it was.
    return isinstance(error, OutOfMemoryError) or "running low on memory" in str(error)


def answers_at_hand(seat: Seat) -> Iterator[Outcome]:
    """Answers that a dead worker gave before it died; their jobs leave its hands."""
    import ray

    for ref, _ in list(seat.queue):
        with suppress(ray.exceptions.RayError):
            outcome: Outcome = ray.get(ref, timeout=0)
            seat.take(ref)
            yield outcome


def _name(job: BlockJob) -> tuple[str, int]:
    return job.item.key, job.block
