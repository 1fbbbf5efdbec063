"""Reading what was restored: the items that manifests name, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from domains.base import Array, BadInputError, ItemRecord
from flows.engine.objects import StoreError, open_objects
from flows.engine.publish import load_manifest
from flows.roots import Root, parse_root


@dataclass(frozen=True)
class RestoredEntry:
    """One published item.

    Attributes:
        item_id: of the item.
        task: of the measurement that it was restored from.
        method: name of the solver or baseline.
        campaign: that published it.
        key: sha256 of all that determined its pixels.
        path: of its OME-Zarr group.
        record: of the item.
        seconds: of computing, summed over blocks.
        nfe: denoiser calls for one image.
        num_operator_calls: applications of A or A' for one image.
        peak_bytes: highest resident memory of a worker.
        model_digest: None for classical baselines.
        residual: |R^{-1/2}(y - A x)|^2 a real measurement, mean over slices; the largest |y - A x|
            where `exact_data`.
        exact_data: whether the data were taken as exact.
        facts: the whole manifest.
    """

    item_id: str
    task: str
    method: str
    campaign: str
    key: str
    path: Root
    record: ItemRecord
    seconds: float
    nfe: int
    num_operator_calls: int
    peak_bytes: int
    model_digest: str | None
    residual: float | None
    exact_data: bool
    facts: Mapping[str, Any] = field(repr=False, default_factory=dict)


class Restored:
    """An output, open for reading. Attributes: path."""

    def __init__(self, path: Root) -> None:
        self.path = path
        self._objects = open_objects(self.path)

    def items(self) -> list[RestoredEntry]:
        """All published items, by item, task and method."""
        keys = [
            n.removesuffix(".json") for n in self._objects.names("manifests") if n.endswith(".json")
        ]
        entries = [entry for key in keys if (entry := self.find(key)) is not None]
        return sorted(entries, key=lambda e: (e.item_id, e.task, e.method, e.key))

    def find(self, key: str) -> RestoredEntry | None:
        """The published item of a key, or None."""
        manifest = load_manifest(self._objects, key)
        return None if manifest is None else entry_of(self.path, manifest)

    def read(
        self,
        entry: RestoredEntry,
        z: slice = slice(None),
        level: int = 0,
        plane: tuple[slice, slice] = (slice(None), slice(None)),
    ) -> Array:
        """Read an item's pixels.

        Args:
            entry: of items().
            z: slices wanted.
            level: of the pyramid; 0 is full resolution.
            plane: rows and columns wanted.

        Returns:
            (c z h w) float32 in source units.

        Raises:
            BadInputError: if a chunk is missing or fails its checksum.
            StoreError: if the object store does not answer.
        """
        import zarr

        from flows.store_files import strict_store

        try:
            array = zarr.open_array(strict_store(entry.path), path=str(level), mode="r")
            return np.asarray(array[:, z, *plane])
        except StoreError:
            raise
        except Exception as error:
            raise BadInputError(
                f"{entry.path}: a chunk is damaged or missing; remove its manifest "
                f"{entry.key[:12]}... and restore it again"
            ) from error


def entry_of(output: Root, manifest: Mapping[str, Any]) -> RestoredEntry:
    """The entry that a manifest describes."""
    from flows.store import record_from_json

    return RestoredEntry(
        item_id=manifest["item_id"],
        task=manifest["task"],
        method=manifest["method"]["name"],
        campaign=manifest["campaign"],
        key=manifest["key"],
        path=output / manifest["path"],
        record=record_from_json(manifest["record"]),
        seconds=manifest["seconds"],
        nfe=manifest["nfe"],
        num_operator_calls=manifest["num_operator_calls"],
        peak_bytes=manifest["peak_bytes"],
        model_digest=manifest["model_digest"],
        residual=manifest["residual"],
        exact_data=manifest["exact_data"],
        facts=manifest,
    )


def open_restored(output: Root | str) -> Restored:
    """Open an output: a folder, or s3://BUCKET/PREFIX.

    Raises:
        BadInputError: if nothing was ever published there.
    """
    root = parse_root(output)
    if not open_objects(root).exists("manifests"):
        raise BadInputError(f"{output}: holds no restored items; run `sashiko restore` first")
    return Restored(root)
