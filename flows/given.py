"""A user's damaged images as a measurement store: the images, and what is wrong with them.

    --mask FOLDER|FILE   white is missing; a folder holds one mask an image, of the same name
    --mask BOXES         a .csv or .json file of boxes: see boxes.py; .geojson: domains/polygons.py
    --mask auto          strokes, stripes and dead lines that are found: see domains/strokes.py
    --mask nodata        pixels without data, as the file says (a GeoTIFF that names no value: 0)
    --mask slices        slices that a DICOM series lacks
    --mask slices:7,9    these slices (from 0), as `sashiko inspect` counts them
    --mask moved         slices of MRI that look as if they moved while they were measured
    --kernel FILE        what blurred them: an image or a .npy array
    --scale N            they are N times too coarse
    --scale-z N          their slices are N times too thick
    --sigma-y S          noise of standard deviation S on [-1, 1]; alone: noise is all there is
    --noise rician       which is that of a magnitude image
    --damage NAME        jpeg, haze or low-light: all that is wrong, its strength read off them

What is known of them besides goes with them: --guide NAME=FOLDER|FILE, see guide_files.py.

Raw measurements (k-space) say themselves what was measured: none of these goes with them.

The store is named by the content of what went into it, so that a run that was stopped finds it,
and lies in the output's work area until all of it is restored and no run uses it. Files of equal
content and equal masks are one item. Items are named by keyed hashes; names of files are kept in
memory only, for the files handed back and for the person who gave them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from domains.base import BadInputError, Domain, Item, Measurement
from domains.files import file_digest, files_digest, keyed_id
from domains.guides import measured_with, with_guides
from domains.registry import load_domain
from flows.api_data import (
    find_files,
    read_file,
    read_measured,
    require_whole,
    site_key,
    tell_unknown,
    unknown_files,
)
from flows.boxes import boxes_of
from flows.config import Home, RestoreSettings
from flows.damage import Damage, is_file, place_below, remark_on
from flows.engine.events import Event, EventHandler
from flows.engine.in_use import InUse, alone_with
from flows.guide_files import Guides
from flows.roots import Root
from flows.store import Measurements, MeasurementWriter
from flows.store_check import verify_store

FORMAT = 3
"""Of the stores made here; another format has another name."""

UNSTATED = (
    "say what is wrong with the images: --mask, --kernel, --scale, --scale-z, --sigma-y or --damage"
)
SAYS_ITSELF = (
    "a raw measurement says itself what was measured; leave out --mask, --kernel, --scale, "
    "--scale-z, --sigma-y and --damage"
)

_GONE = ".gone-"


@dataclass(frozen=True)
class Rejected:
    """A file that could not be used.

    Attributes:
        code: keyed hash of its place below the input: names of files may tell of people.
        source: the file, for the person who gave it.
        digest: of its content, with its companions.
        reason: what is wrong, without the file's name.
    """

    code: str
    source: Path
    digest: str
    reason: str


@dataclass(frozen=True)
class Given:
    """What a folder of damaged images became.

    Attributes:
        path: of the measurement store.
        names: item -> names (below the input, without suffix) of its files.
        sources: item -> the file that it was read from; of equal ones the first.
        rejected: files that could not be used.
        num_unknown: files of the input that are of no kind the domain reads.
        remarks: (file, what its user should know) of files that are used.
        scratch: folder of the store, to be removed when all is restored; None if the store is the
            user's own.
        made: folders that were not there before, the innermost first.
        in_use: keeps other runs from removing the scratch; None if there is none.
    """

    path: Root
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sources: Mapping[str, Path] = field(default_factory=dict)
    rejected: tuple[Rejected, ...] = ()
    num_unknown: int = 0
    remarks: tuple[tuple[Path, str], ...] = ()
    scratch: Path | None = None
    made: tuple[Path, ...] = ()
    in_use: InUse | None = None

    def release(self) -> None:
        """Let other runs remove the scratch: this one reads it no more."""
        if self.in_use is not None:
            self.in_use.end()

    def withdraw(self) -> None:
        """Leave nothing of a request that is refused after all; what was there before stays."""
        self.release()
        if self.scratch in self.made:
            remove_scratch(self.scratch)
        _remove_empty(self.made)


def take_images(settings: RestoreSettings, work: Path, on_event: EventHandler) -> Given:
    """Make the measurement store of a file or folder of damaged images, or find it made.

    Args:
        settings: input, domain, and what is wrong with the images.
        work: folder that the store is made in.
        on_event: told of each file.

    Raises:
        BadInputError: if the settings make no sense, or none of the files can be used; nothing is
            left behind then.
    """
    folder = local_images(settings)
    if settings.domain is None:
        raise BadInputError(
            f"{settings.input}: images need --domain (ct, mri, city) to say what they are"
        )
    domain = load_domain(settings.domain)
    damage = Damage.of(settings, domain)
    images, unknown = _images(settings, folder, domain)
    require_stated(settings, images, damage, domain)
    guides = Guides.of(settings.guides)
    sources = [_Source.of(path, folder, damage, domain, guides) for path in images]
    guides.require([source.place for source in sources], on_event)
    tell_unknown(unknown, on_event)
    path = work / f"given-{_digest(sources, damage, settings)[:16]}" / "measurements.zarr"
    made = tuple(p for p in path.parents if not p.exists())
    in_use = InUse(path.parent)  # before it is looked for: who found it unused may be removing it
    try:
        _make(path, sources, domain, damage, guides, on_event)
        given = _given(path, sources, domain)
    except BaseException:
        in_use.end()
        _remove_empty(made)
        raise
    return replace(given, num_unknown=len(unknown), made=made, in_use=in_use)


def _make(
    path: Path,
    sources: Sequence[_Source],
    domain: Domain,
    damage: Damage,
    guides: Guides,
    on_event: EventHandler,
) -> None:
    """Make the store unless it is there and whole; another run may make it meanwhile."""
    if path.exists():
        found = path.stat()
        if _is_whole(path):
            return
        if path.exists() and os.path.samestat(found, path.stat()):  # it is still that one
            set_gone(path.parent)
            message = "the measurements of an earlier run are damaged: made again from the images"
            on_event(Event("corrupt", 0, 0, message))
    try:
        _write(path, sources, domain, damage, guides, on_event)
    except BadInputError:
        if not path.exists():
            raise


def _is_whole(path: Path) -> bool:
    """Whether a store that was found is what was written, every chunk of it."""
    try:
        store = Measurements(path)
        return isinstance(store.manifest.get("rejected"), dict) and verify_store(store).intact
    except (BadInputError, OSError, ValueError, KeyError, TypeError):
        return False


def _given(path: Path, sources: Sequence[_Source], domain: Domain) -> Given:
    """The store, with the files that are and are not in it."""
    store = Measurements(path)
    reasons = dict(store.manifest["rejected"])
    names: dict[str, tuple[str, ...]] = {}
    files: dict[str, Path] = {}
    rejected = []
    for source in sources:
        if source.content in reasons:
            reason = reasons[source.content]
            rejected.append(Rejected(_code(source.place), source.path, source.digest, reason))
        else:
            item_id = source.item_id(domain)
            names[item_id] = (*names.get(item_id, ()), source.place)
            files.setdefault(item_id, source.path)
    told = ((files.get(entry.item_id), remark_on(entry.params)) for entry in store.entries())
    remarks = tuple((file, remark) for file, remark in told if file is not None and remark)
    return Given(path, names, files, tuple(rejected), remarks=remarks, scratch=path.parent)


def local_images(settings: RestoreSettings) -> Path:
    """The folder or file of the images.

    Raises:
        BadInputError: if there is none, or it is on S3, which holds measurements only.
    """
    if not isinstance(settings.input, Path):
        raise BadInputError(
            f"{settings.input}: holds no finished store of measurements; images are read from a "
            "folder here, and a store is there once its manifest.json is copied too"
        )
    if not settings.input.exists():
        raise BadInputError(f"{settings.input}: there is no such file or folder; check the path")
    return settings.input


def remove_scratch(folder: Path) -> None:
    """Remove the folder of a store that no run uses: at once for all who look, then its bytes."""
    with alone_with(folder) as alone:
        if alone:
            set_gone(folder)
    for gone in folder.parent.glob(f"{_GONE}*"):  # those of a killed run too
        shutil.rmtree(gone, ignore_errors=True)


def set_gone(folder: Path) -> None:
    """Take a folder out of sight; another run may have been first."""
    with suppress(OSError):
        folder.rename(folder.with_name(f"{_GONE}{uuid4().hex}"))


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty, or never made
            folder.rmdir()


@dataclass(frozen=True)
class _Source:
    """An image and its own mask, all that tells one result from another.

    Attributes:
        path: of the file.
        place: its name below the input, without suffixes.
        digest: of its bytes, and of its companions'.
        mask: the file that says what is missing in this image alone, if one does.
        mask_digest: of its bytes, or of the boxes that are its own.
        fault: why it has no mask, "" where it needs none or has one.
        guides: name -> sha256, of the files that are its guides.
    """

    path: Path
    place: str
    digest: str
    mask: Path | None = None
    mask_digest: str = ""
    fault: str = ""
    guides: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, path: Path, folder: Path, damage: Damage, domain: Domain, guides: Guides
    ) -> _Source:
        place, digest = place_below(path, folder), files_digest(files_of(path, domain))
        shown = guides.digests(place)
        if domain.is_raw(path):
            fault = SAYS_ITSELF if damage.stated else ""
            return cls(path, place, digest, fault=fault, guides=shown)
        try:
            mask = damage.mask_of(place)
        except BadInputError as error:
            return cls(path, place, digest, fault=str(error))
        own = "" if mask is None else file_digest(mask)
        if damage.boxes is not None:
            told = json.dumps(boxes_of(damage.boxes, place))
            own = hashlib.sha256(told.encode()).hexdigest()
        return cls(path, place, digest, mask, own, guides=shown)

    @property
    def content(self) -> str:
        """What equal sources have in common: the bytes of the image, its mask and its guides."""
        return ":".join([self.digest, self.mask_digest, *self._told_guides])

    @property
    def _told_guides(self) -> list[str]:
        return [json.dumps(dict(self.guides), sort_keys=True)] if self.guides else []

    def item_id(self, domain: Domain) -> str:
        """Name of the item; an image with two masks, or with two guides, is two items."""
        own = [self.mask_digest] if self.mask_digest else []
        seen = ":".join([self.digest, *own, *self._told_guides])
        return keyed_id(domain.name, seen, site_key(Home().home))


def require_stated(
    settings: RestoreSettings, images: Sequence[Path], damage: Damage, domain: Domain
) -> None:
    """Refuse images of which nothing is said to be wrong; raw measurements say it themselves.

    Raises:
        BadInputError: naming the input.
    """
    if not damage.stated and not any(domain.is_raw(path) for path in images):
        raise BadInputError(f"{settings.input}: {_unstated(images, domain)}")


def _unstated(images: Sequence[Path], domain: Domain) -> str:
    """What is to be said of images; of one file of an unknown kind, that it is one."""
    if any(domain.accepts(path) for path in images):
        return UNSTATED
    return f"not a kind of file that '{domain.name}' reads: {', '.join(domain.suffixes)}"


def files_of(path: Path, domain: Domain) -> list[Path]:
    """A file and its companions, as far as they are there: what counts as one image."""
    return [path, *(p for p in domain.companions(path) if p.is_file())]


def _images(
    settings: RestoreSettings, folder: Path, domain: Domain
) -> tuple[list[Path], list[Path]]:
    """The images of the input, and the files of unknown kind.

    Masks and kernels that lie below the input are neither, and no more is what was restored, now
    or by another run.
    """
    files = find_files(folder, domain)
    is_output = cache(_is_output)
    given = (settings.mask, settings.kernel, *settings.guides.values())
    tools = [Path(p).resolve() for p in given if p is not None and is_file(p)]
    output = settings.output
    if isinstance(output, Path):
        tools.append(output.resolve())

    def is_result(path: Path) -> bool:
        return any(is_output(p) for p in path.parents if p != folder and _within(p, folder))

    def own(paths: Sequence[Path]) -> list[Path]:
        left = [p for p in paths if not any(_within(p.resolve(), tool) for tool in tools)]
        return [p for p in left if not is_result(p)]

    images = own(files)
    if not images:
        raise BadInputError(f"{folder}: holds masks or results and no images; check the paths")
    beside = {file for path in images for file in domain.companions(path)}
    return images, [p for p in own(unknown_files(folder, domain)) if p not in beside]


def _is_output(folder: Path) -> bool:
    """Whether a folder holds results of ours: its campaigns, and what became of them."""
    return (folder / "campaigns").is_dir() and (
        (folder / "manifests").is_dir() or (folder / ".work").is_dir()
    )


def _within(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _write(
    path: Path,
    sources: Sequence[_Source],
    domain: Domain,
    damage: Damage,
    guides: Guides,
    on_event: EventHandler,
) -> None:
    reasons: dict[str, str] = {}
    taken: set[str] = set()
    with MeasurementWriter(path) as writer:
        for done, source in enumerate(sources, start=1):
            if source.content in taken or source.content in reasons:
                continue  # a copy of what was taken: it gets the same result
            try:
                _add(writer, source, domain, damage, guides)
            except BadInputError as error:
                reasons[source.content] = _reason(error, source, domain)
                message = f"{source.place}: {reasons[source.content]}"
                on_event(Event("quarantined", done, len(sources), message))
            else:
                taken.add(source.content)
                on_event(Event("file", done, len(sources), f"reading images ({done})"))
        if not taken:
            reason = next(iter(reasons.values()))
            more = f" (and so are {len(sources) - 1} others)" if len(sources) > 1 else ""
            raise BadInputError(f"{sources[0].path}: {reason}{more}")
        writer.note("rejected", reasons)


def _add(
    writer: MeasurementWriter, source: _Source, domain: Domain, damage: Damage, guides: Guides
) -> None:
    """Read one image and add it as a measurement; raw files hold one already."""
    if domain.is_raw(source.path):
        if source.fault:
            raise BadInputError(source.fault)
        raw = read_measured(domain, source.path)
        record = replace(raw.record, item_id=source.item_id(domain))
        raw, item = replace(raw, record=record), Item(raw.y, record)
        writer.add(_guided(raw, item, source, domain, guides))
        return
    if not damage.stated:
        raise BadInputError(UNSTATED)
    read = read_file(domain, source.path)
    if source.fault:
        raise BadInputError(source.fault)
    if not damage.between:
        require_whole(read, source.path)
    item = Item(read.pixels, replace(read.record, item_id=source.item_id(domain)))
    if damage.spoilt is not None:
        spoilt, exposure = damage.spoilt, damage.exposure
        measurement = domain.given_spoilt(item, source.path, damage=spoilt, exposure=exposure)
    elif damage.noise != "gaussian":
        measurement = domain.given_noisy(item, noise=damage.noise, sigma_y=damage.sigma_y)
    elif damage.scale_z is not None:
        measurement = domain.given_thick(item, scale_z=damage.scale_z, sigma_y=damage.sigma_y)
    else:
        measurement = domain.given(
            item,
            mask=damage.missing(item, source.place, source.mask, domain),
            kernel=damage.kernel,
            scale=damage.scale,
            sigma_y=damage.sigma_y,
        )
    if damage.scale is not None:  # guides lie on the grid that is wanted
        item = replace(item, record=measurement.record)
    writer.add(_guided(measurement, item, source, domain, guides))


def _guided(
    measurement: Measurement, item: Item, source: _Source, domain: Domain, guides: Guides
) -> Measurement:
    """A measurement with the guides of its image, which lie on the item's grid."""
    if not source.guides:
        return measurement
    read = guides.read(source.place, lambda path: read_file(domain, path))
    return measured_with(domain, measurement, with_guides(item, read))


def _reason(error: BadInputError, source: _Source, domain: Domain) -> str:
    """What is wrong with an image: names of files may tell of people, and codes tell nothing."""
    reason = str(error).removeprefix(f"{source.path}: ")
    return reason.removeprefix(f"{source.item_id(domain)}: ")


def _code(place: str) -> str:
    key = site_key(Home().home)
    return f"input-{hmac.new(key, place.encode(), hashlib.sha256).hexdigest()[:12]}"


def _digest(sources: Sequence[_Source], damage: Damage, settings: RestoreSettings) -> str:
    """Names the store by all that goes into it."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "domain": settings.domain,
        "images": sorted(source.content for source in sources),
        "nodata": damage.nodata,
        **({"slices": True} if damage.slices else {}),
        **({"chosen": damage.chosen} if damage.chosen else {}),
        **({"moved": True} if damage.moved else {}),
        **({} if damage.scale_z is None else {"scale_z": damage.scale_z}),
        "mask": None if damage.mask_file is None else file_digest(damage.mask_file),
        "kernel": None if damage.kernel is None else damage.kernel.tolist(),
        "scale": damage.scale,
        "sigma_y": damage.sigma_y,
        **({} if damage.noise == "gaussian" else {"noise": damage.noise}),
        **({"auto": True} if damage.auto else {}),
        **({} if damage.spoilt is None else {"damage": [damage.spoilt, damage.exposure]}),
        "site": hashlib.sha256(site_key(Home().home)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
