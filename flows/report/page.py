"""Results to one HTML page: what stands where, in words and figures ready for the template.

The page is a single file that fetches nothing: style, script and pictures are inside it, and its
own content security policy forbids the rest. It reads without its script, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import Array, Task
from flows.report.cases import Case
from flows.report.describe import (
    COLUMNS,
    MINUS,
    TIMES,
    domain_title,
    measurement_words,
    method_gloss,
    method_label,
    noun,
    task_title,
)
from flows.report.explained import section
from flows.report.pictures import (
    ErrorScale,
    Window,
    absolute_error,
    as_it_lies,
    data_uri,
    encode,
    error_scale,
    inferno,
    windows_for,
)
from flows.report.rows import (
    OURS,
    MethodSummary,
    Row,
    TaskSummary,
    figure,
    main_metric,
)

if TYPE_CHECKING:
    from flows.explaining import Explained
    from flows.report.clips import Clip

HERE = Path(__file__).parent
_CLIP_QUALITY = 80
MISSING = (38, 46, 92)  # colour of pixels that were not measured
ROW_FIGURES = ("psnr", "psnr_hole", "psnr_body", "ssim", "ssim_body", "edge_error",
               "z_gradient_error", "residual", "nfe", "num_operator_calls", "seconds",
               "peak_bytes")  # fmt: skip


@dataclass(frozen=True)
class TaskStory:
    """All that the page says of one task."""

    task: Task
    summary: TaskSummary
    rows: Sequence[Row]
    cases: Sequence[Case] = ()
    explained: Sequence[Explained] = ()
    clip: Clip | None = None


@dataclass(frozen=True)
class ModelFacts:
    """Which model restored, for a page that must account for it.

    Attributes:
        name: as given: "starter", "sashiko-ct" ...
        digest: sha256 over the model directory.
        version: in the registry, "" outside it.
        card: the model card, Markdown.
        files: file name -> sha256.
    """

    name: str
    digest: str
    version: str = ""
    card: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """All that the page says.

    Attributes:
        title: its heading.
        stories: one a task.
        models: the models that restored.
        facts: (name, value) of the provenance table.
        notes: (head, text) beside the ones of the template.
    """

    title: str
    stories: Sequence[TaskStory]
    models: Sequence[ModelFacts] = ()
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[tuple[str, str]] = field(default_factory=list)


def render(page: Page, quality: tuple[int | None, int | None] = (None, 92)) -> str:
    """The page as HTML.

    Args:
        page: what to say.
        quality: WebP quality of grey and of colour pictures; None: lossless.
    """
    from markupsafe import Markup

    stories = [_task(story, quality) for story in page.stories]
    return rendered(
        "page.html",
        title=page.title,
        lede=_lede(page),
        caveat=_caveat(page),
        tasks=stories,
        gradient=_gradient(),
        models=[_model(m) for m in page.models],
        facts=page.facts,
        encoding=_encoding_words(quality),
        notes=page.notes,
        js=Markup((HERE / "page.js").read_text()),
    )


def rendered(template: str, **values: Any) -> str:
    """A template of this folder, with the style of all pages."""
    from markupsafe import Markup

    style = Markup((HERE / "page.css").read_text())
    return str(_environment().get_template(template).render(css=style, **values))


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(HERE)
    return Environment(autoescape=True, undefined=StrictUndefined, loader=loader)


def _task(story: TaskStory, quality: tuple[int | None, int | None]) -> dict[str, Any]:
    """A task for the template."""
    summary, best = story.summary, story.summary.methods[0]
    ours, classical = summary.ours, summary.best_classical
    low, high = _range(summary)
    errors = _error_scale(story.cases)
    columns = _columns(summary)
    return {
        "name": summary.task,
        "title": task_title(story.task),
        "domain_title": domain_title(summary.domain),
        "measurement": measurement_words(story.task),
        "population": _population(summary, story.rows),
        "where": " (missing pixels)" if summary.metric == "psnr_hole" else "",
        "gain": None if ours is None else ours.gain_db,
        "ours_figure": _mean(ours, summary.metric),
        "ours_nfe": _mean(ours, "nfe"),
        "classical_figure": _mean(classical, summary.metric),
        "classical_label": method_label(classical.method) if classical else "",
        "best_label": method_label(best.method),
        "best_figure": _mean(best, summary.metric),
        "noun": noun(summary.domain),
        "count": _count(max(m.num_rows for m in summary.methods), noun(summary.domain)),
        "columns": [dict(zip(("name", "unit", "gloss"), COLUMNS[c], strict=True)) for c in columns],
        "methods": [_method(m, summary, columns) for m in summary.methods],
        "low": low,
        "high": high,
        "cases": [_case(case, errors, quality) for case in story.cases],
        "explained": [section(one) for one in story.explained],
        "clip": None if story.clip is None else _clip(story.clip, quality[1]),
        "windows": _windows(story.cases[0]) if story.cases else [],
        "error_words": f"Errors are shown {TIMES}{errors.gain:.3g} against that range."
        if errors
        else "",
        "row_head": ["item", "slice", "method", *(COLUMNS[c][0] for c in _present(story.rows))],
        "rows": [_row(row, _present(story.rows)) for row in story.rows],
    }


def _method(method: MethodSummary, summary: TaskSummary, columns: Sequence[str]) -> dict[str, Any]:
    """A line of the table of figures."""
    kind = "ours" if method.method in OURS else ("classical" if method.classical else "diffusion")
    return {
        "label": method_label(method.method),
        "gloss": method_gloss(method.method),
        "kind": kind,
        "kind_label": {"ours": "ours", "classical": "classical", "diffusion": "diffusion"}[kind],
        "cells": [_cell(method, key, summary) for key in columns],
        "points": list(method.values.values()),
        "mean": method.means.get(summary.metric, math.nan),
    }


def _cell(method: MethodSummary, key: str, summary: TaskSummary) -> dict[str, Any]:
    if key == "gain_db":
        gain = method.gain_db
        text = "" if gain is None else f"{gain:+.2f}".replace("-", MINUS)
        return {"text": text, "best": False, "tone": "" if not gain else _tone(gain)}
    best = method.method in summary.best.get(key, ())
    text = figure(key, method.means.get(key))
    if key == summary.metric and method.num_rows > 1 and text:
        text += f" ± {method.spread:.1f}"
    return {"text": text, "best": best, "tone": ""}


def _tone(gain: float) -> str:
    return "up" if gain > 0 else "down"


def _columns(summary: TaskSummary) -> list[str]:
    """The columns of the table: the main figure first, its gain, then what any method has."""
    known = {key for method in summary.methods for key in method.means}
    order = (summary.metric, "gain_db", "psnr", "psnr_hole", "psnr_body", "ssim", "edge_error",
             "z_gradient_error", "residual", "nfe", "seconds", "peak_bytes")  # fmt: skip
    return [key for key in dict.fromkeys(order) if key == "gain_db" or key in known]


def _present(rows: Sequence[Row]) -> list[str]:
    return [key for key in ROW_FIGURES if any(row.get(key) is not None for row in rows)]


def _row(row: Row, keys: Sequence[str]) -> list[str]:
    return [row["item"], str(row["slice"]), row["method"], *(figure(k, row.get(k)) for k in keys)]


def _range(summary: TaskSummary) -> tuple[float, float]:
    """Whole dB that enclose every slice of every method."""
    values = [v for m in summary.methods for v in m.values.values() if math.isfinite(v)]
    if not values:
        return 0.0, 1.0
    return math.floor(min(values)), math.floor(max(values)) + 1


def _case(
    case: Case, errors: ErrorScale | None, quality: tuple[int | None, int | None]
) -> dict[str, Any]:
    """A slice for the template, its pictures encoded."""
    windows = windows_for(case.truth, case.record, case.scale)
    height, width = as_it_lies(case.truth[0], case.record).shape
    return {
        "label": case_label(case),
        "why": case.why,
        "width": width,
        "height": height,
        "pictures": [
            {
                "role": role,
                "name": name,
                "figures": figures,
                "sources": [
                    encode(as_it_lies(p, case.record), quality[p.ndim == 3]) for p in shown
                ],
            }
            for role, name, figures, shown in _shown(case, windows, errors)
        ],
        "window_words": windows[0].label,
        "error_full": errors.end_label(case.scale[1], case.record.units) if errors else "",
        "figures": _case_figures(case),
    }


def _clip(clip: Clip, quality: int | None) -> dict[str, Any]:
    """A clip for the template."""
    width, height = clip.size
    encoded = clip.encode(min(quality or _CLIP_QUALITY, _CLIP_QUALITY))
    return {
        "source": data_uri(encoded),
        "width": width,
        "height": height,
        "names": clip.names,
        "first": clip.first,
        "last": clip.last,
        "count": len(clip.frames),
    }


def _shown(
    case: Case, windows: Sequence[Window], errors: ErrorScale | None
) -> list[tuple[str, str, str, list[Array]]]:
    """(role, name, figures, pictures a window) of a case, in reading order."""
    shown = [
        ("truth", "Truth", "", [w.show(case.truth) for w in windows]),
        ("view", f"Measured: {case.view.label}", "", [show_view(case, w) for w in windows]),
    ]
    for method, pixels in case.restored.items():
        role = "ours" if method in OURS else "classical"
        pictures = [w.show(pixels) for w in windows]
        shown.append((role, picture_name(method), picture_figures(case, method), pictures))
    for method, pixels in case.restored.items():
        role = "error-ours" if method in OURS else "error-classical"
        if errors is not None:
            error_map = [errors.show(case.truth, pixels, case.scale[1])]
            shown.append((role, f"Error of {method_label(method)}", "", error_map))
    return shown


def picture_name(method: str) -> str:
    """How a restored picture is captioned."""
    return (
        f"{method_label(method)} (ours)"
        if method in OURS
        else f"{method_label(method)} (best classical)"
    )


def picture_figures(case: Case, method: str) -> str:
    """The figures under a restored picture."""
    row = case.rows.get(method, {})
    hole = row.get("psnr_hole") is not None and main_metric([row]) == "psnr_hole"
    key = "psnr_hole" if hole else "psnr"
    where = " in the hole" if hole else ""
    return f"{figure(key, row.get(key))} dB{where}, SSIM {figure('ssim', row.get('ssim'))}"


def show_view(case: Case, window: Window) -> Array:
    """The measurement as a picture, pixels that were not measured in one flat colour."""
    picture = window.show(case.view.pixels)
    if case.view.missing is None:
        return picture
    colour = np.stack([picture] * 3, axis=-1) if picture.ndim == 2 else picture.copy()
    colour[case.view.missing] = MISSING
    return colour


def case_label(case: Case) -> str:
    """Name of an image: its item, and the source's number of the slice or frame if it has any."""
    numbers = case.record.meta.get("slices")
    if not numbers:
        return case.item
    word = "frame" if noun(case.record.domain) == "picture" else "slice"
    return f"{case.item}, {word} {numbers[0]}"


def _case_figures(case: Case) -> list[tuple[str, str]]:
    """PSNR of every method on this very slice, best first."""
    rows = case.rows.values()
    key = main_metric(list(rows))
    known = sorted(((r[key], r["method"]) for r in rows if r.get(key) is not None), reverse=True)
    return [(method_label(method), f"{figure(key, value)} dB") for value, method in known]


def _error_scale(cases: Sequence[Case]) -> ErrorScale | None:
    """One scale of errors for all cases of a task, set by the first method shown of each."""
    firsts = [(c, next(iter(c.restored.values()))) for c in cases if c.restored]
    if not firsts:
        return None
    return error_scale([absolute_error(c.truth, pixels) * c.scale[1] for c, pixels in firsts])


def _windows(case: Case) -> list[str]:
    return [w.label for w in windows_for(case.truth, case.record, case.scale)]


def _gradient() -> str:
    colours = inferno(np.linspace(0, 1, 9))
    return "linear-gradient(90deg, " + ", ".join(f"rgb({r},{g},{b})" for r, g, b in colours) + ")"


def _mean(method: MethodSummary | None, key: str) -> str:
    return "" if method is None else figure(key, method.means.get(key))


def _model(model: ModelFacts) -> Mapping[str, Any]:
    return {
        "name": model.name,
        "version": model.version,
        "digest": model.digest,
        "card": _markdown(model.card),
        "files": model.files,
    }


def _markdown(text: str) -> Any:
    """Markdown as safe HTML: raw HTML, links and pictures stay text."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    if not text:
        return ""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link"])
    return Markup(parser.render(text))  # the parser escapes


def _lede(page: Page) -> str:
    rows = [row for story in page.stories for row in story.rows]
    images = len({(row["item"], row["slice"]) for row in rows})
    return (
        f"{_count(images, 'image')}, measured and restored in "
        f"{_count(len(page.stories), 'task')} by "
        f"{_count(len({row['method'] for row in rows}), 'method')}, "
        f"held against the truth: {_count(len(rows), 'result')}."
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _population(summary: TaskSummary, rows: Sequence[Row]) -> str:
    images = _count(len({(row["item"], row["slice"]) for row in rows}), noun(summary.domain))
    group = "patient" if noun(summary.domain) == "slice" else "scene"
    if summary.num_groups == 1:
        return f"{images} of one {group}: figures are within-{group}."
    return f"{images} of {_count(summary.num_groups, group)}."


def _caveat(page: Page) -> str:
    lone = [s.summary.domain for s in page.stories if s.summary.num_groups == 1]
    gains = "Gains are means, against the best classical method of each task, kriging included."
    if not lone:
        return gains
    names = " and ".join(dict.fromkeys(domain_title(d).lower() for d in lone))
    return (
        f"{gains} Within-patient only: {names} had one patient or scene to test on, so the spread "
        "there is over slices and says nothing about other people, scanners or cities."
    )


def _encoding_words(quality: tuple[int | None, int | None]) -> str:
    grey, colour = ("lossless" if q is None else f"quality {q}" for q in quality)
    return f"as WebP (grey {grey}, colour and error maps {colour})"
