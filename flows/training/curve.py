"""What training gained: the restoration score against megapixels seen and hours spent.

A model that began with another's weights goes on with that model's curve, if both were scored
alike; otherwise its curve begins with the score of those weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.api_train import new_network
from flows.config import TrainSettings
from flows.training.run_folder import LOG
from flows.training.score import restoration_score
from flows.training.sources import open_sources
from flows.training.stopping import scores_by_step

if TYPE_CHECKING:
    from flows.training.choice import Choice


def training_curve(settings: TrainSettings, run: Path, chosen: Choice) -> dict[str, Any]:
    """The curve of a run that is over, scored in mid-run (`score.every_steps`).

    Returns:
        {"how": what the scores depend on, "points": [{"megapixels", "hours", "score_db"}, ...]},
        the last point being the chosen weights; {} if the run was not scored.
    """
    if not settings.score.every_steps:
        return {}
    how = {
        "score": settings.score.model_dump(mode="json", exclude={"every_steps", "decides"}),
        "conditions": sorted(settings.conditions),
        "data": [source.digest for source in open_sources(settings)],
    }
    points = _points_before(settings, how)
    seen, spent = (points[-1]["megapixels"], points[-1]["hours"]) if points else (0.0, 0.0)
    hours = hours_by_step(settings, run)

    def point(step: int, score_db: float) -> dict[str, float]:
        return {
            "megapixels": round(seen + megapixels(settings, step), 4),
            "hours": round(spent + hours_until(hours, step), 6),
            "score_db": round(score_db, 3),
        }

    points += [point(step, db) for step, db in sorted(scores_by_step(run).items()) if step]
    module = chosen.module
    last = point(chosen.step, restoration_score(settings, module).db)
    return {
        "how": how,
        "points": [p for p in points if p["megapixels"] < last["megapixels"]] + [last],
    }


def _points_before(settings: TrainSettings, how: dict[str, Any]) -> list[dict[str, float]]:
    """The curve of the model that the run began with, or the score of its weights."""
    if settings.init_from is None:
        return []
    config = json.loads((settings.init_from / "config.json").read_text())
    earlier: dict[str, Any] = config.get("curve") or {}
    if earlier.get("how") == how:
        return list(earlier["points"])
    module = new_network(settings).eval().requires_grad_(requires_grad=False)
    score = restoration_score(settings, module).db
    return [{"megapixels": 0.0, "hours": 0.0, "score_db": round(score, 3)}]


def hours_until(hours: Mapping[int, float], step: int) -> float:
    """Hours at the last reading up to a step (see hours_by_step); 0 before the first."""
    return max((spent for reading, spent in hours.items() if reading <= step), default=0.0)


def hours_by_step(settings: TrainSettings, run: Path) -> dict[int, float]:
    """Hours of training up to every reading."""
    readings = {
        entry["step"]: entry["megapixels_per_s"]
        for entry in map(json.loads, (run / LOG).read_text().splitlines())
    }
    hours, spent, before = {}, 0.0, 0
    for step, rate in sorted(readings.items()):
        spent += megapixels(settings, step - before) / rate / 3600
        hours[step], before = spent, step
    return hours


def megapixels(settings: TrainSettings, steps: int) -> float:
    """Megapixels that so many steps see."""
    return steps * settings.batch_size * settings.patch_size**2 / 1e6
