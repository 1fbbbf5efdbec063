"""`sashiko demo`: the whole path on real data, in one folder that holds all it makes.

    OUTPUT/report/index.html    to look at
    OUTPUT/report/results.json  one row a slice, task and method
    OUTPUT/data/                the clean items, and their measurements task by task
    OUTPUT/restored/            what every method made of them
    OUTPUT/home/                MLflow's and Prefect's databases (SASHIKO_HOME)

The sample archives stay in the user's cache. Run again, it takes up what is there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.config import (
    ComputeSettings,
    EvaluateSettings,
    RestoreSettings,
    SimulateSettings,
    config_path,
    demo_tasks,
)
from flows.engine.events import Event, EventHandler, ignore

if TYPE_CHECKING:
    from flows.api_evaluate import EvaluateResult


@dataclass(frozen=True)
class DemoResult:
    """Where the demo left what.

    Attributes:
        output: its folder.
        page: the report.
        results: its rows as JSON.
        rows: the same rows.
        champions: registered name -> version.
        quarantined: what could not be restored, with reasons.
        seconds: wall time.
    """

    output: Path
    page: Path
    results: Path
    rows: Sequence[dict[str, Any]]
    champions: dict[str, str]
    quarantined: Sequence[Any]
    seconds: float

    def summary(self) -> str:
        """The figures as a table, and where to look."""
        from flows.console import duration
        from flows.report.table import results_table

        home = os.environ.get("SASHIKO_HOME", "")
        return "\n".join(
            [
                results_table(self.rows),
                "",
                f"done in {duration(self.seconds)}; look at",
                f"  report    {self.page}",
                f"  figures   {self.results}",
                f"  images    {self.output / 'restored'}",
                f"  models    SASHIKO_HOME={home} sashiko models",
                f"  runs      mlflow ui --backend-store-uri sqlite:///{home}/mlflow.db",
            ]
        )


def demo(
    output: Path,
    *,
    prefect: bool = True,
    compute: ComputeSettings | None = None,
    on_event: EventHandler = ignore,
) -> DemoResult:
    """Fetch samples, damage them, restore them with the starter model, compare, and report.

    Args:
        output: folder of all results.
        prefect: through the Prefect flows.
        compute: who computes; default: Ray, a worker a core.
        on_event: told of progress.
    """
    start = time.monotonic()
    root = output.resolve()
    root.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("SASHIKO_HOME", str(root / "home"))
    compute = compute or ComputeSettings()
    with _warming_up(prefect=prefect, compute=compute) as wait:
        data = _items(root / "data", on_event)
        champions = _crown_starter(on_event)
        wait()
        path = _Path(root, data, compute, prefect, on_event)
        for domain in demo_tasks():
            path.restore(domain)
        results = [path.evaluate(domain) for domain in demo_tasks()]
    _step(on_event, "writing the report")
    page, rows_path, rows = _report(results, root / "report")
    bad = [entry for result in results for entry in result.quarantined]
    return DemoResult(root, page, rows_path, rows, champions, bad, time.monotonic() - start)


@dataclass(frozen=True)
class _Path:
    """What every step of the demo needs to know."""

    root: Path
    data: Path
    compute: ComputeSettings
    prefect: bool
    on_event: EventHandler

    def restore(self, domain: str) -> None:
        """Restore the domain's tasks by the champion, as a user would who has no truth."""
        measurements = self.root / "data" / f"measurements-{domain}.zarr"
        tasks = demo_tasks()[domain]
        if not measurements.exists():
            from flows.api_data import simulate

            _step(self.on_event, f"{domain}: measuring ({', '.join(tasks)})")
            simulate(SimulateSettings(dataset=self.data, tasks=tasks, output=measurements))
        _step(self.on_event, f"{domain}: restoring")
        settings = RestoreSettings(
            input=measurements,
            output=self.root / "restored",
            model=_champion(domain),
            compute=self.compute,
        )
        self._run("restore", settings)

    def evaluate(self, domain: str) -> EvaluateResult:
        """Measure what was restored against the truth, beside the other methods."""
        _step(self.on_event, f"{domain}: comparing with the other methods")
        settings = EvaluateSettings(
            input=self.data,
            domain=domain,
            tasks=demo_tasks()[domain],
            model=_champion(domain),
            output=self.root / "restored",
            json_path=self.root / "report" / f"results-{domain}.json",
            compute=self.compute,
        )
        result: EvaluateResult = self._run("evaluate", settings)
        return result

    def _run(self, command: str, settings: RestoreSettings | EvaluateSettings) -> Any:
        from flows import launch

        return launch.run(command, settings, prefect=self.prefect, on_event=self.on_event)


def _items(folder: Path, on_event: EventHandler) -> Path:
    """The demo's items as a dataset, fetched and read once."""
    from flows.api_data import ingest_samples

    path = folder / "items.zarr"
    if not path.exists():
        _step(on_event, "fetching and reading the sample data")
        ingest_samples(path, demo_only=True, on_event=on_event)
    return path


def _crown_starter(on_event: EventHandler) -> dict[str, str]:
    """Register the starter model for each domain; it is champion where there is none yet."""
    from flows.registry import MODEL_NAMES, champion, promote, register_model

    _step(on_event, "registering the starter model")
    versions = register_model(config_path("models", "starter"), list(MODEL_NAMES.values()))
    for name, version in versions.items():
        if champion(name) is None:
            promote(name, version)
    return {name: champion(name) or "" for name in versions}


def _champion(domain: str) -> str:
    from flows.registry import MODEL_NAMES

    return f"models:/{MODEL_NAMES[domain]}@champion"


def _report(
    results: Sequence[EvaluateResult], folder: Path
) -> tuple[Path, Path, list[dict[str, Any]]]:
    from flows.report import write_report
    from flows.report.write import write_json

    rows = [row for result in results for row in result.rows]
    write_json(folder / "results.json", rows)
    page = write_report(results, folder, title="Sashiko demo")
    return page, folder / "results.json", rows


def _step(on_event: EventHandler, message: str) -> None:
    on_event(Event("step", 0, 0, message))


@contextmanager
def _warming_up(*, prefect: bool, compute: ComputeSettings) -> Iterator[Callable[[], None]]:
    """Start the Prefect server and Ray while other things are done; yields what waits for them."""
    from flows.launch import start_prefect

    ray = _BackgroundRay(compute) if compute.executor == "ray" else None
    wait_for_prefect = start_prefect() if prefect else None

    def wait() -> None:
        if wait_for_prefect is not None:
            wait_for_prefect()
        if ray is not None:
            ray.up.wait()

    try:
        yield wait
    finally:
        if ray is not None:
            ray.close()


class _BackgroundRay:
    """A Ray of our own, held by one thread: its processes die with the thread that made them."""

    def __init__(self, compute: ComputeSettings) -> None:
        self.up, self._closing = threading.Event(), threading.Event()
        self._compute = compute
        self._thread = threading.Thread(target=self._hold, name="ray", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Shut Ray down."""
        self._closing.set()
        self._thread.join()

    def _hold(self) -> None:
        from flows.engine.executor import default_workers
        from flows.engine.ray_session import ray_session

        num_cpus = max(self._compute.num_workers, default_workers(0.0))
        # What goes wrong here goes wrong again in the engine, which tells.
        with suppress(Exception), ray_session(self._compute.ray_address, num_cpus):
            self.up.set()
            self._closing.wait()
        self.up.set()
