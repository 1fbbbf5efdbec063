"""From files to datasets, and from datasets to measurements: samples, ingest, simulate."""

from __future__ import annotations

import hmac
import os
import re
import secrets
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import yaml

from domains.base import BadInputError, Domain, Item, ItemRecord, Measurement, Split, Task
from domains.files import fault_in_words, select, with_site_key
from domains.guides import measured_with, with_guides
from domains.registry import load_domain
from domains.samples import SampleFile, fetch_samples, sample_item
from flows.config import (
    Home,
    IngestSettings,
    SamplesSettings,
    SimulateSettings,
    config_path,
    load_task,
)
from flows.damage import place_below
from flows.engine.events import Event, EventHandler, ignore
from flows.guide_files import Guides
from flows.store import (
    Dataset,
    DatasetWriter,
    MeasurementEntry,
    Measurements,
    MeasurementWriter,
    open_store,
)

SHARES: tuple[tuple[Split, float], ...] = (("train", 0.8), ("validation", 0.1), ("test", 0.1))
KEY_BYTES = 32

T = TypeVar("T")


@dataclass(frozen=True)
class Quarantined:
    """An input that could not be used.

    Attributes:
        path: the file, for the person who gave it.
        code: keyed hash of its place in the source, which is all that the manifest says of it:
            file names hold patients' names.
        reason: what is wrong, without the path.
    """

    path: Path
    code: str
    reason: str


@dataclass(frozen=True)
class IngestResult:
    """What ingest made.

    Attributes:
        path: the dataset.
        digest: sha256 of its content.
        items: records of its items.
        quarantined: inputs that could not be used.
    """

    path: Path
    digest: str
    items: list[ItemRecord]
    quarantined: list[Quarantined] = field(default_factory=list)


@dataclass(frozen=True)
class SimulateResult:
    """What simulate made: the store, its content digest, and its entries."""

    path: Path
    digest: str
    entries: list[MeasurementEntry]


@dataclass(frozen=True)
class DemoItem:
    """One item of the demo: slices and crop (top, left, height, width) as the source counts."""

    label: str
    slices: tuple[int, ...] | None = None
    crop: tuple[int, int, int, int] | None = None


def samples(settings: SamplesSettings, on_event: EventHandler = ignore) -> list[SampleFile]:
    """Fetch the real sample data into the cache.

    Args:
        settings: what to fetch.
        on_event: told of each step.

    Returns:
        The samples at hand, with path, licence and split.

    Raises:
        BadInputError: offline, or a file is not the one in the catalogue.
    """

    def report(line: str) -> None:
        on_event(Event("step", 0, 0, line))

    cache = Home().cache / "samples"
    return fetch_samples(cache, extra=settings.extra, demo_only=settings.demo_only, report=report)


def ingest(settings: IngestSettings, on_event: EventHandler = ignore) -> IngestResult:
    """Make a dataset of a user's own files; of raw ones, or such as lack pixels, of measurements.

    Items are named by keyed hashes of their content; groups by keyed hashes of the first folder
    below the source. What cannot be read is left out with a reason.

    Args:
        settings: source, domain, output, split, mask.
        on_event: told of each file.

    Returns:
        The dataset's items, and what was quarantined.

    Raises:
        BadInputError: if nothing in the source can be used, or the output exists.
    """
    domain = load_domain(settings.domain)
    guides = Guides.of(settings.guides)
    files = [p for p in find_files(settings.source, domain) if not guides.holds(p)]
    if not files:
        raise BadInputError(
            f"{settings.source}: every image there is a guide; name the folder of the images"
        )
    raw = all(domain.is_raw(path) for path in files)
    if raw and (settings.mask is not None or settings.guides):
        raise BadInputError(
            f"{settings.source}: raw files say themselves what they lack, and take no guides here: "
            "leave out --mask and --guide"
        )
    places = {path: place_below(path, settings.source) for path in files}
    guides.require(list(places.values()), on_event)
    tell_unknown(unknown_files(settings.source, domain), on_event)
    key = site_key(Home().home)
    records: list[ItemRecord] = []
    bad: list[Quarantined] = []
    take = None if settings.mask is None else _as_masked(settings, domain)
    writing: Any = MeasurementWriter if raw or take is not None else DatasetWriter
    with writing(settings.output) as writer:
        for done, path in enumerate(files, start=1):
            try:
                known = {r.item_id for r in records}
                if raw:
                    measurement = _own_measurement(path, settings, key, known)
                    writer.add(measurement)
                    item = Item(measurement.y, measurement.record)
                else:
                    item = _own_item(path, settings, key, known)
                    read = guides.read(places[path], lambda guide: read_file(domain, guide))
                    item = with_guides(item, read)
                    writer.add(item if take is None else take(item, path))
            except BadInputError as error:
                reason = str(error).removeprefix(f"{path}: ")
                bad.append(Quarantined(path, _place(path, settings.source, key), reason))
                on_event(Event("quarantined", done, len(files), f"{bad[-1].code}: {reason}"))
            else:
                records.append(item.record)
                on_event(Event("file", done, len(files), _told(item.record)))
        if not records:
            raise BadInputError(_nothing_usable(settings.source, bad))
        writer.note("quarantined", [{"input": q.code, "reason": q.reason} for q in bad])
    if settings.split == "by-group":
        on_event(told_splits(records))
    return IngestResult(settings.output, open_store(settings.output).content_digest, records, bad)


def _as_masked(settings: IngestSettings, domain: Domain) -> Callable[[Item, Path], Measurement]:
    """What turns a file's item into the measurement of the pixels that it does not lack."""
    from flows.config import RestoreSettings
    from flows.damage import Damage, place_below

    asked = RestoreSettings(input=settings.source, output=settings.output, mask=settings.mask)
    damage = Damage.of(asked, domain)

    def take(item: Item, path: Path) -> Measurement:
        place = place_below(path, settings.source)
        missing = damage.missing(item, place, damage.mask_of(place), domain)
        mask = np.zeros(item.pixels.shape[2:], bool) if missing is None else missing
        return domain.given(item, mask=mask, kernel=None, scale=None, sigma_y=0.0)

    return take


def _own_item(path: Path, settings: IngestSettings, key: bytes, taken: Collection[str]) -> Item:
    """A user's own file as an item of the dataset: keyed name, group and split."""
    item = _named(read_file(load_domain(settings.domain), path), path, settings, key, taken)
    require_whole(item, path)
    return item


def _own_measurement(
    path: Path, settings: IngestSettings, key: bytes, taken: Collection[str]
) -> Measurement:
    """The same of a raw file, which holds a measurement."""
    read = read_measured(load_domain(settings.domain), path)
    item = _named(Item(read.y, read.record), path, settings, key, taken)
    return replace(read, record=item.record)


def _named(
    item: Item, path: Path, settings: IngestSettings, key: bytes, taken: Collection[str]
) -> Item:
    """An item under its keyed name, in its group and split."""
    item = with_site_key(item, key)
    if item.record.item_id in taken:
        raise BadInputError(f"{path}: the same bytes as another file; leave one out")
    folder = _first_folder(path, settings.source)
    group = item.record.item_id if folder is None else f"group-{_code(key, folder)}"
    by_group = settings.split == "by-group"
    split = split_of(group, key) if by_group else cast(Split, settings.split)
    return replace(item, record=replace(item.record, group=group, split=split))


def require_whole(item: Item, path: Path) -> None:
    """Refuse a volume that lacks slices where these are not what is to be restored.

    Raises:
        BadInputError: naming the slices.
    """
    if item.record.meta.get("missing_slices"):
        raise BadInputError(
            f"{path}: {item.record.meta['found'][-1]}; have them restored by `sashiko restore "
            "--mask slices`, or export the series again"
        )


def told_splits(records: Sequence[ItemRecord]) -> Event:
    """How many groups fell into each split; a warning where one to learn from stayed empty."""
    groups = {record.group: record.split for record in records}
    counts = {split: list(groups.values()).count(split) for split, _ in SHARES}
    told = "by-group: " + ", ".join(f"{count} {split}" for split, count in counts.items())
    lacking = [split for split in ("train", "validation") if not counts[split]]
    if not lacking:
        return Event("step", 0, 0, f"{told} (groups: patients or scenes)")
    return Event(
        "warning",
        0,
        0,
        f"{told}: of so few groups (patients or scenes) none fell into {' or '.join(lacking)}, "
        "which train and calibrate need: add groups, or ingest each part by itself with --split "
        "train and --split validation, and name both in `data`",
    )


def _first_folder(path: Path, source: Path) -> str | None:
    """The first folder below the source that a file lies in: a patient's or a scene's."""
    inner = path.relative_to(source).parts if source.is_dir() else ()
    return inner[0] if len(inner) > 1 else None


def find_files(source: Path, domain: Domain) -> list[Path]:
    """The files of a source that a domain reads, sorted; one file stands for itself.

    Of several files that are one item (a DICOM series) the one that stands for them.

    Raises:
        BadInputError: if there is none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise BadInputError(f"{source}: there is no such file or folder; check the path")
    files = domain.gather([p for p in sorted(source.rglob("*")) if _is_candidate(p, domain)])
    if not files:
        kinds = ", ".join(domain.suffixes)
        raise BadInputError(f"{source}: no {domain.name} files in this folder; it reads {kinds}")
    return files


def _is_candidate(path: Path, domain: Domain) -> bool:
    hidden = path.name.startswith(".")
    return not hidden and not path.is_dir() and domain.accepts(path)


def unknown_files(source: Path, domain: Domain) -> list[Path]:
    """The files of a folder that are of no kind the domain reads, sorted; hidden ones left out."""
    if not source.is_dir():
        return []
    return [
        path
        for path in sorted(source.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
        and not domain.accepts(path)
    ]


def tell_unknown(files: Sequence[Path], on_event: EventHandler) -> None:
    """Say how many files are left out because of their kind, if any are."""
    if files:
        suffixes = {path.suffix.lower() for path in files}
        usual = sorted(s for s in suffixes if re.fullmatch(r"\.[a-z0-9]{1,5}", s))
        kinds = ", ".join([*usual[:6], *(["others"] if len(usual[:6]) < len(suffixes) else [])])
        count = "1 file" if len(files) == 1 else f"{len(files)} files"
        on_event(Event("step", 0, 0, f"{count} of unknown kind left out ({kinds})"))


def read_file(domain: Domain, path: Path) -> Item:
    """Read one file; whatever goes wrong with it is its own fault alone."""
    return _read_with(domain.read, path)


def read_measured(domain: Domain, path: Path) -> Measurement:
    """Read one file of raw measurements; whatever goes wrong with it is its own fault alone."""
    return _read_with(domain.measured, path)


def _read_with(read: Callable[[Path], T], path: Path) -> T:
    if path.is_symlink():
        raise BadInputError(f"{path}: a symbolic link; give the file itself")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of reading libraries quote what headers hold
            return read(path)
    except BadInputError:
        raise
    except Exception as error:
        fault = fault_in_words(error, path if path.is_file() else None)
        raise BadInputError(f"{path}: it cannot be read ({fault}); export it again") from error


def split_of(group: str, key: bytes) -> Split:
    """The split of a group: the same for all its items, and for ever with one key."""
    position = int(_code(key, f"split:{group}"), 16) / 16**12
    for split, share in SHARES:
        position -= share
        if position < 0:
            return split
    return SHARES[-1][0]


def _place(path: Path, source: Path, key: bytes) -> str:
    """Keyed hash of a file's place below the source."""
    inner = path.relative_to(source) if source.is_dir() else Path(path.name)
    return f"input-{_code(key, str(inner))}"


def _code(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), sha256).hexdigest()[:12]


def _nothing_usable(source: Path, bad: Sequence[Quarantined]) -> str:
    first = bad[0]
    if len(bad) == 1:
        return f"{first.path}: {first.reason}"
    return f"{source}: none of its {len(bad)} files can be used; the first, {first.path.name}: " + (
        first.reason
    )


def _told(record: ItemRecord) -> str:
    size = " x ".join(str(n) for n in record.shape)
    found = "".join(f"; {sentence}" for sentence in record.meta.get("found", ()))
    return f"{record.item_id}: {size} {record.dtype}, {record.split}{found}"


def site_key(home: Path) -> bytes:
    """The secret of this site, made on first use; it keys the names of items.

    Args:
        home: Sashiko's home folder; the key is kept in site.key, readable by the owner alone.
    """
    path = home / "site.key"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        scratch = home / f".site.key-{secrets.token_hex(8)}"
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        try:
            path.hardlink_to(scratch)  # fails if another process was first: its key holds
        except FileExistsError:
            pass
        finally:
            scratch.unlink()
    return path.read_bytes()


def ingest_samples(
    output: Path,
    *,
    splits: Sequence[str] | None = None,
    demo_only: bool = False,
    items: Sequence[DemoItem] | None = None,
    extra: Path | None = None,
    on_event: EventHandler = ignore,
) -> IngestResult:
    """Make one dataset of the sample data, all domains in it.

    Args:
        output: the dataset.
        splits: which splits; None takes all.
        demo_only: the demo's items, cut as configs/demo.yaml says, and nothing else.
        items: these of the demo's packages, so cut, instead.
        extra: folder of the catalogue's local files.
        on_event: told of each step.

    Raises:
        BadInputError: offline, a file is not the one in the catalogue, or the output exists.
    """
    asked = demo_items() if demo_only and items is None else items
    found = samples(SamplesSettings(extra=extra, demo_only=asked is not None), on_event)
    wanted = [
        s for s in found if s.meta["kind"] == "image" and (splits is None or s.split in splits)
    ]
    cuts = None if asked is None else {item.label: item for item in asked}
    if cuts is not None:
        wanted = [s for s in wanted if s.label in cuts]
    if not wanted:
        raise BadInputError(f"no sample is of the splits {splits}; choose train, validation, test")
    records = []
    with DatasetWriter(output) as writer:
        for done, (sample, whole) in enumerate(_with_whole_items(wanted), start=1):
            cut = None if cuts is None else cuts[sample.label]
            item = sample_item(whole, sample) if cut is None else demo_cut(whole, sample, cut)
            writer.add(item)
            records.append(item.record)
            on_event(Event("file", done, len(wanted), _told(item.record)))
    return IngestResult(output, Dataset(output).digest, records)


def _with_whole_items(wanted: Iterable[SampleFile]) -> Iterator[tuple[SampleFile, Item]]:
    """Each sample with its whole file, read once for all its parts."""
    last: tuple[Path, Item] | None = None
    for sample in wanted:
        if last is None or last[0] != sample.path:
            last = (sample.path, load_domain(sample.domain).read(sample.path))
        yield sample, last[1]


def demo_items() -> list[DemoItem]:
    """The demo's items, from configs/demo.yaml."""
    rows = yaml.safe_load(config_path("demo.yaml").read_text(encoding="utf-8"))["items"]
    return [
        DemoItem(
            label=row["label"],
            slices=tuple(row["slices"]) if "slices" in row else None,
            crop=tuple(row["crop"]) if "crop" in row else None,
        )
        for row in rows
    ]


def demo_cut(whole: Item, sample: SampleFile, cut: DemoItem) -> Item:
    """The demo's slices and window of a sample's whole file."""
    meta = {k: v for k, v in sample.meta.items() if k not in ("slices", "crop")}
    item = sample_item(whole, replace(sample, meta=meta))
    return select(item, slices=cut.slices, crop=cut.crop)


def simulate(settings: SimulateSettings, on_event: EventHandler = ignore) -> SimulateResult:
    """Make a task's measurements of a dataset's items, noise and masks keyed by content.

    Args:
        settings: dataset, tasks, output; each task takes the items of its own domain.
        on_event: told of each measurement.

    Raises:
        BadInputError: if a task or an item is unknown, a task has no item, or the output exists.
    """
    dataset = Dataset(settings.dataset)
    tasks = [load_task(name) for name in dict.fromkeys(settings.tasks)]
    pairs = _pairs(dataset, tasks, settings)
    with MeasurementWriter(settings.output) as writer:
        for done, (record, task) in enumerate(pairs, start=1):
            item = dataset.read(record.item_id)
            if settings.slices is not None:
                item = select(item, slices=settings.slices)
            domain = load_domain(record.domain)
            measurement = domain.simulate(item, task, settings.seed)
            writer.add(measured_with(domain, measurement, item))
            on_event(Event("file", done, len(pairs), f"{record.item_id}: {task.name}"))
        writer.note("dataset", {"digest": dataset.digest})
    store = Measurements(settings.output)
    return SimulateResult(settings.output, store.content_digest, store.entries())


def _pairs(
    dataset: Dataset, tasks: Sequence[Task], settings: SimulateSettings
) -> list[tuple[ItemRecord, Task]]:
    """Every (item, task) that goes together."""
    records = dataset.items()
    if settings.items is not None:
        records = [dataset.record(item_id) for item_id in dict.fromkeys(settings.items)]
    pairs = [(r, t) for r in records for t in tasks if r.domain == t.domain]
    idle = [t for t in tasks if all(t is not other for _, other in pairs)]
    if idle or not pairs:
        name, domain = (idle[0].name, idle[0].domain) if idle else ("no task", "its")
        raise BadInputError(
            f"{settings.dataset}: {name} has no item of the {domain} domain here; "
            "choose another task or dataset"
        )
    return pairs
