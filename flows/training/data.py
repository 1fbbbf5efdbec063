"""From datasets to the sequence of patches: in memory while they fit, else through Zarr."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domains.base import Array, BadInputError, Domain, Item, ItemRecord
from domains.registry import domain_names, load_domain
from flows.config import TrainSettings
from flows.training.sources import Source, open_sources

if TYPE_CHECKING:
    import numpy as np

    from diffusion_core.training.patches import Augment, PatchSource, View, Volumes

VIEWS = "views.zarr"
_SHARE_OF_MEMORY = 0.4
"""Of the machine's, for all workers' views, unless the settings give a bound."""
_FLOAT_BYTES = 4


def condition_channels(settings: TrainSettings) -> dict[str, int]:
    """Condition -> channels, in the order of the settings.

    Raises:
        BadInputError: if no domain has a condition of that name.
    """
    known = {c: int(domain.conditions[c]) for c, domain in condition_domains().items()}
    unknown = [name for name in settings.conditions if name not in known]
    if unknown:
        raise BadInputError(
            f"no domain knows the condition '{unknown[0]}': choose from {', '.join(known)}"
        )
    return {name: known[name] for name in settings.conditions}


def condition_domains() -> dict[str, Domain]:
    """Condition -> the domain that it belongs to."""
    found = [load_domain(name) for name in domain_names()]
    return {condition: domain for domain in found for condition in domain.conditions}


def allowed(meta: Any, settings: TrainSettings) -> bool:
    """Shipped weights learn only from what may be shipped."""
    return bool(meta.get("ships", True)) or not settings.shippable_only


def records_of(
    settings: TrainSettings, split: str, *, filled: bool = True
) -> Iterator[tuple[Source, ItemRecord]]:
    """(where it comes from, record) of every item of a split that may be used."""
    for source in open_sources(settings, filled=filled):
        for record in source.items():
            if record.split == split and allowed(record.meta, settings):
                yield source, record


def load_windows(
    settings: TrainSettings,
    split: str,
    *,
    filled: bool = True,
    blank: bool = False,
    most: int | None = None,
) -> Iterator[tuple[str, Sequence[Array]]]:
    """(condition, its views (c z h w)) of every item of a split that may be used.

    Conditions that nothing is drawn from are left out. Where the settings name guides, they are
    further channels of every view, the last ones, NaN where an item has none. Without `filled`
    pixels that were not measured are NaN; `blank` views are for counting, and nothing is restored.
    With `most`, of items of a domain with as many channels the first ones alone.
    """
    wanted, met = _sources(settings), Counter[tuple[str, int]]()
    for source, record in records_of(settings, split, filled=filled):
        kind = record.domain, record.shape[0]
        met[kind] += 1
        if most is not None and met[kind] > most:
            continue
        item = source.item(record) if settings.guides else None
        for name, views in (source.blank_windows if blank else source.windows)(record).items():
            if name in wanted:
                shown = views if item is None else with_guides_shown(settings, item, name, views)
                yield name, shown


def with_guides_shown(
    settings: TrainSettings, item: Item, condition: str, views: Sequence[Array]
) -> Sequence[Array]:
    """An item's views (c z h w) of a condition with its guides as last channels, NaN for none."""
    import numpy as np

    from diffusion_core.model import guide_channels

    domain = load_domain(item.record.domain)
    names = guide_channels(settings.guides)
    shown = {name for c in _drawn_by(condition, domain) for name in settings.guides.get(c, [])}
    joined = list(views)
    for name in names:
        if name in item.guides and name in shown:
            channel = domain.guide_views(item.record, item.guides[name])
        else:
            channel = [np.full((1, *view.shape[1:]), np.nan, np.float32) for view in views]
        joined = [np.concatenate(pair) for pair in zip(joined, channel, strict=True)]
    return joined


def _drawn_by(condition: str, domain: Domain) -> set[str]:
    """A condition, and those whose patches are made of its images."""
    return {condition} | {c for c, source in domain.drawn_from.items() if source == condition}


def num_guides(settings: TrainSettings) -> int:
    """Last channels of every view that are guides."""
    from diffusion_core.model import guide_channels

    return len(guide_channels(settings.guides))


def large_views(views: Sequence[Array], settings: TrainSettings) -> list[Array]:
    """The views (c z h w) of an item that a patch fits into and that are not too coarse."""
    least_width = settings.least_view_scale * views[0].shape[-1]
    size = settings.patch_size
    return [v for v in views if min(v.shape[-2:]) >= size and v.shape[-1] >= least_width]


def patch_source(
    settings: TrainSettings, views: Path | None = None, cache_bytes: int = 0
) -> PatchSource:
    """The sequence of training patches, from the datasets' train split.

    Args:
        settings: see TrainSettings.
        views: store that `prepare_views` wrote; None holds all views in memory.
        cache_bytes: of its chunks that are kept in memory.

    Raises:
        BadInputError: if a condition has no image of at least the patch's size.
    """
    from diffusion_core.training.patches import PatchSource, Volumes
    from flows.training.views import Views

    found: Iterator[tuple[str, Sequence[View], float]]
    found = _weighed(settings) if views is None else Views(views, cache_bytes).items()
    own: dict[str, list[Volumes]] = {}
    for condition, large, weight in found:
        own.setdefault(condition, []).append(Volumes(large, weight))
    domains = condition_domains()
    items: dict[str, list[Volumes]] = {}
    for condition in condition_channels(settings):
        source = domains[condition].drawn_from.get(condition, "")
        items[condition] = _evenly(own.get(condition, []), own.get(source, []))
    try:
        return PatchSource(
            items,
            settings.conditions,
            settings.patch_size,
            settings.seed,
            _augmentation(settings, domains),
            num_guides(settings),
            settings.guide_drop_share,
            settings.hidden_share,
        )
    except ValueError as error:
        raise BadInputError(str(error)) from error


def _augmentation(settings: TrainSettings, domains: Mapping[str, Domain]) -> Augment:
    """What the domains vary, and softness where the settings want it."""
    from diffusion_core.training.patches import soften

    def augment(condition: str, patch: Array, rng: np.random.Generator) -> Array:
        varied = domains[condition].augment(condition, patch, rng)
        share = settings.soft_shares.get(condition, 0.0)
        # Without a share nothing is drawn: runs of before go on as they were.
        return soften(varied, rng) if share and rng.uniform() < share else varied

    return augment


def prepare_views(settings: TrainSettings, run: Path) -> Path | None:
    """Write the views into the run's folder if they do not fit into memory; None if they do.

    Views that a model has to fill first are always written: every worker would do it again.
    Those of an earlier command are taken if they were made of the same data.
    """
    from flows.training.views import key_of, write_views

    path, key = run / VIEWS, _key(settings)
    costly = settings.corruption is not None and settings.corruption.filled_by is not None
    if not costly and views_fit(settings, view_bytes(settings)):
        return None
    if key_of(path) != key:
        shutil.rmtree(path, ignore_errors=True)
        write_views(path, _weighed(settings), key)
    return path


def cache_bytes(settings: TrainSettings) -> int:
    """Memory that a worker may fill with views: as set, or its part of this machine's."""
    from flows.engine.memory import machine_bytes

    if settings.data_memory_gb is not None:
        return int(settings.data_memory_gb * 1e9)
    return int(_SHARE_OF_MEMORY * machine_bytes() / max(1, settings.compute.num_workers))


def views_fit(settings: TrainSettings, num_bytes: int) -> bool:
    """Whether a worker may hold so many bytes of views."""
    return num_bytes <= cache_bytes(settings)


def view_bytes(settings: TrainSettings) -> int:
    """Bytes of all training views, about: the least item of each kind is turned into views."""
    sources = _sources(settings)
    kinds: dict[tuple[str, int], list[tuple[Source, ItemRecord]]] = {}
    for source, record in records_of(settings, "train"):
        kinds.setdefault((record.domain, record.shape[0]), []).append((source, record))
    total = 0.0
    for found in kinds.values():
        source, least = min(found, key=lambda one: prod(one[1].shape))
        windows = source.blank_windows(least)
        wanted = [view for name, views in windows.items() if name in sources for view in views]
        # Views along other axes share their memory, unless guides are joined to each.
        bare = {_owner(view): view.size * _FLOAT_BYTES for view in wanted}
        joined = ((len(v) + num_guides(settings)) * v[0].size * _FLOAT_BYTES for v in wanted)
        each = sum(joined if settings.guides else bare.values())
        total += each / prod(least.shape) * sum(prod(record.shape) for _, record in found)
    return int(total)


def _sources(settings: TrainSettings) -> set[str]:
    """The conditions whose images are drawn from: those asked for, and what they are made of."""
    domains = condition_domains()
    made_of = {domains[c].drawn_from.get(c, c) for c in settings.conditions if c in domains}
    return {*settings.conditions} | made_of


def _weighed(settings: TrainSettings) -> Iterator[tuple[str, list[Array], float]]:
    """(condition, views that are large enough, weight) of every training item."""
    for condition, views in load_windows(settings, "train"):
        if large := large_views(views, settings):
            # The fourth root keeps a large scan from drowning small ones, which differ more from
            # it than its slices do from each other.
            yield condition, large, views[0].size ** 0.25


def _evenly(own: list[Volumes], drawn: list[Volumes]) -> list[Volumes]:
    """A condition's own images and those drawn from another's, half of the samples each."""
    from diffusion_core.training.patches import Volumes

    def scaled(volumes: list[Volumes]) -> list[Volumes]:
        total = sum(v.weight for v in volumes)
        return [Volumes(v.views, v.weight / total) for v in volumes]

    return scaled(own) + scaled(drawn)


def _key(settings: TrainSettings) -> dict[str, Any]:
    """What stored views depend on: the data's content, and which of it is wanted."""
    return {
        "data": [source.digest for source in open_sources(settings)],
        "conditions": sorted(_sources(settings)),
        "patch_size": settings.patch_size,
        "least_view_scale": settings.least_view_scale,
        "shippable_only": settings.shippable_only,
        **({"guides": settings.guides} if settings.guides else {}),
    }


def _owner(array: Array) -> int:
    """Which memory an array is a view of."""
    return id(array if array.base is None else array.base)
