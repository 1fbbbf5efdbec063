"""CovProx beside DiffPIR, DDS and deepinv's solvers: one network, the same measurements.

    python -m tests.benchmarks.core tune --data DATASET   weights of the others, on validation items
    python -m tests.benchmarks.core run                   quality, 8 items a task and more; resumes
    python -m tests.benchmarks.core time                  seconds, 2 items a task; an idle machine
    python -m tests.benchmarks.core report                the tables, in Markdown

`make bench` does run, time and report. Rows land in tests/benchmarks/results/core.json; `seconds`
counts where `idle` is true. Every method computes with --threads threads.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml

from diffusion_core.model import Model, weights_digest
from flows.config import config_path, load_task
from flows.store import Dataset
from tests.benchmarks import ours, tables
from tests.benchmarks.cases import TASKS, TEST, VALIDATION, Case, cases, test_dataset
from tests.benchmarks.ours import Method, Run
from tests.benchmarks.peer import Peer
from tests.benchmarks.peer_env import make
from tests.benchmarks.rows import Rows

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TUNED = HERE / "tuned.yaml"
LAMBDAS = (0.1, 0.3, 1.0, 3.0, 10.0)
ZETAS = (1.0, 0.3)
GAMMAS = (0.001, 0.003, 0.01, 0.03, 0.1)
SAMPLERS_TASKS = ("inpaint-random70", "deblur-gauss")
"""Tasks that deepinv's DPS and DDRM are run on, 2 items each."""
NUM_SAMPLED = NUM_TIMED = 2

QUICK = ("covprox", "covprox-float32", "kriging", "diffpir-our-start", "dds-our-start")
SLOW = ("diffpir", "deepinv-diffpir", "deepinv-ddrm", "deepinv-dps")

Restore = Callable[[Case], Run]


@dataclass(frozen=True)
class Entrant:
    """A method of the benchmark: what restores a case, and the settings that its rows depend on."""

    restore: Restore
    settings: Mapping[str, Any]


class Bench:
    """The model in both precisions, the tuned weights, and deepinv's process once it is asked."""

    def __init__(self, work: Path, peer_python: Path | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self.work, self.threads = work, threads
        self._peer_python = peer_python
        self._peer: Peer | None = None
        path = config_path("models", "starter")
        self.model_path = path
        self.weights = weights_digest(path)[:12]
        self.models = {name: Model.load(path, dtype=getattr(torch, name)) for name in _DTYPES}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._peer is not None:
            self._peer.__exit__(*error)

    @property
    def peer(self) -> Peer:
        """deepinv's process, started at first use; its environment is built if it is missing."""
        if self._peer is None:
            python = self._peer_python or make(ROOT / ".venv-bench")
            jobs = self.work / "jobs"
            self._peer = Peer(python, self.model_path, jobs, self.threads).__enter__()
        return self._peer

    def own(self, method: Method, dtype: str = "bfloat16") -> Entrant:
        """One of our solvers."""
        first, last = float(method.sigmas[0]), float(method.sigmas[-1])
        settings = {"from": first, "to": last, **method.options}
        return Entrant(lambda case: ours.run(method, case, self.models[dtype]), settings)

    def deepinv(self, method: str, options: Mapping[str, Any]) -> Entrant:
        """One of deepinv's."""
        return Entrant(lambda case: self.peer.run(method, options, case), dict(options))


_DTYPES = ("bfloat16", "float32")


def methods(bench: Bench, task: str) -> dict[str, Entrant]:
    """Every method that runs on all items of a task, by its name in the results."""
    tuned = tuned_options(task)
    return {
        "covprox": bench.own(ours.covprox(task)),
        "covprox-float32": bench.own(ours.covprox(task), "float32"),
        "kriging": bench.own(Method("kriging", "kriging", ours.covprox(task).sigmas)),
        "diffpir-our-start": bench.own(
            ours.at_our_levels(task, "diffpir", tuned["diffpir-our-start"])
        ),
        "dds-our-start": bench.own(ours.at_our_levels(task, "dds", tuned["dds-our-start"])),
        "diffpir": bench.own(ours.diffpir_published(task, **tuned["diffpir"])),
        "deepinv-diffpir": bench.deepinv("diffpir", tuned["deepinv-diffpir"]),
    }


def samplers(bench: Bench) -> dict[str, Entrant]:
    """deepinv's DPS (1000 steps) and DDRM (100), as they come."""
    return {
        "deepinv-ddrm": bench.deepinv("ddrm", {}),
        "deepinv-dps": bench.deepinv("dps", {}),
    }


def tuned_options(task: str) -> dict[str, dict[str, Any]]:
    """Weights of a task, found by `tune`."""
    return dict(yaml.safe_load(TUNED.read_text())[task])


def record(rows: Rows, case: Case, name: str, entrant: Entrant, facts: Mapping[str, Any]) -> None:
    """Restore, score, keep."""
    start = time.perf_counter()
    result = entrant.restore(case)
    row = {
        "task": case.task.name,
        "item": case.name,
        "method": name,
        "nfe": result.nfe,
        **{key: round(value, 4) for key, value in case.figures(result.x).items()},
        "seconds": round(result.seconds, 3),
        "settings": entrant.settings,
        **facts,
    }
    rows.put(row)
    click.echo(
        f"{row['task']} {row['item']} {name}: {row['psnr']:.2f} dB, {row['ssim']:.3f}, "
        f"{result.nfe} evaluations, {time.perf_counter() - start:.1f} s"
    )


def run(bench: Bench, rows: Rows, tasks: Sequence[str], only: Sequence[str]) -> None:
    """Quality: every method on every item, the quick ones first.

    Rows that were made by these weights with the settings of today are kept.
    """
    dataset = test_dataset(bench.work)
    facts = {"threads": bench.threads, "idle": False, "weights": bench.weights}
    for phase in (QUICK, SLOW):
        for task in tasks:
            for number, case in enumerate(cases(dataset, task, TEST[load_task(task).domain])):
                chosen = methods(bench, task)
                if task in SAMPLERS_TASKS and number < NUM_SAMPLED:
                    chosen |= samplers(bench)
                for name in phase:
                    wanted = name in chosen and (not only or name in only)
                    if wanted and not known(rows, case, name, chosen[name], bench):
                        record(rows, case, name, chosen[name], facts)


def known(rows: Rows, case: Case, name: str, entrant: Entrant, bench: Bench) -> bool:
    """Whether the row is there, made by these weights with these settings."""
    row = rows.get(case.task.name, case.name, name)
    made_by = {"settings": json.loads(json.dumps(entrant.settings)), "weights": bench.weights}
    return row is not None and {key: row.get(key) for key in made_by} == made_by


def timed(bench: Bench, rows: Rows, tasks: Sequence[str]) -> None:
    """Seconds: CovProx in both precisions and DiffPIR, ours and deepinv's, one after the other."""
    dataset = test_dataset(bench.work)
    facts = {"threads": bench.threads, "idle": True, "weights": bench.weights}
    names = ("covprox", "covprox-float32", "diffpir", "deepinv-diffpir")
    for task in tasks:
        chosen = methods(bench, task)
        for case in cases(dataset, task, TEST[load_task(task).domain][:NUM_TIMED]):
            ours.run(ours.covprox(task, 2), case, bench.models["bfloat16"])  # warm
            for name in names:
                record(rows, case, name, chosen[name], facts)


def tune(bench: Bench, dataset: Dataset, log: Rows, tasks: Sequence[str]) -> None:
    """Search the weights of DiffPIR and DDS on validation items.

    On our levels all candidates are tried; at 100 levels, lambda first and then zeta.
    """
    for task in tasks:
        parts = VALIDATION[load_task(task).domain]
        measured = list(cases(dataset, task, parts))
        search = Search(log, measured)
        levels = ours.covprox(task).sigmas
        here = f"from {levels[0]:.3g} to {levels[-1]:.3g}"
        few = search.best(
            f"diffpir-our-start {here}",
            [{"lam": lam, "zeta": zeta} for zeta in ZETAS for lam in LAMBDAS],
            lambda o, task=task: bench.own(ours.at_our_levels(task, "diffpir", o)),
        )
        dds = search.best(
            f"dds-our-start {here}",
            [{"gamma": g, "num_cg_steps": n} for n in (5, 20) for g in GAMMAS],
            lambda o, task=task: bench.own(ours.at_our_levels(task, "dds", o)),
        )

        def published(options: dict[str, Any], task: str = task) -> Entrant:
            return bench.own(ours.diffpir_published(task, **options))

        many = search.climb("diffpir", [{"lam": lam, "zeta": 1.0} for lam in LAMBDAS], published)
        many = search.best("diffpir", [{**many, "zeta": zeta} for zeta in ZETAS], published)
        # For the same lambda its rho is half of ours: see infra/decisions/0005.
        peer = search.climb(
            "deepinv-diffpir",
            [{"lambda_": 2 * lam, "zeta": many["zeta"]} for lam in LAMBDAS],
            lambda o: bench.deepinv("diffpir", o),
            first=LAMBDAS.index(many["lam"]),
        )
        many = search.refine("diffpir", many, "lam", published)
        peer = search.refine(
            "deepinv-diffpir", peer, "lambda_", lambda o: bench.deepinv("diffpir", o)
        )
        found = {
            "diffpir-our-start": few,
            "dds-our-start": dds,
            "diffpir": many,
            "deepinv-diffpir": peer,
        }
        known = yaml.safe_load(TUNED.read_text()) if TUNED.exists() else {}
        known[task] = found
        TUNED.write_text(
            "# Weights of the other methods, tuned on validation items for mean PSNR. Made by\n"
            "#   python -m tests.benchmarks.core tune --data DATASET\n"
            + yaml.safe_dump(known, sort_keys=True, default_flow_style=None)
        )


@dataclass(frozen=True)
class Search:
    """Over candidates of options, by mean PSNR over measured cases; what was tried is in a log."""

    log: Rows
    measured: Sequence[Case]

    def best(
        self,
        method: str,
        candidates: Sequence[dict[str, Any]],
        enter: Callable[[dict[str, Any]], Entrant],
    ) -> dict[str, Any]:
        """The candidate of the highest figure."""
        return max(candidates, key=lambda options: self.figure(method, options, enter(options)))

    def climb(
        self,
        method: str,
        candidates: Sequence[dict[str, Any]],
        enter: Callable[[dict[str, Any]], Entrant],
        first: int | None = None,
    ) -> dict[str, Any]:
        """The highest of ordered candidates, up and down from one until the figure falls."""

        def figure(i: int) -> float:
            if not 0 <= i < len(candidates):
                return -math.inf
            return self.figure(method, candidates[i], enter(candidates[i]))

        place = len(candidates) // 2 if first is None else first
        for step in (1, -1):
            while figure(place + step) > figure(place):
                place += step
        return candidates[place]

    def refine(
        self,
        method: str,
        best: dict[str, Any],
        weight: str,
        enter: Callable[[dict[str, Any]], Entrant],
    ) -> dict[str, Any]:
        """Between the points of a grid that steps by 3: half a step to either side."""
        sides = [{**best, weight: float(f"{best[weight] * f:.3g}")} for f in (1.8, 1 / 1.8)]
        return self.best(method, [best, *sides], enter)

    def figure(self, method: str, options: dict[str, Any], entrant: Entrant) -> float:
        """Mean PSNR in dB, from the log where it is there."""
        name = f"{method} {json.dumps(options)}"
        rows = []
        for case in self.measured:
            if self.log.get(case.task.name, case.name, name) is None:
                record(self.log, case, name, entrant, {})
            rows.append(self.log.get(case.task.name, case.name, name) or {})
        return float(np.mean([row["psnr"] for row in rows]))


@click.group(help=__doc__)
def main() -> None:
    """See the module."""


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option("--work", type=click.Path(path_type=Path), default=ROOT / ".bench"),
        click.option("--peer-python", type=click.Path(path_type=Path, exists=True)),
        click.option("--threads", type=int, default=2, show_default=True),
        click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), default=TASKS),
        click.option(
            "--results", type=click.Path(path_type=Path), default=HERE / "results" / "core.json"
        ),
    )
    for option in options:
        command = option(command)
    return command


@main.command("run")
@_shared
@click.option("--method", "only", multiple=True, help="Only these; default all.")
def run_command(
    work: Path,
    peer_python: Path | None,
    threads: int,
    tasks: Sequence[str],
    results: Path,
    only: Sequence[str],
) -> None:
    """Quality of every method on every item."""
    with Bench(work, peer_python, threads) as bench:
        run(bench, Rows(results), tasks, only)


@main.command("time")
@_shared
def time_command(
    work: Path, peer_python: Path | None, threads: int, tasks: Sequence[str], results: Path
) -> None:
    """Seconds on an idle machine."""
    with Bench(work, peer_python, threads) as bench:
        timed(bench, Rows(results), tasks)


@main.command("tune")
@_shared
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Dataset of samples.")
def tune_command(
    work: Path,
    peer_python: Path | None,
    threads: int,
    tasks: Sequence[str],
    results: Path,
    data: Path,
) -> None:
    """Weights of the other methods on validation items."""
    del results
    with Bench(work, peer_python, threads) as bench:
        tune(bench, Dataset(data), Rows(work / "tuning.json"), tasks)


@main.command("report")
@_shared
def report_command(results: Path, tasks: Sequence[str], **_others: Any) -> None:
    """The tables."""
    sys.stdout.write(tables.report(list(_rows(results)), tasks))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    yield from Rows(path)


if __name__ == "__main__":
    main()
