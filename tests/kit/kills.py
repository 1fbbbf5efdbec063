"""Kill a driver at a chosen operation of its storage: before it, half-way through, or after it.

The driver is a fork of the test, so that a kill costs milliseconds; SIGKILL leaves no time to tidy.
"""

import os
import signal
from pathlib import Path

from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.objects import LocalObjects
from flows.engine.plan import Plan

OPERATIONS = ("put", "create", "link", "adopt", "rename", "remove")
MOMENTS = ("before", "amid", "after")


class _Killer:
    """Counts operations, and ends the process at one of them."""

    def __init__(self, at: int, moment: str) -> None:
        self.at, self.moment, self.count = at, moment, 0

    def install(self) -> None:
        for name in OPERATIONS:
            setattr(LocalObjects, name, self._wrap(name, getattr(LocalObjects, name)))

    def _wrap(self, name, operation):
        def wrapped(objects, *args, **kwargs):
            self.count += 1
            due = self.count == self.at
            if due and self.moment == "before":
                _die()
            if due and self.moment == "amid" and name in ("put", "create"):
                _tear(objects, name, *args)
            result = operation(objects, *args, **kwargs)
            if due:
                _die()
            return result

        return wrapped


def _tear(objects: LocalObjects, name: str, key: str, data: bytes) -> None:
    """Write the first half as the operation would, and die."""
    path = objects.path(key)
    if name == "create":
        path = path.with_name(f".{path.name}.torn.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[: len(data) // 2])
    _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_kill(plan: Plan, at: int, moment: str) -> bool:
    """Run a plan in a driver of its own that dies at operation `at`; False if it finished first."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _Killer(at, moment).install()
            run_plan(plan, InlineExecutor())
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the driver failed by itself"
    return False


def num_operations(plan: Plan, scratch: Path) -> int:
    """Operations of an undisturbed run into `scratch`."""
    from dataclasses import replace

    killer = _Killer(0, "before")
    saved = {name: getattr(LocalObjects, name) for name in OPERATIONS}
    killer.install()
    try:
        run_plan(replace(plan, output=scratch), InlineExecutor())
    finally:
        for name, operation in saved.items():
            setattr(LocalObjects, name, operation)
    return killer.count
