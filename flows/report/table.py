"""The table of results on a terminal: means by task and method, best first."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flows.report.describe import COLUMNS
from flows.report.rows import OURS, MethodSummary, Row, TaskSummary, figure, summarise

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_COLUMNS = ("psnr", "ssim", "edge_error", "residual", "nfe", "seconds")


def results_table(
    rows: Sequence[Row], *, colour: bool | None = None, width: int | None = None
) -> str:
    """One table a task: means over slices, the gain over the best classical method beside.

    Args:
        rows: of an evaluation.
        colour: use terminal codes; None: if stdout is a terminal and NO_COLOR is not set.
        width: in characters; None: the terminal's, at least 100.
    """
    from rich.console import Console

    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    width = width or max(shutil.get_terminal_size().columns, 100)
    console = Console(
        file=io.StringIO(),
        force_terminal=colour,
        no_color=not colour,
        width=width,
        legacy_windows=False,
    )
    with console.capture() as captured:
        for summary in summarise(rows):
            console.print(_table(summary))
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def _table(summary: TaskSummary) -> Table:
    from rich import box
    from rich.table import Table

    keys = list(dict.fromkeys((summary.metric, *_COLUMNS)))
    count = max(m.num_rows for m in summary.methods)
    title = f"{summary.domain}  {summary.task}  (means over {count}, best first)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    table.add_column("method")
    for key in keys:
        name, unit, _ = COLUMNS[key]
        table.add_column(f"{name} {unit}".strip(), justify="right")
        if key == summary.metric:
            table.add_column("gain dB", justify="right", no_wrap=True)
    for method in summary.methods:
        table.add_row(*_cells(method, summary, keys), style="cyan" if method.method in OURS else "")
    return table


def _cells(method: MethodSummary, summary: TaskSummary, keys: Sequence[str]) -> list[Text]:
    from rich.text import Text

    cells = [Text(method.method)]
    for key in keys:
        best = method.method in summary.best.get(key, ())
        cells.append(Text(figure(key, method.means.get(key)), style="bold" if best else ""))
        if key == summary.metric:
            cells.append(_gain(method, summary))
    return cells


def _gain(method: MethodSummary, summary: TaskSummary) -> Text:
    from rich.text import Text

    classical = summary.best_classical
    if method.gain_db is None:
        best = classical is not None and method.method == classical.method
        return Text("best classical" if best else "", style="dim")
    return Text(f"{method.gain_db:+.2f}", style="bold green" if method.gain_db > 0 else "bold red")
