"""`sashiko train`: datasets to patches, the core's loop inside Ray Train, a model directory out.

runs/NAME/
  settings.json     what was asked (training/run_folder.py); a different one needs another name
  checkpoints/      safetensors, the newest two; a killed run goes on from here
  snapshots/        averaged weights, for the choice of their length (`ema_snapshots`)
  best/             the averaged weights of the best restoration score so far (`score`)
  views.zarr        what patches are drawn from, while they do not fit into memory
  log.jsonl         one line a reading: step, loss, throughput
  scores.jsonl      one line a restoration score
  model/            the finished model (diffusion_core/model.py)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domains.base import BadInputError
from flows.config import SHIPPED, STARTER, DistillSettings, Home, TrainSettings, config_path
from flows.engine.events import Event
from flows.training.data import VIEWS, cache_bytes, prepare_views

if TYPE_CHECKING:
    from diffusion_core.networks.precond import Preconditioned
    from diffusion_core.noise.densities import Histogram
    from diffusion_core.training.loop import Recipe
    from diffusion_core.training.loss import SigmaDensity

OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class TrainResult:
    """What a training run left.

    Attributes:
        model_path: the model directory.
        digest: of the model.
        num_steps: optimiser steps done in all.
        metrics: denoising PSNR on validation by condition and sigma, in dB.
        versions: registered name -> version, if it was registered.
    """

    model_path: Path
    digest: str
    num_steps: int
    metrics: dict[str, float]
    versions: dict[str, str]


def train(settings: TrainSettings, on_event: OnEvent | None = None) -> TrainResult:
    """Train as the settings say, or go on where a killed run of the same name was.

    Args:
        settings: see TrainSettings.
        on_event: told of progress.

    Returns:
        The finished model; trained already, it is returned as it is.

    Raises:
        BadInputError: if the settings or the data cannot be used, or the run folder holds other
            settings, or another command trains it now; nothing is written then.
        KeyboardInterrupt: if Ctrl-C stopped it; the same settings go on where it was.
    """
    from flows.training.checks import check_data, check_settings
    from flows.training.distilling import finish_student
    from flows.training.finish import finish
    from flows.training.run_folder import only_one, open_run, run_path, steps_done

    report = on_event or (lambda _event: None)
    settings = resolved(settings)
    check_settings(settings)
    settings = learned_from(settings, training_data(settings, report), Home().home / "datasets")
    check_data(settings)
    with only_one(run_path(settings)):
        run = open_run(settings)
        if steps_left(settings, run):
            views = prepare_views(settings, run)
            payload = {
                "settings": settings.model_dump(mode="json"),
                "run": str(run),
                "views": views and str(views),
                "cache_bytes": cache_bytes(settings),
            }
            _run_workers(settings, payload, report)
            if left := settings.num_steps - steps_done(run):
                done = settings.num_steps - left
                told = f"stopped: the last {settings.stop.patience} scores brought no gain"
                report(Event("train", done, settings.num_steps, told, {}))
        shutil.rmtree(run / VIEWS, ignore_errors=True)
        if isinstance(settings, DistillSettings):
            return finish_student(settings, run, report)
        return finish(settings, run, report)


def resolved(settings: TrainSettings) -> TrainSettings:
    """Settings whose paths hold in workers, which have another working directory."""
    corruption = settings.corruption
    if corruption is not None and corruption.filled_by is not None:
        from flows.training.filling import classics

        by = corruption.filled_by
        named = by if str(by) in classics() else _model_path(by)
        filled = corruption.model_copy(update={"filled_by": named})
        settings = settings.model_copy(update={"corruption": filled})
    if settings.init_from is None:
        return settings
    return settings.model_copy(update={"init_from": _model_path(settings.init_from)})


def _model_path(model: Path) -> Path:
    """Where a model lies that is named by its directory, or as a shipped one."""
    return config_path("models", str(model)) if str(model) in SHIPPED else model.resolve()


def steps_left(settings: TrainSettings, run: Path) -> int:
    """Steps that a run has still to take; none if its scores ended it."""
    from flows.training.run_folder import steps_done
    from flows.training.stopping import has_ended, scores_by_step

    done = steps_done(run)
    if has_ended(settings.stop, scores_by_step(run), done):
        return 0
    return max(0, settings.num_steps - done)


def recipe_of(settings: TrainSettings) -> Recipe:
    """The core's recipe as the settings give it."""
    from diffusion_core.training.loop import Recipe

    return Recipe(
        num_steps=settings.num_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        adamw_ratio=settings.adamw_ratio,
        warmup_steps=settings.warmup_steps,
        decay_share=settings.decay_share,
        ema_decay=settings.ema_decay,
        density=_density(settings),
        bfloat16=settings.dtype == "bfloat16",
        seed=settings.seed,
        num_snapshots=settings.ema_snapshots,
        micro_batch=settings.micro_batch,
        score_every_steps=settings.score.every_steps,
        prefetch_threads=settings.prefetch_threads,
        log_every_steps=settings.log_every_steps,
        checkpoint_every_s=settings.checkpoint_every_s,
    )


def _density(settings: TrainSettings) -> SigmaDensity | Histogram:
    """Noise levels: by the shares of bins if they are given, else normal and uniform mixed."""
    import math

    import torch

    from diffusion_core.noise.densities import Histogram
    from diffusion_core.training.loss import SigmaDensity

    low, high = settings.sigma_range
    if not settings.level_mass:
        return SigmaDensity(
            settings.ln_sigma_mean, settings.ln_sigma_std, settings.uniform_share, low, high
        )
    mass = torch.tensor(settings.level_mass, dtype=torch.float64)
    edges = torch.linspace(math.log(low), math.log(high), len(mass) + 1, dtype=torch.float64)
    return Histogram(edges, mass / mass.sum())


def new_network(settings: TrainSettings) -> Preconditioned:
    """The network before its first step: seeded, or with the weights of `init_from`.

    With `low_rank` these are frozen, and have corrections.

    Raises:
        BadInputError: if `network` describes none, or `init_from` is another network or lacks a
            condition to begin as.
    """
    from diffusion_core.model import guide_channels
    from diffusion_core.networks.local_unet import LocalUNet
    from diffusion_core.networks.low_rank import add_low_rank
    from diffusion_core.networks.precond import Preconditioned
    from diffusion_core.noise.streams import seeded_initialisation

    try:
        with seeded_initialisation(settings.seed):
            network = LocalUNet(
                num_conditions=len(settings.conditions),
                num_guides=len(guide_channels(settings.guides)),
                sees_missing=settings.hidden_share is not None,
                **settings.network,
            )
            module = Preconditioned(network)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise BadInputError(
            f"the setting 'network' cannot be used ({error}): it takes widths and depths, lists of "
            "one length, and num_features"
        ) from error
    if isinstance(settings, DistillSettings):
        return _new_student(module, settings)
    if settings.init_from is not None:
        _begin_from(module, settings, settings.init_from)
    if settings.low_rank:
        with seeded_initialisation(settings.seed):
            add_low_rank(module, settings.low_rank)
    return module


def _new_student(module: Preconditioned, settings: DistillSettings) -> Preconditioned:
    """A student that begins as its teacher, or as the student that init_from holds."""
    from diffusion_core.model import is_student
    from diffusion_core.networks.student import student_of

    start = settings.init_from
    if start is not None and is_student(start):
        module = student_of(module)
        _begin_from(module, settings, start)
        return module
    if start is not None:
        _begin_from(module, settings, start)
    return student_of(module)


def _begin_from(module: Preconditioned, settings: TrainSettings, path: Path) -> None:
    """Load a model's weights; every condition begins as itself or as `init_conditions` say."""
    from diffusion_core.model import BadModelError, Model, guide_channels

    try:
        start = Model.load(path)
    except BadModelError as error:
        raise BadInputError(
            f"the setting 'init_from' names no model to begin from: {error}; or set init_from="
            f"{STARTER}, the shipped one"
        ) from error
    varies = {"num_conditions": None, "num_guides": None}
    asked = {**module.network.config, **varies}
    asked.pop("sees_missing", None)
    known = list(start.conditions)
    begin_as = [settings.init_conditions.get(c, c) for c in settings.conditions]
    missing = [c for c in begin_as if c not in known]
    if {**start.config["network"], **varies} != asked or missing:
        raise BadInputError(
            f"{path} is another network or knows other conditions than the "
            "settings ask for: give it the same `network`, and `init_conditions` for what is new"
        )
    if start.guide_channels not in ([], guide_channels(settings.guides)):
        raise BadInputError(
            f"{path} knows other guides ({', '.join(start.guide_channels)}) than the settings ask "
            "for: give it the same `guides`, in their order"
        )
    module.begin_from(start.module, [known.index(c) for c in begin_as])


def training_data(settings: TrainSettings, report: OnEvent) -> list[Path]:
    """The datasets to train on; with none named, the samples, ingested once."""
    from flows.api_data import ingest_samples

    if known := known_datasets(settings):
        return known
    path = _samples(settings)
    splits = ("train", "validation")
    ingest_samples(path, splits=splits, extra=settings.extra_samples, on_event=report)
    return [path.resolve()]


def learned_from(settings: TrainSettings, data: list[Path], folder: Path) -> TrainSettings:
    """The settings with the datasets that are read: those named, or some of their slices.

    Args:
        settings: see TrainSettings.
        data: the datasets named.
        folder: where the dataset of `few` slices is, or is written.

    Raises:
        BadInputError: if they do not hold so many slices.
    """
    from flows.training.few import few_dataset

    settings = settings.model_copy(update={"data": data})
    if settings.few is not None:
        return settings.model_copy(update={"data": [few_dataset(settings, settings.few, folder)]})
    return settings


def known_datasets(settings: TrainSettings) -> list[Path]:
    """The datasets to train on; none if they are the samples and those are not ingested yet."""
    if settings.data:
        return [path.resolve() for path in settings.data]
    path = _samples(settings)
    return [path.resolve()] if path.exists() else []


def _samples(settings: TrainSettings) -> Path:
    name = "samples-extra.zarr" if settings.extra_samples else "samples.zarr"
    return Home().home / "datasets" / name


def _run_workers(settings: TrainSettings, payload: dict[str, Any], report: OnEvent) -> None:
    from flows.training import on_ray, worker

    log = Path(payload["run"]) / "log.jsonl"
    with _follow(log, settings.num_steps, report):
        if settings.compute.executor == "inline":
            worker.work(payload)
        else:
            on_ray.run_on_ray(settings, payload)


def _paced(reading: dict[str, float]) -> str:
    """A reading of the log in words."""
    words = f"loss {reading['loss']:.3f}, {reading['megapixels_per_s']:.2f} MP/s"
    if "peak_share" not in reading:  # a line of an older version
        return words
    return f"{words} ({reading['peak_share']:.0%} of the measured peak)"


class _follow:  # noqa: N801  # reads as a statement: `with _follow(log)`
    """Tell of new lines of the log while the workers run, from a thread."""

    def __init__(self, log: Path, total: int, report: OnEvent) -> None:
        import threading

        self._log, self._total, self._report = log, total, report
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._position = log.stat().st_size if log.exists() else 0

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stop.wait(1.0)
            for line in self._new_lines():
                reading = json.loads(line)
                message = _paced(reading)
                step = int(reading["step"])
                self._report(Event("train", step, self._total, message, reading))

    def _new_lines(self) -> Iterable[str]:
        if not self._log.exists():
            return []
        with self._log.open() as file:
            file.seek(self._position)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._position += len(whole.encode())
        return whole.splitlines()
