"""Kill or stop a process at a chosen operation of its storage: before it, half-way, or after.

The process is a fork of the test, so that this costs milliseconds. SIGKILL leaves no time to tidy;
after SIGSTOP the operation goes on where it was, however late, with whatever is there by then.
With objects on S3 it is a fork of a server instead: obstore's threads do not survive a fork.
"""

import multiprocessing
import os
import signal
import uuid
from collections.abc import Callable
from pathlib import Path

from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.objects import LocalObjects, open_objects
from flows.engine.plan import Plan
from flows.roots import Root

OPERATIONS = ("put", "create", "link", "adopt", "rename", "remove")
MOMENTS = ("before", "amid", "after")
_CHILDREN: set[int] = set()


class _Interrupter:
    """Counts operations, and sends the process a signal at one of them."""

    def __init__(self, at: int, moment: str, number: signal.Signals = signal.SIGKILL) -> None:
        self.at, self.moment, self.signal, self.count = at, moment, number, 0

    def install(self, kind: type = LocalObjects) -> None:
        for name in OPERATIONS:
            setattr(kind, name, self._wrap(name, getattr(kind, name)))

    def _wrap(self, name, operation):
        def wrapped(objects, *args, **kwargs):
            self.count += 1
            moment = self.moment if self.count == self.at else ""
            if moment == "amid" and name not in ("put", "create"):
                moment = "after"  # the others have no middle
            if moment == "before":
                self._strike()
            if moment == "amid":
                self._tear(objects, name, *args[:2])
            result = operation(objects, *args, **kwargs)
            if moment == "after":
                self._strike()
            return result

        return wrapped

    def _tear(self, objects: object, name: str, key: str, data: bytes) -> None:
        """Write the first half as the operation would, and be struck; on S3 half of it is none."""
        if not isinstance(objects, LocalObjects):
            self._strike()
            return
        path = objects.path(key)
        if name == "create":
            path = path.with_name(f".{uuid.uuid4().hex}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[: len(data) // 2])
        self._strike()

    def _strike(self) -> None:
        os.kill(os.getpid(), self.signal)


def fork(work: Callable[[], object]) -> int:
    """Do something in a process of its own; returns its id. It ends with 1 if that raises."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _CHILDREN.add(child)
    return child


def reap() -> None:
    """End what a failed test left standing still."""
    for child in _CHILDREN:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    _CHILDREN.clear()


def has_ended(child: int) -> bool:
    """Whether a process has ended by now; it may be asked again after that."""
    return child not in _CHILDREN or _wait(child, os.WNOHANG) is not None


def _wait(child: int, options: int = 0) -> int | None:
    """Wait for a process to end, or to stop if the options say so; its status, None if it runs."""
    ended, status = os.waitpid(child, options)
    if ended and not os.WIFSTOPPED(status):
        _CHILDREN.discard(child)
    return status if ended else None


def ended_well(child: int) -> bool:
    """Wait for a process to end by itself; whether it raised nothing."""
    status = _wait(child)
    assert os.WIFEXITED(status), "it was killed"
    return os.WEXITSTATUS(status) == 0


def run_and_kill(plan: Plan, at: int, moment: str) -> bool:
    """Run a plan in a driver of its own that dies at operation `at`; False if it finished first."""

    if not isinstance(plan.output, Path):
        return _run_and_kill_elsewhere(plan, at, moment)

    def work() -> None:
        _Interrupter(at, moment).install()
        run_plan(plan, InlineExecutor())

    status = _wait(fork(work))
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the driver failed by itself"
    return False


def _drive(environment: dict[str, str], plan: Plan, at: int, moment: str) -> None:
    from flows.engine import s3_objects

    os.environ.update(environment)
    s3_objects.FIRST_WAIT_S = 0.001
    _Interrupter(at, moment).install(type(open_objects(plan.output)))
    run_plan(plan, InlineExecutor())


def _run_and_kill_elsewhere(plan: Plan, at: int, moment: str) -> bool:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["kills", "tiny_domain", "flows.engine.block", "obstore"])
    environment = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "SASHIKO_"))}
    driver = server.Process(target=_drive, args=(environment, plan, at, moment))
    driver.start()
    driver.join()
    if driver.exitcode == -signal.SIGKILL:
        return True
    assert driver.exitcode == 0, "the driver failed by itself"
    return False


def start_and_stop(work: Callable[[], object], at: int, moment: str) -> int:
    """Start a process that stops at operation `at`; returns its id once it stands still."""
    child = start(work, at, moment)
    assert not has_ended(child), "it ended before the operation"
    return child


def start(work: Callable[[], object], at: int, moment: str) -> int:
    """As start_and_stop, but the process may also come to its end before that operation."""

    def stopping() -> None:
        _Interrupter(at, moment, signal.SIGSTOP).install()
        work()

    child = fork(stopping)
    _wait(child, os.WUNTRACED)
    return child


def goes_on_well(child: int) -> bool:
    """Let a stopped process go on to its end; whether it raised nothing."""
    os.kill(child, signal.SIGCONT)
    return ended_well(child)


def count_operations(work: Callable[[], object], kind: type = LocalObjects) -> int:
    """Operations of an undisturbed run."""
    interrupter = _Interrupter(0, "before")
    saved = {name: getattr(kind, name) for name in OPERATIONS}
    interrupter.install(kind)
    try:
        work()
    finally:
        for name, operation in saved.items():
            setattr(kind, name, operation)
    return interrupter.count


def num_operations(plan: Plan, scratch: Root) -> int:
    """Operations of an undisturbed run of a plan into `scratch`."""
    from dataclasses import replace

    elsewhere = replace(plan, output=scratch)
    kind = type(open_objects(scratch))
    return count_operations(lambda: run_plan(elsewhere, InlineExecutor()), kind)
