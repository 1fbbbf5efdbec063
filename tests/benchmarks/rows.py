"""Rows of results in one JSON file, kept as they come, and the paired statistics over them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

Row = dict[str, Any]
KEY = ("task", "item", "method")


class Rows:
    """A JSON file of rows, one for each (task, item, method); written anew, by rename, each time.

    Args:
        path: of the file; read if it is there.
        key: fields that tell one row from another.
    """

    def __init__(self, path: Path, key: Sequence[str] = KEY) -> None:
        self._path, self._fields = path, tuple(key)
        rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
        self._rows = {self._key(row): row for row in rows}

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def get(self, *key: str) -> Row | None:
        """The row of a key (task, item, method ...), if it is there."""
        return self._rows.get(key)

    def put(self, row: Row) -> None:
        """Add or replace a row, and save."""
        self._rows[self._key(row)] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        staging = self._path.with_suffix(".partial")
        lines = ",\n".join(json.dumps(self._rows[key]) for key in sorted(self._rows))
        staging.write_text(f"[\n{lines}\n]\n")
        staging.rename(self._path)

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self._fields)


@dataclass(frozen=True)
class Paired:
    """Differences of a figure between two methods over the items that both have.

    Attributes:
        mean: of the differences.
        std: over items (n - 1).
        lower: one-sided 90% confidence bound of the mean (Student's t); items of one image or
            patient are not independent, so it is a bound for these images.
        count: of items.
    """

    mean: float
    std: float
    lower: float
    count: int


def paired(rows: Iterable[Row], task: str, ours: str, theirs: str, figure: str = "psnr") -> Paired:
    """The figure of `ours` less that of `theirs`, item by item."""
    by_method: dict[str, dict[str, float]] = {ours: {}, theirs: {}}
    for row in rows:
        if row["task"] == task and row["method"] in by_method:
            by_method[row["method"]][row["item"]] = row[figure]
    items = sorted(by_method[ours].keys() & by_method[theirs].keys())
    return summary([by_method[ours][i] - by_method[theirs][i] for i in items])


def summary(differences: Sequence[float]) -> Paired:
    """Mean, spread and lower bound of differences; nan where there are too few."""
    n = len(differences)
    if n == 0:
        return Paired(math.nan, math.nan, math.nan, 0)
    mean = float(np.mean(differences))
    if n == 1:
        return Paired(mean, math.nan, math.nan, 1)
    std = float(np.std(differences, ddof=1))
    return Paired(mean, std, mean - float(student.ppf(0.9, n - 1)) * std / math.sqrt(n), n)


def mean_of(rows: Iterable[Row], task: str, method: str, figure: str) -> float:
    """Mean of a figure over the items of a task; nan without any."""
    values = [r[figure] for r in rows if (r["task"], r["method"]) == (task, method)]
    return float(np.mean(values)) if values else math.nan
