"""What is wrong with a user's images, and the files that say so: masks and kernels.

Whatever is wrong with a kernel, with the one mask of all images or with a folder of masks is a
fault of the request: it is told once, by the name of that file, before any image is read. A mask
of one image's own is that image's matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from domains import polygons
from domains.base import Array, BadInputError, Domain, Item
from domains.between_slices import missing_planes
from domains.guides import MOST_APART, voxels_apart
from domains.imaging import kernel_fault
from domains.polygons import Polygons
from domains.strokes import find_strokes
from domains.validity import INVALID, lacking, unpack
from flows.boxes import SUFFIXES as BOX_SUFFIXES
from flows.boxes import Box, boxes_of, inside, read_boxes
from flows.config import RestoreSettings

NODATA = "nodata"
SLICES = "slices"
MOVED = "moved"
AUTO = "auto"
_NAMED = (None, NODATA, SLICES, MOVED, AUTO)
_CHOSEN = re.compile(rf"{SLICES}:(\d+(?:,\d+)*)")
MAX_KERNEL_PX = 1024


def is_file(mask: str | Path | None) -> bool:
    """Whether a mask is a file or a folder, and no word for what is missing."""
    return mask not in _NAMED and not chosen_slices(mask)


def chosen_slices(mask: str | Path | None) -> tuple[int, ...]:
    """The slices that `slices:7,9` names, rising; none where it is something else."""
    found = _CHOSEN.fullmatch(mask) if isinstance(mask, str) else None
    return tuple(sorted({int(number) for number in found[1].split(",")})) if found else ()


def given_of(settings: RestoreSettings) -> dict[str, Any]:
    """What the user said is wrong: setting -> value, of files and folders their last name.

    It tells results of one image apart, and stands where the image's own name does: in the
    provenance beside files handed over, never in manifests.
    """
    said: dict[str, Any] = {}
    for name in ("mask", "kernel", "scale", "scale_z", "sigma_y", "noise", "damage", "exposure"):
        value = getattr(settings, name)
        if value != type(settings).model_fields[name].default:
            is_path = name == "kernel" or (name == "mask" and is_file(value))
            said[name] = Path(value).name if is_path else value
    return said


def remark_on(params: Mapping[str, Any]) -> str:
    """What is to be said of an image by what was found out of its damage; "" if nothing.

    Args:
        params: of its measurement.
    """
    if params.get("exposure") == 1:
        return "exposure 1: it is as bright as it should be, and is not made brighter"
    return ""


@dataclass(frozen=True)
class Damage:
    """What is wrong with the images, the same for all or a mask for each.

    Attributes:
        kernel: (kh kw) float64, what blurred them.
        scale: how many times too coarse they are.
        scale_z: how many times too thick their slices are.
        sigma_y: standard deviation of their noise, network units.
        noise: its kind.
        spoilt: what spoilt the images as a whole: "jpeg", "haze", "low-light"; None if nothing.
        exposure: of low light, if it is known.
        nodata: whether pixels with the no-data value are missing.
        slices: whether the slices that a series lacks are missing.
        chosen: further slices that are missing.
        moved: whether the slices are missing that look as if they moved.
        auto: whether strokes, stripes and dead lines are looked for, and missing.
        boxes: place of an image below the input -> boxes that are missing; None if there are none.
        polygons: that are missing in every scene, None if there are none.
        mask_file: the one mask of all images, or the file of boxes.
        mask: what it says: (z h w), True where pixels are missing.
        mask_folder: of a mask for each image.
        masks: place below that folder, without suffixes -> mask.
    """

    kernel: Array | None = None
    scale: int | None = None
    scale_z: int | None = None
    sigma_y: float = 0.0
    noise: str = "gaussian"
    spoilt: str | None = None
    exposure: float | None = None
    nodata: bool = False
    slices: bool = False
    chosen: tuple[int, ...] = ()
    moved: bool = False
    auto: bool = False
    boxes: Mapping[str, tuple[Box, ...]] | None = None
    polygons: Polygons | None = None
    mask_file: Path | None = None
    mask: Array | None = None
    mask_folder: Path | None = None
    masks: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: RestoreSettings, domain: Domain) -> Damage:
        """Take the settings apart, and read what holds for all images.

        Raises:
            BadInputError: naming the option or the file that cannot be used.
        """
        parts = (settings.mask, settings.kernel, settings.scale, settings.scale_z)
        if sum(part is not None for part in parts) > 1:
            raise BadInputError(
                "give one of --mask, --kernel, --scale and --scale-z; for several damages restore "
                "one after the other"
            )
        if settings.noise != "gaussian" and (any(parts) or settings.sigma_y <= 0):
            raise BadInputError(
                f"--noise {settings.noise} is for images that have noise alone: give --sigma-y, "
                "and leave out --mask, --kernel and --scale"
            )
        chosen = chosen_slices(settings.mask)
        if (settings.mask in (SLICES, MOVED) or chosen) and not domain.restores_slices:
            raise BadInputError(
                f"--mask {settings.mask}: images of '{domain.name}' are restored one by one, and a "
                "slice or frame that is missing as a whole has no neighbours there; leave it out"
            )
        alone = not any(parts) and settings.sigma_y <= 0 and settings.noise == "gaussian"
        if settings.damage is not None and not alone:
            raise BadInputError(
                f"--damage {settings.damage} says all that is wrong: leave out --mask, --kernel, "
                "--scale, --scale-z, --sigma-y and --noise"
            )
        if settings.exposure is not None and settings.damage != "low-light":
            raise BadInputError("--exposure is of dark images: give --damage low-light with it")
        names = ("scale", "scale_z", "sigma_y", "noise", "exposure")
        values: dict[str, Any] = {name: getattr(settings, name) for name in names}
        values["spoilt"] = settings.damage
        if settings.kernel is not None:
            values["kernel"] = read_kernel(settings.kernel)
        if settings.mask == NODATA:
            values["nodata"] = True
        elif settings.mask == SLICES:
            values["slices"] = True
        elif chosen:
            values["chosen"] = chosen
        elif settings.mask == MOVED:
            values["moved"] = True
        elif settings.mask == AUTO:
            values["auto"] = True
        elif settings.mask is not None:
            values |= _masks(Path(settings.mask), domain)
        return cls(**values)

    @property
    def stated(self) -> bool:
        """Whether anything is said to be wrong."""
        parts = (self.kernel, self.scale, self.scale_z, self.boxes, self.polygons, self.mask)
        given = any(part is not None for part in (*parts, self.mask_folder, self.spoilt))
        return given or self.nodata or self.auto or self.between or self.sigma_y > 0

    @property
    def between(self) -> bool:
        """Whether slices are missing as a whole: a series that lacks some can be restored then."""
        return self.slices or self.moved or bool(self.chosen)

    def mask_of(self, place: str) -> Path | None:
        """The own mask of an image at a place below the input; None if it needs none.

        Raises:
            BadInputError: if each image has a mask and this one has none.
        """
        if self.mask_folder is None:
            return None
        if place not in self.masks:
            raise BadInputError(
                f"no mask in {self.mask_folder} has the image's name; add one, or leave it out"
            )
        return self.masks[place]

    def missing(self, item: Item, place: str, mask: Path | None, domain: Domain) -> Array | None:
        """True where pixels of the item are missing, or None.

        Args:
            item: the image.
            place: of it, below the input.
            mask: of mask_of.
            domain: reads it.
        """
        if self.nodata:
            return nodata_pixels(item)
        if self.between:
            moved = self._moved(item, domain) if self.moved else ()
            return missing_planes(item.record, (*self.chosen, *moved))
        if self.auto:
            return stroke_pixels(item)
        if self.polygons is not None:
            return polygons.inside(self.polygons, item)
        if self.boxes is not None:
            return inside(boxes_of(self.boxes, place), *item.pixels.shape[2:])
        if mask is None:
            return self.mask
        try:
            read = domain.read(mask)
            _require_same_place(read, item)
            return missing_pixels(read.pixels)
        except BadInputError as error:
            # Without its name, which is the image's: reasons are recorded.
            raise BadInputError(f"its mask: {str(error).removeprefix(f'{mask}: ')}") from error

    def _moved(self, item: Item, domain: Domain) -> Sequence[int]:
        found = domain.moved_slices(item)
        if not found:
            raise BadInputError("no slice looks as if it moved; name some: --mask slices:7,9")
        return found


def _masks(path: Path, domain: Domain) -> dict[str, Any]:
    """The mask fields of a Damage: of one file for all images, or of a folder."""
    if path.is_file() and path.suffix.lower() == polygons.SUFFIX:
        return {"mask_file": path, "polygons": polygons.read_polygons(path)}
    if path.is_file() and path.suffix.lower() in BOX_SUFFIXES:
        return {"mask_file": path, "boxes": read_boxes(path)}
    if path.is_file():
        try:
            missing = missing_pixels(domain.read(path).pixels)
        except BadInputError as error:
            raise BadInputError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
        if missing.all():
            raise BadInputError(
                f"{path}: the mask marks every pixel as missing; white means missing, black means "
                "keep"
            )
        return {"mask_file": path, "mask": missing}
    if not path.is_dir():
        raise BadInputError(f"{path}: there is no such mask file or folder; check the path")
    masks: dict[str, Path] = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            masks.setdefault(place_below(file, path), file)
    if not masks:
        raise BadInputError(f"{path}: holds no masks; put one there for each image, of its name")
    return {"mask_folder": path, "masks": masks}


def read_kernel(path: Path) -> Array:
    """A blur kernel (kh kw) float64 from a .npy array, a text table or a grey image.

    Raises:
        BadInputError: if the file is none of these, or no light would come through.
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
    except BadInputError:
        raise
    except Exception as error:
        raise BadInputError(f"{path}: not a blur kernel; give a .npy array or an image") from error
    fault = kernel_fault(kernel)
    if fault:
        raise BadInputError(f"{path}: {fault}")
    _require_small(path, kernel.shape)
    return np.asarray(kernel, dtype=np.float64)


def _require_small(path: Path, shape: tuple[int, ...]) -> None:
    if max(shape) > MAX_KERNEL_PX:
        size = " x ".join(str(n) for n in shape)
        raise BadInputError(
            f"{path}: {size} is too large for a blur kernel; crop it to {MAX_KERNEL_PX} pixels a "
            "side or fewer"
        )


def _read_grey(path: Path) -> Array:
    from PIL import Image

    with Image.open(path) as image:
        _require_small(path, (image.size[1], image.size[0]))
        values = np.asarray(image)
    return values.astype(np.float64).mean(axis=2) if values.ndim == 3 else values


def missing_pixels(mask: Array) -> Array:
    """A mask image (c z h w), white where pixels are missing, as booleans (z h w).

    White is what lies above the middle of the mask's scale, so that a mask saved as JPEG serves
    too: 0..1 for values of 0 and 1; whole numbers 0..255 in whatever type they are, or 0..white of
    a wider one; other fractions 0..highest.

    Raises:
        BadInputError: if it is not black, and nothing in it is white.
    """
    levels = mask.astype(np.float64).mean(axis=0)
    highest = white = float(mask.max())
    if highest <= 1:
        white = 1.0
    elif mask.dtype.kind in "iu":
        white = 255.0 if highest <= 255 else float(np.iinfo(mask.dtype).max)
    missing = np.asarray(levels > white / 2)
    if highest > 0 and not missing.any():
        raise BadInputError(
            f"nothing in it is white: its values reach {levels.max():g} of {white:g}; write 255 "
            "where pixels are missing, or 1, and 0 elsewhere"
        )
    return missing


def _require_same_place(mask: Item, image: Item) -> None:
    """Refuse a mask of the image's size that by the files' own coordinates lies elsewhere."""
    if mask.record.shape[1:] != image.record.shape[1:]:
        return  # of another size, or one for all slices: looked at where it is used
    apart = voxels_apart(mask.record, image.record)
    if apart > MOST_APART:
        raise BadInputError(
            f"it lies elsewhere than the image, {apart:.2g} pixels away by the files' own "
            "coordinates; resample it onto the image's grid"
        )


def nodata_pixels(item: Item) -> Array:
    """Pixels (z h w), or (c z h w), that hold no data: by a mask of the file, or by their value.

    A GeoTIFF that names no value is taken to mean 0, as scenes are commonly cut. Anywhere else a 0
    is a value: black in a photograph, water in CT.

    Raises:
        BadInputError: if there is none, or the file has no means to say so.
    """
    if INVALID in item.record.meta:
        c, _, h, w = item.pixels.shape
        invalid = unpack(item.record.meta[INVALID], c, h, w)[:, None]
        return invalid[0] if len(invalid) == 1 else invalid
    if not {"nodata", "geotiff"} & item.record.meta.keys():
        raise BadInputError(
            "it names no value for pixels without data, and its zeros may be as real as any other "
            "value; draw a mask file, or save it as a GeoTIFF with a no-data value"
        )
    value = item.record.meta.get("nodata", 0)
    missing = lacking(item.pixels, value)
    if not missing.any():
        raise BadInputError(f"no pixel has the no-data value {value}; give a mask")
    return missing[0] if len(missing) == 1 else missing


def stroke_pixels(item: Item) -> Array:
    """Pixels (z h w) that strokes, scratches, stripes or dead lines cover.

    Raises:
        BadInputError: if there is none.
    """
    missing = find_strokes(item)
    if not missing.any():
        why = ", as JPEG blurs the even colour that tells thin ones" * _is_jpeg(item)
        raise BadInputError(
            f"no stroke, stripe or dead line was found{why}; give a mask that shows them"
        )
    return missing


def _is_jpeg(item: Item) -> bool:
    return item.record.source_format == "jpeg"


def place_below(path: Path, root: Path) -> str:
    """Place of a file below the root, without its suffixes (.nii.gz counts as one)."""
    place = path.relative_to(root) if root.is_dir() else Path(path.name)
    stem = place.name.removesuffix(".gz")
    return str(place.with_name(Path(stem).stem))
