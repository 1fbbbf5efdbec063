"""`sashiko inspect`: what an input is, what looks damaged in it, and a picture of both.

It reads whatever a domain reads: images, raw measurements, folders of them; and our own stores of
items and of measurements. Nothing is written but the picture that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from domains.base import Array, BadInputError, Domain, Item, ItemRecord, Measurement
from domains.findings import Finding, find_damage
from domains.registry import domain_names, load_domain
from flows.api_data import find_files, read_file, read_measured
from flows.config import InspectSettings
from flows.engine.events import Event, EventHandler, ignore

MOST_TILES = 6
"""Slices in a picture."""


@dataclass(frozen=True)
class Inspected:
    """One input, or one item of a store.

    Attributes:
        place: path of the file, or name of the item in its store.
        domain: that read it; "" if none could.
        others: further domains that read files of its kind, if none was asked for.
        fault: why it cannot be used; "" if it can.
        record: of the item: format, shape (c z h w), dtype, units, spacing, affine, `meta`.
        bits: of a value that are in use; None of real numbers.
        value_range: least and greatest value.
        measured: of a raw measurement or a stored one: operator, noise, shape of the data.
        findings: what looks damaged.
    """

    place: str
    domain: str = ""
    others: tuple[str, ...] = ()
    fault: str = ""
    record: ItemRecord | None = None
    bits: int | None = None
    value_range: tuple[float, float] | None = None
    measured: Mapping[str, Any] | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class InspectResult:
    """What was found.

    Attributes:
        inputs: in order of their places.
        preview: the picture that was written, if one was asked for.
    """

    inputs: list[Inspected]
    preview: Path | None = None

    @property
    def quarantined(self) -> list[Inspected]:
        """The inputs that cannot be used."""
        return [one for one in self.inputs if one.fault]


@dataclass(frozen=True)
class _Seen:
    """An input with the pixels that a picture needs."""

    told: Inspected
    item: Item | None = None
    marks: Sequence[Array] = field(default_factory=tuple)


def inspect(settings: InspectSettings, on_event: EventHandler = ignore) -> InspectResult:
    """Say what an input is and what looks damaged.

    Args:
        settings: the input, perhaps its domain, perhaps where a picture goes.
        on_event: told of progress.

    Raises:
        BadInputError: if there is no input, no domain reads any of it, or all of it is unusable.
    """
    inputs: list[Inspected] = []
    shown: _Seen | None = None
    for done, seen in enumerate(_look(settings), start=1):
        inputs.append(seen.told)
        if done > 1:
            on_event(Event("file", done, 0, f"looking at inputs ({done})"))
        if seen.item is not None and (shown is None or _graver(seen.told, shown.told)):
            shown = seen
    if not inputs:
        raise BadInputError(f"{settings.source}: holds nothing to look at; check the path")
    if all(one.fault for one in inputs):
        first, more = inputs[0], len(inputs) - 1
        others = f" (and so are {more} others)" if more else ""
        raise BadInputError(f"{first.place}: {first.fault}{others}")
    if settings.preview is None or shown is None or shown.item is None:
        return InspectResult(inputs)
    write_preview(settings.preview, shown.item, shown.marks)
    return InspectResult(inputs, settings.preview)


def _graver(one: Inspected, other: Inspected) -> bool:
    """Whether more of one input is damaged than of another."""
    return sum(f.share for f in one.findings) > sum(f.share for f in other.findings)


def _look(settings: InspectSettings) -> Iterator[_Seen]:
    from flows.store_files import has_manifest

    if settings.source.is_dir() and has_manifest(settings.source):
        yield from _look_into_store(settings.source)
        return
    for path, domains in _candidates(settings).items():
        yield _look_at_file(path, domains)


def _candidates(settings: InspectSettings) -> dict[Path, list[Domain]]:
    """The files of the input, each with the domains that may read it, sorted."""
    names = [settings.domain] if settings.domain else domain_names()
    found: dict[Path, list[Domain]] = {}
    faults = []
    for domain in map(load_domain, names):
        try:
            files = find_files(settings.source, domain)
        except BadInputError as error:
            faults.append(error)
            continue
        for path in files:
            if settings.domain or domain.accepts(path):
                found.setdefault(path, []).append(domain)
    if not found:
        if (settings.domain and faults) or not settings.source.exists():
            raise faults[0]
        source, kinds = settings.source, ", ".join(names)
        if source.is_dir() and not any(p.is_file() for p in source.rglob("*")):
            raise BadInputError(f"{source}: the folder is empty; give one that holds images")
        suffixes = sorted({s for name in names for s in load_domain(name).suffixes})
        raise BadInputError(
            f"{source}: no domain ({kinds}) reads what is there; give {', '.join(suffixes)}, or a "
            "folder that holds such files"
        )
    return dict(sorted(found.items()))


def _look_at_file(path: Path, domains: Sequence[Domain]) -> _Seen:
    """The file as the first domain sees that can read it."""
    reasons = []
    for domain in domains:
        others = tuple(other.name for other in domains if other is not domain)
        try:
            if domain.is_raw(path):
                return _Seen(_told_measured(str(path), read_measured(domain, path), others))
            return _seen(str(path), read_file(domain, path), others)
        except BadInputError as error:
            reasons.append(str(error).removeprefix(f"{path}: "))
    return _Seen(Inspected(str(path), fault=reasons[0]))


def _look_into_store(path: Path) -> Iterator[_Seen]:
    from flows.store import Dataset, open_store

    store = open_store(path)
    if isinstance(store, Dataset):
        for record in store.items():
            yield _seen(record.item_id, store.read(record.item_id))
        return
    for entry in store.entries():
        measurement = store.read(entry.item_id, entry.task)
        yield _Seen(_told_measured(f"{entry.item_id}/{entry.task}", measurement))


def _seen(place: str, item: Item, others: tuple[str, ...] = ()) -> _Seen:
    found = find_damage(item, load_domain(item.record.domain).moved_slices(item))
    low, high = float(item.pixels.min()), float(item.pixels.max())
    told = Inspected(
        place=place,
        domain=item.record.domain,
        others=others,
        record=item.record,
        bits=_bits(low, high) if item.pixels.dtype.kind in "iu" else None,
        value_range=(low, high),
        findings=tuple(finding for finding, _ in found),
    )
    return _Seen(told, item, tuple(marks for _, marks in found))


def _bits(low: float, high: float) -> int:
    """Bits that hold whole numbers from low to high, a sign included where there is one."""
    size = max(high, -low - 1, 0)
    return int(size).bit_length() + int(low < 0)


def _told_measured(place: str, measurement: Measurement, others: tuple[str, ...] = ()) -> Inspected:
    measured: dict[str, Any] = {
        "task": measurement.task,
        "operator": measurement.operator,
        "noise": dict(measurement.noise),
        "data": f"{' x '.join(map(str, measurement.y.shape))} {measurement.y.dtype.name}",
        "params": {k: v for k, v in measurement.params.items() if _is_short(v)},
    }
    for name, values in measurement.arrays.items():
        if values.dtype == bool:
            measured[f"share of {name}"] = float(values.mean())
    record = measurement.record
    return Inspected(place, record.domain, others, record=record, measured=measured)


def _is_short(value: Any) -> bool:
    return isinstance(value, str | int | float | bool) and len(str(value)) < 80


def write_preview(path: Path, item: Item, marks: Sequence[Array]) -> None:
    """Write a PNG: slices as they are, and below them with what looks damaged in red.

    Raises:
        BadInputError: if the path is no PNG's.
    """
    from flows.report.pictures import figure_strip, windows_for
    from flows.report.write import save_png

    if path.suffix.lower() != ".png":
        raise BadInputError(f"{path}: a preview is a PNG; give a name that ends with .png")
    domain = load_domain(item.record.domain)
    damaged = np.zeros(item.pixels.shape[1:], bool)
    for marked in marks:
        damaged |= marked
    plain, marked_tiles = [], []
    for z in chosen_slices(damaged):
        part = item.slices(z, z + 1)
        scale = domain.unit_scale(part.pixels, part.record)
        window = windows_for(part.pixels[:, 0], part.record, scale)[-1]
        picture = _colour(window.show(item.pixels[:, z]))
        share = f"{100 * damaged[z].mean():.3g}% marked"
        plain.append((f"slice {z}", window.label, picture))
        marked_tiles.append((f"slice {z}", share, _reddened(picture, damaged[z])))
    rows = [figure_strip(plain, title=item.record.item_id)]
    rows += [figure_strip(marked_tiles, title="what looks damaged")]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, np.concatenate(rows if damaged.any() else rows[:1]))


def chosen_slices(damaged: Array) -> list[int]:
    """Up to MOST_TILES slices to show: those with most damage, the others spread evenly."""
    num = len(damaged)
    shares = damaged.mean(axis=(1, 2))
    worst = [int(z) for z in np.argsort(-shares, kind="stable") if shares[z] > 0]
    step = max(num / MOST_TILES, 1.0)
    even = [math.floor((i + 0.5) * step) for i in range(MOST_TILES)]
    chosen = dict.fromkeys([*worst[: MOST_TILES // 2], *(z for z in even if z < num)])
    return sorted(list(chosen)[:MOST_TILES])


def _colour(picture: Array) -> Array:
    return picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)


def _reddened(picture: Array, marked: Array) -> Array:
    red = picture.copy()
    red[marked] = (picture[marked] * 0.3 + np.array([255, 40, 30]) * 0.7).astype(np.uint8)
    return red
