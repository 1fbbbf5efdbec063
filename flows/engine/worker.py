"""One attempt at one block, and what became of it: the code that runs inside a worker.

Coordinates come in, a receipt goes out; pixels go from store to store. Failures are values, sorted
by what should be done about them, so that only a worker's death needs the executor's attention.
"""

from __future__ import annotations

import errno
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from domains.base import BadInputError
from flows.engine.objects import LocalObjects
from flows.engine.plan import ItemPlan
from flows.engine.receipt import (
    Receipt,
    create_receipt,
    load_receipt,
    new_attempt,
    stage_block,
)

if TYPE_CHECKING:
    from flows.engine.block import Restorer

_LOG = logging.getLogger(__name__)

FailureKind = Literal["input", "result", "worker", "transient", "returned", "fatal"]
"""What a failure calls for.

    input      the user's data cannot be used: the item is quarantined at once
    result     the block is a pure function and its result unusable: quarantined at once
    worker     the worker died: a new one, and another attempt, a bounded number of times
    transient  anything that may go better next time: another attempt, a bounded number of times
    returned   its worker died of another block before it was begun: back into the queue
    fatal      no block can go well (disk full, model gone): the run stops
"""

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

    measurements: Path
    output: Path
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
    """Computes blocks one after the other; lives as long as its executor and keeps models loaded.

    Args:
        num_threads: of torch on the CPU. One: results then do not depend on the machine's cores,
            and workers do not fight for them.
    """

    def __init__(self, num_threads: int = 1) -> None:
        import torch

        from flows.engine.block import Restorer

        torch.set_num_threads(num_threads)
        self._restorer: Restorer = Restorer()

    def ready(self) -> bool:
        """Answer, once the worker is up."""
        return True

    def attempt(self, job: BlockJob) -> Outcome:
        """Compute a block, stage it, and hand in its receipt. Never raises an Exception."""
        try:
            objects = LocalObjects(job.output)
            # A worker may die between its receipt and its answer: the block is done then.
            receipt = load_receipt(objects, job.item, job.block)
            if receipt is not None:
                return Outcome(job, receipt, fresh=False)
            return Outcome(job, self._compute(objects, job))
        except Exception as error:
            _LOG.debug("block %d failed", job.block, exc_info=True)
            return Outcome(job, failure=failure_of(error))

    def _compute(self, objects: LocalObjects, job: BlockJob) -> Receipt:
        start = time.perf_counter()
        block = job.item.grid.block(job.block)
        pixels, account = self._restorer.compute(job.measurements, job.item, block)
        attempt = new_attempt(block)
        chunks = stage_block(objects, job.item, block, attempt, pixels)
        account = replace(account, seconds=time.perf_counter() - start)
        receipt = Receipt(job.item.key, job.block, attempt, chunks, account)
        return create_receipt(objects, job.item, receipt)


def failure_of(error: Exception) -> Failure:
    """Sort an error by what it calls for."""
    from diffusion_core.model import BadModelError
    from flows.engine.block import ModelChangedError, NotFiniteError

    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, BadInputError | BadModelError):
        return Failure("input", reason)
    if isinstance(error, NotFiniteError):
        return Failure("result", reason)
    if isinstance(error, ModelChangedError):
        return Failure("fatal", reason)
    if isinstance(error, OSError) and error.errno in _FATAL_ERRNO:
        return Failure("fatal", reason)
    return Failure("transient", f"{type(error).__name__}: {reason}")
