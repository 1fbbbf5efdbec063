"""A training run's folder: which settings it holds, and whether another command may go on in it."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from domains.base import BadInputError
from flows.config import TrainSettings
from flows.training.card import started_from

SETTINGS, LOCK, LOG, SCORES = "settings.json", "lock", "log.jsonl", "scores.jsonl"
CHECKPOINTS, SNAPSHOTS, BEST = "checkpoints", "snapshots", "best"

_MAY_CHANGE = {
    "output",
    "num_threads",
    "compute",
    "checkpoint_every_s",
    "log_every_steps",
    "picture_every_steps",
    "register_as",
    "calibration_items",
    "micro_batch",
    "prefetch_threads",
    "data_memory_gb",
    "score",
    "stop",
    "ema_lengths",
    "data",
    "extra_samples",
}
"""What may differ when a run is taken up again: none of it changes what is learned. Calibration
items change the tables, which are measured anew whenever the run is finished, as score and
ema_lengths change which averaged weights are shipped and stop how many steps are taken; data is
compared by its content (below), wherever it lies."""

_NOT_COMPARED: dict[str, Any] = {**dict.fromkeys(_MAY_CHANGE, True), "corruption": {"filled_by"}}
"""The model that fills is part of the data's digests."""

_DATA, _START = "data_digests", "init_digest"
_CALLED = {_DATA: "data", _START: "init_from"}


def run_path(settings: TrainSettings) -> Path:
    """The run's folder."""
    return (settings.output / settings.name).resolve()


@contextmanager
def only_one(run: Path) -> Iterator[None]:
    """Hold a run's folder against any other command that would train it; killed or not, it ends.

    Raises:
        BadInputError: if another command trains it now, or the folder cannot be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("a")
    except OSError as error:
        raise BadInputError(
            f"{run}: cannot be written ({error.strerror}); choose another `output`"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadInputError(
                f"{run} is being trained by another command: wait for it, stop it, or give this "
                "one another name"
            ) from error
        yield


def open_run(settings: TrainSettings) -> Path:
    """The run's folder, made or found again with the same settings.

    A run binds its name from its first checkpoint on: what failed before that is overwritten, so
    that the corrected command can have the name.

    Raises:
        BadInputError: if the folder cannot be made, or holds a run that learned otherwise.
    """
    from flows.report.write import write_whole

    run = run_path(settings)
    asked = asked_of(settings)
    begun = _refuse_other(run, asked)
    try:
        write_whole(run / SETTINGS, (json.dumps(asked, indent=2) + "\n").encode())
        if not begun:
            for name in (LOG, SCORES):
                (run / name).unlink(missing_ok=True)
            for name in (SNAPSHOTS, BEST):
                shutil.rmtree(run / name, ignore_errors=True)
    except OSError as error:
        raise BadInputError(
            f"{run}: cannot be written ({error.strerror}); choose another `output`"
        ) from error
    return run


def check_run(settings: TrainSettings) -> None:
    """Refuse a name whose folder holds a run that learned otherwise, or that is training now.

    Nothing is written.

    Raises:
        BadInputError: if so.
    """
    run = run_path(settings)
    if (run / LOCK).is_file():
        with only_one(run):
            pass
    _refuse_other(run, asked_of(settings))


def steps_done(run: Path) -> int:
    """Steps of the newest checkpoint, 0 without one."""
    from diffusion_core.training.checkpoint import latest_checkpoint

    found = latest_checkpoint(run / CHECKPOINTS)
    return int(json.loads((found / "state.json").read_text())["step"]) if found else 0


def _refuse_other(run: Path, asked: dict[str, Any]) -> bool:
    """Whether a run has begun there; raises BadInputError if it learned otherwise."""
    begun = steps_done(run) > 0
    if begun and (differing := _differing(_kept(run), asked)):
        raise BadInputError(
            f"{run} holds a run with other settings ({', '.join(differing)}): "
            "give this one another name, or remove it"
        )
    return begun


def asked_of(settings: TrainSettings) -> dict[str, Any]:
    """All that the weights depend on, as JSON: settings, and digests of data and first weights."""
    from flows.training.sources import open_sources

    return {
        **settings.model_dump(mode="json", exclude=_NOT_COMPARED),
        _DATA: [source.digest for source in open_sources(settings)],
        _START: started_from(settings),
    }


def _kept(run: Path) -> dict[str, Any]:
    try:
        kept = json.loads((run / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise BadInputError(
            f"{run} holds a run whose {SETTINGS} cannot be read: "
            "give this one another name, or remove it"
        ) from error
    if not isinstance(kept, dict):
        raise BadInputError(f"{run / SETTINGS} holds no settings: remove the run")
    return kept


def _differing(kept: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Names of what differs; a field that an older run does not know has its default.

    A run from before digests were kept is taken to have had this data, and its `init_from` is
    compared as a path.
    """
    empty = TrainSettings.model_construct()  # type: ignore[call-arg]  # the fields with defaults
    defaults = empty.model_dump(mode="json")
    by_path = _START not in kept
    known = {**defaults, _DATA: asked[_DATA], **kept}
    names = (asked.keys() | kept.keys()) - _MAY_CHANGE - {_START if by_path else "init_from"}
    differing = [name for name in names if known.get(name) != asked.get(name)]
    return sorted(_CALLED.get(name, name) for name in differing)
