"""`sashiko review`: compare a candidate with the champion, and promote it if a person says so.

Both restore the same clean items under the same simulated damage; the figures are laid side by
side. Nothing is promoted without a yes, and every decision is kept as a tag of the version.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from domains.base import BadInputError
from flows import registry
from flows.config import EvaluateSettings, Home, ReviewSettings, demo_tasks
from flows.engine.events import Event, EventHandler, ignore

Asker = Callable[["Comparison"], bool | None]
"""Shows a comparison to a person; True yes, False no, None no answer in time."""

Values = Mapping[str, Mapping[tuple[str, int], float]]
"""Task -> (item, slice) -> PSNR in dB."""


@dataclass(frozen=True)
class TaskFigures:
    """One task: PSNR in dB (of the hole, where the task looks there), mean over what both restored.

    Attributes:
        task: its name.
        num_slices: that both models restored.
        candidate: PSNR of the candidate.
        champion: PSNR of the champion; None if there is none.
    """

    task: str
    num_slices: int
    candidate: float
    champion: float | None

    @property
    def gain(self) -> float | None:
        """Candidate minus champion, dB; None without a champion."""
        return None if self.champion is None else self.candidate - self.champion


@dataclass(frozen=True)
class Comparison:
    """A candidate beside the champion."""

    name: str
    candidate: str
    champion: str | None
    tasks: tuple[TaskFigures, ...]

    def sentences(self) -> str:
        """The comparison in plain lines, for a terminal, a form or a log."""
        champion = f"champion version {self.champion}" if self.champion else "no champion yet"
        lines = [f"{self.name}: candidate version {self.candidate}, {champion}"]
        for row in self.tasks:
            line = f"  {row.task}: {row.candidate:.2f} dB over {row.num_slices} slices"
            if row.gain is not None:
                line += f", champion {row.champion:.2f} dB ({row.gain:+.2f})"
            lines.append(line)
        return "\n".join(lines)


@dataclass(frozen=True)
class ReviewResult:
    """What was decided."""

    comparison: Comparison
    decision: str
    promoted: bool


def review(
    settings: ReviewSettings, on_event: EventHandler | None = None, ask: Asker | None = None
) -> ReviewResult:
    """Compare, ask unless the settings hold the answer, and promote on yes.

    Args:
        settings: what is compared, on what.
        on_event: told of progress.
        ask: shows the comparison to a person; without it and without an answer it is a no.

    Raises:
        BadInputError: if there is no such candidate, or it is champion already.
    """
    comparison = compare(settings, on_event)
    answer = None if settings.answer is None else settings.answer == "yes"
    if answer is None and ask is not None:
        answer = ask(comparison)
    return decide(comparison, answer)


def compare(settings: ReviewSettings, on_event: EventHandler | None = None) -> Comparison:
    """Evaluate the candidate and the champion on the same items.

    Raises:
        BadInputError: if there is no such candidate, or it is champion already.
    """
    on_event = on_event or ignore
    candidate, champion = contenders(settings)
    tasks = settings.tasks or _demo_tasks(settings.name)
    data = settings.input or _demo_dataset(on_event)
    figures: dict[str, Values] = {}
    for version in filter(None, (candidate, champion)):
        on_event(Event("step", 0, 0, f"evaluating {settings.name} version {version}"))
        figures[version] = _evaluate(settings, version, data, tasks, on_event)
    rows = tuple(_figures(task, figures[candidate], figures.get(champion or "")) for task in tasks)
    return Comparison(settings.name, candidate, champion, rows)


def decide(comparison: Comparison, answer: bool | None) -> ReviewResult:
    """Carry out a person's answer; None, no answer in time, means no."""
    decision = {True: "yes", False: "no", None: "no answer in time: no"}[answer]
    if answer:
        registry.promote(comparison.name, comparison.candidate)
    now = datetime.now(UTC).isoformat("T", "seconds")
    gains = {row.task: row.gain for row in comparison.tasks}
    note = {"decision": decision, "when": now, "against": comparison.champion, "gain_db": gains}
    registry.tag_version(
        comparison.name, comparison.candidate, {"sashiko.review": json.dumps(note)}
    )
    return ReviewResult(comparison, decision, promoted=bool(answer))


def contenders(settings: ReviewSettings) -> tuple[str, str | None]:
    """(candidate, champion) as versions.

    Raises:
        BadInputError: if there is no such candidate, or it is champion already.
    """
    name = settings.name
    versions = [row.version for row in registry.models() if row.name == name]
    if not versions:
        raise BadInputError(f"no model is registered as {name}: see `sashiko models`")
    candidate = settings.candidate or versions[0]
    if candidate not in versions:
        raise BadInputError(f"{name} has no version {candidate}: see `sashiko models`")
    champion = registry.champion(name)
    if candidate == champion:
        raise BadInputError(
            f"{name} version {candidate} is the champion already: name another --candidate"
        )
    return candidate, champion


def _evaluate(
    settings: ReviewSettings,
    version: str,
    data: Path,
    tasks: Sequence[str],
    on_event: EventHandler,
) -> Values:
    """PSNR of one version by task and slice."""
    from flows.api_evaluate import evaluate
    from flows.report.rows import summarise

    output = settings.output or Home().home / "reviews" / settings.name
    result = evaluate(
        EvaluateSettings(
            input=data,
            tasks=list(tasks),
            model=f"models:/{settings.name}/{version}",
            output=output,
            methods=[settings.method],
            seed=settings.seed,
            dtype=settings.dtype,
            compute=settings.compute,
        ),
        on_event=on_event,
    )
    return {summary.task: summary.methods[0].values for summary in summarise(result.rows)}


def _figures(task: str, candidate: Values, champion: Values | None) -> TaskFigures:
    """Means over what every contender restored."""
    ours, theirs = candidate.get(task, {}), None if champion is None else champion.get(task, {})
    both = [key for key in ours if theirs is None or key in theirs]
    if not both:
        raise BadInputError(f"{task}: no item was restored by both models; there is no comparing")
    return TaskFigures(
        task=task,
        num_slices=len(both),
        candidate=fmean(ours[key] for key in both),
        champion=None if theirs is None else fmean(theirs[key] for key in both),
    )


def _demo_tasks(name: str) -> list[str]:
    """The demo's tasks of the domain that a registered name serves."""
    for domain, registered in registry.MODEL_NAMES.items():
        if registered == name:
            return demo_tasks()[domain]
    raise BadInputError(f"{name} is not one of the built-in names: say --input and --task")


def _demo_dataset(on_event: EventHandler) -> Path:
    """The demo's items, ingested once."""
    from flows.api_data import ingest_samples

    path = Home().home / "datasets" / "demo.zarr"
    if not path.exists():
        ingest_samples(path, demo_only=True, on_event=on_event)
    return path
