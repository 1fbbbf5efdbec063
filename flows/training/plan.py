"""`sashiko train --plan`: what a training would take, found out by a few steps in this process.

Nothing is kept: no Ray, Prefect or MLflow is started, and no file stays. Steps of one sample and
of several are timed on made-up patches with the threads of one worker; a step of the whole share
is their line carried on. Several workers on one machine are taken not to slow each other down.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from flows.api_train import (
    known_datasets,
    learned_from,
    new_network,
    recipe_of,
    resolved,
    steps_left,
)
from flows.config import TrainSettings
from flows.engine.memory import machine_bytes, peak_memory
from flows.training.data import cache_bytes, records_of, view_bytes, views_fit

if TYPE_CHECKING:
    from diffusion_core.networks.precond import Preconditioned
    from diffusion_core.training.patches import Batch

_MOST_PIXELS = 200_000
"""Of a timed step: a few seconds on one core."""
_NUM_STEPS = 3
"""Of which the first warms up."""
_KEPT_CHECKPOINTS = 3
"""Two, and one while it is written."""
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class TrainPlan:
    """What a training would do and take.

    Attributes:
        name: of the run.
        num_steps: in all.
        steps_done: by a run that this one would take up.
        megapixels: that the steps to come look at.
        num_parameters: of the network.
        flop_per_pixel: of one evaluation; a training step takes three times as many.
        num_workers: as far as can be told without Ray.
        device: of a worker.
        num_threads: of a worker.
        num_items: training images and volumes; None while the samples are not ingested.
        data_bytes: of the views that patches are drawn from; None likewise.
        data_in_memory: whether a worker holds them, or reads what it draws.
        worker_bytes: peak memory of one worker, its views included.
        gpu_bytes: peak of the GPU's memory a worker, without a GPU 0.
        machine_bytes: memory of this machine.
        disk_bytes: of checkpoints, snapshots and the model (and the views, where they are written).
        seconds_per_step: predicted.
        seconds: of the steps to come and their scores.
        score_share: of that time for scores; None where none is asked for, or no data is there.
        megapixels_per_s: predicted, of all workers.
        peak_flop_per_s: measured on this machine, of all workers.
        peak_share: of it that training is predicted to use.
        measured: how the prediction was made.
    """

    name: str
    num_steps: int
    steps_done: int
    megapixels: float
    num_parameters: int
    flop_per_pixel: float
    num_workers: int
    device: str
    num_threads: int
    num_items: int | None
    data_bytes: int | None
    data_in_memory: bool
    worker_bytes: int
    gpu_bytes: int
    machine_bytes: int
    disk_bytes: int
    seconds_per_step: float
    seconds: float
    score_share: float | None
    megapixels_per_s: float
    peak_flop_per_s: float
    peak_share: float
    measured: str


@dataclass(frozen=True)
class _Line:
    """Cost of a step by its samples a worker: fixed + each * samples."""

    fixed: float
    each: float

    @classmethod
    def through(cls, few: int, at_few: float, many: int, at_many: float) -> _Line:
        each = max(0.0, (at_many - at_few) / (many - few)) if many > few else at_few / few
        return cls(max(0.0, at_few - each * few), each)

    def at(self, samples: int) -> float:
        return self.fixed + self.each * samples


@dataclass(frozen=True)
class _Trial:
    """What a few steps of a batch took: seconds a step, bytes at the peak, a checkpoint's bytes."""

    seconds: float
    worker_bytes: int
    gpu_bytes: int
    checkpoint_bytes: int


def plan_training(settings: TrainSettings) -> TrainPlan:
    """Say what `train` would do with these settings, and do nothing of it.

    Raises:
        BadInputError: for all that `train` would refuse before it starts.
    """
    from flows.training.checks import check_data, check_settings
    from flows.training.run_folder import check_run, run_path

    settings = resolved(settings)
    check_settings(settings)
    with tempfile.TemporaryDirectory() as folder:
        if datasets := known_datasets(settings):
            settings = learned_from(settings, datasets, Path(folder))
            check_data(settings)
            check_run(settings)
        left = steps_left(settings, run_path(settings))
        num_workers, device = _workers(settings), _device(settings)
        num_threads = settings.num_threads or max(1, (os.cpu_count() or 1) // num_workers)
        with _threads(num_threads):
            return _measured(settings, left, num_workers, device, num_threads)


def _measured(
    settings: TrainSettings, left: int, num_workers: int, device: str, num_threads: int
) -> TrainPlan:
    """The plan, from a few steps and products in this process."""
    from diffusion_core.training.throughput import TRAINING_PASSES, flop_per_pixel, measured_peak

    model = new_network(settings)
    share, num_pixels = settings.batch_size // num_workers, settings.patch_size**2
    micro = min(settings.micro_batch or share, share)
    many = max(1, min(micro, _MOST_PIXELS // num_pixels))
    few_trial = _trial(settings, 1, device)
    trial = _trial(settings, many, device) if many > 1 else few_trial

    def line(attribute: str) -> _Line:
        return _Line.through(1, getattr(few_trial, attribute), many, getattr(trial, attribute))

    seconds_per_step = line("seconds").at(share)
    rate = settings.batch_size * num_pixels / 1e6 / seconds_per_step
    peak = num_workers * measured_peak(device, bfloat16=settings.dtype == "bfloat16")
    operations = flop_per_pixel(model)
    score_s, every = _score_seconds(settings, model, device), settings.score.every_steps
    num_scores = left // every if every else 0
    data = view_bytes(settings) if settings.data else None
    in_memory = data is None or views_fit(settings, data)
    held = 0 if data is None else data if in_memory else cache_bytes(settings)
    return TrainPlan(
        name=settings.name,
        num_steps=settings.num_steps,
        steps_done=settings.num_steps - left,
        megapixels=left * settings.batch_size * num_pixels / 1e6,
        num_parameters=sum(p.numel() for p in model.parameters()),
        flop_per_pixel=operations,
        num_workers=num_workers,
        device=device,
        num_threads=num_threads,
        num_items=len(list(records_of(settings, "train"))) if settings.data else None,
        data_bytes=data,
        data_in_memory=in_memory,
        worker_bytes=int(line("worker_bytes").at(micro)) + held,
        gpu_bytes=int(line("gpu_bytes").at(micro)),
        machine_bytes=machine_bytes(),
        disk_bytes=_disk_bytes(settings, model, trial) + (0 if in_memory else data or 0),
        seconds_per_step=seconds_per_step,
        seconds=left * seconds_per_step + num_scores * (score_s or 0.0),
        score_share=None if score_s is None else score_s / (score_s + every * seconds_per_step),
        megapixels_per_s=rate,
        peak_flop_per_s=peak,
        peak_share=rate * 1e6 * TRAINING_PASSES * operations / peak,
        measured=f"{_NUM_STEPS - 1} steps of 1 and of {many} samples, on {device} with "
        f"{num_threads} threads",
    )


def _workers(settings: TrainSettings) -> int:
    """As asked for, or as many as this machine has places for and divide the batch."""
    compute = settings.compute
    if compute.executor == "inline":
        return 1
    if compute.num_workers:
        return compute.num_workers
    places = os.cpu_count() or 1
    if _device(settings) == "cuda":
        import torch

        places = torch.cuda.device_count()
    return max(n for n in range(1, places + 1) if settings.batch_size % n == 0)


def _device(settings: TrainSettings) -> str:
    """Of a worker, where this machine has one."""
    compute = settings.compute
    if compute.executor == "inline" or not compute.num_gpus_per_worker:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """So many threads of torch for the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _MadeUp:
    """Patches of no image: what a step takes does not depend on what is in them."""

    def __init__(self, settings: TrainSettings) -> None:
        self._side, self._num = settings.patch_size, len(settings.conditions)

    def batch(self, first: int, count: int) -> Batch:
        """Samples first .. first + count - 1."""
        import torch

        from diffusion_core.training.patches import Batch

        numbers = torch.arange(first, first + count)
        ramp = torch.linspace(-1, 1, self._side).expand(count, 3, self._side, self._side)
        return Batch(ramp.contiguous(), numbers % self._num, torch.ones(count, 3))


def _trial(settings: TrainSettings, samples: int, device: str) -> _Trial:
    """Train a new network for a few steps of one worker's micro-batch, in a folder that goes."""
    import torch

    from diffusion_core.training.loop import Callbacks, train

    ends: list[float] = []
    recipe = replace(
        recipe_of(settings),
        num_steps=_NUM_STEPS,
        batch_size=samples,
        micro_batch=0,
        num_snapshots=1 if settings.ema_snapshots else 0,
        score_every_steps=0,
        log_every_steps=1,
        checkpoint_every_s=1e9,
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, peak_memory() as peak:
        told = Callbacks(on_log=lambda *_: ends.append(time.perf_counter()))
        steps = Path(folder, "checkpoints")
        train(new_network(settings), _MadeUp(settings), recipe, steps, told, device=device)  # type: ignore[arg-type]
        return _Trial(
            seconds=min(b - a for a, b in pairwise(ends)),
            worker_bytes=peak(),
            gpu_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else 0,
            checkpoint_bytes=sum(f.stat().st_size for f in steps.rglob("*") if f.is_file()),
        )


def _score_seconds(settings: TrainSettings, model: Preconditioned, device: str) -> float | None:
    """Of one restoration score, taken of the untrained network; None if none is asked for."""
    from flows.training.score import restoration_score
    from flows.training.validation import validation_images

    if not settings.score.every_steps or not settings.data:
        return None
    validation_images(settings, settings.score.num_images, settings.score.side)  # read once a run
    begin = time.perf_counter()
    restoration_score(settings, model.to(device).eval())
    return time.perf_counter() - begin


def _disk_bytes(settings: TrainSettings, model: Preconditioned, trial: _Trial) -> int:
    """Of checkpoints, snapshots, the best, and the model with float16 weights."""
    from diffusion_core.training.power import LENGTHS

    weights = sum(p.numel() for p in model.parameters()) * _FLOAT_BYTES
    snapshots = settings.ema_snapshots * len(LENGTHS) * weights
    best = 2 * weights if settings.score.every_steps else 0
    return _KEPT_CHECKPOINTS * trial.checkpoint_bytes + snapshots + best + weights // 2
