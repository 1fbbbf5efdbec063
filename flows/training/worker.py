"""One training worker: the core's loop with its log, pictures and gradient averaging plugged in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.config import DistillSettings, TrainSettings
from flows.training.run_folder import CHECKPOINTS, LOG
from flows.training.system import system_metrics

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from diffusion_core.networks.precond import Preconditioned
    from flows.tracking import TrackedRun


def ray_loop(payload: dict[str, Any]) -> None:
    """Train inside a worker of Ray Train: `work` with its rank, device and gradient averaging."""
    import ray.train
    import torch
    import torch.distributed

    context = ray.train.get_context()
    num_workers = context.get_world_size()

    def average(gradients: Iterable[Tensor]) -> None:
        if num_workers > 1:
            flat = list(gradients)
            joined = torch.cat([g.reshape(-1) for g in flat])
            torch.distributed.all_reduce(joined)
            joined /= num_workers
            for g, part in zip(flat, joined.split([g.numel() for g in flat]), strict=True):
                g.copy_(part.view_as(g))

    work(
        payload,
        rank=context.get_world_rank(),
        num_workers=num_workers,
        average=average,
        tell=lambda metrics: ray.train.report(metrics),
        device=str(ray.train.torch.get_device()),
    )


def work(
    payload: dict[str, Any],
    *,
    rank: int = 0,
    num_workers: int = 1,
    average: Callable[[Iterable[Tensor]], None] = lambda _gradients: None,
    tell: Callable[[dict[str, float]], None] = lambda _metrics: None,
    device: str = "cpu",
) -> None:
    """Train from the newest checkpoint to the last step, in this process.

    Args:
        payload: {"settings": TrainSettings as JSON, "run": the run's folder, "views": store of
            views or None, "cache_bytes": of it in memory}.
        rank: number of this worker; 0 writes the log, checkpoints and MLflow.
        num_workers: in all.
        average: averages gradients over the workers.
        tell: told of the metrics at every reading, on every worker.
        device: torch device.
    """
    import torch

    from diffusion_core.training.loop import Callbacks, train
    from flows.api_train import new_network, recipe_of
    from flows.training.choice import score_and_keep
    from flows.training.data import patch_source
    from flows.training.distilling import measured, objective_of, settings_of
    from flows.training.run_folder import steps_done
    from flows.training.stopping import has_ended, scores_by_step

    settings = settings_of(payload["settings"])
    run = Path(payload["run"])
    if num_threads := payload.get("num_threads", settings.num_threads):
        torch.set_num_threads(num_threads)
    views = payload["views"] and Path(payload["views"])
    patches = measured(settings, patch_source(settings, views, payload["cache_bytes"]))
    model = new_network(settings)
    pace = Pace(settings, model, device, num_workers) if rank == 0 else None
    with _Journal(settings, run, pace) as journal:

        def on_log(step: int, metrics: dict[str, float], averaged: Preconditioned) -> None:
            journal.read(step, metrics, averaged)
            tell({"step": step, **metrics})

        def on_score(step: int, averaged: Preconditioned) -> bool:
            journal.score(score_and_keep(settings, run, step, averaged))
            return has_ended(settings.stop, scores_by_step(run), step)

        if rank == 0 and settings.stop.patience and settings.init_from and not steps_done(run):
            on_score(0, model.to(device).eval())  # a start that nothing betters is kept
        train(
            model,
            patches,
            recipe_of(settings),
            run / CHECKPOINTS,
            Callbacks(on_log=on_log, on_score=on_score, average=average),
            objective=objective_of(settings),
            rank=rank,
            num_workers=num_workers,
            device=device,
        )


class Pace:
    """Throughput against the roof: a bfloat16 (or float32) matrix product on the same device.

    Attributes:
        flop_per_pixel: of a training step: three evaluations' worth.
        peak: FLOP/s of all workers together, if each has a device as this one's.
        device: torch device.
    """

    def __init__(
        self, settings: TrainSettings, model: Preconditioned, device: str, num_workers: int
    ) -> None:
        from diffusion_core.training.throughput import (
            TRAINING_PASSES,
            flop_per_pixel,
            measured_peak,
        )

        self.flop_per_pixel = TRAINING_PASSES * flop_per_pixel(model)
        self.peak = num_workers * measured_peak(device, bfloat16=settings.dtype == "bfloat16")
        self.device = device

    def of(self, metrics: dict[str, float]) -> dict[str, float]:
        """Operations a second, and their share of the roof."""
        rate = metrics["megapixels_per_s"] * 1e6 * self.flop_per_pixel
        return {"teraflop_per_s": rate / 1e12, "peak_share": rate / self.peak}


class _Journal:
    """The run's log.jsonl and its MLflow run; silent on all workers but the first, with a pace."""

    def __init__(self, settings: TrainSettings, run: Path, pace: Pace | None) -> None:
        self._settings, self._run, self._pace = settings, run, pace
        self._tracking: Any = None
        self._tracked: TrackedRun | None = None

    def __enter__(self) -> _Journal:
        if self._pace is not None:
            from flows.tracking import track_run

            self._tracking = track_run(
                "sashiko-train",
                self._settings.name,
                params={
                    **self._settings.model_dump(mode="json", exclude={"data", "output"}),
                    "peak_teraflop_per_s": round(self._pace.peak / 1e12, 4),
                    "training_flop_per_pixel": round(self._pace.flop_per_pixel),
                },
            )
            self._tracked = self._tracking.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._tracking is not None:
            self._tracking.__exit__(*error)

    def read(self, step: int, metrics: dict[str, float], averaged: Preconditioned) -> None:
        """Log one reading, and now and then a picture of what the averaged model makes of noise."""
        if self._tracked is None or self._pace is None:
            return
        metrics = {**metrics, **self._pace.of(metrics)}
        with (self._run / LOG).open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._tracked.log_metrics({**metrics, **system_metrics(self._run, self._pace.device)}, step)
        if isinstance(self._settings, DistillSettings):  # its network is no denoiser
            return
        every = self._settings.picture_every_steps
        if step // every > (step - self._settings.log_every_steps) // every:
            picture = sample_picture(self._settings, averaged)
            if picture is not None:
                self._tracked.log_picture(f"pictures/step-{step:07d}.png", picture)

    def score(self, entry: dict[str, Any]) -> None:
        """Log a restoration score, which its own file holds already."""
        if self._tracked is not None:
            parts = {f"score/{name}": db for name, db in entry["parts"].items()}
            figures = {"score_db": entry["score_db"], "score_s": entry["seconds"]}
            self._tracked.log_metrics({**figures, **parts}, entry["step"])


def sample_picture(
    settings: TrainSettings, averaged: Preconditioned
) -> np.ndarray[Any, Any] | None:
    """Validation patches clean, noisy and denoised: a row a condition, uint8 (h w 3).

    None where there is no validation image. The crops are the centres of each condition's first
    one, the noise is keyed: two pictures of one run differ by the network alone.
    """
    import numpy as np
    import torch

    from diffusion_core.networks.precond import ConditionedDenoiser
    from diffusion_core.noise.streams import training_noise
    from flows.training.validation import validation_images, without_holes

    rows = []
    shown = without_holes(averaged, validation_images(settings, 1, 128))
    for index, images in enumerate(shown.values()):
        if not images:
            continue
        x0 = images[0]
        denoise = ConditionedDenoiser(averaged, index, x0.shape[1])
        x = x0 + 0.4 * training_noise(0, index, x0)
        with torch.no_grad():
            D_x = denoise(x, torch.full((1,), 0.4))
        rows.append(np.concatenate([_as_rgb(part[0].numpy()) for part in (x0, x, D_x)], axis=1))
    if not rows:
        return None
    side = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(r, ((0, 0), (0, side - r.shape[1]), (0, 0))) for r in rows])


def _as_rgb(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(c h w) in network units to uint8 (h w 3); of a complex image the magnitude."""
    import numpy as np

    if image.shape[0] == 2:
        image = 2 * np.linalg.norm(image, axis=0, keepdims=True) - 1
    grey = np.clip((image + 1) * 127.5, 0, 255).astype(np.uint8)
    return (
        np.repeat(grey, 3, axis=0).transpose(1, 2, 0) if len(grey) == 1 else grey.transpose(1, 2, 0)
    )
