"""A user's damaged images as a measurement store: the images, and what is wrong with them.

    --mask FOLDER|FILE   white is missing; a folder holds one mask an image, of the same name
    --mask nodata        pixels with the file's no-data value (if none is named: 0 in all bands)
    --kernel FILE        what blurred them: an image or a .npy array
    --scale N            they are N times too coarse
    --sigma-y S          noise of standard deviation S on [-1, 1]; alone: noise is all there is

The store is named by the content of what went into it, so that a second run finds it, and lies in
the output's work area. Items are named by keyed hashes; names of files are kept in memory only, for
the files handed back and for the person who gave them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from domains.base import Array, BadInputError, Domain, Item
from domains.files import file_digest, with_site_key
from domains.registry import load_domain
from flows.api_data import find_files, site_key
from flows.config import Home, RestoreSettings
from flows.engine.events import Event, EventHandler
from flows.store import Measurements, MeasurementWriter

NODATA = "nodata"
MAX_KERNEL_PX = 1024


@dataclass(frozen=True)
class Rejected:
    """A file that could not be used.

    Attributes:
        code: keyed hash of its place below the input: names of files may tell of people.
        source: the file, for the person who gave it.
        reason: what is wrong, without the file's name.
    """

    code: str
    source: Path
    reason: str


@dataclass(frozen=True)
class Given:
    """What a folder of damaged images became.

    Attributes:
        path: of the measurement store.
        names: source digest of an item -> names (below the input, without suffix) of its files.
        rejected: files that could not be used.
    """

    path: Path
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rejected: tuple[Rejected, ...] = ()


def take_images(settings: RestoreSettings, work: Path, on_event: EventHandler) -> Given:
    """Make the measurement store of a file or folder of damaged images, or find it made.

    Args:
        settings: input, domain, and what is wrong with the images.
        work: folder that the store is made in.
        on_event: told of each file.

    Raises:
        BadInputError: if the settings make no sense, or none of the files can be used.
    """
    if not settings.input.exists():
        raise BadInputError(f"{settings.input}: there is no such file or folder; check the path")
    if settings.domain is None:
        raise BadInputError(
            f"{settings.input}: images need --domain (ct, mri, city) to say what they are"
        )
    damage = _Damage.of(settings)
    domain = load_domain(settings.domain)
    files = {p: file_digest(p) for p in _images(settings, domain)}
    path = work / f"given-{_digest(files, damage, settings)[:16]}" / "measurements.zarr"
    if not path.exists():
        _write(path, files, domain, damage, settings, on_event)
    reasons = dict(Measurements(path).manifest["rejected"])
    names: dict[str, tuple[str, ...]] = {}
    rejected = []
    for file, digest in files.items():
        name = _name(file, settings.input)
        if digest in reasons:
            rejected.append(Rejected(_code(name), file, reasons[digest]))
        else:
            names[digest] = (*names.get(digest, ()), name)
    return Given(path, names, tuple(rejected))


@dataclass(frozen=True)
class _Damage:
    """What is wrong with the images, the same for all or a mask for each."""

    mask: str | None
    kernel: Array | None
    scale: int | None
    sigma_y: float

    @classmethod
    def of(cls, settings: RestoreSettings) -> _Damage:
        parts = (settings.mask, settings.kernel, settings.scale)
        if sum(part is not None for part in parts) > 1:
            raise BadInputError(
                "give one of --mask, --kernel and --scale; for several damages restore one after "
                "the other"
            )
        if all(part is None for part in parts) and settings.sigma_y <= 0:
            raise BadInputError(
                f"{settings.input}: say what is wrong with the images: --mask, --kernel, --scale "
                "or --sigma-y"
            )
        kernel = None if settings.kernel is None else read_kernel(settings.kernel)
        return cls(settings.mask, kernel, settings.scale, settings.sigma_y)

    def mask_of(self, item: Item, file: Path, root: Path, domain: Domain) -> Array | None:
        """True where pixels are missing, or None."""
        if self.mask is None:
            return None
        if self.mask == NODATA:
            return nodata_pixels(item)
        return missing_pixels(domain.read(_mask_file(Path(self.mask), file, root)).pixels)


def read_kernel(path: Path) -> Array:
    """A blur kernel (kh kw) float64 from a .npy array, a text table or a grey image.

    Raises:
        BadInputError: if the file is none of these.
    """
    if not path.is_file():
        raise BadInputError(f"{path}: there is no such kernel file; check the path")
    try:
        if path.suffix == ".npy":
            kernel = np.load(path, allow_pickle=False)
        elif path.suffix in (".txt", ".csv"):
            kernel = np.loadtxt(path, delimiter="," if path.suffix == ".csv" else None, ndmin=2)
        else:
            kernel = _read_grey(path)
    except Exception as error:
        raise BadInputError(f"{path}: not a blur kernel; give a .npy array or an image") from error
    if kernel.ndim != 2 or kernel.dtype.kind not in "uif" or max(kernel.shape) > MAX_KERNEL_PX:
        raise BadInputError(f"{path}: a blur kernel is 2-D, at most {MAX_KERNEL_PX} pixels a side")
    return kernel.astype(np.float64)


def missing_pixels(mask: Array) -> Array:
    """A mask image (c z h w), white where pixels are missing, as booleans (z h w).

    White is what lies above the middle of the mask's scale, so that a mask saved as JPEG serves
    too: 0..1 for values of 0 and 1, else 0..white of the dtype.
    """
    levels = mask.astype(np.float64).mean(axis=0)
    white = 1.0
    if mask.max() > 1:
        white = float(np.iinfo(mask.dtype).max) if mask.dtype.kind in "iu" else float(mask.max())
    return levels > white / 2


def nodata_pixels(item: Item) -> Array:
    """Pixels (z h w) that hold the no-data value in every band.

    Raises:
        BadInputError: if there is none.
    """
    value = item.record.meta.get("nodata", 0)
    missing = (item.pixels == value).all(axis=0)
    if not missing.any():
        raise BadInputError(f"no pixel has the no-data value {value}; give a mask")
    return np.asarray(missing)


def _images(settings: RestoreSettings, domain: Domain) -> list[Path]:
    """The images of the input; masks and kernels that lie below it are not images."""
    files = find_files(settings.input, domain)
    tools = [Path(p).resolve() for p in (settings.mask, settings.kernel) if p and p != NODATA]
    images = [f for f in files if not any(_within(f.resolve(), tool) for tool in tools)]
    if not images:
        raise BadInputError(f"{settings.input}: holds masks and no images; check the paths")
    return images


def _within(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _write(
    path: Path,
    files: Mapping[Path, str],
    domain: Domain,
    damage: _Damage,
    settings: RestoreSettings,
    on_event: EventHandler,
) -> None:
    key = site_key(Home().home)
    reasons: dict[str, str] = {}
    taken: set[str] = set()
    with MeasurementWriter(path) as writer:
        for done, (file, digest) in enumerate(files.items(), start=1):
            if digest in taken or digest in reasons:
                continue  # a copy of a file that was taken: it gets the same result
            try:
                item = with_site_key(_guarded(domain.read, file), key)
                mask = damage.mask_of(item, file, settings.input, domain)
                writer.add(
                    domain.given(
                        item,
                        mask=mask,
                        kernel=damage.kernel,
                        scale=damage.scale,
                        sigma_y=damage.sigma_y,
                    )
                )
            except BadInputError as error:
                reasons[digest] = str(error).removeprefix(f"{file}: ")
                name = _name(file, settings.input)
                message = f"{name}: {reasons[digest]}"
                on_event(Event("quarantined", done, len(files), message))
            else:
                taken.add(digest)
                on_event(Event("file", done, len(files), f"reading images ({done})"))
        if not taken:
            first, reason = next(iter(files)), next(iter(reasons.values()))
            more = f" (and so are {len(files) - 1} others)" if len(files) > 1 else ""
            raise BadInputError(f"{first}: {reason}{more}")
        writer.note("rejected", reasons)


def _code(name: str) -> str:
    key = site_key(Home().home)
    return f"input-{hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:12]}"


def _guarded(read: Callable[[Path], Item], file: Path) -> Item:
    """Read one file; whatever goes wrong with it is its own fault alone."""
    if file.is_symlink():
        raise BadInputError(f"{file}: a symbolic link; give the file itself")
    try:
        return read(file)
    except BadInputError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise BadInputError(f"{file}: it cannot be read ({kind}); export it again") from error


def _mask_file(mask: Path, image: Path, root: Path) -> Path:
    """The mask of an image: the one file for all, or the file of the same name in the folder.

    Raises:
        BadInputError: if there is none.
    """
    if mask.is_file():
        return mask
    if not mask.is_dir():
        raise BadInputError(f"{mask}: there is no such mask file or folder; check the path")
    stem = mask / _name(image, root)
    found = sorted(
        p for p in stem.parent.glob("*") if p.is_file() and _name(p, mask) == _name(image, root)
    )
    if not found:
        raise BadInputError(f"no mask in {mask} has the image's name; add one, or leave it out")
    return found[0]


def _name(path: Path, root: Path) -> str:
    """Place of a file below the root, without its suffixes (.nii.gz counts as one)."""
    place = path.relative_to(root) if root.is_dir() else Path(path.name)
    stem = place.name.removesuffix(".gz")
    return str(place.with_name(Path(stem).stem))


def _digest(files: Mapping[Path, str], damage: _Damage, settings: RestoreSettings) -> str:
    """Names the store by all that goes into it."""
    masks = {}
    if damage.mask not in (None, NODATA):
        for file in files:
            try:
                masks[str(file)] = file_digest(
                    _mask_file(Path(str(damage.mask)), file, settings.input)
                )
            except BadInputError:
                masks[str(file)] = ""
    content: dict[str, Any] = {
        "format": 1,
        "domain": settings.domain,
        "images": sorted((digest, masks.get(str(file))) for file, digest in files.items()),
        "nodata": damage.mask == NODATA,
        "kernel": None if damage.kernel is None else damage.kernel.tolist(),
        "scale": damage.scale,
        "sigma_y": damage.sigma_y,
        "site": hashlib.sha256(site_key(Home().home)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_grey(path: Path) -> Array:
    from PIL import Image

    with Image.open(path) as image:
        if max(image.size) > MAX_KERNEL_PX:
            raise ValueError("too large for a kernel")
        values = np.asarray(image)
    return values.astype(np.float64).mean(axis=2) if values.ndim == 3 else values
