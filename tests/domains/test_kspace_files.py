"""Raw k-space of every format against one scan, written by the formats' own libraries."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest
from kspace_kit import (
    acquisition,
    centred_fft,
    header,
    lines,
    scan,
    write_bart,
    write_fastmri,
    write_ismrmrd,
)

from domains.base import BadInputError
from domains.mri.domain import MRI
from domains.mri.kspace import read_scan, transform_of_centred
from domains.mri.measured import cropped_readout, measured

MATRIX, FOV = (128, 48, 1), (320.0, 192.0, 6.0)
RECON_FOV = (160.0, 192.0, 6.0)


def image_of(k):
    return np.fft.ifft2(k, norm="ortho")


def closeness(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def oversampled(k):
    """The k-space of the middle half of the rows' field of view: the readout at twice the rate."""
    image = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(k, axes=-2), axis=-2), axes=-2)
    h = k.shape[-2]
    wide = np.pad(image, [(0, 0)] * (k.ndim - 2) + [(h // 2, h // 2), (0, 0)])
    return np.fft.fftshift(np.fft.fft(np.fft.ifftshift(wide, axes=-2), axis=-2), axes=-2)


@pytest.mark.parametrize("size", [(64, 48), (65, 47), (64, 47)])
def test_the_middle_of_the_image_stands_where_it_was(size):
    image = np.random.default_rng(0).standard_normal(size) + 1j
    assert closeness(image_of(transform_of_centred(centred_fft(image))), image) < 1e-5


@pytest.mark.parametrize("first", [False, True])
def test_numpy_scans_are_found_centred_or_not(tmp_path, first):
    full = scan(65, 48)
    k = np.fft.fft2(full.image * full.maps, norm="ortho") if first else full.k
    np.save(tmp_path / "scan.npy", k.astype(np.complex128))
    found = read_scan(tmp_path / "scan.npy")
    assert (found.k.shape, found.k.dtype, found.source_format) == ((1, 4, 65, 48), "c8", "npy")
    assert closeness(image_of(found.k)[0], full.image * full.maps) < 0.2


def test_bart_is_read_in_its_own_order(tmp_path):
    full = scan(sigma=0.0)
    path = write_bart(tmp_path / "scan", full.k)
    assert closeness(image_of(read_scan(path).k)[0], full.image * full.maps) < 1e-5
    assert [p.suffix for p in MRI().companions(path)] == [".hdr"]


def test_a_3d_scan_becomes_planes_across_its_readout(tmp_path):
    rng = np.random.default_rng(0)
    volume = rng.standard_normal((20, 32, 24)) + 1j * rng.standard_normal((20, 32, 24))
    shifted = np.fft.ifftshift(volume)
    k = np.fft.fftshift(np.fft.fftn(shifted, norm="ortho")).astype(np.complex64)
    (tmp_path / "v.hdr").write_text("# Dimensions\n20 32 24 1 1\n")
    k.transpose(2, 1, 0).tofile(tmp_path / "v.cfl")
    assert closeness(image_of(read_scan(tmp_path / "v.cfl").k)[:, 0], volume) < 1e-5
    k[3, 5, 7] = 0  # in the midst of a readout
    k.transpose(2, 1, 0).tofile(tmp_path / "v.cfl")
    with pytest.raises(BadInputError, match="not measured in full"):
        read_scan(tmp_path / "v.cfl")


@pytest.mark.parametrize("coils", [4, 1])
def test_fastmri_loses_the_oversampling_of_its_readout_and_nothing_else(tmp_path, coils):
    full = scan(coils=4, sigma=0.0)
    k = np.stack([full.k, 2 * full.k])[:, : coils if coils > 1 else None]
    k = k if coils > 1 else k[:, :1]
    wide = oversampled(k) / np.sqrt(2)  # so that the transforms are unitary
    wide[..., ~lines(48)] = 0
    stored = wide if coils > 1 else wide[:, 0]
    path = write_fastmri(tmp_path / "f.h5", stored, header(MATRIX, FOV, RECON_FOV))
    found = measured(path)
    assert found.record.shape == (2, 2, 64, 48)
    assert found.record.spacing_mm == pytest.approx((6.0, 2.5, 4.0))
    assert found.operator == ("multi-coil" if coils > 1 else "fourier")
    mask = found.arrays["mask"]
    assert mask.shape == (2, 1, 64, 48)
    assert np.array_equal(np.fft.fftshift(mask[0, 0], axes=1)[0], lines(48))
    assert mask.all(axis=2)[..., mask.any(axis=2)[0, 0]].all()
    raw = read_scan(path)
    assert raw.rows == 64
    cropped = cropped_readout(path, raw.k, raw.rows)
    assert closeness(cropped, transform_of_centred(k * lines(48))) < 1e-5
    assert "CANARY" not in json.dumps(asdict(found.record))


def readouts(k, **more):
    """An acquisition of every line that holds anything, in a shuffled order."""
    order = np.random.default_rng(1).permutation(np.flatnonzero(np.abs(k).any(axis=(0, 1))))
    return [acquisition(k[:, :, line], step1=int(line), **more) for line in order]


def test_ismrmrd_is_sorted_by_its_counters(tmp_path):
    full = scan(sigma=0.0)
    k = oversampled(full.k) / np.sqrt(2) * lines(48)
    acquisitions = readouts(k) + readouts(2 * k, slice_=1)
    path = write_ismrmrd(tmp_path / "i.h5", acquisitions, header(MATRIX, FOV, RECON_FOV))
    raw = read_scan(path)
    assert (raw.source_format, raw.rows, raw.noise) == ("ismrmrd", 64, None)
    assert closeness(raw.k[0], transform_of_centred(k)) < 1e-5
    assert closeness(raw.k[1], 2 * transform_of_centred(k)) < 1e-5
    found = measured(path)
    assert found.record.shape == (2, 2, 64, 48)
    assert found.record.spacing_mm == pytest.approx((6.0, 2.5, 4.0))
    # The middle pixel of the image lies at the acquisition's position, LPS turned to RAS.
    middle = np.array(found.record.affine) @ [24, 32, 0, 1]
    assert np.allclose(middle, [-10.0, 20.0, 30.0, 1.0])
    assert np.allclose(np.array(found.record.affine)[:3, :3] @ [0, 1, 0], [0, -2.5, 0])
    assert np.allclose(np.array(found.record.affine)[:3, :3] @ [0, 0, 1], [0, 0, 6.0])
    assert "CANARY" not in json.dumps(asdict(found.record))


def test_ismrmrd_tells_noise_averages_reversed_and_partial_readouts_apart(tmp_path):
    full = scan(h=64, sigma=0.0)
    k = full.k.copy()
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4, 400)) + 1j * rng.standard_normal((4, 400))
    special = [
        acquisition(noise, flags=(ismrmrd.ACQ_IS_NOISE_MEASUREMENT,), dwell=20.0),
        acquisition(1e3 * k[:, :, 3], step1=3, flags=(ismrmrd.ACQ_IS_NAVIGATION_DATA,)),
    ]
    for line in range(48):
        forward = acquisition(k[:, 16:, line] * 0.5, step1=line, centre=16)
        back = acquisition(k[:, :15:-1, line] * 1.5, step1=line, centre=31)
        back.set_flag(ismrmrd.ACQ_IS_REVERSE)
        special += [forward, back]
    calibration = (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION,)
    special.append(acquisition(1e3 * k[:, 16:, 24], step1=24, centre=16, flags=calibration))
    xml = header((64, 48, 1), (160.0, 192.0, 6.0), RECON_FOV)
    raw = read_scan(write_ismrmrd(tmp_path / "i.h5", special, xml))
    k[:, :16] = 0
    assert closeness(raw.k[0], transform_of_centred(k)) < 1e-5
    assert np.allclose(raw.noise, noise)
    # Four times its bandwidth doubles the noise; the mean of two readouts halves its power.
    assert raw.noise_gain == pytest.approx(2.0 / np.sqrt(2))
    assert raw.rows is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda k: [*readouts(k), *readouts(k, contrast=1)], "several images in one (contrast)"),
        (lambda k: [*readouts(k), acquisition(k[:, :, 0], step1=48)], "outside of"),
        (lambda k: [*readouts(k), acquisition(k[:2, :, 0])], "different coils"),
        (lambda k: [acquisition(k[:, :, 0], flags=(ismrmrd.ACQ_IS_NOISE_MEASUREMENT,))], "no imag"),
    ],
)
def test_ismrmrd_that_is_no_image_is_refused(tmp_path, make, words):
    xml = header((64, 48, 1), (160.0, 192.0, 6.0), RECON_FOV)
    path = write_ismrmrd(tmp_path / "i.h5", make(scan().k), xml)
    with pytest.raises(BadInputError) as error:
        read_scan(path)
    assert words in str(error.value)
    assert "CANARY" not in str(error.value)


def save(path: Path, array):
    np.save(path, array)
    return path


def linked(path: Path):
    write_fastmri(path.with_name("other.h5"), scan().k[None])
    with h5py.File(path, "w") as file:
        file["kspace"] = h5py.ExternalLink("other.h5", "/kspace")
    return path


def virtual(path: Path):
    other = write_fastmri(path.with_name("other.h5"), scan().k[None])
    layout = h5py.VirtualLayout((1, 4, 64, 48), "c8")
    layout[...] = h5py.VirtualSource(str(other), "kspace", (1, 4, 64, 48))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("kspace", layout)
    return path


def external(path: Path):
    scan().k.astype("c8").tofile(path.with_name("secret.bin"))
    with h5py.File(path, "w") as file:
        where = [(str(path.with_name("secret.bin")), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("kspace", (1, 4, 64, 48), "c8", external=where)
    return path


def squeezed(path: Path):
    with h5py.File(path, "w") as file:
        file.create_dataset("kspace", data=np.ones((4, 4, 256, 256), "c8"), compression="gzip")
    return path


def bomb(path: Path, shape):
    with h5py.File(path, "w") as file:
        file.create_dataset("kspace", shape, "c8", chunks=(1, 1, 64, 64), compression="gzip")
    return path


def bart_of(path, text, k=None):
    write_bart(path, scan().k if k is None else k)
    path.with_suffix(".hdr").write_text(text)
    return path.with_suffix(".cfl")


def without_centre():
    k = scan().k.copy()
    k[:, :, 22:27] = 0
    return k


def nan():
    k = scan().k.copy()
    k[0, 0, 0] = np.nan
    return k


def other(path: Path):
    with h5py.File(path, "w") as file:
        file["kspace"] = np.ones((4, 64, 48))
    return path


K = scan().k
BAD = {
    "real numbers": (lambda d: save(d / "a.npy", np.ones((4, 64, 48))), "raw k-space is complex"),
    "five axes": (lambda d: save(d / "a.npy", np.ones((1, 1, 4, 64, 48), "c8")), "is no scan"),
    "coils last": (lambda d: save(d / "a.npy", np.ones((64, 48, 8), "c8")), "coils"),
    "small": (lambda d: save(d / "a.npy", np.ones((4, 8, 8), "c8")), "too small"),
    "objects": (lambda d: save(d / "a.npy", np.array([{}], object)), "not a readable .npy"),
    "zeros": (lambda d: save(d / "a.npy", np.zeros((4, 64, 48), "c8")), "nothing was measured"),
    "not finite": (lambda d: save(d / "a.npy", nan()), "1 samples are NaN"),
    "no centre": (lambda d: save(d / "a.npy", without_centre()), "calibration lines"),
    "no header": (
        lambda d: write_bart(d / "a", K).rename(d / "b.cfl"),
        ".hdr, is not there",
    ),
    "bad header": (lambda d: bart_of(d / "a", "# Dimensions\n64 -48 x\n"), "states no dimensions"),
    "cut": (lambda d: bart_of(d / "a", "# Dimensions\n64 48 1 5\n"), "its size is not that"),
    "echoes": (lambda d: bart_of(d / "a", "# Dimensions\n64 48 1 2 1 2\n"), "several contrasts"),
    "text": (lambda d: Path(d / "a.h5").write_text("no") and d / "a.h5", "not a readable .h5"),
    "a link": (lambda d: linked(d / "a.h5"), "no data set of this file"),
    "a virtual set": (lambda d: virtual(d / "a.h5"), "no data set of this file"),
    "an external set": (lambda d: external(d / "a.h5"), "no data set of this file"),
    "squeezed": (lambda d: squeezed(d / "a.h5"), "not all stored"),
    "a bomb": (lambda d: bomb(d / "a.h5", (4000, 64, 640, 640)), "over the limit"),
    "hollow": (lambda d: bomb(d / "a.h5", (4, 4, 64, 64)), "not all stored"),
    "other HDF5": (
        lambda d: other(d / "a.h5"),
        "fastMRI has complex",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_used_are_refused_in_a_sentence(tmp_path, name):
    make, words = BAD[name]
    path = make(tmp_path)
    with pytest.raises(BadInputError) as error:
        MRI().measured(path)
    assert words in str(error.value)
    assert str(error.value).startswith(f"{path}: ")


def test_a_header_that_defines_entities_is_refused(tmp_path):
    xml = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'
    path = write_fastmri(tmp_path / "f.h5", scan().k[None], xml)
    with pytest.raises(BadInputError, match="more than ISMRMRD has"):
        read_scan(path)
    path.unlink()
    with pytest.raises(BadInputError, match="cannot be read"):
        read_scan(write_fastmri(path, scan().k[None], "<ismrmrdHeader/>"))


def test_an_image_is_not_read_from_raw_data(tmp_path):
    with pytest.raises(BadInputError, match="a measurement and no image"):
        MRI().read(save(tmp_path / "a.npy", scan().k))


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut, flipped in some bits, or with a piece of it said twice."""
    kind, place = rng.integers(4), int(rng.integers(len(data)))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + data[max(place - 64, 0) :]
    values = bytearray(data)
    near = min(len(data), 2048) if kind == 2 else len(data)  # headers lie at the front
    for at in rng.integers(near, size=8):
        values[at] ^= 1 << int(rng.integers(8))
    return bytes(values)


def refusal(path: Path) -> str:
    """Why a file is refused; "" where it is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of samples that became infinite
        try:
            read_scan(path)
        except BadInputError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("kind", ["npy", "bart", "fastmri", "ismrmrd"])
def test_mutated_files_are_read_or_refused_and_nothing_else(tmp_path, kind):
    k = scan(32, 24, 2).k
    xml = header((32, 24, 1), (160.0, 192.0, 6.0), RECON_FOV)
    makers = {
        "npy": lambda p: save(p.with_suffix(".npy"), k.astype("c8")),
        "bart": lambda p: write_bart(p, k),
        "fastmri": lambda p: write_fastmri(p.with_suffix(".h5"), k[None], xml),
        "ismrmrd": lambda p: write_ismrmrd(p.with_suffix(".h5"), readouts(k), xml),
    }
    path = makers[kind](tmp_path / "scan")
    target = path.with_suffix(".hdr") if kind == "bart" else path
    whole, refused = target.read_bytes(), 0
    before = sorted(p.name for p in tmp_path.iterdir())
    rng = np.random.default_rng(3)
    for _ in range(30):
        target.write_bytes(mutated(whole, rng))
        reason = refusal(path)
        refused += bool(reason)
        assert "CANARY" not in reason
    assert refused >= 5
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_text_that_is_longer_than_the_file_takes_no_memory(tmp_path):
    """Its reference says two thousand million characters: HDF5 would make room for them first."""
    path = write_fastmri(tmp_path / "f.h5", scan(32, 24, 2).k[None], "<ismrmrdHeader/>")
    with h5py.File(path) as file:
        offset = file["ismrmrd_header"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset : offset + 4] = (2**31 - 1).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    with pytest.raises(BadInputError, match="longer than the file"):
        read_scan(path)
