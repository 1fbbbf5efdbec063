"""The Prefect flow `restore`: one task a window of items, one pool of workers for all of them.

Prefect sees minutes of work, never blocks: the pool belongs to the flow's process and outlives
its windows. What is published is not computed again, so a run that died is simply run again.
"""

from __future__ import annotations

import time
from dataclasses import replace

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE

from flows.api_restore import RestoreResult, WindowResult, collect, prepare, restore_window
from flows.config import RestoreSettings
from flows.engine.events import Event, EventHandler
from flows.engine.executor import make_executor
from flows.engine.plan import Plan
from flows.watch import finished, flow_events


@flow(name="restore")
def restore_flow(settings: RestoreSettings) -> RestoreResult | State[RestoreResult]:
    """Restore measurements or damaged images; what is restored already is not computed again."""
    on_event = flow_events("restore-progress")
    with prepare(settings, on_event) as job:
        windows = job.windows()
        hear = as_one_run(windows, on_event)
        with make_executor(settings.compute) as executor:

            @task(name="window", task_run_name="window-{number}", cache_policy=NO_CACHE)
            def window(number: int) -> WindowResult:
                return restore_window(job, windows[number], executor, hear[number])

            results = [window(number) for number in range(len(windows))]
        return finished(collect(job, results))


def as_one_run(windows: list[Plan], on_event: EventHandler) -> list[EventHandler]:
    """A handler for each window that tells `on_event` of all of them as of one run."""
    total, start = sum(window.num_blocks for window in windows), time.monotonic()

    def handler(before: int, *, last: bool) -> EventHandler:
        def hear(event: Event) -> None:
            done = before + event.done
            kind = "window" if event.kind == "done" and not last else event.kind
            eta = (time.monotonic() - start) * (total - done) / done if done else None
            facts = event.facts if len(windows) == 1 else {**event.facts, "eta_s": eta}
            on_event(replace(event, kind=kind, done=done, total=total, facts=facts))

        return hear

    counts = [window.num_blocks for window in windows]
    before = [sum(counts[:number]) for number in range(len(counts))]
    return [handler(b, last=i == len(counts) - 1) for i, b in enumerate(before)]
