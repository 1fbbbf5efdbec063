"""What stores say of their items and measurements, as dataclasses and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from domains.base import Array, ItemRecord, Measurement
from flows.store_files import array_digest, json_digest


@dataclass(frozen=True)
class MeasurementEntry:
    """What a store says of one measurement: everything but the arrays.

    Attributes:
        item_id: of the item that is measured.
        task: name of the task.
        record: of the item.
        num_slices: along z.
        operator: kind of operator.
        params: of the operator.
        noise: the noise model.
        digest: sha256 of the content: arrays, parameters, record.
        num_bytes: of all arrays in memory.
        y_shape: (z, *m).
        arrays: array name -> sha256; "y", and "array-NAME" for the operator's.
        truth_digest: of the true pixels if simulated.
        seed: of the simulation.
    """

    item_id: str
    task: str
    record: ItemRecord
    num_slices: int
    operator: str
    params: Mapping[str, Any]
    noise: Mapping[str, Any]
    digest: str
    num_bytes: int
    y_shape: tuple[int, ...]
    arrays: Mapping[str, str]
    truth_digest: str | None
    seed: int


def record_to_json(record: ItemRecord) -> dict[str, Any]:
    """A record as JSON-able values."""
    return dict(json.loads(json.dumps(asdict(record))))


def record_from_json(values: Mapping[str, Any]) -> ItemRecord:
    """The record that record_to_json wrote."""
    fields = dict(values)
    fields["shape"] = tuple(fields["shape"])
    if fields["spacing_mm"] is not None:
        fields["spacing_mm"] = tuple(fields["spacing_mm"])
    if fields["affine"] is not None:
        fields["affine"] = tuple(tuple(row) for row in fields["affine"])
    return ItemRecord(**fields)


def named_arrays(measurement: Measurement) -> dict[str, Array]:
    """Every array of a measurement under its name in the store."""
    return {"y": measurement.y, **{f"array-{k}": v for k, v in measurement.arrays.items()}}


def shared_names(params: Mapping[str, Any]) -> set[str]:
    """Names in the store of the arrays that all slices share."""
    return {f"array-{name}" for name in params.get("shared_arrays", ())}


def measurement_to_json(measurement: Measurement, arrays: Mapping[str, Array]) -> dict[str, Any]:
    """All of a measurement but its arrays, which their digests stand for."""
    values = {
        "task": measurement.task,
        "record": record_to_json(measurement.record),
        "operator": measurement.operator,
        "params": dict(measurement.params),
        "noise": dict(measurement.noise),
        "truth_digest": measurement.truth_digest,
        "seed": measurement.seed,
        "num_bytes": int(sum(array.nbytes for array in arrays.values())),
        "y_shape": list(measurement.y.shape),
        "arrays": {name: array_digest(array) for name, array in arrays.items()},
    }
    values = json.loads(json.dumps(values))
    return {**values, "digest": json_digest(values)}


def entry_from_json(values: Mapping[str, Any]) -> MeasurementEntry:
    """The entry that measurement_to_json wrote."""
    record = record_from_json(values["record"])
    fields = {**values, "record": record, "y_shape": tuple(values["y_shape"])}
    return MeasurementEntry(item_id=record.item_id, num_slices=record.shape[1], **fields)
