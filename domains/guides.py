"""Guides: other images of the same thing on the same grid, that the prior may look at.

A second contrast (T1 for T2), a panchromatic band (for multispectral ones). A guide is no
measurement of the unknown: it is shown to the network, and the data step knows nothing of it. It
must lie on the image's own grid; nothing is resampled here. Its values are taken to [-1, 1] by
its own robust range, so that units and gains do not matter. An item keeps its guides as they are
shown, and says of each in `meta["guides"]` which file it was, and its range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import Array, BadInputError, Domain, Item, ItemRecord, Measurement, Problem
from domains.validity import invalid_pixels

if TYPE_CHECKING:
    from torch import Tensor

META = "guides"
"""Of an item's record: name -> {"source_sha256", "low", "high"}."""
PREFIX = "guide-"
"""Of a guide's array in a measurement, before its name."""
RANGE_PERCENTILES = (0.1, 99.9)
"""Of a guide's values, taken to -1 and 1; nothing is clipped."""
MOST_APART = 0.1
"""Of a voxel: how far the corners of two grids may lie from each other."""


def with_guides(item: Item, guides: Mapping[str, Item]) -> Item:
    """An item with other images of it as its guides, in network units.

    Args:
        item: the image, or a damaged one.
        guides: name -> what the domain read of it: one channel on the item's grid.

    Raises:
        BadInputError: if one has several channels, no range, or another grid.
    """
    shown, facts = dict(item.guides), dict(item.record.meta.get(META, {}))
    for name, guide in guides.items():
        require_one_grid(name, guide.record, item.record)
        shown[name], facts[name] = _normalised(name, guide, item.record.item_id)
    meta = {**item.record.meta, META: facts} if facts else item.record.meta
    return Item(item.pixels, replace(item.record, meta=meta), shown)


def require_one_grid(name: str, guide: ItemRecord, image: ItemRecord) -> None:
    """Refuse a guide that does not lie on the image's grid.

    Raises:
        BadInputError: saying how they differ.
    """
    if guide.shape[0] != 1:
        raise BadInputError(
            f"{image.item_id}: its guide '{name}' has {guide.shape[0]} channels; give one contrast "
            "or one band"
        )
    if guide.shape[1:] != image.shape[1:]:
        sizes = (" x ".join(map(str, record.shape[1:])) for record in (guide, image))
        raise BadInputError(
            f"{image.item_id}: its guide '{name}' has {next(sizes)} pixels and the image "
            f"{next(sizes)}; resample the guide onto the image's grid"
        )
    apart = voxels_apart(guide, image)
    if apart > MOST_APART:
        raise BadInputError(
            f"{image.item_id}: its guide '{name}' lies elsewhere, {apart:.2g} pixels away by the "
            "files' own coordinates; resample the guide onto the image's grid"
        )


def voxels_apart(one: ItemRecord, other: ItemRecord) -> float:
    """Largest distance of the grids' corners, in the image's smallest side of a voxel.

    0 where the files do not say where they lie.
    """
    ours, theirs = _corners(other), _corners(one)
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return 0.0
    _, z, h, w = other.shape
    lengths = np.linalg.norm(ours[:, 1:4] - ours[:, :1], axis=0) / (w, h, z)
    side = lengths[lengths > 0].min()
    return float(np.linalg.norm(ours - theirs, axis=0).max() / side)


def _corners(record: ItemRecord) -> Array | None:
    """World coordinates (3 n) of the grid's outer corners: the origin, those next to it, others."""
    _, z, h, w = record.shape
    ends = np.array(list(product((0, w), (0, h), (0, z))), np.float64)
    ends = ends[np.argsort(np.count_nonzero(ends, axis=1), kind="stable")][[0, 3, 2, 1, 4, 5, 6, 7]]
    if record.affine is not None:  # of voxels' centres
        affine = np.array(record.affine)
        return np.asarray(affine[:3, :3] @ (ends.T - 0.5) + affine[:3, 3:])
    geo = record.meta.get("geotiff") or {}
    if not geo.get("transform"):
        return None
    top, left, height, width = record.meta.get("crop") or (0, 0, *geo["shape"])
    a, b, c, d, e, f = geo["transform"]
    x, y = left + ends[:, 0] / w * width, top + ends[:, 1] / h * height
    return np.stack([a * x + b * y + c, d * x + e * y + f, np.zeros(len(x))])


def _normalised(name: str, guide: Item, item_id: str) -> tuple[Array, dict[str, Any]]:
    """A guide's values on [-1, 1] by its own range, and what is kept of it."""
    values = guide.pixels.astype(np.float32)
    if (invalid := invalid_pixels(guide.record.meta, guide.pixels)) is not None:
        values[invalid[:, None]] = np.nan  # it says nothing there
    if not np.isfinite(values).any():
        raise BadInputError(f"{item_id}: its guide '{name}' holds no data; leave it out")
    low, high = (float(v) for v in np.nanpercentile(values, RANGE_PERCENTILES))
    if not high > low:
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if not high > low:
        raise BadInputError(f"{item_id}: its guide '{name}' has one value everywhere; leave it out")
    shown: Array = (2 * (values - low) / (high - low) - 1).astype(np.float32)
    facts = {"source_sha256": guide.record.source_digest, "low": low, "high": high}
    return shown, facts


def measured_with(domain: Domain, measurement: Measurement, item: Item) -> Measurement:
    """A measurement that carries the guides of what was measured.

    Args:
        domain: of the item.
        measurement: of the item.
        item: with guides on the grid of the image to be restored, as files have it; its pixels
            are not looked at.

    Raises:
        BadInputError: if the measurement is of another grid.
    """
    if not item.guides:
        return measurement
    arrays = dict(measurement.arrays)
    for name, guide in item.guides.items():
        laid = domain.as_measured(Item(guide, item.record), measurement.record)
        if laid.pixels.shape[1:] != measurement.record.shape[1:]:
            raise BadInputError(
                f"{item.record.item_id}: the guide '{name}' does not fit the task "
                f"'{measurement.task}', which changes the image's grid; leave out --guide"
            )
        arrays[f"{PREFIX}{name}"] = np.ascontiguousarray(laid.pixels.swapaxes(0, 1), np.float32)
    meta = {**measurement.record.meta, META: item.record.meta[META]}
    return replace(measurement, arrays=arrays, record=replace(measurement.record, meta=meta))


def guide_names(record: ItemRecord) -> list[str]:
    """Names of the guides that an item or a measurement has."""
    return list(record.meta.get(META, {}))


def posed(domain: Domain, measurement: Measurement) -> Problem:
    """The inverse problem of a measurement, with its guides laid out as its batch is.

    Bands that are folded into the batch have the same guide each; a canvas that is larger than the
    picture has none beyond it.
    """
    import torch

    problem = domain.problem(measurement)
    names = [name for name in measurement.arrays if name.startswith(PREFIX)]
    num_slices, (b, _, height, width) = len(measurement.y), problem.shape
    h, w = measurement.record.shape[2:]
    top, left = measurement.params.get("margin", (0, 0))
    guides = {}
    for name in names:
        canvas = torch.full((num_slices, 1, height, width), torch.nan)
        values = torch.from_numpy(np.array(measurement.arrays[name], np.float32))
        canvas[..., top : top + h, left : left + w] = values
        guides[name.removeprefix(PREFIX)] = canvas.repeat_interleave(b // num_slices, dim=0)
    return replace(problem, guides=guides) if guides else problem


def as_channels(problem: Problem, channels: Sequence[str]) -> Tensor | None:
    """The guides of a problem as a network takes them, (b g h w); None if it has none of them.

    Args:
        problem: of `posed`.
        channels: names in the order of the network's channels.
    """
    import torch

    found = [problem.guides.get(name) for name in channels]
    given = [guide for guide in found if guide is not None]
    if not given:
        return None
    none = torch.full_like(given[0], torch.nan)
    return torch.cat([none if guide is None else guide for guide in found], dim=1)
