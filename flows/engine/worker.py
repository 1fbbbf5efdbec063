"""One attempt at one block, and what became of it: the code that runs inside a worker.

Coordinates come in, a receipt goes out; pixels go from store to store. Failures are values, sorted
by what should be done about them, so that only a worker's death needs the executor's attention.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from domains.base import BadInputError
from flows.engine.environment import environment
from flows.engine.memory import give_back, peak_memory
from flows.engine.objects import StoreError, open_objects
from flows.engine.plan import ItemPlan
from flows.engine.receipt import (
    Objects,
    Receipt,
    create_receipt,
    load_receipt,
    new_attempt,
    stage_block,
)
from flows.roots import Root

if TYPE_CHECKING:
    from flows.engine.block import Restorer

_LOG = logging.getLogger(__name__)

FailureKind = Literal[
    "input", "result", "worker", "memory", "io", "transient", "lost", "returned", "fatal"
]
"""What a failure calls for.

    input      the user's data cannot be used: the item is quarantined at once
    result     the block is a pure function and its result unusable: quarantined at once
    worker     the worker died: a new one, and another attempt, a bounded number of times
    memory     the worker ran out of memory, or was killed for it: as a worker's death
    io         the storage failed: another attempt after a while, a bounded number of times; where
               it fails for item after item, the run stops
    transient  anything else that may go better next time: another attempt, a bounded number of
               times
    lost       the worker died and this block need not be why (its machine went, or blocks of other
               items were in its hands too): another attempt that is not held against the item
    returned   was in the hands of a worker that died of another block: back into the queue
    fatal      no block can go well (disk full, store or model gone or another): the run stops
"""

OUT_OF_MEMORY = "out of memory; take fewer workers (--workers), or a larger machine"

_FATAL_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class BlockJob:
    """One block to be computed; small, since it travels.

    Attributes:
        measurements: path of the store to read.
        output: root of the store to write.
        item: whose block it is.
        block: its index.
    """

    measurements: Root
    output: Root
    item: ItemPlan
    block: int


@dataclass(frozen=True)
class Failure:
    """Why there is no receipt: what it calls for, and a sentence."""

    kind: FailureKind
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a receipt or a failure.

    Attributes:
        job: the job.
        receipt: of the block, if it is staged.
        failure: if not.
        fresh: whether this attempt computed it; False if a receipt was there before.
    """

    job: BlockJob
    receipt: Receipt | None = None
    failure: Failure | None = None
    fresh: bool = True


class BlockWorker:
    """Computes blocks; lives as long as its executor and keeps models loaded.

        thread 1   read 0 | compute 0 | write 0 | read 2       | compute 2 | ...
        thread 2   read 1             | compute 1              | write 1   | read 3 ...

    Its executor calls `attempt` from one thread more than there are lanes: while the lanes compute,
    the block after is read and the one before is written, and no more than that is in memory. One
    thread alone does one thing after the other. What a block becomes is the same either way.

    Args:
        num_lanes: blocks that are computed at the same time.
        num_threads: of torch on the CPU, for each lane. One: results then do not depend on the
            machine's cores, and workers do not fight for them.
    """

    def __init__(self, num_lanes: int = 1, num_threads: int = 1) -> None:
        from flows.engine.block import Restorer

        self._num_threads = num_threads
        self._lanes = threading.Semaphore(num_lanes)
        self._restorer: Restorer = Restorer()

    def ready(self) -> bool:
        """Answer, once the worker is up."""
        return True

    def attempt(self, job: BlockJob) -> Outcome:
        """Compute a block, stage it, and hand in its receipt. Never raises an Exception."""
        try:
            objects = open_objects(job.output)
            # A worker may die between its receipt and its answer: the block is done then.
            receipt = load_receipt(objects, job.item, job.block)
            if receipt is not None:
                return Outcome(job, receipt, fresh=False)
            return Outcome(job, self._carry_out(objects, job))
        except Exception as error:
            _LOG.debug("block %d failed", job.block, exc_info=True)
            return Outcome(job, failure=failure_of(error))

    def _carry_out(self, objects: Objects, job: BlockJob) -> Receipt:
        """Read, compute when a lane is free, write."""
        import torch

        start = time.perf_counter()
        block = job.item.grid.block(job.block)
        attempt = new_attempt(block)
        with peak_memory() as peak:
            measurement = self._restorer.read(job.measurements, job.item, block)
            overview = self._restorer.overview(job.measurements, job.item, block)
            read = time.perf_counter()
            with self._lanes:
                waited = time.perf_counter() - read
                torch.set_num_threads(self._num_threads)  # each thread has a number of its own
                pixels, account = self._restorer.compute(measurement, job.item, block, overview)
            del measurement  # the next block's is in memory already
            chunks = stage_block(objects, job.item, block, attempt, pixels)
        num_bytes = pixels.nbytes
        del pixels
        give_back(num_bytes)
        seconds = time.perf_counter() - start - waited
        account = replace(account, seconds=seconds, peak_bytes=peak())
        where = environment(job.item.device_class)
        receipt = Receipt(job.item.key, job.block, attempt, chunks, account, where)
        return create_receipt(objects, job.item, receipt)


def failure_of(error: Exception) -> Failure:
    """Sort an error by what it calls for."""
    from diffusion_core.model import BadModelError
    from flows.engine.block import InputChangedError, ModelChangedError, NotFiniteError

    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, BadInputError | BadModelError):
        return Failure("input", reason)
    if isinstance(error, NotFiniteError):
        return Failure("result", reason)
    if isinstance(error, InputChangedError | ModelChangedError | StoreError):
        return Failure("fatal", reason)
    if isinstance(error, OSError) and error.errno in _FATAL_ERRNO:
        return Failure("fatal", reason)
    # torch's own is of the same name; it is not worth an import.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Failure("memory", f"its worker ran {OUT_OF_MEMORY}")
    kind: FailureKind = "io" if isinstance(error, OSError) else "transient"
    return Failure(kind, f"{type(error).__name__}: {reason}")
