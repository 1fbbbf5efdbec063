"""Training under Ray Train: how many workers, which failures are tried again, and Ctrl-C.

Ray Train starts workers again whatever stopped them. A wrong setting stops them every time, so
its own counter is set to 0, and we try again only after what chance can bring: a lost worker.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from domains.base import BadInputError
from flows.config import TrainSettings
from flows.training.worker import ray_loop

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

_MAX_FAILURES = 3  # times that lost workers are started again from the newest checkpoint


def run_on_ray(settings: TrainSettings, payload: dict[str, Any]) -> None:
    """Run the workers under Ray Train; lost ones are replaced from the newest checkpoint.

    Args:
        settings: see TrainSettings.
        payload: of `worker.work`.

    Raises:
        BadInputError: if the cluster has no place for the workers, or a worker found input that
            cannot be used.
        RuntimeError: if workers were lost too often.
        KeyboardInterrupt: on Ctrl-C; on SIGTERM what its handler raises.
    """
    from ray.train import WorkerGroupError

    from flows.engine.ray_session import ray_session

    compute = settings.compute
    # One CPU more than workers: Ray Train's controller takes part of one.
    num_cpus = max(os.cpu_count() or 1, compute.num_workers) + 1
    with _interruptible(), ray_session(compute.ray_address, num_cpus):
        for failures in range(_MAX_FAILURES + 1):
            try:
                _trainer(settings, payload).fit()
            except WorkerGroupError as error:
                lost = _lost(error)
                if failures == _MAX_FAILURES:
                    raise RuntimeError(
                        f"the training workers were lost {failures + 1} times, at last by {lost}; "
                        "the same command goes on from the newest checkpoint"
                    ) from error
            else:
                return


def _trainer(settings: TrainSettings, payload: dict[str, Any]) -> TorchTrainer:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    use_gpu = settings.compute.num_gpus_per_worker > 0
    num_workers = _num_workers(settings, use_gpu=use_gpu)
    num_threads = settings.num_threads or max(1, (os.cpu_count() or 1) // num_workers)
    return TorchTrainer(
        ray_loop,
        train_loop_config={**payload, "num_threads": num_threads},
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=settings.name,
            storage_path=str(Path(payload["run"]) / "ray"),
            failure_config=FailureConfig(max_failures=0),
        ),
    )


def _num_workers(settings: TrainSettings, *, use_gpu: bool) -> int:
    """As asked for, or as many as have a place and divide the batch.

    Raises:
        BadInputError: if they have no place: Ray would wait for one without end.
    """
    import ray

    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    places = int(resources.get("GPU", 0)) if use_gpu else int(resources.get("CPU", 1)) - 1
    wanted, size = settings.compute.num_workers, settings.batch_size
    if places < max(1, wanted):
        kind = "GPUs" if use_gpu else "CPUs beside the controller's"
        raise BadInputError(
            f"Ray has {places} {kind} and {max(1, wanted)} training workers need one each: "
            "change compute.num_workers or compute.num_gpus_per_worker"
        )
    return wanted or max(n for n in range(1, places + 1) if size % n == 0)


def _lost(error: Any) -> str:
    """What took the workers, if it was chance; else a worker's own error is raised.

    Args:
        error: a WorkerGroupError.
    """
    from ray.exceptions import RayError

    reason = str(error)
    for failure in error.worker_failures.values():
        # A lost worker is a RayError, or Ray Train's own word for one (no public class); its
        # neighbours' collectives fail by RuntimeError.
        rays_own = type(failure).__module__.startswith("ray.")
        if not rays_own and not isinstance(failure, RayError | RuntimeError | OSError):
            raise failure from error
        reason = f"{type(failure).__name__} ({str(failure).partition(chr(10))[0]})"
    return reason


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the waiting for Ray; the handlers before have the last word.

    Ray's waiting heeds KeyboardInterrupt and SystemExit alone, and may make a SystemError of them:
    what Prefect's handler of SIGTERM raises is lost in it, so ours stands before it. Ray Train's
    own handler of SIGINT leaves by SystemExit.

    Raises:
        KeyboardInterrupt: on SIGINT; on SIGTERM what its handler before raises.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    on_sigint, on_sigterm = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    terminated = False

    def terminate(_number: int, _frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    if callable(on_sigterm):
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, SystemExit, SystemError) as error:
        raised = error.__cause__ or error.__context__ if isinstance(error, SystemError) else error
        if not isinstance(raised, KeyboardInterrupt | SystemExit):
            raise
        if terminated and callable(on_sigterm):
            on_sigterm(signal.SIGTERM, None)
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, on_sigint)
        if callable(on_sigterm):
            signal.signal(signal.SIGTERM, on_sigterm)
