"""The benchmark's tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.benchmarks.rows import Row, mean_of, paired, summary

METHODS = (
    "kriging",
    "covprox",
    "diffpir",
    "deepinv-diffpir",
    "diffpir-our-start",
    "dds-our-start",
    "deepinv-ddrm",
    "deepinv-dps",
)
RIVALS = ("diffpir", "deepinv-diffpir", "diffpir-our-start", "dds-our-start")


def report(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """All tables."""
    parts = [
        "PSNR in dB / SSIM, means over items:",
        quality(rows, tasks),
        "CovProx less the other, PSNR in dB: mean, (std over items), lower 90% bound of the mean:",
        differences(rows, tasks),
        "Seconds an image (idle machine):",
        seconds(rows, tasks),
    ]
    return "\n\n".join(parts) + "\n"


def quality(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """PSNR / SSIM by task and method."""
    lines = []
    for task in tasks:
        cells = []
        for method in METHODS:
            psnr, ssim = (mean_of(rows, task, method, f) for f in ("psnr", "ssim"))
            cells.append("" if math.isnan(psnr) else f"{psnr:.2f} / {ssim:.3f}")
        items = len({r["item"] for r in rows if r["task"] == task})
        lines.append([task, str(items), *cells])
    return _markdown(["task", "items", *METHODS], lines)


def differences(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Paired differences of CovProx against each rival, and their mean over tasks."""
    lines, means = [], {rival: [] for rival in RIVALS}
    for task in tasks:
        cells = []
        for rival in RIVALS:
            found = paired(rows, task, "covprox", rival)
            cells.append(
                f"{found.mean:+.2f} ({found.std:.2f}) >= {found.lower:+.2f}" if found.count else ""
            )
            if found.count:
                means[rival].append(found.mean)
        lines.append([task, *cells])
    over = [f"{summary(v).mean:+.2f}" if v else "" for v in means.values()]
    return _markdown(["task", *RIVALS], [*lines, ["mean over tasks", *over]])


def seconds(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Seconds and ratios over the items that were timed on an idle machine."""
    idle = [row for row in rows if row.get("idle")]
    names = ("covprox", "covprox-float32", "diffpir", "deepinv-diffpir")
    lines = []
    for task in tasks:
        mean = {name: mean_of(idle, task, name, "seconds") for name in names}
        ratios = [mean["deepinv-diffpir"] / mean[n] for n in ("covprox", "covprox-float32")]
        figures = [f"{value:.2f}" for value in mean.values()] + [f"{r:.1f}x" for r in ratios]
        lines.append([task, *(figures if not math.isnan(ratios[0]) else [""] * len(figures))])
    return _markdown(["task", *names, "deepinv / covprox", "the same, ours in float32"], lines)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [list(head), ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)
