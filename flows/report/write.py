"""Write a report: index.html, which needs nothing beside it, and pictures/ for a README."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from domains.base import Array
from domains.registry import load_domain
from flows.config import load_task
from flows.report.cases import Case, CaseReader, choose
from flows.report.clips import make_clip, neighbours
from flows.report.explained import picture_files
from flows.report.page import (
    ModelFacts,
    Page,
    TaskStory,
    case_label,
    picture_figures,
    picture_name,
    render,
    show_view,
)
from flows.report.pictures import as_it_lies, busiest_window, figure_strip, windows_for
from flows.report.rows import Row, TaskSummary, summarise

if TYPE_CHECKING:
    from flows.api_evaluate import EvaluateResult

MAX_BYTES = 15 * 10**6
_QUALITIES: Sequence[tuple[int | None, int | None]] = ((None, 92), (90, 85), (75, 70), (50, 45))


def write_report(
    results: EvaluateResult | Sequence[EvaluateResult],
    path: Path,
    *,
    title: str = "Sashiko restoration report",
    notes: Sequence[tuple[str, str]] = (),
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write the report of one or several evaluations.

    Args:
        results: of flows.api_evaluate; their stores are read again for the pictures.
        path: folder of the report; made if missing. index.html and pictures/ in it are replaced.
        title: heading of the page.
        notes: (head, text) beside the standing ones.
        max_bytes: pictures are compressed harder until the page is smaller than this.

    Returns:
        Path of index.html.

    Raises:
        BadInputError: if a store cannot be read any more.
    """
    results = results if isinstance(results, Sequence) else [results]
    stories = [story for result in results for story in stories_of(result)]
    page = Page(title, stories, _models(results), _facts(results), notes)
    path.mkdir(parents=True, exist_ok=True)
    for name, strip in (*strips(stories), *_explained_pictures(stories)):
        save_png(path / "pictures" / f"{name}.png", strip)
    for story in stories:
        if story.clip is not None:
            clip = path / "pictures" / f"{story.summary.task}.webp"
            write_whole(clip, story.clip.encode())
    html = ""
    for quality in _QUALITIES:
        html = render(page, quality)
        if len(html.encode()) <= max_bytes:
            break
    write_whole(path / "index.html", html.encode())
    return path / "index.html"


def stories_of(result: EvaluateResult) -> list[TaskStory]:
    """Read what the page shows of an evaluation, task by task."""
    return [_story(result, summary) for summary in summarise(result.rows)]


def _story(result: EvaluateResult, summary: TaskSummary) -> TaskStory:
    from flows.engine.restored import open_restored
    from flows.store import Dataset, Measurements

    task = load_task(summary.task)
    rows = [row for row in result.rows if row["task"] == summary.task]
    reader = CaseReader(
        summary,
        rows,
        domain=load_domain(summary.domain),
        truth=Dataset(result.dataset),
        measurements=Measurements(result.measurements),
        restored=open_restored(result.output),
        keys=result.keys,
        view_method=task.baselines[0] if task.baselines else None,
    )
    cases = [reader.read(key, why) for key, why in choose(summary, rows)]
    explained = [one for one in result.explained if one.task == summary.task]
    clip = make_clip(reader.read(key) for key in neighbours(summary, rows))
    return TaskStory(task, summary, rows, cases, explained, clip)


def strips(stories: Sequence[TaskStory]) -> Iterator[tuple[str, Array]]:
    """One labelled strip a task: truth, measured, best classical and ours, with a detail below.

    Of the cases the one of median gain is taken, or the first where all are shown.
    """
    for story in stories:
        if story.cases:
            median = (case for case in story.cases if case.why.startswith("median"))
            yield story.summary.task, case_strip(next(median, story.cases[0]))


def _explained_pictures(stories: Sequence[TaskStory]) -> Iterator[tuple[str, Array]]:
    """The pictures of what was explained."""
    for story in stories:
        for one in story.explained:
            yield from picture_files(one)


def case_strip(case: Case) -> Array:
    """The strip of one case, uint8 (h, w, 3)."""
    window = windows_for(case.truth, case.record, case.scale)[0]
    truth = window.show(case.truth)
    tiles = [
        ("Truth", case_label(case), truth),
        ("Measured", case.view.label, show_view(case, window)),
    ]
    for method, pixels in case.restored.items():
        tiles.append((picture_name(method), picture_figures(case, method), window.show(pixels)))
    lying = [(name, line, as_it_lies(picture, case.record)) for name, line, picture in tiles]
    return figure_strip(lying, detail=busiest_window(lying[0][2]))


def _models(results: Sequence[EvaluateResult]) -> list[ModelFacts]:
    """The models of several evaluations, each once."""
    known = {r.model.digest: r.model for r in results if r.model is not None}
    return list(known.values())


def _facts(results: Sequence[EvaluateResult]) -> list[tuple[str, str]]:
    """Provenance of all results; what they share is said once."""
    merged: dict[str, list[str]] = {}
    for result in results:
        for name, value in result.facts.items():
            if value not in merged.setdefault(name, []):
                merged[name].append(value)
    return [(name, "; ".join(values)) for name, values in merged.items()]


def model_facts(path: Path, name: str, digest: str, version: str) -> ModelFacts:
    """What the page says of a model directory; its files were checked when it was resolved."""
    from diffusion_core.model import CARD, DIGESTS

    card, digests = path / CARD, path / DIGESTS
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    files: Mapping[str, str] = json.loads(digests.read_text()) if digests.is_file() else {}
    return ModelFacts(name, digest, version, text, files)


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as a JSON list, whole or not at all."""
    write_whole(path, (json.dumps(list(rows), indent=1, allow_nan=False) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def save_png(path: Path, picture: Array) -> None:
    """Write a uint8 picture (h, w) or (h, w, 3) as PNG; it appears whole."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png", optimize=True)
    write_whole(path, buffer.getvalue())
