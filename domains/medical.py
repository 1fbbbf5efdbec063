"""NIfTI and NRRD for the medical domains: read and oriented through MONAI, written by nibabel.

Volumes are turned so that slices (row = y, column = x) show the patient as a radiologist hangs the
film: axial ones have array axes (x, y, z) running to the patient's Left, Posterior and Superior.
Volumes of thick coronal or sagittal slices keep those as their slices. Turning is a permutation
and flips of axes, never an interpolation, and the affine moves with it; the codes of the source
are kept, so that writing returns to them exactly. So are the number of its dimensions and what a
NIfTI file says its two affines lead to (scanner, atlas ...).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from domains import dicom, nrrd_header
from domains.base import Array, BadInputError, Item, ItemRecord
from domains.dicom_series import read_series
from domains.files import (
    fault_in_words,
    files_digest,
    keyed_id,
    require_file,
    require_finite,
    require_held,
    require_size,
)

PAIR = (".img", ".hdr")
"""A NIfTI volume of two files: the voxels, which stand for it, and the header."""

NIFTI_SUFFIXES = (".nii", ".nii.gz", PAIR[0])
NRRD_SUFFIXES = (".nrrd",)
SUFFIXES = (*NIFTI_SUFFIXES, *NRRD_SUFFIXES)
LABELS = (("L", "R"), ("P", "A"), ("I", "S"))

AXIAL, CORONAL, SAGITTAL = "LPS", "LIP", "PIL"
"""Where the array axes (x, y, z) of each kind of slices run to."""

PLANES = {"S": AXIAL, "I": AXIAL, "A": CORONAL, "P": CORONAL, "L": SAGITTAL, "R": SAGITTAL}
MODALITIES = {"ct": "CT", "mri": "MR"}
"""What DICOM calls the images of a domain; others are refused there."""

THICK = 1.3
"""A volume is cut across the axis whose spacing is this much above the others', else axially."""

MM_PER = {"meter": 1e3, "micron": 1e-3}
"""Millimetres in the units of length that a NIfTI file may name; what names none is in mm."""

_NIFTI_OFFSET = 352
"""Where the voxels of a single NIfTI-1 file begin."""

SINGULAR = 1e-12
"""Determinant (mm^3) under which an affine says nothing."""


@dataclass(frozen=True)
class Header:
    """What a medical file says of itself before its pixels are read.

    Attributes:
        shape: as stored.
        dtype: as stored.
        scaled: whether the values are those stored times a slope, plus an intercept.
        source_format: "nifti" or "nrrd".
        worlds: of a NIfTI file, where its affines lead to; see worlds_of.
        compressed: whether the file may be smaller than its voxels.
        to_ras_mm: what its coordinates are multiplied by to be R, A and S in mm.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    scaled: bool
    source_format: str
    worlds: Mapping[str, Any] = field(default_factory=dict)
    compressed: bool = False
    to_ras_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)


def companions(path: Path) -> tuple[Path, ...]:
    """The header beside the voxels of a NIfTI pair."""
    return (path.with_suffix(PAIR[1]),) if suffix_of(path).lower() == PAIR[0] else ()


def suffix_of(path: Path) -> str:
    """The suffix as medical files have it: .nii.gz counts as one."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def read_header(path: Path) -> Header:
    """Read a header alone.

    Raises:
        BadInputError: if the file is not what its suffix says.
    """
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise BadInputError(f"{path}: not a NIfTI or NRRD file; expected {', '.join(SUFFIXES)}")
    try:
        return _nifti_header(path) if suffix in NIFTI_SUFFIXES else _nrrd_header(path)
    except BadInputError:
        raise
    except Exception as error:
        # The libraries' own words are not passed on: they quote paths and headers, which name
        # patients.
        kind = "NIfTI" if suffix in NIFTI_SUFFIXES else "NRRD"
        raise BadInputError(
            f"{path}: not a readable {kind} file ({fault_in_words(error, path)}); export it again"
        ) from error


def _nifti_header(path: Path) -> Header:
    import nibabel

    for header in companions(path):
        if header.is_symlink() or not header.is_file():
            raise BadInputError(
                f"{path}: its header of the same name, {PAIR[1]}, is not there; put it beside it"
            )
    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Pair):  # Analyze does not say which side is left
        raise BadInputError(
            f"{path}: an Analyze volume, which states no orientation; convert it to NIfTI"
        )
    mm = MM_PER.get(image.header.get_xyzt_units()[0], 1.0)
    affine = _in_ras_mm(image.affine, (mm, mm, mm))
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < SINGULAR:
        raise BadInputError(f"{path}: its affine is singular or not finite; export it again")
    # nibabel clears the scale in the loaded header; the data proxy has it.
    scaled = (image.dataobj.slope, image.dataobj.inter) != (1.0, 0.0)
    worlds = worlds_of(image.header, mm)
    return Header(
        shape=tuple(image.shape),
        dtype=image.get_data_dtype(),
        scaled=scaled,
        source_format="nifti",
        worlds=worlds,
        compressed=suffix_of(path) == ".nii.gz",
        to_ras_mm=(mm, mm, mm),
    )


def _in_ras_mm(affine: Any, factors: tuple[float, float, float]) -> Array:
    """An affine (4x4) whose world is that of the factors' product with its own."""
    return np.asarray(np.diag([*factors, 1.0]) @ np.asarray(affine, dtype=np.float64))


def worlds_of(header: Any, mm_per_unit: float = 1.0) -> dict[str, Any]:
    """The codes of a NIfTI header's two affines: 0 unset, 1 scanner, 2 aligned, 3 and 4 atlases.

    Where both are set and differ, `qform_of_sform` (4x4) leads from the world of the first to that
    of the second: it stays true of any cut or finer grid of the volume.
    """
    sform, sform_code = header.get_sform(coded=True)
    qform, qform_code = header.get_qform(coded=True)
    worlds = {"sform_code": int(sform_code), "qform_code": int(qform_code)}
    if sform is None or qform is None or np.allclose(sform, qform, rtol=1e-5, atol=1e-5):
        return worlds
    if abs(np.linalg.det(sform[:3, :3])) < SINGULAR:
        return worlds
    between = qform @ np.linalg.inv(sform)
    between[:3, 3] *= mm_per_unit
    return {**worlds, "qform_of_sform": between.tolist()}


def _nrrd_header(path: Path) -> Header:
    header = nrrd_header.read(path)
    return Header(
        header.shape,
        header.dtype,
        False,
        "nrrd",
        compressed=header.compressed,
        to_ras_mm=header.to_ras_mm,
    )


def read_volume(path: Path, domain: str, units: str) -> Item:
    """Read one NIfTI or NRRD volume, or a DICOM series, in canonical orientation.

    Integer values stay as they are stored; scaled or floating values become float32.

    Args:
        path: .nii, .nii.gz, .img (with its .hdr) or .nrrd; 2-D, 3-D, or 4-D with a last dimension
            of 1; a DICOM file, which stands for its series, or the folder of one.
        domain: name of the domain, for the record.
        units: of the values, for the record.

    Returns:
        The item, pixels (1 z h w), affine of array axes (x, y, z).

    Raises:
        BadInputError: if it cannot be used.
    """
    if path.is_dir() or dicom.is_dicom(path):
        return read_series(path, domain, units, MODALITIES.get(domain))
    require_file(path)
    header = read_header(path)
    if header.dtype.kind not in "iuf":
        raise BadInputError(
            f"{path}: values of type {header.dtype} are not supported; "
            "export it with one real number a voxel"
        )
    shape = _volume_shape(path, header.shape)
    # Orientation may permute the axes: no axis but the slice axis may be short, and that is
    # known only afterwards, so the check before decoding takes the two longest.
    require_size(path, shape, _two_longest(shape))
    require_held(path, math.prod(shape) * header.dtype.itemsize, compressed=header.compressed)
    try:
        pixels, affine, codes = _load(path, shape, header)
    except BadInputError:
        raise
    except Exception as error:
        raise BadInputError(
            f"{path}: the pixels cannot be read ({fault_in_words(error)}); export it again"
        ) from error
    require_size(path, pixels.shape, (pixels.shape[2], pixels.shape[3]))
    pixels = _stored_values(path, pixels, header)
    digest = files_digest([path, *companions(path)])
    record = ItemRecord(
        item_id=keyed_id(domain, digest, b""),
        domain=domain,
        shape=pixels.shape,
        dtype=pixels.dtype.name,
        units=units,
        source_digest=digest,
        source_format=header.source_format,
        spacing_mm=spacing_of(affine),
        affine=tuple(tuple(float(v) for v in row) for row in affine),
        meta={
            "orientation": codes,
            "num_source_dims": len(header.shape),
            **({"nifti_worlds": dict(header.worlds)} if header.worlds else {}),
        },
    )
    return Item(pixels, record)


def _volume_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(x, y, z) of a 2-D, 3-D or trivially 4-D file."""
    core = shape
    while len(core) > 3 and core[-1] == 1:
        core = core[:-1]
    if len(core) == 2:
        core = (*core, 1)
    if len(core) != 3:
        size = " x ".join(str(n) for n in shape)
        raise BadInputError(f"{path}: {size} is not one volume; export one volume per file")
    return (core[0], core[1], core[2])


def _two_longest(shape: tuple[int, int, int]) -> tuple[int, int]:
    _, middle, longest = sorted(shape)
    return (middle, longest)


def _load(path: Path, shape: tuple[int, int, int], header: Header) -> tuple[Array, Array, str]:
    """Pixels (1 z h w) and affine in canonical orientation, and the source's axis codes."""
    import nibabel
    import torch

    # MONAI looks for a GPU's decoder of DICOM, and says aloud that there is none.
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    from monai.data import MetaTensor, NibabelReader, NrrdReader
    from monai.transforms import Orientation
    from monai.utils.type_conversion import convert_to_tensor

    # The readers themselves: LoadImage makes all of MONAI's, and one for DICOM misses a GPU, and
    # it fails on values of the other byte order.
    reader = (
        NibabelReader()
        if header.source_format == "nifti"
        else NrrdReader(dtype=None, affine_lps_to_ras=False)
    )
    values, meta = reader.get_data(reader.read(str(path)))
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    affine = np.asarray(meta["affine"], dtype=np.float64)
    if affine.shape == (4, 4):
        affine = _in_ras_mm(affine, header.to_ras_mm)
    if affine.shape != (4, 4) or abs(np.linalg.det(affine[:3, :3])) < SINGULAR:
        raise BadInputError(f"{path}: its affine is singular; export it again")
    image = convert_to_tensor(values.reshape(1, *shape))
    volume = MetaTensor(image, affine=torch.tensor(affine))
    codes = "".join(nibabel.aff2axcodes(affine))
    oriented = Orientation(axcodes=PLANES[codes[_slice_axis(affine, shape)]], labels=LABELS)(volume)
    pixels = np.ascontiguousarray(oriented.numpy().transpose(0, 3, 2, 1))
    return pixels, oriented.affine.numpy().astype(np.float64), codes


def oriented(volume: Array, affine: Array) -> tuple[Array, Array, str, tuple[int, bool]]:
    """Turn a volume (x y z) that a reader put together, as _load turns those of MONAI.

    Returns:
        Pixels (1 z h w), their affine, the axis codes before, and where the last axis went: its
        number among (z, h, w), and whether it was turned round.
    """
    import nibabel
    from nibabel import orientations

    codes = "".join(nibabel.aff2axcodes(affine))
    target = PLANES[codes[_slice_axis(affine, volume.shape)]]
    turn = orientations.ornt_transform(
        orientations.axcodes2ornt(codes), orientations.axcodes2ornt(target)
    )
    turned = orientations.apply_orientation(volume, turn)
    affine = affine @ orientations.inv_ornt_aff(turn, volume.shape)
    pixels = np.ascontiguousarray(turned.transpose(2, 1, 0))[None]
    return pixels, affine, codes, (2 - int(turn[2, 0]), bool(turn[2, 1] < 0))


def _slice_axis(affine: Array, shape: tuple[int, int, int]) -> int:
    """The axis that slices follow each other along: the thick one, else from feet to head."""
    import nibabel

    if shape[2] == 1:
        return 2
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    thickest = int(np.argmax(spacing))
    if spacing[thickest] > THICK * np.delete(spacing, thickest).max():
        return thickest
    codes = nibabel.aff2axcodes(affine)
    return next(axis for axis, code in enumerate(codes) if code in "SI")


def _stored_values(path: Path, pixels: Array, header: Header) -> Array:
    """Integers in the dtype that the file has, everything else in float32; finite."""
    if header.dtype.kind in "iu" and not header.scaled:
        return pixels.astype(header.dtype.newbyteorder("="))
    require_finite(path, pixels)
    with np.errstate(over="ignore"):
        values = pixels.astype(np.float32)
    require_finite(path, values)
    return values


def spacing_of(affine: Array) -> tuple[float, float, float]:
    """(z, y, x) spacing in mm of an affine of array axes (x, y, z)."""
    x, y, z = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
    return (float(z), float(y), float(x))


def write_volume(item: Item, stem: Path, dtype: np.dtype[Any]) -> Path:
    """Write an item as NIfTI (gzip) in its source's orientation, with its exact affine.

    Args:
        item: pixels (1 z h w) in canonical orientation.
        stem: path without suffix.
        dtype: to write; values are taken as they are, so round before.

    Returns:
        stem + ".nii.gz".
    """
    import nibabel
    from nibabel import orientations

    _require_grey(item.record, stem)
    turn = turn_of(item.record)
    volume = orientations.apply_orientation(item.pixels[0].transpose(2, 1, 0), turn)
    path = stem.with_name(stem.name + ".nii.gz")
    nibabel.save(_nifti(np.ascontiguousarray(volume, dtype=dtype), item.record), path)
    return path


def write_slices(
    record: ItemRecord, slice_of: Callable[[int], Array], stem: Path, dtype: np.dtype[Any]
) -> Path | None:
    """Write a volume that cannot be held, slice by slice; voxels and header as of write_volume.

    Args:
        record: of the item.
        slice_of: slice -> its values (h w), to be taken as they are.
        stem: path without suffix.
        dtype: to write.

    Returns:
        stem + ".nii.gz", or None if the file's slices are not the item's: it then must be turned
        as a whole.
    """
    import gzip

    from nibabel import orientations

    _require_grey(record, stem)
    turn = turn_of(record)
    if turn[2, 0] != 2:
        return None
    _, z, h, w = record.shape
    stored = [0, 0, 0]
    for (axis, _), length in zip(turn, (w, h, z), strict=True):
        stored[int(axis)] = length
    # One value seen as many: the header is made of an image that takes no memory.
    image = _nifti(np.broadcast_to(np.zeros((), dtype), stored), record)
    image.update_header()
    header = image.header
    header.set_slope_inter(1.0, 0.0)
    header["vox_offset"] = _NIFTI_OFFSET
    order = range(z) if turn[2, 1] > 0 else range(z - 1, -1, -1)
    flat = turn.copy()
    flat[2, 1] = 1
    path = stem.with_name(stem.name + ".nii.gz")
    with gzip.open(path, "wb", compresslevel=1) as file:
        header.write_to(file)
        file.write(b"\0" * (_NIFTI_OFFSET - file.tell()))
        for index in order:
            plane = orientations.apply_orientation(slice_of(index).T[..., None], flat)
            file.write(np.asarray(plane, dtype).tobytes(order="F"))
    return path


def _require_grey(record: ItemRecord, stem: Path) -> None:
    if record.shape[0] != 1:
        raise BadInputError(f"{stem}: a NIfTI volume has one channel, got {record.shape[0]}")


def turn_of(record: ItemRecord) -> Array:
    """nibabel's transform from canonical axes (x, y, z) to those of the source."""
    import nibabel
    from nibabel import orientations

    return np.asarray(
        orientations.ornt_transform(
            orientations.axcodes2ornt(nibabel.aff2axcodes(_affine(record))),
            orientations.axcodes2ornt(record.meta.get("orientation", AXIAL)),
        )
    )


def _affine(record: ItemRecord) -> Array:
    return np.array(record.affine) if record.affine else _affine_of_spacing(record)


def _nifti(volume: Array, record: ItemRecord) -> Any:
    """The NIfTI image of a volume in its source's orientation."""
    import nibabel
    from nibabel import orientations

    _, z, h, w = record.shape
    affine = _affine(record) @ orientations.inv_ornt_aff(turn_of(record), (w, h, z))
    volume = volume.reshape(_source_shape(volume.shape, record.meta.get("num_source_dims", 3)))
    image = nibabel.Nifti1Image(volume, affine, dtype=volume.dtype)
    _set_worlds(image, affine, record.meta.get("nifti_worlds", {}))
    image.header.set_xyzt_units("mm")
    return image


def _source_shape(shape: tuple[int, ...], num_dims: int) -> tuple[int, ...]:
    """(x, y, z) as the source had it: without a z of 1, or with further dimensions of 1."""
    if num_dims == 2 and shape[2] == 1:
        return shape[:2]
    return (*shape, *(1 for _ in range(num_dims - 3)))


def _set_worlds(image: Any, affine: Array, worlds: Mapping[str, Any]) -> None:
    """Give a NIfTI image its affine, under the codes that the source had for it.

    An sform holds the affine as it is. A qform cannot hold shears: it is set only where the source
    had one. Where the source had neither, an affine that a reader would not guess is an sform.
    """
    sform_code, qform_code = worlds.get("sform_code", 1), worlds.get("qform_code", 0)
    image.set_qform(None, code=0)
    image.set_sform(affine, code=0)
    if not (sform_code or qform_code):
        sform_code = int(not np.allclose(image.header.get_base_affine(), affine, atol=1e-4))
    image.set_sform(affine, code=sform_code)
    if qform_code:
        image.set_qform(np.array(worlds.get("qform_of_sform", np.eye(4))) @ affine, code=qform_code)


def _affine_of_spacing(record: ItemRecord) -> Array:
    """An LPS affine about the origin for items that came without one."""
    z, y, x = record.spacing_mm or (1.0, 1.0, 1.0)
    return np.diag([-x, -y, z, 1.0])
