"""The training loop: one long function to read from top to bottom.

It knows tensors and steps only. Ray, MLflow and files of data come in through `Callbacks` and
the patch source; a worker of many passes its rank and a function that averages gradients.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_core.networks.precond import Preconditioned, to_channels_last
from diffusion_core.noise.densities import Histogram
from diffusion_core.noise.streams import training_noise
from diffusion_core.training.checkpoint import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from diffusion_core.training.ema import Ema
from diffusion_core.training.loss import Objective, SigmaDensity, denoising_loss, levels_of
from diffusion_core.training.muon import Muon
from diffusion_core.training.patches import Batch, PatchSource
from diffusion_core.training.power import LENGTHS, PowerAverage, save_snapshot, snapshot_steps


@dataclass(frozen=True)
class Recipe:
    """How to train; every field changes the result, save the last five.

    Attributes:
        num_steps: optimiser steps.
        batch_size: samples a step, over all workers.
        learning_rate: Muon's, on convolution weights; held, then brought to 0 linearly.
        adamw_ratio: AdamW's rate (all other weights) as a share of it.
        warmup_steps: from 0 to the full rate.
        decay_share: last part of the steps, over which the rate falls to 0.
        ema_decay: of the weights that are shipped.
        density: noise levels.
        bfloat16: compute F in bfloat16 (weights stay float32).
        seed: of patches and noise.
        num_snapshots: of the averages whose length is chosen afterwards (power.py); 0: none is
            kept.
        micro_batch: samples that a worker computes at once, their gradients added up; 0: its whole
            share of the batch. The step is the same up to rounding.
        score_every_steps: how often `on_score` is called; 0: never.
        prefetch_threads: that draw batches ahead.
        log_every_steps: how often `on_log` is called.
        checkpoint_every_s: seconds between checkpoints.
    """

    num_steps: int
    batch_size: int = 16
    learning_rate: float = 2e-3
    adamw_ratio: float = 0.25
    warmup_steps: int = 100
    decay_share: float = 0.4
    ema_decay: float = 0.999
    density: SigmaDensity | Histogram = field(default_factory=SigmaDensity)
    bfloat16: bool = True
    seed: int = 0
    num_snapshots: int = 0
    micro_batch: int = 0
    score_every_steps: int = 0
    prefetch_threads: int = 1
    log_every_steps: int = 50
    checkpoint_every_s: float = 60.0

    def rate(self, step: int) -> float:
        """Learning rate of step number `step` (from 0)."""
        warmup = (step + 1) / max(1, self.warmup_steps)
        decay = (self.num_steps - step) / max(1.0, self.decay_share * self.num_steps)
        return self.learning_rate * min(1.0, warmup, decay)


@dataclass(frozen=True)
class Callbacks:
    """What the loop tells the world; every function may be left out.

    Attributes:
        on_log: (step, metrics, averaged model) every `log_every_steps`.
        on_checkpoint: (step, folder) after each.
        on_score: (step, averaged model) every `score_every_steps`, on rank 0; the others wait. True
            ends the training there.
        average: averages tensors over the workers in place: gradients and losses, before the step.
    """

    on_log: Callable[[int, dict[str, float], Preconditioned], None] = lambda *_: None
    on_checkpoint: Callable[[int, Path], None] = lambda *_: None
    on_score: Callable[[int, Preconditioned], bool] = lambda *_: False
    average: Callable[[Iterable[Tensor]], None] = lambda *_: None


def train(
    model: Preconditioned,
    patches: PatchSource,
    recipe: Recipe,
    folder: Path,
    callbacks: Callbacks | None = None,
    *,
    objective: Objective = denoising_loss,
    rank: int = 0,
    num_workers: int = 1,
    device: str = "cpu",
) -> TrainingState:
    """Train `model` in place, going on from the newest checkpoint in `folder` if there is one.

    Args:
        model: D; trained on `device` in float32 weights.
        patches: the sequence of clean samples; step k takes samples k b .. k b + b - 1.
        recipe: see Recipe.
        folder: for checkpoints, and `snapshots` beside it; rank 0 writes them.
        callbacks: see Callbacks.
        objective: what is to fall.
        rank: number of this worker; it takes the rank-th of num_workers parts of each batch.
        num_workers: workers in all; must divide the batch.
        device: of the model.
    Returns:
        The state after the last step, or the one that `on_score` ended with; `state.ema.module` is
        what to ship.
    Raises:
        ValueError: if the workers do not divide the batch.
    """
    if recipe.batch_size % num_workers:
        raise ValueError(f"batch {recipe.batch_size} does not divide by {num_workers} workers")
    callbacks = callbacks or Callbacks()
    model = model.to(device).train()
    to_channels_last(model)
    state = TrainingState(model, Ema(model, recipe.ema_decay), _optimisers(model, recipe))
    if recipe.num_snapshots:
        state.family = [PowerAverage(model, length) for length in LENGTHS]
    meter = _Meter(num_workers)
    if found := latest_checkpoint(folder):
        meter.go_on(load_checkpoint(found, state))

    snapshots_after = set(snapshot_steps(recipe.num_steps, recipe.num_snapshots))
    samples = _prefetched(patches, recipe, state.step, rank, num_workers)
    last_saved = time.monotonic()
    for step in range(state.step, recipe.num_steps):
        batch, sigma, eps = (move(part, device) for part in next(samples))
        for optimiser in state.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step) * group["ratio"]

        losses = []
        for part in _micro_batches(len(sigma), recipe.micro_batch):
            with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=recipe.bfloat16):
                loss, weighted = objective(model, batch.part(part), sigma[part], eps[part])
            share = len(weighted) / len(sigma)
            (loss * share).backward()
            losses.append(share * torch.stack([loss.detach(), weighted.mean()]))
        loss_and_error = torch.stack(losses).sum(dim=0)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        callbacks.average([*gradients, loss_and_error])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in state.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        state.step = step + 1
        state.ema.update(model, state.step)
        for average in state.family:
            average.update(model, state.step)

        meter.add(loss_and_error, norm, batch)
        if state.step % recipe.log_every_steps == 0:
            metrics = {**meter.read(), "rate": recipe.rate(step)}
            callbacks.on_log(state.step, metrics, state.ema.module)
        is_last = state.step == recipe.num_steps
        if recipe.score_every_steps and state.step % recipe.score_every_steps == 0:
            ended = torch.zeros(1, device=device)
            if rank == 0:
                with meter.paused():
                    ended += bool(callbacks.on_score(state.step, state.ema.module))
            callbacks.average([ended])  # so that all workers end at one step
            is_last = is_last or bool(ended > 0)
        if rank == 0 and (state.step in snapshots_after or (is_last and state.family)):
            save_snapshot(folder.with_name("snapshots"), state.step, state.family)
        is_due = is_last or time.monotonic() - last_saved > recipe.checkpoint_every_s
        if rank == 0 and is_due:
            path = save_checkpoint(folder, state, meter.facts())
            callbacks.on_checkpoint(state.step, path)
            last_saved = time.monotonic()
        if is_last:
            break
    return state


def _micro_batches(count: int, size: int) -> list[slice]:
    """Parts of `size` samples of a batch of `count`; the last may be smaller. 0: one part."""
    size = size or count
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def move(part: Batch | Tensor, device: str) -> Any:
    """A batch or tensor on `device`."""
    return part.to(device)


def _optimisers(model: Preconditioned, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden convolutions, AdamW for the head, the vectors and the features.

    What is frozen has no optimiser; low-rank factors are AdamW's.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in trained if p.ndim == 4 and not name.startswith("network.head")]
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in trained if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    adamw.param_groups[0]["ratio"] = recipe.adamw_ratio
    if not hidden:
        return [adamw]
    muon = Muon(hidden, lr=recipe.learning_rate)
    muon.param_groups[0]["ratio"] = 1.0
    return [muon, adamw]


def _prefetched(
    patches: PatchSource, recipe: Recipe, first_step: int, rank: int, num_workers: int
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Batches from `first_step` on, a few drawn ahead in threads: memory stays bounded."""
    with ThreadPoolExecutor(recipe.prefetch_threads, thread_name_prefix="patches") as pool:
        ahead: list[Future[tuple[Batch, Tensor, Tensor]]] = []
        for step in itertools.count(first_step):
            ahead.append(pool.submit(_draw, patches, recipe, step, rank, num_workers))
            if len(ahead) > recipe.prefetch_threads + 1:
                yield ahead.pop(0).result()


def _draw(
    patches: PatchSource, recipe: Recipe, step: int, rank: int, num_workers: int
) -> tuple[Batch, Tensor, Tensor]:
    """This worker's contiguous part of step `step`: patches, noise levels, noise."""
    share = recipe.batch_size // num_workers
    first = step * recipe.batch_size + rank * share
    batch = patches.batch(first, share)
    sigma = levels_of(first, share, recipe.density)
    eps = torch.stack([training_noise(recipe.seed, first + i, batch.x0[i]) for i in range(share)])
    return batch, sigma, eps


class _Meter:
    """Means since the last reading, and throughput over all workers.

    What was added since then goes into the checkpoint: a resumed run's readings are those of an
    undisturbed one. Tensors stay on their device until they are read: a GPU need not be waited
    for at every step.
    """

    _NAMES = ("loss", "weighted_error", "gradient_norm")

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._before = torch.zeros(len(self._NAMES), dtype=torch.float64)
        self._num_before = 0
        self._reset()

    def _reset(self) -> None:
        self._since = time.monotonic()
        self._paused_s = 0.0
        self._seen: list[Tensor] = []
        self._pixels = 0

    def add(self, losses: Tensor, norm: Tensor, batch: Batch) -> None:
        """Take in a step: loss and weighted error, gradient norm, and its patches."""
        self._seen.append(torch.cat([losses, norm.reshape(1)]).detach())
        b, _, h, w = batch.x0.shape
        self._pixels += b * h * w * self._num_workers

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no training, told apart from the throughput."""
        begin = time.monotonic()
        yield
        self._paused_s += time.monotonic() - begin

    def facts(self) -> dict[str, Any]:
        """What a resumed run must know of the steps since the last reading."""
        return {"meter": {"sums": self._sums().tolist(), "steps": self._steps()}}

    def go_on(self, facts: dict[str, Any]) -> None:
        """Take up what `facts` gave; a checkpoint of an older version has none."""
        if kept := facts.get("meter"):
            self._before = torch.tensor(kept["sums"], dtype=torch.float64)
            self._num_before = kept["steps"]

    def read(self) -> dict[str, float]:
        """The means, and a new beginning."""
        means = self._sums() / max(1, self._steps())
        seconds = max(1e-9, time.monotonic() - self._since)
        metrics = dict(zip(self._NAMES, means.tolist(), strict=True))
        training_s = max(1e-9, seconds - self._paused_s)
        metrics["megapixels_per_s"] = self._pixels / 1e6 / training_s
        if self._paused_s:
            metrics["score_share"] = self._paused_s / seconds
        self._before, self._num_before = torch.zeros_like(self._before), 0
        self._reset()
        return metrics

    def _sums(self) -> Tensor:
        if not self._seen:
            return self._before.clone()
        return self._before + torch.stack(self._seen).cpu().double().sum(dim=0)

    def _steps(self) -> int:
        return self._num_before + len(self._seen)
