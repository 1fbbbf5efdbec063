"""Evaluate: clean images, damaged as a task says, restored by every method, held to the truth.

    images --ingest--> dataset.zarr --simulate--> measurements.zarr --engine--> items by method
                             |                                                    |
                             +------------------- score --------------------------+--> results.json

A row is one slice of one item restored by one method; ROW_NOTE says how each figure is made, and
stands as README.md in the output folder. Every method restores the same measurement. DiffPIR and
DDS get the start and the noise levels of the task's own solver, so that all diffusion methods
cost the same number of evaluations. What the output folder holds already, by content, is not
computed again: not what an earlier evaluation made there, and not what `restore` made.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from diffusion_core.model import solver_settings
from diffusion_core.posterior import METHODS, STANDARD
from domains.base import BadInputError, Task
from flows.config import (
    EvaluateSettings,
    IngestSettings,
    MethodSettings,
    SimulateSettings,
    load_task,
)
from flows.engine.events import Event, EventHandler, ignore
from flows.engine.methods import known_methods, require_methods
from flows.plural import plural
from flows.report.page import ModelFacts
from flows.report.rows import Row, summarise
from flows.report.table import results_table
from flows.roots import require_local

if TYPE_CHECKING:
    from flows.api_data import Quarantined as QuarantinedFile
    from flows.engine.campaign import CampaignResult
    from flows.engine.plan import ModelRef
    from flows.engine.quarantine import Quarantined as QuarantinedItem
    from flows.explaining import Explained
    from flows.store import Dataset, MeasurementEntry, Measurements

Methods = Mapping[str, Sequence[str]]
"""Task -> names of the methods that restore it."""

EXPERIMENT = "sashiko-evaluate"
ROW_NOTE = """# How a row is made

`results.json` is a list of rows. One row is one slice (or frame, or still) of one item, restored
by one method from a measurement that was simulated from the clean image. Every method gets the
same measurement; its noise and masks are keyed by the image's content and the seed.

| figure | is |
|---|---|
| domain, task, item, slice | which; `slice` counts in the dataset, from 0 |
| group, region | patient or scene; "hole" where the task looks at the missing pixels |
| method, nfe | name; evaluations of the network for one image (0: a classical method) |
| num_operator_calls | applications of the operator and its adjoint for one image |
| model_digest | sha256 of the model directory; null for classical baselines |
| seconds, peak_bytes | wall time of the item over its slices; the worker's highest memory |
| psnr, ssim, edge_error | on [0, 1] after clipping, see below |
| z_gradient_error | mean error of the difference to the slice or frame before; none of the first |
| psnr_hole | PSNR of the missing pixels alone, where the operator is a mask |
| psnr_body, ssim_body | inside the body, where the domain knows one |
| residual | squared misfit in units of the noise, per real number measured, see below |

Where M samples were drawn (`--num-samples`), `covprox-sample` is the first of them and
`covprox-samples` their mean, whose rows have more figures: v_over_b, variance over error of the
samples on the unknown pixels (1 is calibrated), the sums sample_variance and sample_error that
a task's V/B is pooled from, and log_correlation of variance with error over blocks of 16^2. A
calibrated sample is about 3 dB below the mean, by theory.

The range [0, 1] is -1000 to 2000 HU for CT, 0 to the 99.9th percentile of the true slice for
MRI, and the range of the sensor for pictures. A residual about 1 explains the data, far below 1
fits their noise; where data are exact it is the largest misfit instead. A figure that a row does
not have is null.

DiffPIR and DDS get the start and the noise levels of
the task's own solver, so they cost as many evaluations. Kriging is the best linear estimate
under the Gaussian prior that was measured with the model: no network, and counted as classical.
Classical baselines run with parameters frozen on validation images.
With one patient a modality every statistic is within-patient.
"""


@dataclass(frozen=True)
class EvaluateResult:
    """What an evaluation found, and where it lies.

    Attributes:
        rows: one a slice and method.
        output: folder of all that was made.
        dataset: the clean images.
        measurements: what was restored.
        json_path: the rows as JSON.
        keys: of the published items behind the rows, in `output`.
        model: that restored; None if only classical methods ran.
        facts: provenance, name -> words.
        quarantined: files and items that could not be used, with reasons.
        num_reused: items that had been restored before.
        seconds: wall time.
        explained: how the first restorations came about, where it was asked for.
    """

    rows: list[Row]
    output: Path
    dataset: Path
    measurements: Path
    json_path: Path
    keys: frozenset[str]
    model: ModelFacts | None
    facts: Mapping[str, str]
    quarantined: Sequence[QuarantinedFile | QuarantinedItem] = ()
    num_reused: int = 0
    seconds: float = 0.0
    explained: Sequence[Explained] = ()

    def table(self, *, colour: bool | None = None, width: int | None = None) -> str:
        """Means by task and method, best first, with the gain over the best classical method.

        Args:
            colour: highlight by terminal codes; default: if stdout is a terminal.
            width: in characters; default: the terminal's, at least 100.
        """
        from flows.sampling import pooled_text

        table = results_table(self.rows, colour=colour, width=width)
        return "\n".join(filter(None, [table, pooled_text(self.rows)]))


def evaluate(settings: EvaluateSettings, on_event: EventHandler | None = None) -> EvaluateResult:
    """Compare methods on the same measurements of clean images.

    Args:
        settings: images, tasks, methods, model.
        on_event: told of progress.

    Returns:
        The rows, and where everything lies. The rows are in `json_path` too (results.json of the
        output by default), and in MLflow with pictures; losing MLflow fails nothing.

    Raises:
        BadInputError: if the images, a task, a method or the model cannot be used, or nothing
            could be restored.
    """
    on_event, start = on_event or ignore, perf_counter()
    tasks = checked_tasks(settings)
    methods = choose_methods(tasks, settings.methods)
    needs_model = (
        settings.num_samples > 0
        or settings.explain > 0
        or any(name in METHODS for names in methods.values() for name in names)
    )
    model = _model(settings.model, tasks) if needs_model else None
    dataset, bad_files = _dataset(settings, tasks, on_event)
    measurements = _measurements(settings, dataset, tasks, on_event)
    campaign, *samples = _restore(settings, measurements, methods, model, on_event)
    on_event(Event("step", 0, 0, "comparing with the truth"))
    rows = _rows(settings, campaign, samples, dataset, measurements, tasks)
    explained = _explained(settings, measurements, dataset, model, on_event)
    result = EvaluateResult(
        rows=rows,
        output=settings.output,
        dataset=require_local(dataset.path),
        measurements=require_local(measurements.path),
        json_path=settings.json_path or settings.output / "results.json",
        keys=frozenset(entry.key for entry in campaign.published),
        model=None if model is None else _model_facts(model),
        facts=_facts(settings, dataset, measurements, campaign),
        quarantined=(*bad_files, *campaign.quarantined),
        num_reused=len(campaign.reused),
        seconds=perf_counter() - start,
        explained=explained,
    )
    _write(result)
    _track(settings, result, on_event)
    on_event(Event("done", len(rows), len(rows), f"{len(rows)} results in {result.json_path}"))
    return result


def checked_tasks(settings: EvaluateSettings) -> dict[str, Task]:
    """The tasks by name, once the request is seen to make sense.

    Raises:
        BadInputError: if a task or a method is not known, or one sample is asked for.
    """
    tasks = {name: load_task(name) for name in settings.tasks}
    if not tasks:
        raise BadInputError("no task is named: give one with --task")
    choose_methods(tasks, settings.methods)
    if settings.num_samples == 1:
        raise BadInputError("one sample has no spread: ask for two or more with --num-samples")
    return tasks


def choose_methods(tasks: Mapping[str, Task], names: Sequence[str] | None) -> Methods:
    """The methods of each task: standard solvers and its baselines, or those of `names` that fit.

    Raises:
        BadInputError: if a name fits none of the tasks.
    """
    if names is None:
        return {name: [*STANDARD, *task.baselines] for name, task in tasks.items()}
    require_methods(names, [task.domain for task in tasks.values()])
    known = {name: known_methods(task.domain) for name, task in tasks.items()}
    fitting = {task: [n for n in names if n in of_task] for task, of_task in known.items()}
    return {task: of_task for task, of_task in fitting.items() if of_task}


def _model(name: str, tasks: Mapping[str, Task]) -> ModelRef:
    """The model, resolved once for the whole evaluation."""
    from flows.engine.plan import ModelRef
    from flows.registry import resolve_model

    found = resolve_model(name, {task.domain for task in tasks.values()})
    return ModelRef(str(found.path), found.digest, found.name, found.version)


def _model_facts(model: ModelRef) -> ModelFacts:
    from flows.report.write import model_facts

    return model_facts(Path(model.path), model.name, model.digest, model.version)


def _dataset(
    settings: EvaluateSettings, tasks: Mapping[str, Task], on_event: EventHandler
) -> tuple[Dataset, Sequence[QuarantinedFile]]:
    """The clean images: a dataset as it is, or a folder of files read into one."""
    from flows.api_data import ingest
    from flows.store import Dataset

    if (settings.input / "zarr.json").is_file() or settings.input.suffix == ".zarr":
        if settings.guides:
            raise BadInputError(
                f"{settings.input}: a dataset holds the guides that it was ingested with; leave "
                "out --guide, or ingest it anew with it"
            )
        return Dataset(settings.input), ()
    domain = settings.domain or next(iter(tasks.values())).domain
    fresh = settings.output / f".dataset-{uuid.uuid4().hex}.zarr"
    try:
        made = ingest(
            IngestSettings(
                source=settings.input, domain=domain, output=fresh, guides=settings.guides
            ),
            on_event,
        )
        path = settings.output / f"dataset-{made.digest[:12]}.zarr"
        if not path.exists():
            fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return Dataset(path), made.quarantined


def _measurements(
    settings: EvaluateSettings,
    dataset: Dataset,
    tasks: Mapping[str, Task],
    on_event: EventHandler,
) -> Measurements:
    """Measurements of the dataset, made unless the same ones lie in the output folder.

    They are called measurements.zarr, and by a digest of what they are made of where another
    evaluation has taken that name.
    """
    from flows.api_data import simulate
    from flows.store import Measurements
    from flows.store_files import json_digest

    made_of = json_digest(
        {
            "dataset": dataset.digest,
            "tasks": [asdict(task) for task in tasks.values()],
            "items": settings.items,
            "seed": settings.seed,
        }
    )
    named = settings.output / f"measurements-{made_of[:12]}.zarr"
    for path in (settings.output / "measurements.zarr", named):
        note = path.with_suffix(".json")
        if note.is_file() and json.loads(note.read_text())["made_of"] == made_of:
            return Measurements(path)
        if not path.exists():
            break
    on_event(Event("step", 0, 0, f"measuring: {', '.join(tasks)}"))
    simulate(
        SimulateSettings(
            dataset=dataset.path,
            tasks=list(tasks),
            output=path,
            items=settings.items,
            seed=settings.seed,
        ),
        on_event,
    )
    from flows.report.write import write_whole

    write_whole(note, json.dumps({"made_of": made_of}).encode())
    return Measurements(path)


def _restore(
    settings: EvaluateSettings,
    measurements: Measurements,
    methods: Methods,
    model: ModelRef | None,
    on_event: EventHandler,
) -> list[CampaignResult]:
    """Restore everything by every method on one pool of workers; then the samples, a seed each."""
    from flows.engine.campaign import run_plan
    from flows.engine.executor import make_executor
    from flows.engine.methods import resolve_method
    from flows.engine.plan import make_plan
    from flows.sampling import SAMPLE_MODE

    calibrated = solver_settings(Path(model.path)) if model else {}
    evaluations = {} if settings.num_levels is None else {"num_levels": settings.num_levels}

    def ways(entry: MeasurementEntry) -> list[MethodSettings]:
        asked = (MethodSettings(name=name, **evaluations) for name in methods[entry.task])
        return [resolve_method(way, entry, calibrated) for way in asked]

    def sampled(entry: MeasurementEntry) -> list[MethodSettings]:
        return [resolve_method(SAMPLE_MODE, entry, calibrated)]

    compute = settings.compute
    count = settings.num_samples
    runs = [(ways, settings.seed, "")]
    runs += [(sampled, settings.seed + k, f"sample {k + 1} of {count}: ") for k in range(count)]
    results = []
    with make_executor(compute) as executor:
        for methods_for, seed, which in runs:
            plan = make_plan(
                measurements.path,
                settings.output,
                model=model,
                items=settings.items,
                tasks=list(methods),
                seed=seed,
                dtype=settings.dtype,
                device_class="cuda" if compute.num_gpus_per_worker > 0 else "cpu",
                num_workers=executor.num_workers,
                num_lanes=compute.lanes,
                memory_limit_bytes=compute.memory_limit_bytes,
                methods_for=methods_for,
                along_z=settings.along_z,
            )
            tell = _prefixed(on_event, which)
            todo = f"{plural(len(plan.items), 'item')}, {plural(plan.num_blocks, 'block')}"
            tell(Event("step", 0, 0, f"restoring: {todo}"))
            results.append(run_plan(plan, executor, tell, max_attempts=compute.max_attempts))
    return results


def _prefixed(on_event: EventHandler, words: str) -> EventHandler:
    """The handler, told every message with words before it."""
    return lambda event: on_event(replace(event, message=f"{words}{event.message}"))


def _rows(
    settings: EvaluateSettings,
    campaign: CampaignResult,
    samples: Sequence[CampaignResult],
    dataset: Dataset,
    measurements: Measurements,
    tasks: Mapping[str, Task],
) -> list[Row]:
    """The rows, in the order of the tasks, the dataset's items, and their slices."""
    from flows.engine.restored import open_restored
    from flows.sampling import sample_rows
    from flows.scoring import score_entries

    if not campaign.published:
        reason = campaign.quarantined[0].reason if campaign.quarantined else "nothing was planned"
        raise BadInputError(f"{settings.input}: nothing could be restored: {reason}")
    restored = open_restored(settings.output)
    rows = list(score_entries(campaign.published, restored, dataset, measurements, tasks))
    if samples:
        drawn = [of_seed.published for of_seed in samples]
        rows += sample_rows(drawn, restored, dataset, measurements, tasks)
    task_order = {name: i for i, name in enumerate(tasks)}
    item_order = {record.item_id: i for i, record in enumerate(dataset.items())}
    rows.sort(key=lambda r: (task_order[r["task"]], item_order[r["item"]], r["slice"]))
    return rows


def _explained(
    settings: EvaluateSettings,
    measurements: Measurements,
    dataset: Dataset,
    model: ModelRef | None,
    on_event: EventHandler,
) -> Sequence[Explained]:
    """How the restorations of the first items came about; the numbers are in explain.json too."""
    if not settings.explain:
        return ()
    from flows.api_explain import explain_first

    return explain_first(settings, measurements, dataset, model, on_event)


def _facts(
    settings: EvaluateSettings,
    dataset: Dataset,
    measurements: Measurements,
    campaign: CampaignResult,
) -> dict[str, str]:
    """Provenance in words; no path, no user, no host name."""
    entry = campaign.published[0].facts
    versions = ", ".join(f"{k} {v}" for k, v in entry.get("versions", {}).items())
    return {
        "Dataset": f"sha256 {dataset.digest}",
        "Measurements": f"sha256 {measurements.content_digest}",
        "Campaign": campaign.campaign,
        "Seed": str(settings.seed),
        "Network precision": settings.dtype,
        "Machine": machine(),
        "Workers": f"{settings.compute.executor}, {settings.compute.num_workers or 'one a core'}",
        "Software": f"Python {platform.python_version()}, {versions}",
        "Restored now": f"{len(campaign.published) - len(campaign.reused)} of "
        f"{plural(len(campaign.published), 'item')} in {campaign.seconds:.0f} s, the others before",
        "Not restored": plural(len(campaign.quarantined), "item")
        if campaign.quarantined
        else "none",
    }


def machine() -> str:
    """The processor and its cores, as the operating system names them."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next(
            (value.strip() for key, _, value in lines if key.startswith("model name")), name
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {platform.system()}"


def _write(result: EvaluateResult) -> None:
    """Write the rows, and beside them how they were made."""
    from flows.report.write import write_json, write_whole

    write_json(result.json_path, result.rows)
    write_whole(result.output / "README.md", ROW_NOTE.encode())


def _track(settings: EvaluateSettings, result: EvaluateResult, on_event: EventHandler) -> None:
    """Log means, rows and pictures to MLflow."""
    from flows.report.write import stories_of, strips
    from flows.tracking import track_run

    on_event(Event("step", 0, 0, "logging to MLflow"))
    model = result.model
    params = {
        "tasks": " ".join(settings.tasks),
        "model": model.name if model else "",
        "model_digest": model.digest if model else "",
        "seed": settings.seed,
        "dtype": settings.dtype,
        **{name: result.facts[name] for name in ("Dataset", "Measurements", "Campaign")},
    }
    with track_run(EXPERIMENT, " ".join(settings.tasks)[:200], params=params) as run:
        for summary in summarise(result.rows):
            for method in summary.methods:
                means = {**method.means, "gain_db": method.gain_db}
                prefix = f"{summary.task}/{method.method}"
                run.log_metrics({f"{prefix}/{key}": value for key, value in means.items()})
        run.log_json("results.json", result.rows)
        for name, strip in strips(stories_of(result)):
            run.log_picture(f"pictures/{name}.png", strip)
