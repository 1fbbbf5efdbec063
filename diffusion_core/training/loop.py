"""The training loop: one long function to read from top to bottom.

It knows tensors and steps only. Ray, MLflow and files of data come in through `Callbacks` and
the patch source; a worker of many passes its rank and a function that averages gradients.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from diffusion_core.training.loss import SigmaDensity, denoising_loss, levels_of
from diffusion_core.training.muon import Muon
from diffusion_core.training.patches import Batch, PatchSource


@dataclass(frozen=True)
class Recipe:
    """How to train; every field changes the result, save the last two.

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
        average: averages gradients over the workers in place, before the step.
    """

    on_log: Callable[[int, dict[str, float], Preconditioned], None] = lambda *_: None
    on_checkpoint: Callable[[int, Path], None] = lambda *_: None
    average: Callable[[Iterable[Tensor]], None] = lambda *_: None


def train(
    model: Preconditioned,
    patches: PatchSource,
    recipe: Recipe,
    folder: Path,
    callbacks: Callbacks | None = None,
    *,
    rank: int = 0,
    num_workers: int = 1,
    device: str = "cpu",
) -> TrainingState:
    """Train `model` in place, going on from the newest checkpoint in `folder` if there is one.

    Args:
        model: D; trained on `device` in float32 weights.
        patches: the sequence of clean samples; step k takes samples k b .. k b + b - 1.
        recipe: see Recipe.
        folder: for checkpoints; rank 0 writes them.
        callbacks: see Callbacks.
        rank: number of this worker; worker r takes every num_workers-th sample from r.
        num_workers: workers in all; must divide the batch.
        device: of the model.
    Returns:
        The state after the last step; `state.ema.module` is what to ship.
    Raises:
        ValueError: if the workers do not divide the batch.
    """
    if recipe.batch_size % num_workers:
        raise ValueError(f"batch {recipe.batch_size} does not divide by {num_workers} workers")
    callbacks = callbacks or Callbacks()
    model = model.to(device).train()
    to_channels_last(model)
    state = TrainingState(model, Ema(model, recipe.ema_decay), _optimisers(model, recipe))
    if found := latest_checkpoint(folder):
        load_checkpoint(found, state)

    samples = _prefetched(patches, recipe, state.step, rank, num_workers)
    meter = _Meter()
    last_saved = time.monotonic()
    for step in range(state.step, recipe.num_steps):
        batch, sigma, eps = (move(part, device) for part in next(samples))
        for optimiser in state.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step) * group["ratio"]

        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=recipe.bfloat16):
            loss, weighted = denoising_loss(model, batch, sigma, eps)
        loss.backward()
        callbacks.average(p.grad for p in model.parameters() if p.grad is not None)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in state.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        state.step = step + 1
        state.ema.update(model, state.step)

        meter.add(loss, weighted, norm, batch)
        if state.step % recipe.log_every_steps == 0:
            metrics = {**meter.read(), "rate": recipe.rate(step)}
            callbacks.on_log(state.step, metrics, state.ema.module)
        is_last = state.step == recipe.num_steps
        if rank == 0 and (is_last or time.monotonic() - last_saved > recipe.checkpoint_every_s):
            path = save_checkpoint(folder, state, {})
            callbacks.on_checkpoint(state.step, path)
            last_saved = time.monotonic()
    return state


def move(part: Batch | Tensor, device: str) -> Any:
    """A batch or tensor on `device`."""
    if isinstance(part, Batch):
        return Batch(*(t.to(device) for t in (part.x0, part.condition, part.channels)))
    return part.to(device)


def _optimisers(model: Preconditioned, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden convolutions, AdamW for the head, the vectors and the features."""
    hidden = [
        p
        for name, p in model.named_parameters()
        if p.ndim == 4 and not name.startswith("network.head")
    ]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = Muon(hidden, lr=recipe.learning_rate)
    adamw = torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    muon.param_groups[0]["ratio"] = 1.0
    adamw.param_groups[0]["ratio"] = recipe.adamw_ratio
    return [muon, adamw]


def _prefetched(
    patches: PatchSource, recipe: Recipe, first_step: int, rank: int, num_workers: int
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Batches from `first_step` on, two drawn ahead in a thread: memory stays bounded."""
    with ThreadPoolExecutor(1, thread_name_prefix="patches") as pool:
        ahead: list[Future[tuple[Batch, Tensor, Tensor]]] = []
        for step in itertools.count(first_step):
            ahead.append(pool.submit(_draw, patches, recipe, step, rank, num_workers))
            if len(ahead) > 2:
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
    """Means since the last reading, and throughput."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._since = time.monotonic()
        self._sums = {"loss": 0.0, "weighted_error": 0.0, "gradient_norm": 0.0}
        self._steps = 0
        self._pixels = 0

    def add(self, loss: Tensor, weighted: Tensor, norm: Tensor, batch: Batch) -> None:
        self._sums["loss"] += loss.item()
        self._sums["weighted_error"] += weighted.mean().item()
        self._sums["gradient_norm"] += norm.item()
        self._steps += 1
        b, _, h, w = batch.x0.shape
        self._pixels += b * h * w

    def read(self) -> dict[str, float]:
        seconds = max(1e-9, time.monotonic() - self._since)
        means = {name: total / max(1, self._steps) for name, total in self._sums.items()}
        means["megapixels_per_s"] = self._pixels / 1e6 / seconds
        self._reset()
        return means
