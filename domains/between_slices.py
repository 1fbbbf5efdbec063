"""Volumes seen from the side: where slices are missing or thick, images across them are restored.

A clip that lacks frames is such a volume: cut along y, it shows how each row of the scene changes.

A slice that is missing as a whole leaves nothing in its own plane to go on from, but a volume cut
the other way, along y, shows it as a missing row with its neighbours above and below. A turned item
has the axes (c y z x); its affine is turned with it, so that writing returns to the source's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import Array, BadInputError, Item, ItemRecord, Measurement, Problem, Task
from domains.files import MAX_PIXELS
from domains.imaging import Units, measure, slices_first
from domains.keyed import pixel_digest

if TYPE_CHECKING:
    from torch import Tensor

OPERATORS = ("mask", "pool-rows")
"""What measures a volume with slices missing, and one of thick slices."""

_BY_SLICE = ("slices", "crop", "missing_slices", "missing_axis")
"""Notes of a record that count along axes which are others now."""


def turned(item: Item) -> Item:
    """The item cut along y: (c z h w) -> (c h z w); pixels share memory."""
    return Item(item.pixels.swapaxes(1, 2), turned_record(item.record))


def turned_record(record: ItemRecord) -> ItemRecord:
    """The record of a turned item; `meta["turned"]` says that it is one."""
    c, z, h, w = record.shape
    spacing = record.spacing_mm
    affine = np.array(record.affine) if record.affine else _plain_affine(record)
    meta = {name: value for name, value in record.meta.items() if name not in _BY_SLICE}
    return replace(
        record,
        shape=(c, h, z, w),
        spacing_mm=None if spacing is None else (spacing[1], spacing[0], spacing[2]),
        affine=tuple(tuple(float(v) for v in row) for row in affine[:, [0, 2, 1, 3]]),
        meta={**meta, "turned": True},
    )


def unturned(item: Item) -> Item:
    """A turned item as it was, sharing its pixels; spacing and affine are not brought back."""
    c, h, z, w = item.record.shape
    meta = {name: value for name, value in item.record.meta.items() if name != "turned"}
    record = replace(item.record, shape=(c, z, h, w), spacing_mm=None, affine=None, meta=meta)
    return Item(item.pixels.swapaxes(1, 2), record)


def _plain_affine(record: ItemRecord) -> Array:
    z, y, x = record.spacing_mm or (1.0, 1.0, 1.0)
    return np.diag([-x, -y, z, 1.0])


def as_measured(item: Item, record: ItemRecord) -> Item:
    """A clean item as a measurement's record has it: turned, or as it is."""
    return turned(item) if record.meta.get("turned") else item


def lacks_slices(missing: Array | None, record: ItemRecord) -> bool:
    """Whether a mask (True = missing) takes whole slices of a volume of several."""
    _, z, h, w = record.shape
    if missing is None or z < 2:
        return False
    missing = np.asarray(missing) != 0
    if missing.shape[-3:] != (z, h, w) or missing.size != z * h * w:
        return False
    return bool(missing.reshape(z, -1).all(axis=1).any())


def turned_mask(missing: Array, record: ItemRecord) -> Array:
    """A mask (z h w) of the volume as one of the turned volume."""
    _, z, h, w = record.shape
    return np.asarray(missing).reshape(z, h, w).swapaxes(0, 1)


def missing_planes(record: ItemRecord, chosen: Sequence[int] = ()) -> Array:
    """(z h w) True where the source lacks a slice, and in the chosen ones.

    Args:
        record: of the volume.
        chosen: slices of no use, from 0, as `sashiko inspect` counts them.

    Raises:
        BadInputError: if it lacks none and none is chosen, or a chosen one is not there.
    """
    planes, num_slices = record.meta.get("missing_slices") or (), record.shape[1]
    if not planes and not chosen:
        raise BadInputError("no slice is missing; leave out `--mask slices`")
    if beyond := [n for n in chosen if n >= num_slices]:
        raise BadInputError(
            f"slice {beyond[0]} is not one of its {num_slices}, which count from 0; `sashiko "
            "inspect` shows them"
        )
    mask = np.zeros(record.shape[1:], dtype=bool)
    np.moveaxis(mask, int(record.meta.get("missing_axis", 0)), 0)[list(planes)] = True
    mask[list(chosen)] = True
    return mask


def taken_thick(
    item: Item, units: Units, scale_z: int, sigma_y: float, params: Mapping[str, Any]
) -> Measurement:
    """A volume of thick slices as the measurement of one with `scale_z` times as many.

    Args:
        item: the volume as it is.
        units: of its network scale.
        scale_z: slices that are wanted of one.
        sigma_y: standard deviation of its noise, network units.
        params: further parameters to be kept with the measurement.

    Raises:
        BadInputError: if it has one slice only, or would have too many pixels.
    """
    _, num_slices, h, w = item.record.shape
    if num_slices < 2:
        raise BadInputError("one slice has nothing before and behind it; leave out --scale-z")
    if num_slices * scale_z * h * w > MAX_PIXELS:
        raise BadInputError(
            f"{num_slices * scale_z} x {h} x {w} is over the limit of {MAX_PIXELS} pixels; split it"
        )
    return Measurement(
        record=turned_record(thinned(item.record, scale_z)),
        task="given",
        operator="pool-rows",
        params={**params, "factor": scale_z},
        noise={"kind": "gaussian", "sigma_y": float(sigma_y)},
        y=np.ascontiguousarray(slices_first(units.to_network(turned(item).pixels))),
    )


def thinned(record: ItemRecord, scale_z: int) -> ItemRecord:
    """The record of a volume of slices `scale_z` times thinner: shape, spacing, affine follow.

    The thin slices fill the thick one that they come from, so that the first lies before its
    middle.
    """
    c, z, h, w = record.shape
    spacing, affine = record.spacing_mm, record.affine
    if spacing is not None:
        spacing = (spacing[0] / scale_z, spacing[1], spacing[2])
    if affine is not None:
        # Slice k of the fine grid has its centre at (k + 1/2) / scale_z - 1/2 of ours.
        fine = np.diag([1.0, 1.0, 1 / scale_z, 1.0])
        fine[2, 3] = 0.5 / scale_z - 0.5
        affine = tuple(tuple(float(v) for v in row) for row in np.array(affine) @ fine)
    return replace(record, shape=(c, z * scale_z, h, w), spacing_mm=spacing, affine=affine)


def simulate(item: Item, task: Task, seed: int, units: Units) -> Measurement:
    """Take slices away from a clean volume, or make them thick.

    Args:
        item: three slices or more.
        task: "mask" with {pattern: slices, every: n}: of n slices the last n - 1 are missing, the
            volume's last is kept (frames of a clip: pattern "frames"); "pool-rows" with
            {factor: n}: means of n slices.
        seed: of the noise.
        units: of the network scale.

    Raises:
        BadInputError: if the item has too few slices.
    """
    num_slices, params = item.record.shape[1], dict(task.operator_params)
    name = "every" if task.operator == "mask" else "factor"
    if name not in params:
        raise BadInputError(
            f"task '{task.name}': {task.operator} of a volume needs operator_params "
            f"{{{name}: 2}} or more"
        )
    step = int(params[name])
    if num_slices <= step or step < 2:
        raise BadInputError(
            f"{item.record.item_id}: {num_slices} slices are too few for one of {step}; give more"
        )
    arrays: Mapping[str, Array] = {}
    side = turned(item)
    if task.operator == "mask":
        known = np.zeros(num_slices, dtype=bool)
        known[::step] = known[-1] = True
        _, h, z, w = side.record.shape
        arrays = {"mask": np.broadcast_to(known[None, None, :, None], (h, 1, z, w)).copy()}
    measured = measure(side, units, task, seed, params, arrays)
    return replace(measured, truth_digest=pixel_digest(item.pixels))


def linear_z(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Straight lines from slice to slice."""
    del params
    return _interpolated(measurement, problem, degree=1)


def cubic_z(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Cubic splines from slice to slice."""
    del params
    return _interpolated(measurement, problem, degree=3)


def _interpolated(measurement: Measurement, problem: Problem, degree: int) -> Tensor:
    """Splines through the known rows, constant beyond the first and the last."""
    import torch
    from scipy.interpolate import make_interp_spline

    y = problem.y.numpy()
    rows = problem.shape[2]
    if measurement.operator == "mask":
        known = np.asarray(measurement.arrays["mask"], dtype=bool)
        whole = np.all(known[:, 0], axis=2)
        if not (whole == whole[:1]).all() or not whole.any():
            raise BadInputError("interpolation along z is for slices missing as a whole")
        places = np.flatnonzero(whole[0]).astype(np.float64)
        y = y[:, :, whole[0]]
    elif measurement.operator == "pool-rows":
        factor = int(measurement.params["factor"])
        starts = np.arange(0, rows, factor)
        places = (starts + np.minimum(starts + factor, rows) - 1) / 2
    else:
        raise BadInputError("interpolation along z is for missing or thick slices")
    degree = min(degree, len(places) - 1)
    if degree < 1:
        return torch.from_numpy(np.repeat(y[:, :, :1], rows, axis=2))
    spline = make_interp_spline(places, y, k=degree, axis=2)
    at = np.clip(np.arange(rows), places[0], places[-1])
    return torch.from_numpy(np.ascontiguousarray(spline(at), np.float32))
