"""Sinograms from files: discs, whose line integrals are known in closed form, come back in HU."""

import json
import math

import h5py
import numpy as np
import pytest
import torch

from diffusion_core.testing import LinearOperatorContract
from domains.base import BadInputError
from domains.ct.baselines import BASELINES
from domains.ct.degradations import MU_WATER_PER_MM, scan
from domains.ct.domain import CT, geometry_of
from domains.ct.geometry import FanGeometry, ParallelGeometry
from domains.ct.operators import beam_of
from domains.ct.sinograms import estimated_counts

CENTRE, RADIUS, HU = (9.0, -14.0), 25.0, 300.0
PARALLEL = {"beam": "parallel", "bin_mm": 1.5, "offset_mm": 0.6}
FAN = {"beam": "fan", "bin_mm": 2.0, "offset_mm": -1.1, "source_mm": 400.0, "detector_mm": 700.0}


def disc(geometry, angles):
    """Line integrals (views bins) of a disc, by the distance of each ray from its centre."""
    bins = 96
    t = (np.arange(bins) - (bins - 1) / 2) * geometry["bin_mm"] + geometry.get("offset_mm", 0)
    theta = np.radians(angles)[:, None]
    s = CENTRE[0] * np.cos(theta) + CENTRE[1] * np.sin(theta)
    r = CENTRE[1] * np.cos(theta) - CENTRE[0] * np.sin(theta)
    distance = s - t
    if geometry["beam"] == "fan":  # from (0, -source) through (t, detector - source)
        D = geometry["detector_mm"]
        distance = (s * D - t * (geometry["source_mm"] + r)) / np.hypot(D, t)
    chord = 2 * np.sqrt(np.maximum(RADIUS**2 - distance**2, 0))
    return MU_WATER_PER_MM * (1 + HU / 1000) * chord


def angles_of(geometry):
    """Not from 0, not evenly, over half or the whole turn."""
    arc = 360 if geometry["beam"] == "fan" else 180
    return [17.0 + arc * (k + 0.2 * (k % 3)) / 120 for k in range(120)]


def write(path, values, geometry):
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        with h5py.File(path, "w") as file:
            file["sinogram"] = values
    path.with_suffix(".json").write_text(json.dumps(geometry))
    return path


def reconstructed(path):
    measurement = CT().measured(path)
    problem = CT().problem(measurement)
    x = BASELINES["sirt"](measurement, problem, {"num_iterations": 60})
    return problem.to_source(x)[:, 0].numpy(), measurement.record


@pytest.mark.parametrize("geometry", [PARALLEL, FAN], ids=["parallel", "fan"])
@pytest.mark.parametrize("suffix", [".npy", ".h5"])
def test_a_disc_comes_back_where_it_was_in_hounsfield_units(tmp_path, geometry, suffix):
    angles = angles_of(geometry)
    values = disc(geometry, angles)
    counts = 1e6 * np.exp(-values)
    full = {**geometry, "angles_degrees": angles, "counts_per_ray": 1e6}
    image, record = reconstructed(write(tmp_path / f"a{suffix}", values, full))
    other, _ = reconstructed(write(tmp_path / f"b{suffix}", counts, {**full, "values": "counts"}))
    np.testing.assert_allclose(image, other, atol=1.0)
    _, dy, dx = record.spacing_mm
    h, w = image.shape[1:]
    y, x = np.mgrid[:h, :w]
    from_centre = np.hypot((x - (w - 1) / 2) * dx - CENTRE[0], (y - (h - 1) / 2) * dy - CENTRE[1])
    inside, outside = image[0][from_centre < RADIUS - 4], image[0][from_centre > RADIUS + 4]
    assert inside.mean() == pytest.approx(HU, abs=12)
    assert outside.mean() == pytest.approx(-1000, abs=12)
    assert (record.units, record.shape[1]) == ("HU", 1)


def test_water_of_another_attenuation_moves_the_units(tmp_path):
    angles = angles_of(PARALLEL)
    full = {**PARALLEL, "angles_degrees": angles, "counts_per_ray": 1e6, "water_per_mm": 0.026}
    image, _ = reconstructed(write(tmp_path / "a.npy", disc(PARALLEL, angles), full))
    assert np.median(image[image > -300]) == pytest.approx(0, abs=25)  # .026 / .026: water


LOPSIDED = {"angles_degrees": (3.0, 47.0, 110.5, 262.0), "offset_mm": 2.3}
SIZE = (21, 17, (1.1, 0.9), 4, 360.0, 31, 1.0)
SCANS = {
    "parallel": ParallelGeometry(*SIZE, **LOPSIDED),
    "fan": FanGeometry(*SIZE, 60.0, 110.0, **LOPSIDED),
}


class TestLopsidedParallel(LinearOperatorContract):
    def make(self, dtype):
        return beam_of(SCANS["parallel"], 0.03), (2, 1, 21, 17)


class TestLopsidedFan(LinearOperatorContract):
    def make(self, dtype):
        return beam_of(SCANS["fan"], 0.03), (2, 1, 21, 17)


@pytest.mark.parametrize("beam", SCANS)
def test_the_finer_scanner_sees_a_lopsided_scan_as_the_matrix_does(beam):
    y, x = np.mgrid[:21, :17]
    image = np.exp(-(((x - 6) / 4) ** 2) - ((y - 12) / 5) ** 2)[None].astype(np.float32)
    coarse = beam_of(SCANS[beam]).A(torch.from_numpy(image)[None])[0, 0].numpy()
    fine = scan(image, SCANS[beam])[0]
    assert np.abs(coarse - fine).max() < 0.03 * fine.max()


def test_geometries_of_before_keep_the_names_of_their_matrices():
    plain = ParallelGeometry(16, 16, (1.0, 1.0), 4, 180.0, 23, 1.0)
    assert plain.digest == "e4832ecd01e56f16488179db"
    moved = ParallelGeometry(16, 16, (1.0, 1.0), 4, 180.0, 23, 1.0, offset_mm=0.5)
    turned = ParallelGeometry(16, 16, (1.0, 1.0), 4, 180.0, 23, 1.0, angles_degrees=(1, 2, 3, 4))
    assert len({plain.digest, moved.digest, turned.digest}) == 3


def test_counts_are_estimated_from_noise_that_is_known():
    angles = np.arange(360) / 2
    clean = disc(PARALLEL, angles)
    rng = np.random.default_rng(0)
    for counts in (3e3, 3e4):
        noisy = -np.log(np.maximum(rng.poisson(counts * np.exp(-clean)), 0.5) / counts)
        assert estimated_counts(noisy[None]) == pytest.approx(counts, rel=0.25)


def test_what_is_measured_is_the_operator_of_the_measurement(tmp_path):
    full = {**FAN, "num_views": 90, "arc_degrees": 360.0, "counts_per_ray": 1e5}
    values = np.zeros((3, 90, 96))
    image = {"height": 40, "width": 50, "pixel_mm": [2.0, 1.5]}
    path = write(tmp_path / "a.npy", values, {**full, "image": image, "slice_mm": 3.0})
    measurement = CT().measured(path)
    assert measurement.operator == "fan-beam"
    assert measurement.y.shape == (3, 1, 90, 96)
    assert measurement.record.shape == (1, 3, 40, 50)
    assert measurement.record.spacing_mm == (3.0, 2.0, 1.5)
    geometry = geometry_of(measurement.record, json.loads(json.dumps(dict(measurement.params))))
    assert geometry.angle(45) == pytest.approx(math.pi)
    assert (geometry.offset_mm, geometry.num_bins) == (-1.1, 96)
    assert [p.name for p in CT().companions(path)] == ["a.json"]


OK = {**PARALLEL, "num_views": 10, "arc_degrees": 180.0, "counts_per_ray": 1e5}
BAD = {
    "angles": (np.zeros((9, 20)), OK, "9 views, and its geometry has 10 angles"),
    "nan": (np.full((10, 20), np.nan), OK, "or all are NaN"),
    "text": (np.zeros((10, 20)), "{not json", "its geometry cannot be used"),
    "unknown": (np.zeros((10, 20)), {**OK, "bin_cm": 1}, "bin_cm: extra inputs"),
    "negative": (np.zeros((10, 20)), {**OK, "bin_mm": -1}, "bin_mm: input should be greater"),
    "fan": (np.zeros((10, 20)), {**OK, "beam": "fan"}, "states no source_mm"),
    "counts": (np.zeros((10, 20)), {"beam": "parallel", "bin_mm": 1, "num_views": 10,
               "arc_degrees": 180, "values": "counts"}, "states no counts_per_ray"),
    "air": (np.full((10, 20), 1e9), {**OK, "values": "counts"}, "counts reach 1e+09"),
    "none": (np.zeros((10, 20)), {"beam": "parallel", "bin_mm": 1.0}, "states no angles"),
    "shape": (np.zeros((1, 1, 10, 20)), OK, "is no sinogram"),
    "complex": (np.zeros((10, 20), complex), OK, "real numbers, not complex128"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("suffix", [".npy", ".h5"])
def test_an_unusable_sinogram_gets_one_sentence(tmp_path, name, suffix):
    values, geometry, reason = BAD[name]
    path = write(tmp_path / f"a{suffix}", values, {})
    text = geometry if isinstance(geometry, str) else json.dumps(geometry)
    path.with_suffix(".json").write_text(text)
    with pytest.raises(BadInputError) as error:
        CT().measured(path)
    assert str(error.value).startswith(f"{path}: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_sinogram_or_point_elsewhere_are_refused(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"not numpy")
    (tmp_path / "b.h5").write_bytes(b"not hdf5")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["sinogram"] = h5py.ExternalLink("/etc/passwd", "x")
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["other"] = np.zeros(3)
    np.save(tmp_path / "e.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "f.npy", np.zeros((10, 20)))
    for name in ("a.npy", "b.h5", "c.h5", "d.h5", "e.npy", "f.npy"):
        with pytest.raises(BadInputError, match=name):
            CT().measured(tmp_path / name)
    with pytest.raises(BadInputError, match="a measurement and no image"):
        CT().read(tmp_path / "f.npy")


GEOMETRY = json.dumps({"beam": "parallel", "num_views": 24, "arc_degrees": 180, "bin_mm": 1.0})


def with_geometry(path, text=GEOMETRY, libver="earliest", **how):
    with h5py.File(path, "w", libver=libver) as file:
        data = file.create_dataset(
            "sinogram", data=np.random.default_rng(0).random((24, 32)), **how
        )
        data.attrs["geometry"] = text
    return path


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_a_geometry_stands_in_the_attribute_of_either_kind_of_text(tmp_path, libver):
    for name, text in (("a.h5", GEOMETRY), ("b.h5", np.bytes_(GEOMETRY))):
        path = with_geometry(tmp_path / name, text, libver)
        assert CT().measured(path).params["num_views"] == 24
    with pytest.raises(BadInputError, match="not one text"):
        CT().measured(with_geometry(tmp_path / "c.h5", np.arange(3), libver))


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_a_text_that_claims_to_be_longer_than_its_file_is_not_read(tmp_path, libver):
    """HDF5 would take the 2 GB that the altered length claims, and look then."""
    path = with_geometry(tmp_path / "a.h5", libver=libver)
    data = bytearray(path.read_bytes())
    length = len(GEOMETRY).to_bytes(4, "little")
    places = [i for i in range(len(data)) if data[i : i + 4] == length]
    told = []
    for place in places:
        altered = bytearray(data)
        altered[place : place + 4] = (2**31).to_bytes(4, "little")
        path.write_bytes(altered)
        try:
            CT().measured(path)
        except BadInputError as error:
            told.append(str(error))
    assert len(told) == len(places) > 0
    in_words = sum("is longer than the file" in text for text in told)
    assert in_words == (libver == "earliest"), "the latest has a checksum of its headers"


def test_samples_that_are_not_there_are_not_made_up(tmp_path):
    for name, how in (("a.h5", {}), ("b.h5", {"compression": "gzip", "chunks": (4000, 4000)})):
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            file.create_dataset("sinogram", (4000, 4000), "f8", **how)
            if name == "b.h5":
                file["sinogram"][...] = 0.5
        with pytest.raises(BadInputError, match="not all stored"):
            CT().measured(path)
