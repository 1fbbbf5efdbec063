"""Stores: exact round trips, read by the slice, whole or absent, damage found."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from domains.base import BadInputError, Item, ItemRecord, Measurement
from flows.store import Dataset, DatasetWriter, Measurements, MeasurementWriter, open_store
from flows.store_files import array_digest

QUICK = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
REAL = ["u1", "i1", "u2", "i2", "i4", "f4", "f8"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9999, 9999) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner,
                                                                max_size=3),
    max_leaves=6,
)  # fmt: skip


def record_of(pixels, item_id="scan", **fields):
    return ItemRecord(
        item_id=item_id, domain="ct", shape=pixels.shape, dtype=pixels.dtype.name, units="HU",
        source_digest="00", source_format="nifti", **fields,
    )  # fmt: skip


def item_of(shape=(1, 5, 16, 17), item_id="scan", seed=0, **fields):
    pixels = np.random.default_rng(seed).integers(-900, 900, shape).astype(np.int16)
    return Item(pixels, record_of(pixels, item_id, **fields))


def measurement_of(item, task="task", seed=0):
    rng = np.random.default_rng(seed)
    z = item.record.shape[1]
    y = rng.normal(size=(z, 3, 4)) + 1j * rng.normal(size=(z, 3, 4))
    return Measurement(
        record=item.record,
        task=task,
        operator="fourier",
        params={"shared_arrays": ["kernel"], "factor": 4},
        noise={"kind": "gaussian", "sigma_y": 0.05},
        y=y.astype(np.complex64),
        arrays={"mask": rng.random((z, 16)) > 0.5, "kernel": rng.random((7, 7))},
        truth_digest="ff",
        seed=3,
    )


def write(path, *items):
    with DatasetWriter(path) as writer:
        for item in items:
            writer.add(item)
    return Dataset(path)


def shapes(axes):
    return st.tuples(*[st.integers(1, n) for n in axes])


@QUICK
@given(
    pixels=st.sampled_from(REAL).flatmap(lambda kind: npst.arrays(kind, shapes((3, 4, 9, 9)))),
    meta=st.dictionaries(st.text(max_size=5), JSON, max_size=3),
    start=st.integers(0, 4),
    length=st.integers(0, 4),
)
def test_any_item_comes_back_bit_for_bit(pixels, meta, start, length):
    affine = ((-0.7, 0.0, 0.1, 1e-17), (0.0, 1 / 3, 0.0, 2.0), (0.0, 0.0, 5.0, -3.0),
              (0.0, 0.0, 0.0, 1.0))  # fmt: skip
    meta.pop("slices", None)
    record = record_of(pixels, affine=affine, spacing_mm=(5.0, 1 / 3, 0.7), meta=meta)
    with TemporaryDirectory() as folder:
        dataset = write(Path(folder) / "a.zarr", Item(pixels, record))
        again = dataset.read("scan")
        part = dataset.read("scan", slice(start, start + length))
    assert again.record == record
    assert again.pixels.dtype == pixels.dtype
    np.testing.assert_array_equal(again.pixels, pixels)
    np.testing.assert_array_equal(part.pixels, pixels[:, start : start + length])
    assert part.record.shape == part.pixels.shape


@QUICK
@given(
    y=st.sampled_from(["f4", "f8", "c8", "c16"]).flatmap(
        lambda kind: npst.arrays(kind, shapes((4, 3, 5)))
    ),
    params=st.dictionaries(st.text(max_size=5), JSON, max_size=3),
)
def test_any_measurement_comes_back_bit_for_bit(y, params):
    z = y.shape[0]
    params = {**params, "shared_arrays": ["kernel"]}
    arrays = {"mask": np.arange(z * 6).reshape(z, 6) % 3 == 0, "kernel": np.ones((3, 3))}
    item = Item(np.zeros((1, z, 8, 8)), record_of(np.zeros((1, z, 8, 8))))
    made = Measurement(
        item.record, "task", "mask", params, {"kind": "gaussian"}, y, arrays, None, 7
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.zarr"
        with MeasurementWriter(path) as writer:
            writer.add(made)
        again = Measurements(path).read("scan", "task")
    np.testing.assert_array_equal(again.y, y)
    assert (again.y.dtype, again.params, again.seed) == (y.dtype, params, 7)
    assert set(again.arrays) == {"mask", "kernel"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


def test_slices_of_a_measurement_are_those_of_the_whole(tmp_path):
    whole = measurement_of(item_of())
    with MeasurementWriter(tmp_path / "m.zarr") as writer:
        writer.add(whole)
    part = Measurements(tmp_path / "m.zarr").read("scan", "task", slice(1, 3))
    expected = whole.slices(1, 3)
    np.testing.assert_array_equal(part.y, expected.y)
    np.testing.assert_array_equal(part.arrays["mask"], expected.arrays["mask"])
    np.testing.assert_array_equal(part.arrays["kernel"], whole.arrays["kernel"])
    assert part.record == expected.record
    assert part.record.meta["slices"] == [1, 2]


def test_measurements_are_chunked_by_the_slice_but_for_what_slices_share(tmp_path):
    with MeasurementWriter(tmp_path / "m.zarr") as writer:
        writer.add(measurement_of(item_of()))
    group = zarr.open(tmp_path / "m.zarr", mode="r")["measurements/scan/task"]
    chunks = {name: array.chunks for name, array in group.arrays()}
    assert chunks == {"y": (1, 3, 4), "array-mask": (1, 16), "array-kernel": (7, 7)}


def test_other_zarr_readers_see_one_checksummed_zstd_chunk_a_slice(tmp_path):
    item = item_of((3, 4, 20, 30))
    write(tmp_path / "a.zarr", item)
    array = zarr.open(tmp_path / "a.zarr", mode="r")["items/scan/pixels"]
    assert array.metadata.zarr_format == 3
    assert array.chunks == (3, 1, 20, 30)
    np.testing.assert_array_equal(array[...], item.pixels)
    codecs = json.loads((tmp_path / "a.zarr/items/scan/pixels/zarr.json").read_text())["codecs"]
    zstd = next(c for c in codecs if c["name"] == "zstd")
    assert zstd["configuration"]["checksum"] is True


def test_reading_slices_touches_only_their_chunks(tmp_path):
    item = item_of()
    write(tmp_path / "a.zarr", item)
    for n in (0, 2, 3, 4):
        (tmp_path / f"a.zarr/items/scan/pixels/c/0/{n}/0/0").unlink()
    part = Dataset(tmp_path / "a.zarr").read("scan", slice(1, 2))
    np.testing.assert_array_equal(part.pixels, item.pixels[:, 1:2])


def test_the_digest_is_of_the_content_alone(tmp_path):
    a, b = item_of(item_id="a"), item_of(item_id="b", seed=1)
    first = write(tmp_path / "1.zarr", a, b).digest
    assert write(tmp_path / "2.zarr", b, a).digest == first
    changed = Item(a.pixels.copy(), a.record)
    changed.pixels[0, 0, 0, 0] += 1
    assert write(tmp_path / "3.zarr", changed, b).digest != first
    relabelled = Item(a.pixels, replace(a.record, split="test"))
    assert write(tmp_path / "4.zarr", relabelled, b).digest != first


def test_array_digests_tell_type_and_shape_apart_but_not_memory_order():
    values = np.arange(12, dtype=np.int16).reshape(3, 4)
    same = [np.asfortranarray(values), values.astype(">i2"), values.copy()]
    assert {array_digest(v) for v in same} == {array_digest(values)}
    others = [values.astype("u2"), values.reshape(4, 3), values.T, np.zeros((0, 4), "i2")]
    assert len({array_digest(v) for v in [values, *others]}) == 5


def test_a_measurement_digest_changes_with_every_part_of_it(tmp_path):
    base = measurement_of(item_of())
    variants = [
        base,
        replace(base, y=base.y * 2),
        replace(base, arrays={**base.arrays, "mask": ~base.arrays["mask"]}),
        replace(base, noise={"kind": "gaussian", "sigma_y": 0.06}),
        replace(base, params={**base.params, "factor": 5}),
        replace(base, seed=4),
        replace(base, record=replace(base.record, source_digest="11")),
    ]
    digests = set()
    for n, variant in enumerate(variants):
        with MeasurementWriter(tmp_path / f"{n}.zarr") as writer:
            writer.add(variant)
        digests.add(Measurements(tmp_path / f"{n}.zarr").digest("scan", "task"))
    assert len(digests) == len(variants)


def test_a_failed_writer_leaves_nothing(tmp_path):
    def fail():
        with DatasetWriter(tmp_path / "a.zarr") as writer:
            writer.add(item_of())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_dataset_and_the_next_one_tidies_up(tmp_path):
    path = tmp_path / "a.zarr"
    program = (
        "import numpy as np, time, sys\nfrom pathlib import Path\n"
        "from domains.base import Item, ItemRecord\nfrom flows.store import DatasetWriter\n"
        "pixels = np.zeros((1, 3, 16, 16), np.int16)\n"
        "record = ItemRecord('x', 'ct', pixels.shape, 'int16', 'HU', '00', 'nifti')\n"
        f"with DatasetWriter(Path({str(path)!r})) as writer:\n"
        "    writer.add(Item(pixels, record))\n    print('added', flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"added\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = tmp_path.iterdir()
    for folder in (path, left):
        with pytest.raises(BadInputError, match="unfinished"):
            open_store(folder)
    write(path, item_of())
    assert list(tmp_path.iterdir()) == [path]


def test_the_staging_of_a_living_writer_is_left_alone(tmp_path):
    with DatasetWriter(tmp_path / "a.zarr") as slow:
        slow.add(item_of(seed=1))
        winner = write(tmp_path / "a.zarr", item_of(seed=2))
        with pytest.raises(BadInputError, match="another process made it"):
            slow.__exit__(None, None, None)
        slow._publish = lambda: None
    assert Dataset(tmp_path / "a.zarr").digest == winner.digest
    assert list(tmp_path.iterdir()) == [tmp_path / "a.zarr"]


def test_a_store_is_never_written_again(tmp_path):
    write(tmp_path / "a.zarr", item_of())
    with pytest.raises(BadInputError, match="exists already"):
        write(tmp_path / "a.zarr", item_of())


def test_two_entries_of_one_name_are_refused(tmp_path):
    with pytest.raises(BadInputError, match="holds it already"):
        write(tmp_path / "a.zarr", item_of(), item_of(seed=1))
    with MeasurementWriter(tmp_path / "m.zarr") as writer:
        writer.add(measurement_of(item_of()))
        with pytest.raises(BadInputError, match="task already"):
            writer.add(measurement_of(item_of(), seed=1))


def flipped(data, position, bit):
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def test_a_flipped_bit_in_a_chunk_never_changes_a_pixel(tmp_path):
    item = item_of((1, 1, 16, 16))
    dataset = write(tmp_path / "a.zarr", item)
    chunk = tmp_path / "a.zarr/items/scan/pixels/c/0/0/0/0"
    data = chunk.read_bytes()
    found = 0
    for position in range(len(data)):
        chunk.write_bytes(flipped(data, position, bit=position % 8))
        try:
            np.testing.assert_array_equal(dataset.read("scan").pixels, item.pixels)
        except BadInputError:
            found += 1
    assert found > 0.98 * len(data)  # the rest are bits that zstd does not use


def test_a_lost_chunk_is_no_chunk_of_zeros(tmp_path):
    dataset = write(tmp_path / "a.zarr", item_of())
    (tmp_path / "a.zarr/items/scan/pixels/c/0/3/0/0").unlink()
    assert dataset.read("scan", slice(0, 3)).pixels.any()
    with pytest.raises(BadInputError, match="damaged or missing"):
        dataset.read("scan")


@pytest.mark.parametrize("damage", ["cut", "digest", "pixels", "kind", "list"])
def test_a_damaged_manifest_is_found(tmp_path, damage):
    write(tmp_path / "a.zarr", item_of())
    file = tmp_path / "a.zarr/manifest.json"
    text = file.read_text()
    values = json.loads(text)
    if damage == "cut":
        file.write_text(text[: len(text) // 2])
    elif damage == "list":
        file.write_text("[]")
    else:
        values["entries"][0]["pixels_digest" if damage == "pixels" else "x"] = "0"
        values["digest" if damage == "digest" else "y"] = "0"
        values["kind"] = 3 if damage == "kind" else values["kind"]
        file.write_text(json.dumps(values))
    with pytest.raises(BadInputError, match="damaged"):
        open_store(tmp_path / "a.zarr")


def test_the_two_kinds_of_store_are_told_apart(tmp_path):
    write(tmp_path / "a.zarr", item_of())
    with MeasurementWriter(tmp_path / "m.zarr") as writer:
        writer.add(measurement_of(item_of()))
    assert isinstance(open_store(tmp_path / "a.zarr"), Dataset)
    assert isinstance(open_store(tmp_path / "m.zarr"), Measurements)
    with pytest.raises(BadInputError, match="not a sashiko-measurements but a sashiko-dataset"):
        Measurements(tmp_path / "a.zarr")
    with pytest.raises(BadInputError, match="not a store"):
        open_store(tmp_path)
    with pytest.raises(BadInputError, match="holds no item 'none'"):
        Dataset(tmp_path / "a.zarr").read("none")
    with pytest.raises(BadInputError, match="holds no other of 'scan'"):
        Measurements(tmp_path / "m.zarr").read("scan", "other")


def test_entries_say_what_planning_needs(tmp_path):
    made = measurement_of(item_of())
    with MeasurementWriter(tmp_path / "m.zarr") as writer:
        writer.add(made)
    (entry,) = Measurements(tmp_path / "m.zarr").entries()
    assert (entry.item_id, entry.task, entry.num_slices) == ("scan", "task", 5)
    assert entry.y_shape == made.y.shape
    assert entry.num_bytes == made.y.nbytes + sum(a.nbytes for a in made.arrays.values())
    assert (entry.record, entry.params, entry.noise) == (made.record, made.params, made.noise)
    assert (entry.truth_digest, entry.seed) == ("ff", 3)


def test_every_file_is_flushed_before_the_store_appears(tmp_path, monkeypatch):
    flushed = []
    real = os.fsync

    def fsync(handle):
        flushed.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        assert not (tmp_path / "a.zarr").exists() or flushed[-1] == str(tmp_path)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "a.zarr", item_of())
    names = {Path(name).name for name in flushed}
    assert {"manifest.json", "zarr.json", "0", tmp_path.name} <= names
    files = [p for p in (tmp_path / "a.zarr").rglob("*") if p.is_file()]
    assert len(flushed) > len(files) > 5


def test_opening_is_quick_however_large_the_items(tmp_path):
    write(tmp_path / "a.zarr", item_of((1, 40, 256, 256)))
    start = time.perf_counter()
    Dataset(tmp_path / "a.zarr").items()
    opened_s = time.perf_counter() - start
    start = time.perf_counter()
    Dataset(tmp_path / "a.zarr").read("scan")
    assert opened_s < time.perf_counter() - start
