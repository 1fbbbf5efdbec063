"""Rows of results, and what they add up to: means by task and method, gains, the best classical.

A row is one slice of one item restored by one method: a flat, JSON-able dict (flows.api_evaluate
says how each figure is made). A method that never calls the network is *classical*: the
baselines, and kriging. Gains are taken against the best classical method of the same task, the
one with the highest mean; that is a choice in favour of the classical side, made with the truth
in hand, so the gain is never flattered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

Row = dict[str, Any]

OURS = frozenset({"covprox", "distilled"})
"""Our own solvers, that of the models and that of their students."""
METRICS = ("psnr", "psnr_hole", "psnr_body", "ssim", "ssim_body", "edge_error",
           "z_gradient_error", "residual")  # fmt: skip
COSTS = ("nfe", "num_operator_calls", "seconds", "peak_bytes")
LOWER_IS_BETTER = frozenset({"edge_error", "z_gradient_error", "seconds", "peak_bytes"})


@dataclass(frozen=True)
class MethodSummary:
    """One method on one task.

    Attributes:
        method: its name.
        classical: it made no call of the network.
        num_rows: slices counted.
        means: metric or cost -> mean over the rows that have it.
        spread: population standard deviation over the rows of the task's main metric.
        gain_db: mean of the main metric above the best classical method's; None for classical.
        values: main metric by row key (item, slice), for paired views.
    """

    method: str
    classical: bool
    num_rows: int
    means: dict[str, float]
    spread: float
    gain_db: float | None
    values: dict[tuple[str, int], float]


@dataclass(frozen=True)
class TaskSummary:
    """All methods on one task, best first.

    Attributes:
        domain: name of the domain.
        task: name of the task.
        metric: the figure that ranks: "psnr", or "psnr_hole" where the task looks at the hole.
        methods: summaries, highest mean of `metric` first.
        best: metric -> names of the methods with the best mean, as far as it is printed.
        num_groups: patients or scenes behind the rows.
    """

    domain: str
    task: str
    metric: str
    methods: tuple[MethodSummary, ...]
    best: dict[str, frozenset[str]]
    num_groups: int = 0

    @property
    def best_classical(self) -> MethodSummary | None:
        """The classical method with the highest mean; None if none was run."""
        return next((m for m in self.methods if m.classical), None)

    @property
    def ours(self) -> MethodSummary | None:
        """The summary of our own solver, the better one of two; None if it was not run."""
        return next((m for m in self.methods if m.method in OURS), None)


def summarise(rows: Iterable[Row]) -> list[TaskSummary]:
    """Add rows up by task, in the order in which domains and tasks first appear."""
    by_task: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_task.setdefault((row["domain"], row["task"]), []).append(row)
    return [_summarise_task(*key, part) for key, part in by_task.items()]


def main_metric(rows: Sequence[Row]) -> str:
    """The figure that ranks a task: that of the hole where the rows say so, else of the image."""
    return "psnr_hole" if any(row.get("region") == "hole" for row in rows) else "psnr"


def _summarise_task(domain: str, task: str, rows: Sequence[Row]) -> TaskSummary:
    metric = main_metric(rows)
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    plain = [_summarise_method(name, part, metric) for name, part in by_method.items()]
    plain.sort(key=lambda m: -m.means.get(metric, -math.inf))
    bar = next((m.means[metric] for m in plain if m.classical and metric in m.means), None)
    methods = tuple(_with_gain(m, metric, bar) for m in plain)
    groups = {row.get("group") or row["item"] for row in rows}
    return TaskSummary(domain, task, metric, methods, _best(methods), len(groups))


def _summarise_method(name: str, rows: Sequence[Row], metric: str) -> MethodSummary:
    means = {}
    for key in (*METRICS, *COSTS):
        known = [row[key] for row in rows if row.get(key) is not None]
        if known:
            means[key] = fmean(known)
    values = {
        (row["item"], row["slice"]): row[metric] for row in rows if row.get(metric) is not None
    }
    spread = pstdev(values.values()) if values else 0.0
    classical = all(row["nfe"] == 0 for row in rows)
    return MethodSummary(name, classical, len(rows), means, spread, None, values)


def _with_gain(method: MethodSummary, metric: str, bar: float | None) -> MethodSummary:
    if method.classical or bar is None or metric not in method.means:
        return method
    gain = method.means[metric] - bar
    return MethodSummary(**{**method.__dict__, "gain_db": gain})


def _best(methods: Sequence[MethodSummary]) -> dict[str, frozenset[str]]:
    """The best methods by metric; figures that print alike share the honour."""
    best = {}
    for key in METRICS:
        if key == "residual":  # about 1 is right; neither end is best
            continue
        known = {m.method: figure(key, m.means[key]) for m in methods if key in m.means}
        if known:
            pick = min if key in LOWER_IS_BETTER else max
            top = pick(known.values(), key=float)
            best[key] = frozenset(name for name, shown in known.items() if shown == top)
    return best


def figure(key: str, value: float | None) -> str:
    """A figure as it is printed everywhere: dB to .01, SSIM to .001, edge error to .0001."""
    if value is None or not math.isfinite(value):
        return ""
    if key.startswith("psnr") or key == "gain_db":
        return f"{value:.2f}"
    if key.startswith("ssim"):
        return f"{value:.3f}"
    if key.endswith("_error"):
        return f"{value:.4f}"
    if key == "peak_bytes":
        return f"{value / 2**20:.0f}"
    if key in {"nfe", "num_operator_calls"}:
        return f"{value:.0f}"
    if key == "seconds":
        return f"{value:.2g}" if value < 10 else f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
