"""What is trained on: datasets of clean items, or stores of images that lack pixels.

A store of measurements holds y and the mask and no truth; a pixel that was not measured is NaN
from here on, whatever y has in its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from domains.base import Array, BadInputError, Item, ItemRecord
from domains.registry import load_domain

if TYPE_CHECKING:  # zarr takes its time to import, and the command line comes by here
    from flows.config import TrainSettings
    from flows.store import Dataset, MeasurementEntry, Measurements
    from flows.training.filling import Filler

Windows: TypeAlias = Mapping[str, Sequence[Array]]


class CleanItems:
    """A dataset, every pixel of it."""

    has_holes = False

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.digest = dataset.digest

    def items(self) -> list[ItemRecord]:
        """Records of all items."""
        return self._dataset.items()

    def item(self, record: ItemRecord) -> Item:
        """An item with its guides."""
        return self._dataset.read(record.item_id)

    def windows(self, record: ItemRecord) -> Windows:
        """{condition: views (c z h w) in network units} of an item."""
        item = self._dataset.read(record.item_id)
        return load_domain(record.domain).training_windows(item)


class MaskedItems:
    """Measurements of images by masks: their measured pixels, and NaN for the others.

    Raises:
        BadInputError: if the store holds other measurements, or noisy ones.
    """

    has_holes = True

    def __init__(self, store: Measurements) -> None:
        self._store = store
        self.digest = store.content_digest
        self._entries: dict[str, MeasurementEntry] = {}
        for entry in store.entries():
            noisy = float(entry.noise.get("sigma_y", 1.0)) > 0
            if entry.operator != "mask" or noisy or entry.item_id in self._entries:
                raise BadInputError(
                    f"{store.path}: its '{entry.task}' of {entry.item_id} is no training image; "
                    "a store to train on holds images that lack pixels and have no noise, each once"
                )
            self._entries[entry.item_id] = entry

    def items(self) -> list[ItemRecord]:
        """Records of all items."""
        return [entry.record for entry in self._entries.values()]

    def item(self, record: ItemRecord) -> None:
        """None: what lacks pixels is no clean item, and has no guides."""

    def windows(self, record: ItemRecord) -> Windows:
        """{condition: [view (c z h w) in network units, NaN where nothing was measured]}."""
        import numpy as np

        measurement = self._store.read(record.item_id, self._entries[record.item_id].task)
        problem = load_domain(record.domain).problem(measurement)
        if problem.known is None:
            raise BadInputError(f"{self._store.path}: {record.item_id} says of no pixel what it is")
        y = problem.y.numpy()
        view = np.where(problem.known.numpy(), y, np.float32(np.nan)).astype(np.float32)
        return {problem.condition: [np.moveaxis(view, 0, 1)]}


class FilledItems(MaskedItems):
    """The same, with a model's restorations where nothing was measured.

    Raises:
        BadInputError: also if the model cannot be used.
    """

    has_holes = False

    def __init__(self, store: Measurements, filler: Filler) -> None:
        super().__init__(store)
        self._filler = filler
        both = f"{self.digest} filled by {filler.digest}"
        self.digest = hashlib.sha256(both.encode()).hexdigest()

    def windows(self, record: ItemRecord) -> Windows:
        """{condition: [view (c z h w) in network units]}, nothing missing."""
        return {
            condition: [self._filler.fill(view, condition, record.source_digest) for view in views]
            for condition, views in super().windows(record).items()
        }


Source: TypeAlias = CleanItems | MaskedItems


def open_source(path: Path, filler: Filler | None = None) -> Source:
    """A store to train on.

    Args:
        path: of a dataset, or of measurements by masks.
        filler: of what these lack; None leaves it NaN.

    Raises:
        BadInputError: if it cannot be read or trained on.
    """
    from flows.store import Dataset, open_store

    store = open_store(path)
    if isinstance(store, Dataset):
        return CleanItems(store)
    return MaskedItems(store) if filler is None else FilledItems(store, filler)


def open_sources(settings: TrainSettings, *, filled: bool = True) -> list[Source]:
    """All stores of a training.

    Args:
        settings: name them, and what fills them.
        filled: False looks at what was measured alone, which takes no restoration.

    Raises:
        BadInputError: as open_source, and if the model that fills cannot be used.
    """
    from flows.training.filling import filler_of

    filler = filler_of(settings) if filled else None
    return [open_source(path, filler) for path in settings.data]
