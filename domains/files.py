"""What all readers share: digests, bounds checked before decoding, keyed names, pixel checks."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from domains.base import Array, BadInputError, Item

MIN_SIDE = 16
"""Shortest side of an image, in pixels: less holds no structure to restore."""

MAX_PIXELS = 2**30
"""Most pixels (over all slices and bands) that one file may hold; checked on the header."""

MOST_FOLD = 200
"""Times that a measured image can be larger than its compressed file; blank pages are more."""

CODE, CODE_DIGITS = "sha256 ", 12
"""What the code of a file begins with, and the digits of its sha256 in it."""

_SMALL_BYTES = 1 << 27
"""Images up to this size may be unfolded from anything: they fit."""

_CONTENTS = (
    (b"\x89PNG", 0, "a PNG image"),
    (b"\xff\xd8\xff", 0, "a JPEG image"),
    (b"II*\0", 0, "a TIFF image"),
    (b"MM\0*", 0, "a TIFF image"),
    (b"GIF8", 0, "a GIF image"),
    (b"DICM", 128, "a DICOM file"),
    (b"\x89HDF", 0, "an HDF5 file"),
    (b"NRRD", 0, "an NRRD volume"),
    (b"n+1\0", 344, "a NIfTI volume"),
    (b"\x1f\x8b", 0, "compressed by gzip"),
    (b"ftyp", 4, "a video"),
    (b"PK\3\4", 0, "a zip archive"),
    (b"%PDF", 0, "a PDF document"),
)
"""(bytes, their place, what a file with them is)."""

# What these libraries log of a damaged file quotes its header, and headers name patients.
for _name in ("monai", "nibabel.global", "nrrd", "PIL", "pydicom", "rasterio", "tifffile"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def file_digest(path: Path) -> str:
    """Sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_digest(files: Sequence[Path]) -> str:
    """What files hold together: of one its sha256; of several that of theirs, in rising order.

    The names of the files and their order do not matter.
    """
    digests = sorted(file_digest(file) for file in files)
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def code_of(digest: str) -> str:
    """What stands for a file: a person finds it by its sha256, and its name may tell of people."""
    return f"{CODE}{digest[:CODE_DIGITS]}"


def fault_in_words(error: Exception, path: Path | None = None) -> str:
    """What an error of a reading library says of its file, for people who did not write it.

    Args:
        error: of the library; its own words quote paths and headers, and are not passed on.
        path: of the file, which is told by its first bytes if they are another kind's.
    """
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    content = None if path is None else content_of(path)
    if content is not None:
        return f"by its first bytes it is {content}"
    return "it is damaged, cut off, or not what its name says"


def content_of(path: Path) -> str | None:
    """What a file is by its first bytes, in words; None if they tell nothing."""
    with path.open("rb") as file:
        head = file.read(512)
    for magic, place, words in _CONTENTS:
        if head[place : place + len(magic)] == magic:
            return words
    if not any(head):
        return "nothing but zeros"
    printable = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    return "plain text" if printable else None


def keyed_id(domain: str, digest: str, key: bytes) -> str:
    """A name for a user's own file that tells nothing without the site's key.

    Args:
        domain: name of the domain, the id's prefix.
        digest: sha256 of the source.
        key: secret of the site; b"" gives the same name everywhere.
    """
    code = hmac.new(key, f"{domain}:{digest}".encode(), hashlib.sha256).hexdigest()
    return f"{domain}-{code[:12]}"


def with_site_key(item: Item, key: bytes) -> Item:
    """The item under the name that this site's key gives it."""
    item_id = keyed_id(item.record.domain, item.record.source_digest, key)
    return replace(item, record=replace(item.record, item_id=item_id))


def require_file(path: Path) -> None:
    """Refuse what is not a file with something in it.

    Raises:
        BadInputError: naming the path and what is wrong.
    """
    if not path.is_file():
        raise BadInputError(f"{path}: there is no such file; check the path")
    if path.stat().st_size == 0:
        raise BadInputError(f"{path}: the file is empty; fetch or export it again")


def require_size(path: Path, shape: tuple[int, ...], height_width: tuple[int, int]) -> None:
    """Refuse sizes that cannot be restored, before any pixel is decoded.

    Args:
        path: for the message.
        shape: all dimensions that the header states.
        height_width: of one slice.

    Raises:
        BadInputError: if a slice is under MIN_SIDE or the whole over MAX_PIXELS.
    """
    num_pixels = math.prod(shape)
    size = " x ".join(str(n) for n in shape)
    if num_pixels > MAX_PIXELS:
        raise BadInputError(f"{path}: {size} is over the limit of {MAX_PIXELS} pixels; split it")
    if num_pixels <= 0 or min(height_width) < MIN_SIDE:
        raise BadInputError(
            f"{path}: {size} pixels is too small; images need at least {MIN_SIDE} x {MIN_SIDE}"
        )


def require_held(path: Path, num_bytes: int, *, compressed: bool, fold: int = MOST_FOLD) -> None:
    """Refuse a file that cannot hold what its header promises, before memory is taken for it.

    Args:
        path: of the file.
        num_bytes: of the pixels, as stored once they are unfolded.
        compressed: whether the file may be smaller than its pixels.
        fold: times that it may be.

    Raises:
        BadInputError: if it is cut off, or promises what no image of its size unfolds to.
    """
    held = path.stat().st_size
    told = f"{path}: its header promises {num_bytes / 1e6:.4g} MB of pixels"
    if not compressed and held < num_bytes:
        raise BadInputError(f"{told}, the file has {held / 1e6:.2g} MB; fetch or export it again")
    if compressed and num_bytes > _SMALL_BYTES and num_bytes > fold * held:
        raise BadInputError(
            f"{told}, {num_bytes // max(held, 1)} times its size, which no image unfolds to; "
            "export it again without compression"
        )


def require_finite(path: Path, pixels: Array) -> None:
    """Refuse NaN and infinity.

    Raises:
        BadInputError: with the number of such pixels.
    """
    if not np.issubdtype(pixels.dtype, np.floating):
        return
    num_bad = int(pixels.size - np.count_nonzero(np.isfinite(pixels)))
    if num_bad:
        raise BadInputError(
            f"{path}: {num_bad} pixels are NaN or infinite; write a number in their place, and "
            "mark them in a mask (white = missing) to have them restored"
        )


def select(
    item: Item, *, slices: Sequence[int] | None = None, crop: Sequence[int] | None = None
) -> Item:
    """A part of an item: some of its slices or frames, and a window of each.

    The affine moves with the window. Slices that are not evenly spaced have no exact affine: it
    then steps by their mean distance, and `meta["slices"]` names them as the source counts them.

    Args:
        item: the whole.
        slices: indices along z, increasing; None takes all.
        crop: (top, left, height, width) in pixels; None takes the whole plane.

    Raises:
        BadInputError: if the item does not have these slices or this window.
    """
    _, z, h, w = item.pixels.shape
    indices = list(range(z)) if slices is None else [int(s) for s in slices]
    top, left, height, width = (0, 0, h, w) if crop is None else (int(v) for v in crop)
    inside = min(top, left) >= 0 and top + height <= h and left + width <= w
    rising = indices == sorted(set(indices)) and bool(indices)
    if not rising or indices[0] < 0 or indices[-1] >= z or not inside or min(height, width) < 1:
        raise BadInputError(
            f"{item.record.item_id}: slices {indices} with crop {crop} are not rising numbers and "
            f"a window within its {z} x {h} x {w} pixels; choose others"
        )
    planes = slice(None) if slices is None else indices
    step = (indices[-1] - indices[0]) / max(len(indices) - 1, 1) or 1.0
    meta = dict(item.record.meta)
    if slices is not None:
        numbers = meta.get("slices") or range(z)
        meta["slices"] = [numbers[i] for i in indices]
    if crop is not None:
        above, before = (meta.get("crop") or (0, 0))[:2]
        meta["crop"] = [above + top, before + left, height, width]
    record = replace(
        item.record,
        shape=(item.pixels.shape[0], len(indices), height, width),
        affine=_moved(item.record.affine, (left, top, indices[0]), step),
        spacing_mm=_stretched(item.record.spacing_mm, step),
        meta=meta,
    )
    return item.cut(record, planes, slice(top, top + height), slice(left, left + width))


def _moved(
    affine: tuple[tuple[float, ...], ...] | None, origin_xyz: tuple[int, int, int], step: float
) -> tuple[tuple[float, ...], ...] | None:
    """The affine of a window that starts at an origin and steps along z."""
    if affine is None:
        return None
    window = np.diag([1.0, 1.0, step, 1.0])
    window[:3, 3] = origin_xyz
    return tuple(tuple(float(v) for v in row) for row in np.array(affine) @ window)


def _stretched(
    spacing: tuple[float, float, float] | None, step: float
) -> tuple[float, float, float] | None:
    return None if spacing is None else (spacing[0] * step, spacing[1], spacing[2])
