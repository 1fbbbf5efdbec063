"""What is trained on: datasets of clean items, or stores of measurements.

A store of measurements holds y and the operator and no truth. Of masks a pixel that was not
measured is NaN from here on, whatever y has in its place; other measurements are learned from as
what a model or a classical method makes of them.
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
    from flows.training.filling import ByModel, Filler

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

    def blank_windows(self, record: ItemRecord) -> Windows:
        """The same: they are at hand."""
        return self.windows(record)


class _Measured:
    """Measurements, each of another image.

    Raises:
        BadInputError: if an image was measured twice.
    """

    def __init__(self, store: Measurements) -> None:
        self._store = store
        self.digest = store.content_digest
        self._entries: dict[str, MeasurementEntry] = {}
        for entry in store.entries():
            if entry.item_id in self._entries:
                raise BadInputError(
                    f"{store.path}: holds {entry.item_id} twice (its '{entry.task}'); a store to "
                    "train on has each image once"
                )
            self._entries[entry.item_id] = entry

    def items(self) -> list[ItemRecord]:
        """Records of all items."""
        return [entry.record for entry in self._entries.values()]

    def item(self, record: ItemRecord) -> None:
        """None: what was not measured in full is no clean item, and has no guides."""

    def _filled_digest(self, filler: Filler) -> str:
        both = f"{self.digest} filled by {filler.digest}"
        return hashlib.sha256(both.encode()).hexdigest()


class MaskedItems(_Measured):
    """Noiseless measurements of images by masks: their measured pixels, and NaN for the others."""

    has_holes = True

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

    def blank_windows(self, record: ItemRecord) -> Windows:
        """Views of that shape, which nothing had to be restored for."""
        return MaskedItems.windows(self, record)


class FilledItems(MaskedItems):
    """The same, with a model's restorations where nothing was measured."""

    has_holes = False

    def __init__(self, store: Measurements, filler: ByModel) -> None:
        super().__init__(store)
        self._filler = filler
        self.digest = self._filled_digest(filler)

    def windows(self, record: ItemRecord) -> Windows:
        """{condition: [view (c z h w) in network units]}, nothing missing."""
        return {
            condition: [self._filler.fill(view, condition, record.source_digest) for view in views]
            for condition, views in super().windows(record).items()
        }


class RestoredItems(_Measured):
    """Measurements of any kind, as the images that are made of them.

    Args:
        store: of measurements.
        filler: makes the images.
    """

    has_holes = False

    def __init__(self, store: Measurements, filler: Filler) -> None:
        super().__init__(store)
        self._filler = filler
        self.digest = self._filled_digest(filler)

    def windows(self, record: ItemRecord) -> Windows:
        """{condition: views (c z h w) in network units} of an item."""
        key = self.digest, record.item_id
        if key not in _restored:
            entry = self._entries[record.item_id]
            read = self._store.read(record.item_id, entry.task)
            _restored[key] = self._filler.restored(read, entry)
            while len(_restored) > _MOST_RESTORED:
                del _restored[next(iter(_restored))]
        return load_domain(record.domain).training_windows(_restored[key])

    def blank_windows(self, record: ItemRecord) -> Windows:
        """Views of that shape, which nothing had to be restored for."""
        import numpy as np

        item = Item(np.ones(record.shape, np.float32), record)
        return load_domain(record.domain).training_windows(item)


_restored: dict[tuple[str, str], Item] = {}
"""Of RestoredItems: figures and tables look at the same ones several times."""
_MOST_RESTORED = 16

Source: TypeAlias = CleanItems | MaskedItems | RestoredItems


def open_source(path: Path, filler: Filler | None = None, *, filled: bool = True) -> Source:
    """A store to train on.

    Args:
        path: of a dataset, or of measurements.
        filler: restores what these lack; None leaves pixels that they lack NaN.
        filled: False leaves them NaN though there is a model to fill them.

    Raises:
        BadInputError: if it cannot be read or trained on.
    """
    from flows.store import Dataset, open_store
    from flows.training.filling import ByClassic

    store = open_store(path)
    if isinstance(store, Dataset):
        return CleanItems(store)
    other = next((entry for entry in store.entries() if not _lacks_pixels(entry)), None)
    if other is not None and filler is None:
        raise BadInputError(
            f"{path}: its '{other.task}' of {other.item_id} is more than an image that lacks "
            "pixels: set corruption={filled_by: MODEL} to learn from what a model makes of it; "
            "starter is one, and so is a classical method (tv)"
        )
    if isinstance(filler, ByClassic) or (filler is not None and other is not None):
        return RestoredItems(store, filler)
    return FilledItems(store, filler) if filler is not None and filled else MaskedItems(store)


def _lacks_pixels(entry: MeasurementEntry) -> bool:
    """Whether what was measured was measured exactly, pixel by pixel."""
    return entry.operator == "mask" and float(entry.noise.get("sigma_y", 1.0)) == 0


def open_sources(settings: TrainSettings, *, filled: bool = True) -> list[Source]:
    """All stores of a training.

    Args:
        settings: name them, and what fills them.
        filled: False leaves pixels that are missing NaN, of a crop to be filled by itself.

    Raises:
        BadInputError: as open_source, and if what fills cannot be used.
    """
    from flows.training.filling import filler_of

    filler = filler_of(settings)
    return [open_source(path, filler, filled=filled) for path in settings.data]
