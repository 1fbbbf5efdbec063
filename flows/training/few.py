"""Little data: a dataset of some slices of others, a few of them held out to score by.

All that follows (patches, scores, tables, the model card) reads this dataset and no other, so that
no slice that was not chosen can teach anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from domains.base import BadInputError, Item, ItemRecord, Split
from flows.config import FewSettings, TrainSettings
from flows.training.data import allowed

if TYPE_CHECKING:
    from flows.store import Dataset

HELD_OUT = "-held-out"


def few_dataset(settings: TrainSettings, few: FewSettings, folder: Path) -> Path:
    """The dataset of the slices that `few` chooses of the settings' data, written if need be.

    An item's slices that are learned from keep its name. Validation items are taken over where no
    slice is held out.

    Args:
        settings: with the datasets to choose from.
        few: how many, and which.
        folder: of the dataset, which is named by its content.

    Raises:
        BadInputError: if the training items do not hold so many slices.
    """
    from flows.store import Dataset, DatasetWriter
    from flows.store_files import has_manifest, json_digest

    digests = [Dataset(path).digest for path in settings.data]
    key = json_digest([digests, few.model_dump(), settings.shippable_only])
    path = folder / f"few-{key[:16]}.zarr"
    if has_manifest(path):
        return path
    with DatasetWriter(path) as writer:
        for item in _items(settings, few):
            writer.add(item)
    return path


def _items(settings: TrainSettings, few: FewSettings) -> Iterator[Item]:
    sources = list(_records(settings, "train"))
    depths = [record.shape[1] for _, record in sources]
    learned, held_out = chosen_slices(depths, few)
    for (dataset, record), own, others in zip(sources, learned, held_out, strict=True):
        yield from _part(dataset, record, own, "train", record.item_id)
        yield from _part(dataset, record, others, "validation", record.item_id + HELD_OUT)
    if not few.held_out:
        for dataset, record in _records(settings, "validation"):
            yield dataset.read(record.item_id)


def _records(settings: TrainSettings, split: Split) -> Iterator[tuple[Dataset, ItemRecord]]:
    from flows.store import Dataset

    for dataset in map(Dataset, settings.data):
        for record in dataset.items():
            if record.split == split and allowed(record.meta, settings):
                yield dataset, record


def _part(
    dataset: Dataset, record: ItemRecord, slices: Sequence[int], split: Split, name: str
) -> Iterator[Item]:
    """The item of these slices; none of no slices.

    It has no spacing: slices that were picked out are no volume to be cut along other axes.
    """
    if not slices:
        return
    parts = [dataset.read(record.item_id, slice(z, z + 1)).pixels for z in slices]
    pixels = np.concatenate(parts, axis=1)
    numbers = list(record.meta.get("slices") or range(record.shape[1]))
    yield Item(
        pixels,
        replace(
            record,
            item_id=name,
            shape=pixels.shape,
            split=split,
            spacing_mm=None,
            affine=None,
            meta={**record.meta, "slices": [numbers[z] for z in slices]},
        ),
    )


def chosen_slices(
    depths: Sequence[int], few: FewSettings
) -> tuple[list[list[int]], list[list[int]]]:
    """Which slices of each item are learned from, and which are held out.

    All slices in a row are parted into as many even stretches as are wanted, one slice is taken of
    each: its middle, or with `draw` one by chance. Held out are some of these, spread likewise.

    Args:
        depths: slices of each item.
        few: how many, and which choice.

    Raises:
        BadInputError: if there are too few slices.
    """
    total = sum(depths)
    wanted = few.slices or total
    if wanted > total or few.held_out >= wanted:
        raise BadInputError(
            f"the training items hold {total} slices: {wanted} to take, {few.held_out} of them to "
            "hold out, are too many; change few.slices or few.held_out, or give more data"
        )
    chosen = _spread(total, wanted, few.draw)
    held_out = {chosen[i] for i in _spread(wanted, few.held_out, few.draw)}
    item_of = [(item, z) for item, depth in enumerate(depths) for z in range(depth)]
    learned: list[list[int]] = [[] for _ in depths]
    others: list[list[int]] = [[] for _ in depths]
    for number in chosen:
        item, z = item_of[number]
        (others if number in held_out else learned)[item].append(z)
    return learned, others


def _spread(total: int, wanted: int, draw: int) -> list[int]:
    """One number of each of `wanted` even stretches of range(total)."""
    edges = [total * i // wanted for i in range(wanted + 1)] if wanted else []
    stretches = list(pairwise(edges))
    if not draw:
        return [(first + end) // 2 for first, end in stretches]
    rng = np.random.Generator(np.random.Philox(key=[draw, wanted]))
    return [int(rng.integers(first, end)) for first, end in stretches]
