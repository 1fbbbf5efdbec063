"""What is seen of wrong settings before any worker starts: Ray would take a minute to say it."""

from __future__ import annotations

from collections.abc import Iterator

from domains.base import BadInputError
from flows.api_train import new_network
from flows.config import TrainSettings
from flows.training.data import (
    condition_channels,
    condition_domains,
    large_views,
    load_windows,
)
from flows.training.sources import CleanItems, open_sources


def check_settings(settings: TrainSettings) -> None:
    """Refuse what no data could make right: workers, conditions, the network and its start.

    Raises:
        BadInputError: naming the setting to change.
    """
    size, num_workers = settings.batch_size, settings.compute.num_workers
    if settings.compute.executor == "ray" and num_workers and size % num_workers:
        raise BadInputError(
            f"a batch of {size} does not divide by {num_workers} workers: "
            "change batch_size or compute.num_workers"
        )
    condition_channels(settings)
    stride = new_network(settings).network.stride
    if settings.patch_size % stride:
        raise BadInputError(
            f"a patch of {settings.patch_size} pixels does not divide by {stride}, which the "
            f"network needs: {-(-settings.patch_size // stride) * stride} does"
        )


def check_data(settings: TrainSettings) -> None:
    """Refuse datasets that lack a condition, a calibration item or the images of a score.

    No more is read than must be.

    Raises:
        BadInputError: if one cannot be read, or names what they lack.
    """
    sources = open_sources(settings)
    held = {record.item_id: record for source in sources for record in source.items()}
    absent = [name for name in settings.calibration_items if name not in held]
    scored = settings.score.every_steps or (settings.ema_snapshots and settings.ema_lengths)
    if scored and not any(record.split == "validation" for record in held.values()):
        raise BadInputError(
            "no validation image to score the network by: give the data a validation split, or "
            "set score.every_steps=0 and ema_snapshots=0"
        )
    if settings.corruption is None and any(source.has_holes for source in sources):
        raise BadInputError(
            "the data lack pixels: set corruption={kind: mask} to learn from what was measured"
        )
    filled = settings.corruption is not None and settings.corruption.filled_by is not None
    if filled and all(isinstance(source, CleanItems) for source in sources):
        raise BadInputError(
            "corruption.filled_by restores what measurements lack, and `data` holds images alone: "
            "leave it out, or name a store of measurements"
        )
    holes_to_score = [
        record.item_id
        for source in sources
        for record in source.items()
        if source.has_holes and record.split == "validation"
    ]
    if scored and holes_to_score:
        raise BadInputError(
            f"the validation image '{holes_to_score[0]}' lacks pixels, and what fills them would "
            "change with every score: give whole ones, or set score.every_steps=0, ema_snapshots=0"
        )
    if absent:
        raise BadInputError(
            f"no dataset holds the calibration item '{absent[0]}': "
            "choose items of the data, or set calibration_items=[]"
        )
    lacking = list(_lacking(settings))
    if lacking:
        raise BadInputError(
            f"no training image for {', '.join(lacking)} (of {settings.patch_size} pixels a side "
            "at least): add data or drop it"
        )


def _lacking(settings: TrainSettings) -> Iterator[str]:
    """Conditions that no training image can be drawn for; stops reading once all have one."""
    domains = condition_domains()
    sources = {c: {c, domains[c].drawn_from.get(c, c)} for c in settings.conditions}
    for condition, views in load_windows(settings, "train", blank=True):
        if large_views(views, settings):
            sources = {c: names for c, names in sources.items() if condition not in names}
        if not sources:
            return
    yield from sources
