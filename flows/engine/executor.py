"""Who computes blocks: this process, or a pool of long-lived Ray actors. Same bytes either way.

An executor only carries jobs to workers and outcomes back. What to compute next, how often to try
and when to give up is decided by the campaign, through the function that it asks for jobs.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self

from flows.config import ComputeSettings
from flows.engine.ray_session import WORKER_ENVIRONMENT, connect
from flows.engine.seats import Seat, Suspicions, answers_at_hand, with_its_node
from flows.engine.worker import BlockJob, BlockWorker, Failure, Outcome

NextJob = Callable[[], BlockJob | None]
"""Asked whenever a worker has room; None: nothing now (failures may bring more)."""

MAX_FAILED_STARTS = 3
RESIZE_S = 5.0
"""Seconds between two looks at the size of the cluster."""

_PATIENCE_S = 60.0
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
    """Computes in this process. A block that kills its worker kills us.

    Args:
        num_lanes: blocks that are computed at the same time. With one, a block is read, computed
            and written before the next is asked for; with more, in threads, as an actor does it.
    """

    num_workers = 1

    def __init__(self, num_lanes: int = 1) -> None:
        self._lanes = num_lanes
        self._worker: BlockWorker | None = None

    def run(self, next_job: NextJob) -> Iterator[Outcome]:
        """Carry out jobs, on one thread of torch for each lane; with one lane in their order."""
        import torch

        threads = torch.get_num_threads()
        self._worker = worker = self._worker or BlockWorker(self._lanes)
        try:
            if self._lanes > 1:
                yield from _threaded(worker, self._lanes + 1, next_job)
                return
            while (job := next_job()) is not None:
                yield worker.attempt(job)
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


def _threaded(worker: BlockWorker, num_threads: int, next_job: NextJob) -> Iterator[Outcome]:
    """Outcomes of jobs in threads; no more of them are asked for than there are threads."""
    running: set[Future[Outcome]] = set()
    with ThreadPoolExecutor(num_threads, "lane") as threads:
        while True:
            while len(running) < num_threads and (job := next_job()) is not None:
                running.add(threads.submit(worker.attempt, job))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


class RayExecutor:
    """A pool of Ray actors that hold the model, with one block in flight more than they compute.

    While an actor computes, it reads the block after and writes the one before; whoever is done
    asks for more, so that fast machines do more than slow ones and a slow disk is not flooded.
    A dead actor is replaced; seats.py says which of its blocks is to blame. Actors that are still
    starting, or wait for a place on a busy cluster, are given nothing yet. The pool grows onto
    machines that come later and shrinks with the cluster, within the number wanted.

    Args:
        num_workers: 0: one a core, or one a GPU.
        address: of a running cluster; None: use Ray if it is up in this process, else start it.
        num_gpus_per_worker: GPUs of each actor, may be a fraction; 0: computes on the CPU.
        num_lanes: blocks that each actor computes at the same time, each on a core of its own.
    """

    def __init__(
        self,
        num_workers: int = 0,
        *,
        address: str | None = None,
        num_gpus_per_worker: float = 0.0,
        num_lanes: int = 1,
    ) -> None:
        self._wanted, self._address = num_workers, address
        self._gpus, self._lanes, self._in_flight = num_gpus_per_worker, num_lanes, num_lanes + 1
        self._seats: list[Seat] = []
        self._held: deque[BlockJob] = deque()
        self._suspicions = Suspicions()
        self._started_ray = False
        self._failed_starts = 0
        self._resized = self._silent_s = 0.0
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
        num_cpus = max(self._wanted * self._lanes, default_workers(0.0))
        self._started_ray = connect(self._address, num_cpus) or self._started_ray
        if self._places() < 1:
            gpus = f"{self._gpus:g} GPU and " if self._gpus > 0 else ""
            cpus = "one CPU" if self._lanes == 1 else f"{self._lanes} CPUs"
            raise ExecutorError(f"Ray has no place with {gpus}{cpus} for a worker")
        self._resize()

    def run(self, next_job: NextJob) -> Iterator[Outcome]:
        """Carry out jobs on the pool; outcomes come as workers finish."""
        self.start()
        finished = False
        try:
            while True:
                hungry = self._fill(next_job)
                busy = {ref: seat for seat in self._seats for ref, _ in seat.queue}
                starting = {seat.starting: seat for seat in self._seats if seat.starting}
                if not busy and not hungry:
                    break
                # Nobody waits for an actor to start when there is nothing for it to do.
                waiting = {**starting, **busy} if hungry else busy
                ref = self._first_ready(list(waiting)) if waiting else None
                if ref is not None:
                    yield from self._collect(waiting[ref], ref)
            finished = True
        finally:
            if not finished:  # the campaign stopped: nobody wants what is in flight
                self._held.clear()
                self._dismiss([seat for seat in self._seats if seat.queue])

    def close(self) -> None:
        """Let the actors go, and Ray too if it was started here."""
        import ray

        self._dismiss(list(self._seats))
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
        places = int(resources.get("CPU", 0) / self._lanes)
        if self._gpus > 0:
            places = min(places, int(resources.get("GPU", 0) / self._gpus))
        return places

    def _resize(self) -> bool:
        """Let the pool follow the cluster: new seats on new machines, none where none can be.

        Returns:
            Whether there are other seats now.
        """
        before = list(self._seats)
        self._resized = time.monotonic()
        places = self._places()
        # On a cluster "one a core" means the cluster's cores, not those of the driver's machine.
        wanted = self._wanted or (places if self._address else default_workers(self._gpus))
        while len(self._seats) < min(wanted, places):
            self._seats.append(self._new_seat())
        beyond = len(self._seats) - max(places, 1)
        if beyond > 0:
            self._dismiss([seat for seat in self._seats if seat.starting][:beyond])
        return self._seats != before

    def _new_seat(self) -> Seat:
        import ray

        # Retries are the campaign's: one that Ray does by itself would not be counted.
        actor_class = ray.remote(max_restarts=0, max_task_retries=0)(BlockWorker)
        options: dict[str, Any] = {"num_cpus": self._lanes, "num_gpus": self._gpus}
        environment = dict(WORKER_ENVIRONMENT) if self._address else {}  # else ray_session sets it
        if self._lanes > 1:  # with one CPU an actor Ray does so itself
            environment["OMP_NUM_THREADS"] = "1"
        if environment:  # a process that Ray has not started yet: half a second
            options["runtime_env"] = {"env_vars": environment}
        actor: Any = actor_class.options(max_concurrency=self._in_flight, **options).remote(
            self._lanes
        )
        return Seat(actor, actor.ready.remote())

    def _fill(self, next_job: NextJob) -> bool:
        """Give out jobs one at a time, so that few jobs are spread over all workers.

        Returns:
            Whether more workers could be of use: False once there is no further job.
        """
        for depth in range(self._in_flight):
            # A second job behind a running one would be missed by an actor about to be ready.
            if depth and any(seat.starting_soon for seat in self._seats):
                return True
            for seat in self._seats:
                if seat.starting or seat.alone or len(seat.queue) > depth:
                    continue
                job = self._job_for(seat, next_job)
                if job is None:
                    return bool(self._held)
                seat.give(job, alone=self._suspicions.has(job))
        return True

    def _job_for(self, seat: Seat, next_job: NextJob) -> BlockJob | None:
        """The next job that a seat may have: a suspect is held back until one is empty."""
        if self._held and not seat.queue:
            return self._held.popleft()
        while (job := next_job()) is not None and seat.queue and self._suspicions.has(job):
            self._held.append(job)
        return job

    def _first_ready(self, refs: list[Any]) -> Any | None:
        """Wait for the first answer; None if none came for a while, or the pool has changed.

        Says so in the log if none comes for long.
        """
        import ray

        if time.monotonic() - self._resized >= RESIZE_S and self._resize():
            return None
        done, _ = ray.wait(refs, num_returns=1, timeout=RESIZE_S)
        self._silent_s = 0.0 if done else self._silent_s + RESIZE_S
        if self._silent_s >= _PATIENCE_S:
            free = ray.available_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
            _LOG.info("waiting for %d answers of workers; Ray has %g CPUs free", len(refs), free)
            self._silent_s = 0.0
        return done[0] if done else None

    def _collect(self, seat: Seat, ref: Any) -> list[Outcome]:
        """Take the answer that is there, and tell what it says of jobs."""
        import ray

        if ref == seat.starting:
            self._seat_started(seat)
            return []
        try:
            outcome: Outcome = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            outcome = Outcome(seat.take(ref), failure=Failure("transient", _last_line(error)))
        except ray.exceptions.RayError as error:
            return self._bury(seat, error)
        else:
            seat.take(ref)
        self._suspicions.acquit(outcome.job)
        return [outcome]

    def _bury(self, seat: Seat, error: Exception) -> list[Outcome]:
        """Replace a dead actor, and tell what became of the jobs in its hands."""
        answered = list(answers_at_hand(seat))
        told = self._suspicions.outcomes([job for _, job in seat.queue], error)
        seat.move_in(self._new_seat())
        self.num_replaced += 1
        return [*answered, *told]

    def _seat_started(self, seat: Seat) -> None:
        """Welcome an actor, or replace one that died before it was up."""
        import ray

        try:
            ray.get(seat.starting)
        except ray.exceptions.RayError as error:
            self._failed_starts += not with_its_node(error)
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise ExecutorError(f"workers cannot start: {_last_line(error)}") from error
            seat.move_in(self._new_seat())
        else:
            seat.starting, self._failed_starts = None, 0

    def _dismiss(self, leaving: list[Seat]) -> None:
        import ray

        self._seats = [seat for seat in self._seats if seat not in leaving]
        for seat in leaving:
            with suppress(Exception):
                ray.kill(seat.actor)


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
        return InlineExecutor(compute.lanes)
    return RayExecutor(
        compute.num_workers,
        address=compute.ray_address,
        num_gpus_per_worker=compute.num_gpus_per_worker,
        num_lanes=compute.lanes,
    )


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
