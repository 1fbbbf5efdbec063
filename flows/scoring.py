"""Published items held against the truth: one row a slice (flows.api_evaluate says of what)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from domains.base import Array, BadInputError, Domain, Item, Task
from domains.keyed import pixel_digest
from domains.metrics import hole_of, score
from domains.registry import load_domain
from flows.report.rows import Row

if TYPE_CHECKING:
    from flows.engine.restored import Restored, RestoredEntry
    from flows.store import Dataset, Measurements

FIGURES = ("psnr", "ssim", "psnr_hole", "psnr_body", "ssim_body", "edge_error",
           "z_gradient_error", "residual")  # fmt: skip


def score_entries(
    entries: Sequence[RestoredEntry],
    restored: Restored,
    dataset: Dataset,
    measurements: Measurements,
    tasks: Mapping[str, Task],
) -> Iterator[Row]:
    """Score published items, item by item, so that each truth is read once.

    Args:
        entries: what was published.
        restored: the folder it was published in.
        dataset: the clean images.
        measurements: what was restored.
        tasks: by name.

    Raises:
        BadInputError: if a measurement was not made of the dataset's image.
    """

    def place(entry: RestoredEntry) -> tuple[str, str]:
        return entry.item_id, entry.task

    ordered = sorted(entries, key=place)
    for (item_id, task), group in groupby(ordered, key=place):
        truth = dataset.read(item_id)
        if measurements.entry(item_id, task).truth_digest != pixel_digest(truth.pixels):
            raise BadInputError(
                f"{measurements.path}: its {task} of {item_id} was not made of the image in "
                f"{dataset.path}; remove the measurements and evaluate again"
            )
        domain = load_domain(truth.record.domain)
        truth = domain.as_measured(truth, measurements.entry(item_id, task).record)
        region = hole(domain, measurements, item_id, task, truth)
        for entry in group:
            pixels = restored.read(entry)
            yield from _score_entry(entry, pixels, domain, truth, region, tasks[task])


def _score_entry(
    entry: RestoredEntry,
    pixels: Array,
    domain: Domain,
    truth: Item,
    region: Array | None,
    task: Task,
) -> Iterator[Row]:
    """One row a slice of one published item."""
    for z, figures in enumerate(score(domain, truth, pixels, region=region)):
        row = figures_row(entry, z, pixels.shape[1], domain, truth, task)
        values: dict[str, Any] = {**figures, "residual": row["residual"]}
        yield {**row, **{key: finite(values.get(key)) for key in FIGURES}}


def figures_row(
    entry: RestoredEntry, z: int, num_slices: int, domain: Domain, truth: Item, task: Task
) -> Row:
    """A row of slice z before its figures: what was restored how, at which cost, its residual."""
    residuals = entry.facts.get("residuals", ())
    return {
        "domain": domain.name,
        "task": entry.task,
        "item": entry.item_id,
        "slice": z,
        "group": truth.record.group or entry.item_id,
        "region": task.region,
        "method": entry.method,
        "nfe": entry.nfe,
        "num_operator_calls": entry.num_operator_calls,
        "model_digest": entry.model_digest,
        "seconds": entry.seconds / num_slices,
        "peak_bytes": entry.peak_bytes,
        "residual": finite(residuals[z] if len(residuals) == num_slices else entry.residual),
    }


def hole(
    domain: Domain, measurements: Measurements, item_id: str, task: str, truth: Item
) -> Array | None:
    """(c|1 z h w) True where a mask knows nothing; None for other operators."""
    if measurements.entry(item_id, task).operator != "mask":
        return None
    hole = hole_of(domain.problem(measurements.read(item_id, task)))
    c, z, h, w = truth.pixels.shape
    if hole is not None and hole.shape[1] != z:  # bands that were folded into the batch
        return hole.reshape(z, c, h, w).swapaxes(0, 1)
    return hole


def finite(value: float | None) -> float | None:
    """JSON knows no infinity: an exact restoration has no PSNR."""
    return value if value is not None and math.isfinite(value) else None
