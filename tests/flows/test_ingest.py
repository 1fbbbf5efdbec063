"""From files to datasets to measurements, with real files and the real domains."""

import json
import re
import shutil
import stat
import threading
from collections import Counter
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest

from domains.base import BadInputError
from domains.ct.domain import CT
from domains.samples import SampleFile, catalogue
from flows import api_data
from flows.api_data import (
    demo_items,
    ingest,
    ingest_samples,
    simulate,
    site_key,
    split_of,
)
from flows.config import IngestSettings, SimulateSettings
from flows.store import Dataset, Measurements, open_store

NAME = "Kanarienvogel"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SASHIKO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "home"


def scan(path, seed=0, shape=(20, 18, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.int16)
    image = nibabel.Nifti1Image(values, np.diag([-1.0, -1.0, 4.0, 1.0]))
    image.header["descrip"] = NAME.encode()
    nibabel.save(image, path)
    return path


def photograph(path, seed=0, shape=(40, 48, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    cv2.imwrite(str(path), cv2.GaussianBlur(image, (0, 0), 2))
    return path


def ingest_ct(source, output, events=None, **fields):
    settings = IngestSettings(source=source, domain="ct", output=output, **fields)
    return ingest(settings, *([] if events is None else [events.append]))


def test_a_folder_becomes_a_dataset_and_bad_files_are_named_with_a_reason(tmp_path):
    source = tmp_path / "in"
    scan(source / f"{NAME}_A" / "1.nii.gz", seed=1)
    scan(source / f"{NAME}_A" / "deep" / "2.NII.GZ", seed=2)
    scan(source / f"{NAME}_B" / "3.nii", seed=3)
    scan(source / "4.nii", seed=4)
    shutil.copy(source / "4.nii", source / "copy_of_4.nii")
    (source / f"{NAME}.nii.gz").write_text(f"{NAME} wrote this text")
    (source / "empty.nii").touch()
    scan(source / "tiny.nii", shape=(1, 1, 1))
    (source / "link.nii").symlink_to(source / "4.nii")
    (source / "readme.txt").write_text("not for us")
    (source / ".hidden.nii").touch()
    events = []
    result = ingest_ct(source, tmp_path / "a.zarr", events)
    reasons = {q.path.name: q.reason for q in result.quarantined}
    assert {name: reason.split(";")[0] for name, reason in reasons.items()} == {
        "copy_of_4.nii": "the same bytes as another file",
        f"{NAME}.nii.gz": reasons[f"{NAME}.nii.gz"].split(";")[0],
        "empty.nii": "the file is empty",
        "tiny.nii": "1 x 1 x 1 pixels is too small",
        "link.nii": "a symbolic link",
    }
    assert "not a readable NIfTI" in reasons[f"{NAME}.nii.gz"]
    dataset = Dataset(tmp_path / "a.zarr")
    assert dataset.digest == result.digest
    assert [r.item_id for r in dataset.items()] == [r.item_id for r in result.items]
    assert len(result.items) == 4
    assert all(r.item_id.startswith("ct-") for r in result.items)
    groups = Counter(r.group for r in dataset.items())
    assert sorted(groups.values()) == [1, 1, 2]
    assert len(dataset.manifest["quarantined"]) == 5
    kinds = Counter(e.kind for e in events)
    assert kinds == {"step": 1, "file": 4, "quarantined": 5}
    assert events[0].message == "1 file of unknown kind left out (.txt)"
    assert [e.done for e in events[1:]] == list(range(1, 10))
    told = " ".join(e.message for e in events) + json.dumps(dataset.manifest)
    assert NAME not in told


def test_no_file_of_a_dataset_holds_a_name(tmp_path):
    scan(tmp_path / NAME / NAME / f"{NAME}.nii.gz")
    ingest_ct(tmp_path / NAME, tmp_path / "a.zarr")
    files = [p for p in (tmp_path / "a.zarr").rglob("*") if p.is_file()]
    assert len(files) > 5
    assert not any(NAME in str(p.relative_to(tmp_path)) for p in files)
    assert not any(NAME.encode() in p.read_bytes() for p in files)


def test_another_site_names_the_same_files_otherwise(tmp_path, monkeypatch):
    for n in range(2):
        scan(tmp_path / "in" / "patient" / f"{n}.nii", seed=n)
    (tmp_path / "in" / "bad.nii").touch()
    here, again = (ingest_ct(tmp_path / "in", tmp_path / f"{n}.zarr") for n in range(2))
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "elsewhere"))
    there = ingest_ct(tmp_path / "in", tmp_path / "there.zarr")

    def names(result):
        codes = [q.code for q in result.quarantined]
        return {*codes, *(r.item_id for r in result.items), *(r.group for r in result.items)}

    assert names(here) == names(again)
    assert len(names(here)) == 4
    assert not names(here) & names(there)


def test_pixels_arrive_as_the_domain_reads_them(tmp_path):
    path = scan(tmp_path / "in" / "1.nii.gz")
    result = ingest_ct(path, tmp_path / "a.zarr")
    item = Dataset(tmp_path / "a.zarr").read(result.items[0].item_id)
    expected = CT().read(path)
    np.testing.assert_array_equal(item.pixels, expected.pixels)
    assert item.record.affine == expected.record.affine
    assert item.record.spacing_mm == (4.0, 1.0, 1.0)


@pytest.mark.parametrize("kind", ["text", "empty folder", "other files", "absent", "all bad"])
def test_nothing_usable_is_one_sentence_and_no_dataset(tmp_path, kind):
    source = tmp_path / "in"
    source.mkdir()
    if kind == "text":
        source = source / "scan.nii.gz"
        source.write_text("not an image")
    elif kind == "other files":
        (source / "a.txt").write_text("a")
    elif kind == "absent":
        source = tmp_path / "none"
    elif kind == "all bad":
        (source / "a.nii").touch()
        (source / "b.nii").touch()
    with pytest.raises(BadInputError) as error:
        ingest_ct(source, tmp_path / "a.zarr")
    message = str(error.value)
    assert message.startswith(str(source))
    assert "\n" not in message
    assert message.count(str(source)) == 1
    expected = {
        "text": "not a readable NIfTI", "empty folder": "no ct files", "other files": "no ct files",
        "absent": "no such file or folder", "all bad": "none of its 2 files",
    }  # fmt: skip
    assert expected[kind] in message
    assert not (tmp_path / "a.zarr").exists()
    assert not list(tmp_path.glob(".a.zarr*"))


def test_a_reader_that_breaks_its_promise_spoils_only_its_file(tmp_path, monkeypatch):
    scan(tmp_path / "in" / "1.nii", seed=1)
    scan(tmp_path / "in" / "2.nii", seed=2)
    real = CT.read

    def read(self, path):
        if path.name == "1.nii":
            raise MemoryError
        return real(self, path)

    monkeypatch.setattr(CT, "read", read)
    result = ingest_ct(tmp_path / "in", tmp_path / "a.zarr")
    assert [q.path.name for q in result.quarantined] == ["1.nii"]
    assert "more memory than there is" in result.quarantined[0].reason
    assert len(result.items) == 1


def test_an_existing_output_is_refused_before_any_work(tmp_path):
    scan(tmp_path / "in" / "1.nii")
    ingest_ct(tmp_path / "in", tmp_path / "a.zarr")
    with pytest.raises(BadInputError, match="exists already"):
        ingest_ct(tmp_path / "in", tmp_path / "a.zarr")


def test_an_unknown_domain_names_the_known_ones(tmp_path):
    settings = IngestSettings(source=tmp_path, domain="xray", output=tmp_path / "a.zarr")
    with pytest.raises(BadInputError, match=r"unknown domain 'xray': choose one of city, ct, mri"):
        ingest(settings)


def test_the_split_is_the_group_s(tmp_path):
    for patient in range(6):
        for n in range(2):
            scan(tmp_path / "in" / f"p{patient}" / f"{n}.nii", seed=2 * patient + n)
    result = ingest_ct(tmp_path / "in", tmp_path / "a.zarr", split="by-group")
    by_group = {}
    for record in result.items:
        by_group.setdefault(record.group, set()).add(record.split)
    assert len(by_group) == 6
    assert all(len(splits) == 1 for splits in by_group.values())
    again = ingest_ct(tmp_path / "in", tmp_path / "b.zarr", split="by-group")
    assert [r.split for r in again.items] == [r.split for r in result.items]
    fixed = ingest_ct(tmp_path / "in", tmp_path / "c.zarr", split="test")
    assert {r.split for r in fixed.items} == {"test"}


@pytest.mark.parametrize(
    ("splits", "kind", "words"),
    [
        (
            ["train", "train", "test"],
            "warning",
            "2 train, 0 validation, 1 test.*into validation,",
        ),
        (["test"], "warning", "0 train, 0 validation, 1 test: .*into train or validation,"),
        (["train", "validation"], "step", "1 train, 1 validation, 0 test"),
    ],
)
def test_a_split_that_stayed_empty_is_told(splits, kind, words, tmp_path, monkeypatch):
    for number in range(len(splits)):
        for n in range(2):
            scan(tmp_path / "in" / f"p{number}" / f"{n}.nii", seed=2 * number + n)
    order = {}
    monkeypatch.setattr(
        api_data, "split_of", lambda group, _: splits[order.setdefault(group, len(order))]
    )
    events = []
    ingest_ct(tmp_path / "in", tmp_path / "a.zarr", events, split="by-group")
    assert events[-1].kind == kind
    assert re.search(words, events[-1].message)
    ingest_ct(tmp_path / "in", tmp_path / "b.zarr", events := [], split="train")
    assert {event.kind for event in events} == {"file"}


def test_groups_fall_into_splits_by_80_10_10():
    shares = Counter(split_of(f"group-{n}", b"key") for n in range(4000))
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert abs(shares[split] / 4000 - share) < 4 * np.sqrt(share * (1 - share) / 4000)


def test_the_site_key_is_made_once_and_for_the_owner_alone(tmp_path):
    found = []
    barrier = threading.Barrier(8)

    def make():
        barrier.wait()
        found.append(site_key(tmp_path / "new" / "home"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(found[0]) == 32
    (file,) = (tmp_path / "new" / "home").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert site_key(tmp_path / "other") != found[0]


# --- samples and demo -------------------------------------------------------------------------


def sample(label, path, **fields):
    values = {"domain": "ct", "split": "train", "group": label, "licence": "MIT", "ships": True,
              "demo": False, "meta": {"source": "test", "kind": "image"}}  # fmt: skip
    meta = {**values.pop("meta"), **fields.pop("meta", {})}
    return SampleFile(label=label, path=path, meta=meta, **{**values, **fields})


def test_samples_of_all_domains_become_one_dataset(tmp_path, monkeypatch):
    ct, city = scan(tmp_path / "1.nii", shape=(20, 18, 6)), photograph(tmp_path / "2.png")
    found = [
        sample("scan-a", ct, meta={"slices": [0, 4]}, group="scan"),
        sample("scan-b", ct, meta={"slices": [4, 6]}, group="scan", split="validation"),
        sample("street", city, domain="city", meta={"crop": [4, 0, 30, 40]}, ships=False),
        sample("raw", tmp_path / "none.npy", meta={"kind": "kspace"}),
    ]
    monkeypatch.setattr(api_data, "fetch_samples", lambda *args, **options: found)
    result = ingest_samples(tmp_path / "a.zarr")
    dataset = Dataset(result.path)
    whole = CT().read(ct).pixels
    assert {r.item_id: r.shape for r in dataset.items()} == {
        "scan-a": (1, 4, 18, 20), "scan-b": (1, 2, 18, 20), "street": (3, 1, 30, 40),
    }  # fmt: skip
    np.testing.assert_array_equal(dataset.read("scan-b").pixels, whole[:, 4:])
    record = dataset.record("street")
    assert (record.split, record.licence, record.group) == ("train", "MIT", "street")
    assert record.meta["ships"] is False
    train = ingest_samples(tmp_path / "b.zarr", splits=("train",))
    assert [r.item_id for r in train.items] == ["scan-a", "street"]
    with pytest.raises(BadInputError, match="no sample"):
        ingest_samples(tmp_path / "c.zarr", splits=("test",))


def test_a_demo_item_counts_slices_and_pixels_as_its_file_does(tmp_path, monkeypatch):
    path = scan(tmp_path / "1.nii", shape=(30, 28, 6))
    found = [sample("scan", path, meta={"slices": [3, 6], "crop": [2, 2, 20, 20]}, demo=True)]
    cut = api_data.DemoItem("scan", slices=(3, 5), crop=(4, 6, 17, 18))
    monkeypatch.setattr(api_data, "fetch_samples", lambda *args, **options: found)
    monkeypatch.setattr(api_data, "demo_items", lambda: [cut])
    result = ingest_samples(tmp_path / "demo.zarr", demo_only=True)
    item = Dataset(result.path).read("scan")
    np.testing.assert_array_equal(item.pixels, CT().read(path).pixels[:, [3, 5], 4:21, 6:24])
    assert item.record.meta["slices"] == [3, 5]
    assert item.record.meta["crop"] == [4, 6, 17, 18]
    other = api_data.DemoItem("scan", slices=(4,))
    result = ingest_samples(tmp_path / "other.zarr", items=[other])
    item = Dataset(result.path).read("scan")
    np.testing.assert_array_equal(item.pixels, CT().read(path).pixels[:, [4]])


def test_the_demo_cuts_the_test_part_of_its_samples():
    known = {s.label: s for s in catalogue()}
    cuts = {item.label: item for item in demo_items()}
    assert set(cuts) == {s.label for s in known.values() if s.demo}
    assert list(cuts["lung2"].slices) == [int((i + 0.5) * 61 / 8) for i in range(8)]
    assert list(cuts["brain2"].slices) == [int((i + 0.5) * 23 / 8) for i in range(8)]
    assert cuts["bikes-3"].slices == (200,)
    start, stop = known["bikes-3"].meta["slices"]
    assert start <= 200 < stop
    sides = {"china": (427, 640), "sample-geotiff": (900, 900), "bikes-3": (272, 640)}
    sizes = {"china": (416, 640), "sample-geotiff": (512, 512), "bikes-3": (256, 512)}
    for label, (h, w) in sizes.items():
        centre = tuple((side - size) // 2 for side, size in zip(sides[label], (h, w), strict=True))
        assert cuts[label].crop == (*centre, h, w)
    top, left, h, w = cuts["pan2"].crop
    valid_top, valid_left, valid_h, valid_w = known["pan2"].meta["crop"]
    assert (h, w) == (256, 256)
    assert valid_top <= top <= top + h <= valid_top + valid_h
    assert valid_left <= left <= left + w <= valid_left + valid_w


@pytest.mark.samples
def test_the_real_demo_has_the_items_that_the_documents_name(tmp_path, monkeypatch):
    monkeypatch.delenv("SASHIKO_CACHE")  # the samples that are there already
    result = ingest_samples(tmp_path / "demo.zarr", demo_only=True)
    assert {r.item_id: r.shape for r in result.items} == {
        "lung2": (1, 8, 512, 512), "brain2": (1, 8, 256, 256), "china": (3, 1, 416, 640),
        "sample-geotiff": (1, 1, 512, 512), "pan2": (1, 1, 256, 256), "bikes-3": (3, 1, 256, 512),
    }  # fmt: skip
    assert {r.split for r in result.items} == {"test"}
    assert Dataset(result.path).read("pan2").pixels.min() > 0


# --- simulate ---------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    found = [
        sample("scan", scan(tmp_path / "1.nii", shape=(32, 32, 4))),
        sample("street", photograph(tmp_path / "2.png"), domain="city"),
    ]
    monkeypatch.setattr(api_data, "fetch_samples", lambda *args, **options: found)
    return ingest_samples(tmp_path / "ds.zarr").path


def test_each_task_measures_the_items_of_its_domain(dataset, tmp_path):
    tasks = ["ct-sparse20", "inpaint-random70", "inpaint-random70"]
    events = []
    settings = SimulateSettings(dataset=dataset, tasks=tasks, output=tmp_path / "m.zarr", seed=5)
    result = simulate(settings, events.append)
    assert [(e.item_id, e.task) for e in result.entries] == [
        ("scan", "ct-sparse20"), ("street", "inpaint-random70"),
    ]  # fmt: skip
    assert [e.done for e in events] == [1, 2]
    store = open_store(tmp_path / "m.zarr")
    assert isinstance(store, Measurements)
    assert store.manifest["dataset"] == {"digest": Dataset(dataset).digest}
    made = store.read("street", "inpaint-random70")
    assert (made.seed, made.record) == (5, Dataset(dataset).record("street"))
    assert made.truth_digest is not None


def test_the_same_seed_measures_the_same_and_another_does_not(dataset, tmp_path):
    digests = []
    for n, seed in enumerate((1, 1, 2)):
        output = tmp_path / f"{n}.zarr"
        settings = SimulateSettings(
            dataset=dataset, tasks=["ct-sparse20"], output=output, seed=seed
        )
        digests.append(simulate(settings).digest)
    assert digests[0] == digests[1] != digests[2]


def test_slices_measured_alone_are_those_of_the_whole(dataset, tmp_path):
    common = {"dataset": dataset, "tasks": ["ct-sparse20"], "seed": 1}
    simulate(SimulateSettings(output=tmp_path / "all.zarr", **common))
    simulate(SimulateSettings(output=tmp_path / "two.zarr", slices=[1, 3], **common))
    whole = Measurements(tmp_path / "all.zarr").read("scan", "ct-sparse20")
    two = Measurements(tmp_path / "two.zarr").read("scan", "ct-sparse20")
    np.testing.assert_array_equal(two.y, whole.y[[1, 3]])
    assert two.record.meta["slices"] == [1, 3]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tasks": ["none"]}, "unknown task 'none'"),
        ({"tasks": ["kspace-x4"]}, "kspace-x4 has no item of the mri domain"),
        ({"tasks": ["ct-sparse20", "kspace-x4"]}, "kspace-x4 has no item of the mri domain"),
        ({"tasks": []}, "no task"),
        ({"tasks": ["ct-sparse20"], "items": ["none"]}, "holds no item 'none'"),
        ({"tasks": ["ct-sparse20"], "items": ["street"]}, "no item of the ct domain"),
        ({"tasks": ["ct-sparse20"], "slices": [9]}, "choose others"),
    ],
)
def test_what_cannot_be_simulated_is_one_sentence_and_no_store(dataset, tmp_path, fields, reason):
    settings = SimulateSettings(dataset=dataset, output=tmp_path / "m.zarr", **fields)
    with pytest.raises(BadInputError) as error:
        simulate(settings)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "m.zarr").exists()


def test_a_measurement_store_is_no_dataset(dataset, tmp_path):
    first = SimulateSettings(dataset=dataset, tasks=["ct-sparse20"], output=tmp_path / "m.zarr")
    simulate(first)
    with pytest.raises(BadInputError, match="not a sashiko-dataset"):
        simulate(first.model_copy(update={"dataset": tmp_path / "m.zarr"}))


def test_every_function_is_offered_by_the_api():
    from flows import api

    assert (api.ingest, api.simulate) == (ingest, simulate)
    assert Path(api_data.__file__).name == "api_data.py"
