"""When a training ends early: a function of its restoration scores alone, so that any run agrees.

A run that was killed and goes on scores the same steps alike, and ends at the same one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from flows.config import StopSettings
from flows.training.run_folder import SCORES


def has_ended(stop: StopSettings, scores: Mapping[int, float], step: int) -> bool:
    """Whether, up to `step`, so many scores in a row as `patience` says gained nothing.

    Args:
        stop: patience 0 never ends a training.
        scores: in dB by step; what lies beyond `step` is not looked at.
        step: that the run is at.
    """
    if not stop.patience:
        return False
    best, without_gain = float("-inf"), 0
    for _, db in sorted((at, db) for at, db in scores.items() if at <= step):
        gained = db > best + stop.min_gain_db
        best, without_gain = (db, 0) if gained else (best, without_gain + 1)
        if without_gain == stop.patience:
            return True
    return False


def scores_by_step(run: Path) -> dict[int, float]:
    """The score of every step of a run; the newest, where a resumed run scored it again."""
    path = run / SCORES
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["step"]: entry["score_db"] for entry in map(json.loads, lines)}
