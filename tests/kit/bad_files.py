"""Hundreds of bad files out of few real ones: cut, flipped, swapped, absurd, bombs; seeded."""

import gzip
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np

BOMB_BYTES = 3 << 30
"""What bombs inflate to: more than the readers of these small images may take."""
_BLOCK = 1 << 24


@dataclass(frozen=True)
class BadFile:
    """One file of the corpus.

    Attributes:
        name: says what is wrong with it; the suffix is the one that readers go by.
        data: its bytes.
        hopeless: whether nobody could read it; what is merely damaged may still be readable.
    """

    name: str
    data: bytes
    hopeless: bool = False


def corpus(kinds: tuple[str, ...], seed: int = 0, *, of_mr: bool = False) -> Iterator[BadFile]:
    """The bad files made of originals of the given suffixes; of MR where DICOM is of MR."""
    for kind in kinds:
        original = dicom_mr() if kind == ".dcm" and of_mr else ORIGINALS[kind]()
        rng = np.random.default_rng([seed, *kind.encode()])
        for name, data, hopeless in _mutations(kind, original, rng):
            yield BadFile(f"{name}{kind}", data, hopeless)
        for name, data in SPECIAL.get(kind, lambda _: {})(original).items():
            yield BadFile(f"{name}{kind}", data, "may" not in name)


def _mutations(
    kind: str, data: bytes, rng: np.random.Generator
) -> Iterator[tuple[str, bytes, bool]]:
    size = len(data)
    yield "empty", b"", True
    yield "text", b"Dear sir, please find my image attached.\n" * 20, True
    yield "zeros", bytes(size), True
    yield "noise", rng.bytes(5000), True
    for share in (0.01, 0.2, 0.5, 0.8, 0.97):
        yield f"cut-{share}", data[: int(share * size)], share < 0.1
    for number in range(6):
        yield f"flipped-header-{number}", _flip(data, rng, 8, min(size, 400)), False
    for number in range(4):
        yield f"flipped-{number}", _flip(data, rng, 30, size), False
    start = int(rng.integers(size // 4, size // 2))
    length = min(size // 4, 4000)
    yield "hole", data[:start] + bytes(length) + data[start + length :], False
    yield "lost-block", data[:start] + data[start + length :], False
    yield "doubled-block", data[: start + length] + data[start:], False
    yield "longer", data + data[: size // 2], False
    others = [other for other in ORIGINALS if _family(other) != _family(kind)]
    for other in rng.permutation(others)[:3]:
        foreign = ORIGINALS[str(other)]()
        known = str(other) == ".dcm"  # by its content, whatever its name
        yield f"truly-a{other}-with", foreign, not known
        yield f"header-of{other}-with", foreign[:132] + data[132:], False


def _flip(data: bytes, rng: np.random.Generator, count: int, within: int) -> bytes:
    changed = bytearray(data)
    for place, bit in zip(rng.integers(0, within, count), rng.integers(0, 8, count), strict=True):
        changed[int(place)] ^= 1 << int(bit)
    return bytes(changed)


def _family(kind: str) -> str:
    return {".nii.gz": ".nii", ".jpeg": ".jpg", ".tiff": ".tif"}.get(kind, kind)


# The originals: small real images of each format.


def _volume() -> tuple[np.ndarray, np.ndarray]:
    """The anatomical MR volume of nibabel's own tests, and its affine."""
    import nibabel

    image = nibabel.load(str(files("nibabel") / "tests" / "data" / "anatomical.nii"))
    return np.asarray(image.dataobj)[:, :, :6].astype(np.int16), image.affine


def _camera() -> np.ndarray:
    from PIL import Image

    path = files("skimage") / "data" / "camera.png"
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))[100:196, 180:308]


@cache
def nifti() -> bytes:
    import nibabel

    values, affine = _volume()
    return nibabel.Nifti1Image(values, affine).to_bytes()


@cache
def nifti_gz() -> bytes:
    return gzip.compress(nifti(), mtime=0)


def _nrrd_head(sizes: str = "33 41 6", encoding: str = "gzip", more: str = "") -> bytes:
    return (
        f"NRRD0004\ntype: int16\ndimension: 3\nspace: left-posterior-superior\nsizes: {sizes}\n"
        "space directions: (2,0,0) (0,2,0) (0,0,3)\nkinds: domain domain domain\n"
        f"endian: little\nencoding: {encoding}\nspace origin: (0,0,0)\n{more}\n"
    ).encode()


@cache
def nrrd() -> bytes:
    values, _ = _volume()
    return _nrrd_head() + gzip.compress(values.tobytes(order="F"), mtime=0)


@cache
def dicom() -> bytes:
    return (files("pydicom") / "data" / "test_files" / "CT_small.dcm").read_bytes()


@cache
def dicom_mr() -> bytes:
    return (files("pydicom") / "data" / "test_files" / "MR_small.dcm").read_bytes()


@cache
def tiff() -> bytes:
    import tifffile

    buffer = io.BytesIO()
    pages = np.stack([_camera(), _camera()[::-1]])
    tifffile.imwrite(buffer, pages, compression="deflate", photometric="minisblack", metadata=None)
    return buffer.getvalue()


@cache
def png() -> bytes:
    return _saved("PNG")


@cache
def jpeg() -> bytes:
    return _saved("JPEG", quality=90)


def _saved(kind: str, **how: object) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(_camera()).convert("RGB").save(buffer, kind, **how)
    return buffer.getvalue()


@cache
def mp4() -> bytes:
    from tempfile import TemporaryDirectory

    import cv2

    with TemporaryDirectory() as name:
        path = Path(name) / "clip.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, (128, 96))
        for shift in range(8):
            writer.write(np.roll(np.repeat(_camera()[..., None], 3, axis=2), shift, axis=1).copy())
        writer.release()
        return path.read_bytes()


def _hdf5(fill: Callable) -> bytes:
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        fill(file)
    return buffer.getvalue()


@cache
def hdf5() -> bytes:
    """Multi-coil k-space as fastMRI lays it out."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 4, 48, 40, 2), dtype=np.float32).view(np.complex64)[..., 0]

    def fill(file) -> None:
        file["kspace"] = values
        file.attrs["acquisition"] = "AXT2"

    return _hdf5(fill)


ORIGINALS: dict[str, Callable[[], bytes]] = {
    ".nii": nifti,
    ".nii.gz": nifti_gz,
    ".nrrd": nrrd,
    ".dcm": dicom,
    ".tif": tiff,
    ".png": png,
    ".jpg": jpeg,
    ".mp4": mp4,
    ".h5": hdf5,
}


# What only one format can say: absurd sizes, and little that becomes much.


def _patched(data: bytes, offset: int, form: str, *values: float) -> bytes:
    part = struct.pack(form, *values)
    return data[:offset] + part + data[offset + len(part) :]


@cache
def _zeros_gz() -> bytes:
    """Gzip members that inflate to BOMB_BYTES of zeros."""
    return gzip.compress(bytes(_BLOCK), 9, mtime=0) * (BOMB_BYTES // _BLOCK)


@cache
def _zeros_deflated(wrapped: bool = True) -> bytes:
    """One deflate stream that inflates to a quarter of BOMB_BYTES, with zlib's wrapper or bare."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 15 if wrapped else -15)
    block = bytes(_BLOCK)
    parts = [squeeze.compress(block) for _ in range(BOMB_BYTES // 4 // _BLOCK)]
    return b"".join([*parts, squeeze.flush()])


def _bad_nifti(data: bytes) -> dict[str, bytes]:
    return {
        "absurd-size": _patched(data, 40, "<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1),
        "absurd-but-allowed-size": _patched(data, 40, "<8h", 3, 1000, 1000, 1000, 1, 1, 1, 1),
        "negative-size": _patched(data, 40, "<8h", 3, -33, 41, 6, 1, 1, 1, 1),
        "no-size": _patched(data, 40, "<8h", 3, 0, 0, 0, 1, 1, 1, 1),
        "seven-dimensions": _patched(data, 40, "<8h", 7, 33, 41, 1, 2, 3, 1, 1),
        "unknown-type": _patched(data, 70, "<h", 999),
        "complex-type": _patched(data, 70, "<hh", 32, 64),
        "data-far-away": _patched(data, 108, "<f", 1e12),
        "scaled-to-infinity": _patched(data, 112, "<ff", 3e38, 3e38),
        "flat-affine": _patched(_patched(data, 252, "<hh", 0, 1), 280, "<12f", *([0.0] * 12)),
        "affine-of-nan": _patched(_patched(data, 252, "<hh", 0, 1), 280, "<12f", *[np.nan] * 12),
    }


def _bad_nifti_gz(_: bytes) -> dict[str, bytes]:
    made = {name: gzip.compress(data, mtime=0) for name, data in _bad_nifti(nifti()).items()}
    big = _patched(nifti()[:352], 40, "<8h", 3, 1000, 1000, 1000, 1, 1, 1, 1)
    made["bomb-of-its-size"] = gzip.compress(big, mtime=0) + _zeros_gz()
    made["bomb-behind-may"] = nifti_gz() + _zeros_gz()
    return made


def _bad_nrrd(data: bytes) -> dict[str, bytes]:
    body = data[len(_nrrd_head()) :]
    raw = gzip.decompress(body)
    return {
        "absurd-size": _nrrd_head("99999 99999 99999") + body,
        "absurd-but-allowed-size": _nrrd_head("1000 1000 1000") + body,
        "absurd-raw": _nrrd_head("1000 1000 1000", "raw") + raw,
        "negative-size": _nrrd_head("-33 41 6") + body,
        "bomb": _nrrd_head() + _zeros_gz(),
        "bomb-of-its-size": _nrrd_head("1000 1000 1000") + _zeros_gz(),
        "data-elsewhere": _nrrd_head(more="data file: /etc/passwd\n"),
        "data-list": _nrrd_head(more="data file: LIST\n/etc/passwd\n/etc/hosts\n"),
        "skips": _nrrd_head(more="line skip: 999999999\n") + body,
        "skips-back": _nrrd_head(encoding="raw", more="byte skip: -9999999\n") + raw,
        "unknown-encoding": _nrrd_head(encoding="magic") + body,
        "endless-header": _nrrd_head(more="a:=b\n" * 100_000) + body[:50],
    }


def _dicom_with(data: bytes, change: Callable) -> bytes:
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = pydicom.dcmread(io.BytesIO(data))
        change(image)
        buffer = io.BytesIO()
        image.save_as(buffer, enforce_file_format=False)
    return buffer.getvalue()


def _bad_dicom(data: bytes) -> dict[str, bytes]:
    def setting(**values: object) -> bytes:
        def change(image) -> None:
            for name, value in values.items():
                setattr(image, name, value)

        return _dicom_with(data, change)

    def without(name: str) -> bytes:
        return _dicom_with(data, lambda image: delattr(image, name))

    rows = data.index(b"\x28\x00\x10\x00US\x02\x00") + 8
    deflated = (files("pydicom") / "data" / "test_files" / "image_dfl.dcm").read_bytes()
    meta_end = 144 + struct.unpack_from("<I", deflated, 140)[0]
    nested = b"\xfe\xff\x00\xe0\xff\xff\xff\xff\x40\x00\x75\x02SQ\x00\x00\xff\xff\xff\xff" * 20_000
    return {
        "absurd-size": _patched(data, rows, "<H", 65535),
        "absurd-rows-and-columns": setting(Rows=65535, Columns=65535),
        "absurd-frames": setting(NumberOfFrames=2_000_000_000),
        "negative-frames": setting(NumberOfFrames=-5),
        "no-pixels": without("PixelData"),
        "no-rows": without("Rows"),
        "no-bits": without("BitsAllocated"),
        "odd-bits": setting(BitsAllocated=13),
        "absurd-samples": setting(SamplesPerPixel=60000),
        "no-slope": setting(RescaleSlope=0),
        "spacing-of-nothing-may": setting(PixelSpacing=[0, 0]),
        "wrong-syntax": data.replace(b"1.2.840.10008.1.2.1\x00", b"1.2.840.10008.1.2.5\x00", 1),
        "deflated-bomb": deflated[:meta_end] + _zeros_deflated(False),
        "endless-nesting": data[:1000] + nested,
        "odd-representation-may": data.replace(b"\x08\0\x08\0CS", b"\x08\0\x08\0C\x13", 1),
    }


def _tiff_tag(data: bytes, tag: int) -> int:
    """Where the value of a tag of the first page stands (little-endian classic TIFF)."""
    start = struct.unpack_from("<I", data, 4)[0]
    for entry in range(struct.unpack_from("<H", data, start)[0]):
        place = start + 2 + 12 * entry
        if struct.unpack_from("<H", data, place)[0] == tag:
            return place
    raise KeyError(tag)


def _tiff_set(data: bytes, tag: int, value: int) -> bytes:
    return _patched(data, _tiff_tag(data, tag) + 2, "<HII", 4, 1, value)


def _bad_tiff(data: bytes) -> dict[str, bytes]:
    first = struct.unpack_from("<I", data, 4)[0]
    next_page = first + 2 + 12 * struct.unpack_from("<H", data, first)[0]
    bomb = _zeros_deflated()
    strip, length = (_tiff_tag(data, tag) for tag in (273, 279))
    exploding = _patched(data, strip + 2, "<HII", 4, 1, len(data)) + bomb
    return {
        "absurd-width": _tiff_set(data, 256, 2**31 - 1),
        "absurd-size": _tiff_set(_tiff_set(data, 256, 2**31 - 1), 257, 2**31 - 1),
        "absurd-but-allowed-size": _tiff_set(_tiff_set(data, 256, 30_000), 257, 30_000),
        "no-size": _tiff_set(data, 256, 0),
        "pages-in-a-circle-may": _patched(data, next_page, "<I", first),
        "bomb-may": _patched(exploding, length + 2, "<HII", 4, 1, len(bomb)),
        "absurd-samples": _tiff_set(data, 277, 60000),
        "odd-compression": _tiff_set(data, 259, 31337),
    }


def _png_part(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def _bad_png(data: bytes) -> dict[str, bytes]:
    def of(width: int, height: int, body: bytes, before: bytes = b"", depth: int = 8) -> bytes:
        head = _png_part(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
        tail = _png_part(b"IDAT", body) + _png_part(b"IEND", b"")
        return data[:8] + head + before + tail

    words = _png_part(b"zTXt", b"Comment\0\0" + _zeros_deflated())
    small = zlib.compress(bytes(3 * 64 * 64 + 64))
    return {
        "absurd-size": of(2**31 - 1, 2**31 - 1, small),
        "absurd-deep-size": of(40_000, 20_000, small, depth=16),
        "absurd-but-allowed-size": of(12_000, 12_000, small),
        "no-size": of(0, 0, small),
        "bomb-may": of(64, 64, _zeros_deflated()),
        "bomb-of-words-may": of(64, 64, small, words),
    }


def _bad_jpeg(data: bytes) -> dict[str, bytes]:
    frame = data.index(b"\xff\xc0") + 5
    return {
        "absurd-size": _patched(data, frame, ">HH", 65500, 65500),
        "absurd-but-allowed-size-may": _patched(data, frame, ">HH", 9000, 9000),
        "no-size": _patched(data, frame, ">HH", 0, 0),
    }


def _bad_hdf5(_: bytes) -> dict[str, bytes]:
    import h5py

    def absurd(file) -> None:
        shape = (2**20, 2**10, 2**16, 2)
        file.create_dataset("kspace", shape, np.complex64, chunks=(1, 1, 2**10, 2))

    def allowed(file) -> None:
        file.create_dataset("kspace", (2**6, 8, 2**10, 2**10), np.complex64, chunks=True)

    def elsewhere(file) -> None:
        file["kspace"] = h5py.ExternalLink("/etc/passwd", "/kspace")

    def outside(file) -> None:
        space = [("/etc/passwd", 0, 800)]
        file.create_dataset("kspace", (1, 1, 10, 10), np.complex64, external=space)

    def circle(file) -> None:
        file["kspace"] = h5py.SoftLink("/kspace")

    def words(file) -> None:
        file["kspace"] = "Dear sir"

    def nothing(file) -> None:
        file["pictures"] = np.zeros((3, 4))

    def folder(file) -> None:
        file.create_group("kspace")

    def not_numbers(file) -> None:
        file["kspace"] = np.full((1, 4, 48, 40), np.nan, np.complex64)

    made = (absurd, allowed, elsewhere, outside, circle, words, nothing, folder, not_numbers)
    return {make.__name__.replace("_", "-"): _hdf5(make) for make in made}


SPECIAL: dict[str, Callable[[bytes], dict[str, bytes]]] = {
    ".nii": _bad_nifti,
    ".nii.gz": _bad_nifti_gz,
    ".nrrd": _bad_nrrd,
    ".dcm": _bad_dicom,
    ".tif": _bad_tiff,
    ".png": _bad_png,
    ".jpg": _bad_jpeg,
    ".h5": _bad_hdf5,
}
