"""Calibrate: fit the solver's settings on validation images, and keep them with the model.

    dataset --cut, simulate--> cases --roll-outs (calibration.py)--> settings --> MODEL/solver.json

    solver.json: tasks -> TASK -> covprox -> MODE -> number of levels -> settings, figures

Each fit is stored as soon as it is found, so that a run that was stopped goes on where it was.
`flows.engine.methods` reads the settings when a restoration with this model is planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from domains.base import BadInputError, Task
from flows.config import CalibrateSettings, MethodSettings, load_method, load_task
from flows.engine.events import Event, EventHandler, ignore

if TYPE_CHECKING:
    from flows.calibration import Bench, Fit
    from flows.knobs import Knobs
    from flows.store import Dataset
    from flows.tune import Case, Selection

SOLVER = "covprox"
SIDE_PX = 256
"""Validation items are cut to this about their centre, where no parts are given."""
_KEPT = frozenset(
    {"mode", "inflation", "zeta", "momentum", "local", "adapt", "tolerance", "max_steps"}
)
"""Options that a fit decides; the others stay the task's."""


@dataclass(frozen=True)
class CalibrateResult:
    """What was fitted.

    Attributes:
        model_path: directory of the model with its settings.
        digest: of the model.
        fits: what solver.json holds of the tasks asked for, by task, mode and number of levels.
    """

    model_path: Path
    digest: str
    fits: Mapping[str, Any]

    def table(self) -> str:
        """Figures of every fit, as Markdown."""
        return figures_table(self.fits)


def calibrate(settings: CalibrateSettings, on_event: EventHandler | None = None) -> CalibrateResult:
    """Fit CovProx's settings for tasks, and store them in the model's directory.

    Args:
        settings: model, validation images, tasks, modes and numbers of levels.
        on_event: told of progress.

    Raises:
        BadInputError: if the dataset has no images for a task, or one of which the data leave
            nothing open, or the model has no directory of its own to write to.
        BadModelError: if the model cannot be used.
    """
    import torch

    from diffusion_core.model import Model, model_digest, solver_settings
    from flows.registry import resolve_model
    from flows.store import Dataset

    on_event = on_event or ignore
    path = Path(resolve_model(settings.model).path)
    target = _target(settings)
    source = _known(target, path)
    document: dict[str, Any] = {**solver_settings(source)}
    document["format"] = 1
    model = Model.load(source, dtype=getattr(torch, settings.dtype))
    dataset, parts = Dataset(settings.data), read_parts(settings.parts)
    tasks: dict[str, Any] = document.setdefault("tasks", {})
    with torch.no_grad():
        for name in settings.tasks:
            fits = tasks.setdefault(name, {}).setdefault(SOLVER, {})
            for mode, count, entry in _fits(settings, fits, name, model, dataset, parts, on_event):
                fits.setdefault(mode, {})[str(count)] = entry
                _store(source, target, document)
                source = target
    return CalibrateResult(target, model_digest(target), {n: tasks[n] for n in settings.tasks})


def _fits(
    settings: CalibrateSettings,
    known: Mapping[str, Any],
    name: str,
    model: Any,
    dataset: Dataset,
    parts: Mapping[str, Sequence[Selection]],
    on_event: EventHandler,
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(mode, number of levels, entry) of what is still to be fitted for a task."""
    from diffusion_core.posterior.calibration import NothingOpenError
    from flows.calibration import Bench
    from flows.knobs import Knobs

    wanted = [(mode, n) for mode in settings.modes for n in settings.levels.get(mode, ())]
    left = [(m, n) for m, n in wanted if settings.again or str(n) not in known.get(m, {})]
    if not left:
        return
    task, own = load_task(name), load_method(name)
    cases = list(_cases(name, task, dataset, parts))
    bench = Bench(model, cases, task.region)
    items = [case.truth.record.item_id for case in cases]
    start: Knobs | None = None
    for mode, count in left:
        done = known.get("mean", {}) if mode == "mean" and not settings.again else {}
        if start is None and done:
            start = Knobs.of(_method(own, next(iter(done.values()))))
        on_event(Event("step", 0, 0, f"{name}: {mode} mode at {count} levels"))
        try:
            fit, start = _fit(settings, bench, own, mode, count, start, on_event)
        except NothingOpenError as error:
            raise _nothing_open(name, mode, items, error.number) from error
        yield mode, count, _entry(fit, items) | {"command": _command(settings, name, mode)}


def _fit(
    settings: CalibrateSettings,
    bench: Bench,
    own: MethodSettings,
    mode: str,
    count: int,
    start: Knobs | None,
    on_event: EventHandler,
) -> tuple[Fit, Knobs | None]:
    from flows.calibration import fit_mean, fit_sample

    if mode == "sample":
        return fit_sample(bench, own, count, settings.num_samples), start
    say = on_event
    knobs, fit = fit_mean(bench, own, count, start, lambda line: say(Event("step", 0, 0, line)))
    return fit, knobs


def _nothing_open(task: str, mode: str, items: Sequence[str], number: int | None) -> BadInputError:
    """What to tell of a task that has nothing to calibrate."""
    images = ", ".join(dict.fromkeys(items)) if number is None else items[number]
    return BadInputError(
        f"task '{task}' cannot be calibrated in {mode} mode on {images}: the data leave no "
        "pixel open there; name other images with --parts"
    )


def _entry(fit: Fit, items: Sequence[str]) -> dict[str, Any]:
    """A fit as solver.json holds it."""
    levels = fit.settings.model_dump(include={"sigma_max", "sigma_min", "rho"})
    options = {name: value for name, value in fit.settings.options.items() if name in _KEPT}
    return {**levels, "options": options, "figures": dict(fit.figures), "items": list(items)}


def _method(own: MethodSettings, entry: Mapping[str, Any]) -> MethodSettings:
    """The settings of an entry."""
    levels = {name: entry[name] for name in ("sigma_max", "sigma_min", "rho")}
    return own.model_copy(update={**levels, "options": {**own.options, **entry["options"]}})


def _cases(
    name: str, task: Task, dataset: Dataset, parts: Mapping[str, Sequence[Selection]]
) -> Iterator[Case]:
    """The task's calibration images, measured, each slice by itself: its scale is its own."""
    from flows.tune import case_of, cut

    chosen = parts.get(name) or parts.get(task.domain) or _validation(dataset, task.domain)
    if not chosen:
        raise BadInputError(
            f"{dataset.path} has no validation item of the domain '{task.domain}': "
            "ingest some with --split validation, or name items with --parts"
        )
    for part in chosen:
        item = cut(dataset, part)
        for z in range(item.pixels.shape[1]):
            yield case_of(task, item.slices(z, z + 1))


def _validation(dataset: Dataset, domain: str) -> list[Selection]:
    """The middle of every validation item of a domain."""
    from flows.tune import Selection

    return [
        Selection(r.item_id, size=(min(r.shape[2], SIDE_PX), min(r.shape[3], SIDE_PX)))
        for r in dataset.items()
        if r.domain == domain and r.split == "validation"
    ]


def read_parts(path: Path | None) -> dict[str, list[Selection]]:
    """Images by domain or task, from a YAML file: see configs/calibrate-starter.yaml."""
    from flows.tune import Selection

    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text())
        return {
            domain: [
                Selection(**{**part, "size": tuple(part["size"]) if part.get("size") else None})
                for part in listed
            ]
            for domain, listed in values.items()
        }
    except (OSError, yaml.YAMLError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInputError(f"{path}: it does not list images by domain ({reason})") from error


def _target(settings: CalibrateSettings) -> Path:
    """The directory to write: --output, or the model's own where the user named one."""
    if settings.output is not None:
        return settings.output
    if Path(settings.model).is_dir():
        return Path(settings.model)
    raise BadInputError(f"{settings.model} has no directory of its own: say where with --output")


def _known(target: Path, path: Path) -> Path:
    """The target where it holds this model with some fits already, else the model.

    Raises:
        BadInputError: if the target holds another model.
    """
    from diffusion_core.model import DIGESTS, weights_digest

    if not (target / DIGESTS).is_file():
        return path
    if weights_digest(target) != weights_digest(path):
        raise BadInputError(
            f"{target} holds another model than {path}: name another folder with --output"
        )
    return target


def _command(settings: CalibrateSettings, task: str, mode: str) -> str:
    """How to make a fit again; of paths only the names."""
    words = ["sashiko calibrate MODEL --data DATASET", f"--task {task} --mode {mode}"]
    if settings.parts is not None:
        words.append(f"--parts {settings.parts.name}")
    return " ".join(words)


def _store(source: Path, target: Path, document: Mapping[str, Any]) -> None:
    from diffusion_core.model import store_solver_settings

    section = (
        "CovProx's inflation, zeta, momentum and levels, fitted by `sashiko calibrate` on the\n"
        "images that solver.json names. PSNR in dB is the mean over them: with the prototype's\n"
        "fixed settings, with those of the task's file, and fitted. V/B is the variance of\n"
        "samples over their error, 1 if calibrated.\n\n"
    )
    store_solver_settings(source, document, section + figures_table(document["tasks"]), target)


def figures_table(tasks: Mapping[str, Any]) -> str:
    """Figures of fits by task, mode and number of levels, as Markdown."""
    lines = [
        "| task | mode | levels | fixed dB | task file dB | fitted dB | V/B |",
        "|---|---|---|---|---|---|---|",
    ]
    names = ("psnr_prototype_db", "psnr_task_file_db", "psnr_db", "v_over_b")
    for task, by_solver in tasks.items():
        for mode, by_levels in by_solver.get(SOLVER, {}).items():
            for count, entry in by_levels.items():
                cells = [entry["figures"].get(name) for name in names]
                text = ["" if value is None else f"{value:.2f}" for value in cells]
                lines.append(f"| {task} | {mode} | {count} | {' | '.join(text)} |")
    return "\n".join(lines)
