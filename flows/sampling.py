"""Rows of posterior samples: one sample, the mean of M, and how their spread compares to the error.

    covprox-sample     the first sample by itself: about 3 dB below the mean, by theory
    covprox-samples    the mean of M samples; `v_over_b` and `log_correlation` (diffusion_core
                       .uncertainty) of its slice over the pixels that are unknown, and the sums
                       `sample_variance` and `sample_error` that V/B is pooled from

Samples differ by the seed of the solver's noise alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import Array, Domain, Item, Task
from domains.metrics import score
from domains.registry import load_domain
from flows.config import MethodSettings
from flows.report.rows import Row
from flows.scoring import FIGURES, figures_row, finite, hole

if TYPE_CHECKING:
    from flows.engine.restored import Restored, RestoredEntry
    from flows.store import Dataset, Measurements

ONE, MEAN = "covprox-sample", "covprox-samples"
MATCHES = (0.8, 1.25)
"""V/B between which the spread of samples is taken to match their error."""
SAMPLE_MODE = MethodSettings(name="covprox", options={"mode": "sample"})


def sample_rows(
    entries: Sequence[Sequence[RestoredEntry]],
    restored: Restored,
    dataset: Dataset,
    measurements: Measurements,
    tasks: Mapping[str, Task],
) -> Iterator[Row]:
    """Score samples: two rows a slice.

    Args:
        entries: of each seed, what was published; items without a sample of every seed are left.
        restored: the folder it was published in.
        dataset: the clean images.
        measurements: what was restored.
        tasks: by name.
    """
    by_seed = [{(e.item_id, e.task): e for e in of_seed} for of_seed in entries]
    for place in sorted(set.intersection(*(set(found) for found in by_seed))):
        item_id, task = place
        truth = dataset.read(item_id)
        domain = load_domain(truth.record.domain)
        truth = domain.as_measured(truth, measurements.entry(item_id, task).record)
        region = hole(domain, measurements, item_id, task, truth)
        samples = [found[place] for found in by_seed]
        pixels = np.stack([restored.read(entry) for entry in samples]).astype(np.float64)
        yield from _rows(samples[0], ONE, pixels[0], domain, truth, region, tasks[task])
        mean = pixels.mean(axis=0)
        spreads = _spreads(domain, truth, pixels, region)
        rows = _rows(samples[0], MEAN, mean, domain, truth, region, tasks[task], len(samples))
        yield from ({**row, **next(spreads)} for row in rows)


def pooled(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """By task: V/B over all slices, its standard deviation over them, mean log-correlation.

    The standard deviation of one slice is nan.
    """
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        if row["method"] == MEAN:
            by_task.setdefault(row["task"], []).append(row)
    return {task: _pooled(part) for task, part in by_task.items()}


def pooled_text(rows: Iterable[Row]) -> str:
    """`pooled` in words, a line a task."""
    return "\n".join(_told(task, figures) for task, figures in pooled(rows).items())


def _told(task: str, figures: Mapping[str, float]) -> str:
    ratio, std, correlation = (
        figures[name] for name in ("v_over_b", "v_over_b_std", "log_correlation")
    )
    over_slices = f" (over slices +-{std:.2f})" if math.isfinite(std) else ""
    told = f"{task}: V/B {ratio:.2f}{over_slices}: {_judged(ratio)}"
    if math.isfinite(correlation):
        told += f"; log-correlation of block variance with error {correlation:.2f}"
    return told


def _judged(ratio: float) -> str:
    """What variance over error says of samples."""
    if not math.isfinite(ratio):
        return "they have no error to compare with"
    if ratio < MATCHES[0]:
        return "the samples are closer together than they are wrong"
    if ratio > MATCHES[1]:
        return "the samples are further apart than they are wrong"
    return "the samples' spread matches their error"


def _pooled(rows: Sequence[Row]) -> dict[str, float]:
    error = sum(row["sample_error"] for row in rows)
    ratios = [row["v_over_b"] for row in rows if row["v_over_b"] is not None]
    correlations = [r["log_correlation"] for r in rows if r["log_correlation"] is not None]
    return {
        "v_over_b": sum(row["sample_variance"] for row in rows) / error if error else math.inf,
        "v_over_b_std": float(np.std(ratios)) if len(ratios) > 1 else math.nan,
        "log_correlation": float(np.mean(correlations)) if correlations else math.nan,
    }


def _rows(
    entry: RestoredEntry,
    name: str,
    pixels: Array,
    domain: Domain,
    truth: Item,
    region: Array | None,
    task: Task,
    num_samples: int = 1,
) -> Iterator[Row]:
    """Rows of one image; the costs are those of all its samples, the residual is one sample's."""
    for z, figures in enumerate(score(domain, truth, pixels, region=region)):
        row = figures_row(entry, z, pixels.shape[1], domain, truth, task)
        for cost in ("nfe", "num_operator_calls", "seconds"):
            row[cost] *= num_samples
        known = {key: finite(figures.get(key)) for key in FIGURES if key != "residual"}
        residual = None if num_samples > 1 else row["residual"]
        yield {**row, **known, "method": name, "residual": residual}


def _spreads(
    domain: Domain, truth: Item, samples: Array, region: Array | None
) -> Iterator[dict[str, Any]]:
    """V/B and log-correlation of each slice; samples (m c z h w) in source units."""
    import torch

    from diffusion_core.uncertainty import block_log_correlation, spread

    for z in range(samples.shape[2]):
        part = truth.slices(z, z + 1)
        offset, gain = domain.unit_scale(part.pixels, part.record)
        scaled = torch.from_numpy((samples[:, None, :, z] - offset) * gain)
        x0 = torch.from_numpy((part.pixels.swapaxes(0, 1).astype(np.float64) - offset) * gain)
        unknown = None
        if region is not None:
            unknown = torch.from_numpy(np.ascontiguousarray(region[None, :, z])).expand_as(x0)
        found = spread(scaled, x0, unknown)
        yield {
            "num_samples": len(samples),
            "sample_variance": found.variance,
            "sample_error": found.error,
            "v_over_b": finite(found.ratio),
            "log_correlation": finite(block_log_correlation(scaled, x0, unknown)),
        }
