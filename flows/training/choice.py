"""Which averaged weights are shipped: the newest, the best seen, or an average of another length.

best/step-000004000/ema.safetensors, score.json     the best of the run's scores so far
snapshots/step-.../                                 see diffusion_core/training/power.py
scores.jsonl                                        every score: step, dB, its parts, seconds
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.api_train import new_network
from flows.config import TrainSettings
from flows.training.run_folder import BEST, CHECKPOINTS, SCORES, SNAPSHOTS, steps_done
from flows.training.score import Score, restoration_score

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_core.networks.precond import Preconditioned

Weights = Callable[[], "dict[str, Tensor]"]


@dataclass(frozen=True)
class Choice:
    """The averaged weights that were chosen.

    Attributes:
        step: steps done in all.
        module: the network with these weights, plain ones, in evaluation mode.
        trained: the same as it was trained: with low-rank corrections, told of missing pixels.
        name: "newest", "best-step-4000" or "length-0.05".
        scores: restoration score in dB of every candidate; empty if there was but one.
    """

    step: int
    module: Preconditioned
    trained: Preconditioned
    name: str = "newest"
    scores: dict[str, float] = field(default_factory=dict)


def chosen_average(
    settings: TrainSettings, run: Path, tell: Callable[[str], None] = lambda _: None
) -> Choice:
    """The candidate of the highest restoration score; the newest average if there is no other.

    Args:
        settings: of the run.
        run: its folder.
        tell: told of every score.

    Raises:
        FileNotFoundError: if the run has no checkpoint yet.
    """
    from diffusion_core.networks.low_rank import merged

    step = steps_done(run)
    candidates = dict(_candidates(settings, run, step))
    module = new_network(settings).eval().requires_grad_(requires_grad=False)
    if len(candidates) == 1:
        module.load_state_dict(candidates["newest"]())
        return Choice(step, merged(module), module)
    scores: dict[str, float] = {}
    for name, weights in candidates.items():
        module.load_state_dict(weights())
        scores[name] = restoration_score(settings, module).db
        tell(f"{name}: {scores[name]:.3f} dB restored")
    best = max(scores, key=lambda name: scores[name])
    module.load_state_dict(candidates[best]())
    told = {name: round(db, 4) for name, db in scores.items()}
    return Choice(step, merged(module), module, best, told)


def _candidates(settings: TrainSettings, run: Path, step: int) -> Iterator[tuple[str, Weights]]:
    """(name, what reads its weights); the newest first, so that it wins a tie."""
    from safetensors.torch import load_file

    from diffusion_core.training.files import folders_by_step
    from diffusion_core.training.power import reconstruct

    newest = _newest(run)
    yield "newest", lambda: load_file(newest / "ema.safetensors")
    if not settings.score.decides:
        return
    if settings.score.every_steps:
        for when, folder in folders_by_step(run / BEST):
            if when != step:
                yield f"best-step-{when}", lambda f=folder: load_file(f / "ema.safetensors")  # type: ignore[misc]
    if settings.ema_snapshots:
        for length in settings.ema_lengths:
            yield (
                f"length-{length:g}",
                lambda one=length: reconstruct(run / SNAPSHOTS, one, step),  # type: ignore[misc]
            )


def score_and_keep(
    settings: TrainSettings, run: Path, step: int, module: Preconditioned
) -> dict[str, Any]:
    """Score averaged weights in mid-run, and keep them if they are the best so far.

    Returns:
        What was written to scores.jsonl: step, score_db, parts, seconds.
    """
    begin = time.monotonic()
    score = restoration_score(settings, module)
    _keep_if_best(settings, run / BEST, step, score, module)
    entry = {
        "step": step,
        "score_db": score.db,
        "parts": score.parts,
        "seconds": time.monotonic() - begin,
    }
    with (run / SCORES).open("a") as file:
        file.write(json.dumps(entry) + "\n")
    return entry


def _keep_if_best(
    settings: TrainSettings, folder: Path, step: int, score: Score, module: Preconditioned
) -> None:
    from safetensors.torch import save_file

    from diffusion_core.training.files import (
        folders_by_step,
        publish,
        staging_for,
        step_folder,
    )

    how = settings.score.model_dump(exclude={"every_steps", "decides"})
    before = [(path, json.loads((path / "score.json").read_text()))
              for _, path in folders_by_step(folder)]  # fmt: skip
    # A best that was scored otherwise is not comparable: it gives way.
    if any(kept["db"] >= score.db and kept["how"] == how for _, kept in before):
        return
    final = step_folder(folder, step)
    staging = staging_for(final)
    weights = {k: v.contiguous().cpu() for k, v in module.state_dict().items()}
    save_file(weights, staging / "ema.safetensors")
    (staging / "score.json").write_text(json.dumps({"db": score.db, "how": how}))
    publish(staging, final)
    for path, _ in before:
        if path != final:
            shutil.rmtree(path)


def _newest(run: Path) -> Path:
    from diffusion_core.training.checkpoint import latest_checkpoint

    found = latest_checkpoint(run / CHECKPOINTS)
    if found is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet: train first")
    return found
