"""The block engine: plan, blocks, receipts, publishing, executors.

    plan = make_plan(measurements, output, method, model)
    with make_executor(settings.compute) as executor:
        result = run_plan(plan, executor, on_event)
    restored = open_restored(output)

Each is imported when it is first asked for: whoever wants an event pays for no plan.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.engine.campaign import run_plan
    from flows.engine.executor import make_executor
    from flows.engine.plan import make_plan
    from flows.engine.restored import open_restored

_HOMES = {
    "make_executor": "executor",
    "make_plan": "plan",
    "open_restored": "restored",
    "run_plan": "campaign",
}

__all__ = ["make_executor", "make_plan", "open_restored", "run_plan"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flows.engine' has no attribute '{name}'")
    return getattr(import_module(f"flows.engine.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
