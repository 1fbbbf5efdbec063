"""Who computes blocks: this process, or a pool of long-lived Ray actors. Same bytes either way.

An executor only carries jobs to workers and outcomes back. What to compute next, how often to try
and when to give up is decided by the campaign, through the function that it asks for jobs.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from flows.config import ComputeSettings
from flows.engine.ray_session import connect
from flows.engine.worker import BlockJob, BlockWorker, Failure, Outcome

NextJob = Callable[[], BlockJob | None]
"""Asked whenever a worker has room; None: nothing now (failures may bring more)."""

MAX_FAILED_STARTS = 3
_PATIENCE_S = 60.0
_RETURNED = Failure("returned", "its worker died before it came to this block")
_LOG = logging.getLogger(__name__)


class ExecutorError(RuntimeError):
    """The workers cannot be had."""


class Executor(Protocol):
    """Runs jobs until there are none; can be used for several plans; closed at the end."""

    @property
    def num_workers(self) -> int:
        """Blocks that are computed at the same time."""
        ...

    def run(self, next_job: NextJob) -> Iterator[Outcome]:
        """Carry out jobs and yield outcomes as they come; ends when no job is left or running."""
        ...

    def close(self) -> None:
        """Let the workers go; may be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...


class InlineExecutor:
    """Computes in this process, one block at a time. A block that kills its worker kills us."""

    num_workers = 1

    def __init__(self) -> None:
        self._worker: BlockWorker | None = None

    def run(self, next_job: NextJob) -> Iterator[Outcome]:
        """Carry out jobs in the order given, on one thread of torch."""
        import torch

        threads = torch.get_num_threads()
        self._worker = self._worker or BlockWorker()
        torch.set_num_threads(1)
        try:
            while (job := next_job()) is not None:
                yield self._worker.attempt(job)
        finally:
            torch.set_num_threads(threads)

    def close(self) -> None:
        """Forget loaded models."""
        self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(eq=False)
class _Seat:
    """One place in the pool: its actor and the jobs in flight there, oldest first."""

    actor: Any
    starting: Any
    queue: deque[tuple[Any, BlockJob]] = field(default_factory=deque)


class RayExecutor:
    """A pool of Ray actors that hold the model, with two blocks in flight each.

    Actors do one block after the other; the second in flight hides the way to the driver and back.
    A dead actor is replaced; of its blocks only the one that it was at failed, others go back.
    Actors that are still starting, or wait for a place on a busy cluster, are given nothing yet.

    Args:
        num_workers: 0: one a core, or one a GPU.
        address: of a running cluster; None: use Ray if it is up in this process, else start it.
        num_gpus_per_worker: GPUs of each actor, may be a fraction; 0: computes on the CPU.
        in_flight: blocks in flight at each actor.
    """

    def __init__(
        self,
        num_workers: int = 0,
        *,
        address: str | None = None,
        num_gpus_per_worker: float = 0.0,
        in_flight: int = 2,
    ) -> None:
        self._wanted, self._address = num_workers, address
        self._gpus, self._in_flight = num_gpus_per_worker, in_flight
        self._seats: list[_Seat] = []
        self._started_ray = False
        self._failed_starts = 0
        self.num_replaced = 0

    @property
    def num_workers(self) -> int:
        """Actors of the pool; once Ray is up, no more than it has room for."""
        return len(self._seats) or self._wanted or default_workers(self._gpus)

    def start(self) -> None:
        """Start Ray and the actors, if they are not up; returns before the actors are ready.

        Raises:
            ExecutorError: if Ray has not a single place of the kind wanted.
        """
        num_cpus = max(self._wanted, default_workers(0.0))
        self._started_ray = connect(self._address, num_cpus) or self._started_ray
        places = self._places()
        # On a cluster "one a core" means the cluster's cores, not those of the driver's machine.
        wanted = self._wanted or (places if self._address else default_workers(self._gpus))
        while len(self._seats) < min(wanted, places):
            self._seats.append(self._new_seat())

    def run(self, next_job: NextJob) -> Iterator[Outcome]:
        """Carry out jobs on the pool; outcomes come as workers finish."""
        self.start()
        finished = False
        try:
            while True:
                hungry = self._fill(next_job)
                busy = {seat.queue[0][0]: seat for seat in self._seats if seat.queue}
                starting = {seat.starting: seat for seat in self._seats if seat.starting}
                if not busy and not hungry:
                    break
                # Nobody waits for an actor to start when there is nothing for it to do.
                waiting = {**starting, **busy} if hungry else busy
                yield from self._collect(waiting[_first_ready(list(waiting))])
            finished = True
        finally:
            if not finished:  # the campaign stopped: nobody wants what is in flight
                self._dismiss(busy_only=True)

    def close(self) -> None:
        """Let the actors go, and Ray too if it was started here."""
        import ray

        self._dismiss(busy_only=False)
        if self._started_ray and ray.is_initialized():
            ray.shutdown()
        self._started_ray = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _places(self) -> int:
        """How many of our actors Ray could hold if it held nothing else."""
        import ray

        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        places = int(resources.get("CPU", 0))
        if self._gpus > 0:
            places = min(places, int(resources.get("GPU", 0) / self._gpus))
        if places < 1:
            kind = f"{self._gpus:g} GPU and one CPU" if self._gpus > 0 else "one CPU"
            raise ExecutorError(f"Ray has no place with {kind} for a worker")
        return places

    def _new_seat(self) -> _Seat:
        import ray

        # Retries are the campaign's: one that Ray does by itself would not be counted.
        actor_class = ray.remote(max_restarts=0, max_task_retries=0)(BlockWorker)
        # With one CPU an actor Ray sets OMP_NUM_THREADS to 1; the worker does as much for torch.
        actor: Any = actor_class.options(num_cpus=1, num_gpus=self._gpus).remote()
        return _Seat(actor, actor.ready.remote())

    def _fill(self, next_job: NextJob) -> bool:
        """Give out jobs one at a time, so that few jobs are spread over all workers.

        Returns:
            Whether more workers could be of use: False once there is no further job.
        """
        for depth in range(self._in_flight):
            # A second job behind a running one would be missed by an actor about to be ready.
            if depth and any(seat.starting for seat in self._seats):
                return True
            for seat in self._seats:
                if seat.starting or len(seat.queue) > depth:
                    continue
                job = next_job()
                if job is None:
                    return False
                seat.queue.append((seat.actor.attempt.remote(job), job))
        return True

    def _collect(self, seat: _Seat) -> list[Outcome]:
        """Take the answer that is there, and tell what it says of jobs."""
        import ray

        if seat.starting:
            self._seat_started(seat)
            return []
        ref, job = seat.queue.popleft()
        try:
            return [ray.get(ref)]
        except ray.exceptions.RayTaskError as error:
            return [Outcome(job, failure=Failure("transient", _last_line(error)))]
        except ray.exceptions.RayError as error:
            reason = f"its worker died ({type(error).__name__}): killed, or out of memory"
            died = Outcome(job, failure=Failure("worker", reason))
            behind = [Outcome(other, failure=_RETURNED) for _, other in seat.queue]
            self._replace(seat)
            self.num_replaced += 1
            return [died, *behind]

    def _seat_started(self, seat: _Seat) -> None:
        """Welcome an actor, or replace one that died before it was up."""
        import ray

        try:
            ray.get(seat.starting)
        except ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise ExecutorError(f"workers cannot start: {_last_line(error)}") from error
            self._replace(seat)
        else:
            seat.starting, self._failed_starts = None, 0

    def _replace(self, seat: _Seat) -> None:
        """Put a new actor in a dead one's place."""
        import ray

        with suppress(Exception):
            ray.kill(seat.actor)
        fresh = self._new_seat()
        seat.actor, seat.starting, seat.queue = fresh.actor, fresh.starting, fresh.queue

    def _dismiss(self, *, busy_only: bool) -> None:
        import ray

        leaving = [seat for seat in self._seats if seat.queue or not busy_only]
        self._seats = [seat for seat in self._seats if seat not in leaving]
        for seat in leaving:
            with suppress(Exception):
                ray.kill(seat.actor)


def _first_ready(refs: list[Any]) -> Any:
    """Wait for the first answer; says so in the log if none comes for long."""
    import ray

    while True:
        done, _ = ray.wait(refs, num_returns=1, timeout=_PATIENCE_S)
        if done:
            return done[0]
        free = ray.available_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
        _LOG.info("waiting for %d workers; Ray has %g CPUs free", len(refs), free)


def default_workers(num_gpus_per_worker: float) -> int:
    """One worker a core that this process may use, or as many as share the GPUs of the cluster."""
    if num_gpus_per_worker <= 0:
        return (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    import torch

    return max(1, int(torch.cuda.device_count() / num_gpus_per_worker))


def make_executor(compute: ComputeSettings) -> Executor:
    """The executor that the settings ask for; nothing is started yet."""
    if compute.executor == "inline":
        return InlineExecutor()
    return RayExecutor(
        compute.num_workers,
        address=compute.ray_address,
        num_gpus_per_worker=compute.num_gpus_per_worker,
    )


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
