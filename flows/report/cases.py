"""Cases: the slices a report shows, read from the stores of an evaluation.

Which slices are shown is decided by a rule, not by taste: of each task the slice where our solver
gains least over the best classical method, the median one, and the one where it gains most.
Tasks of few slices show them all.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import Array, Domain, Item, ItemRecord, Measurement, Problem
from domains.imaging import PICTURE_OPERATORS
from flows.report.describe import method_label
from flows.report.rows import Row, TaskSummary

if TYPE_CHECKING:
    from flows.engine.restored import Restored
    from flows.store import Dataset, Measurements

Key = tuple[str, int]
"""(item, slice)."""

SHOW_ALL_UP_TO = 4


@dataclass(frozen=True)
class View:
    """What was measured, as a picture.

    Attributes:
        label: what kind of picture it is: "the known pixels", "FBP" ...
        pixels: (c h w) in source units.
        missing: (h, w) True where nothing was measured; None where that has no meaning.
    """

    label: str
    pixels: Array
    missing: Array | None = None


@dataclass(frozen=True)
class Case:
    """One slice of one item with all that is shown of it; pixels (c h w) in source units.

    Attributes:
        item: its id.
        slice: along z.
        why: why it is shown: "smallest gain" ...
        record: of the item.
        scale: (offset, gain) of the metrics' range.
        truth: the clean slice.
        view: the measurement as a picture.
        restored: method -> pixels; the best classical method first, ours last.
        rows: method -> row.
    """

    item: str
    slice: int
    why: str
    record: ItemRecord
    scale: tuple[float, float]
    truth: Array
    view: View
    restored: Mapping[str, Array]
    rows: Mapping[str, Row] = field(default_factory=dict)


def choose(summary: TaskSummary, rows: Sequence[Row]) -> list[tuple[Key, str]]:
    """The slices to show and why, by the rule above; in item order if all are shown."""
    keys = list(dict.fromkeys((row["item"], row["slice"]) for row in rows))
    ours, classical = summary.ours, summary.best_classical
    if ours is None or classical is None:
        return [(key, "") for key in keys[:SHOW_ALL_UP_TO]]
    paired = [k for k in keys if k in ours.values and k in classical.values]
    gains = {k: ours.values[k] - classical.values[k] for k in paired}
    if len(paired) <= SHOW_ALL_UP_TO:
        return [(k, f"gain {gains[k]:+.2f} dB") for k in paired]
    ranked = sorted(paired, key=gains.__getitem__)
    chosen = {
        "smallest gain": ranked[0],
        "median gain": ranked[len(ranked) // 2],
        "largest gain": ranked[-1],
    }
    return [(key, f"{why}, {gains[key]:+.2f} dB") for why, key in chosen.items()]


class CaseReader:
    """Reads slices of one task with all that is shown of them.

    Args:
        summary: of the task.
        rows: of the task.
        domain: of the task.
        truth: the clean dataset.
        measurements: what was measured.
        restored: what the engine made.
        keys: of the published items to use; the folder may hold others.
        view_method: classical method whose result stands for the measurement where the data are
            no picture (FBP for a sinogram).
    """

    def __init__(
        self,
        summary: TaskSummary,
        rows: Sequence[Row],
        *,
        domain: Domain,
        truth: Dataset,
        measurements: Measurements,
        restored: Restored,
        keys: Container[str],
        view_method: str | None = None,
    ) -> None:
        self._task, self._domain, self._view_method = summary.task, domain, view_method
        self._truth, self._measurements = truth, measurements
        self._pixels = _Pixels(restored, summary.task, keys)
        self._shown = [m.method for m in (summary.best_classical, summary.ours) if m is not None]
        self._rows: dict[Key, dict[str, Row]] = {}
        for row in rows:
            self._rows.setdefault((row["item"], row["slice"]), {})[row["method"]] = row

    def read(self, key: Key, why: str = "") -> Case:
        """One slice."""
        (item, z), domain, pixels = key, self._domain, self._pixels
        record = self._measurements.entry(item, self._task).record
        part = _true_slice(domain, self._truth, record, z)
        measurement = self._measurements.read(item, self._task, slice(z, z + 1))
        name, direct = self._view_method, None
        if name and not is_picture(measurement):
            made = pixels.of(name, item, z)
            direct = classical(domain, measurement, name) if made is None else made
        return Case(
            item=item,
            slice=z,
            why=why,
            record=part.record,
            scale=domain.unit_scale(part.pixels, part.record),
            truth=part.pixels[:, 0],
            view=view_of(domain, measurement, direct, name),
            restored={m: p for m in self._shown if (p := pixels.of(m, item, z)) is not None},
            rows=self._rows[item, z],
        )


def _true_slice(domain: Domain, truth: Dataset, record: ItemRecord, z: int) -> Item:
    """Slice z of the clean item, as the measurement counts slices."""
    own = truth.record(record.item_id)
    if (own.shape, own.affine) == (record.shape, record.affine):
        return truth.read(record.item_id, slice(z, z + 1))
    return domain.as_measured(truth.read(record.item_id), record).slices(z, z + 1)


def view_of(
    domain: Domain, measurement: Measurement, direct: Array | None, direct_name: str | None
) -> View:
    """A measurement of one slice as a picture.

    A mask shows the pixels it knows; data that are themselves a (smaller) picture show as they
    are, enlarged without interpolation; else the direct method's result stands for them.

    Args:
        domain: of the measurement.
        measurement: of one slice.
        direct: result of the direct method (c h w) in source units, or None.
        direct_name: its name.
    """
    c, _, h, w = measurement.record.shape
    if is_picture(measurement):
        problem = domain.problem(measurement)
        if problem.known is not None:
            image = _source(problem, problem.operator.A_adjoint(problem.y))
            return View("known pixels", image, _missing(problem))
        picture = _source(problem, problem.facts.get("measured", problem.y))
        rows, columns = (-(-n // m) for n, m in zip((h, w), picture.shape[-2:], strict=True))
        enlarged = picture.repeat(rows, axis=-2).repeat(columns, axis=-1)
        return View("as measured", enlarged[..., :h, :w])
    if direct is not None and direct_name is not None:
        return View(method_label(direct_name), direct)
    return View("not a picture", np.zeros((c, h, w), np.float32))


def is_picture(measurement: Measurement) -> bool:
    """Whether the data are pixels themselves: known ones, blurred ones, or fewer of them."""
    return measurement.operator in PICTURE_OPERATORS


def classical(domain: Domain, measurement: Measurement, name: str) -> Array:
    """A classical method's result on one slice, (c h w) in source units."""
    from flows.engine.methods import baseline_params

    problem = domain.problem(measurement)
    params = baseline_params(measurement.task, name)
    return _source(problem, domain.baselines()[name](measurement, problem, params))


def _missing(problem: Problem) -> Array:
    """(h, w) True where no channel and no band was measured."""
    if problem.known is None:
        raise ValueError("the problem has no mask")
    known = problem.known.reshape(-1, *problem.known.shape[-2:])
    return np.asarray(~known.any(dim=0).cpu().numpy())


def _source(problem: Problem, image: Any) -> Array:
    """A batch in network units as one (c h w) image in source units.

    Bands that a domain folds into the batch are unfolded again.
    """
    pixels = problem.to_source(image).detach().cpu().numpy()
    return pixels.reshape(-1, *pixels.shape[-2:])


class _Pixels:
    """Restored slices by method, item and z."""

    def __init__(self, restored: Restored, task: str, keys: Container[str]) -> None:
        self._restored = restored
        self._entries = {
            (e.method, e.item_id): e for e in restored.items() if e.task == task and e.key in keys
        }

    def of(self, method: str, item: str, z: int) -> Array | None:
        entry = self._entries.get((method, item))
        return None if entry is None else self._restored.read(entry, slice(z, z + 1))[:, 0]
