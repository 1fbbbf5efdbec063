"""Sample data: what may be taken into the cache, and what the catalogue promises."""

import hashlib
import io
import itertools
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from domains import samples
from domains.base import BadInputError
from domains.samples import SampleFile, catalogue, fetch_samples, find_local

CANARY = (
    "import pathlib, os\npathlib.Path(os.environ['CANARY']).write_text('ran')\nraise SystemExit(1)"
)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


PYPROJECT = (
    b'[build-system]\nrequires = ["no-such-package"]\nbuild-backend = "setuptools.build_meta"\n'
)


def sdist(path, name, members, *, modern):
    """A source archive whose build would run code and needs packages that do not exist."""
    files = {
        "PKG-INFO": f"Metadata-Version: 1.1\nName: {name}\nVersion: 1.0\n".encode(),
        "setup.py": CANARY.encode(),
        **({"pyproject.toml": PYPROJECT} if modern else {}),
        **members,
    }
    with tarfile.open(path, "w:gz") as tar:
        for member, data in files.items():
            entry = tarfile.TarInfo(f"{name}-1.0/{member}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def wheel(path, name, members):
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


class Shop:
    """A package index of two archives, and the catalogue that goes with it."""

    def __init__(self, folder, *, modern=True):
        self.folder, self.cache = folder / "index", folder / "cache"
        self.folder.mkdir()
        self.data = {f"data/{n}.bin": n.encode() * 1000 for n in ("one", "two")}
        sdist(self.folder / "sashiko-a-1.0.tar.gz", "sashiko-a", self.data, modern=modern)
        wheel(self.folder / "sashiko_b-1.0-py3-none-any.whl", "sashiko_b", {"b.bin": b"bbb"})
        self.rows = [
            self.row("sashiko-a", "sashiko-a-1.0.tar.gz", [
                self.file("sashiko-a-1.0/data/one.bin", self.data["data/one.bin"], "one"),
                self.file("sashiko-a-1.0/data/two.bin", self.data["data/two.bin"], "two"),
            ]),
            self.row("sashiko-b", "sashiko_b-1.0-py3-none-any.whl", [
                {**self.file("b.bin", b"bbb", "three"), "demo": True},
            ]),
        ]  # fmt: skip

    def row(self, name, file, files):
        data = (self.folder / file).read_bytes()
        return {"requirement": f"{name}==1.0", "file": file, "sha256": sha256(data),
                "num_bytes": len(data), "licence": "MIT", "files": files}  # fmt: skip

    def file(self, path, data, label):
        return {"path": path, "sha256": sha256(data), "label": label, "domain": "ct",
                "split": "train", "group": label}  # fmt: skip

    def fetch(self, **options):
        self.lines = []
        return fetch_samples(self.cache, report=self.lines.append, **options)

    def files(self):
        """Everything in the cache, hidden things too."""
        return sorted(str(p.relative_to(self.cache)) for p in self.cache.rglob("*") if p.is_file())


@pytest.fixture(params=["pyproject", "setup.py"])
def any_shop(request, tmp_path, monkeypatch):
    """With the two kinds of source archives; pip treats them differently."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "wheel.py").touch()  # where it is installed, pip runs an old archive's setup.py
    monkeypatch.setenv("PYTHONPATH", str(modules))
    return open_shop(tmp_path, monkeypatch, modern=request.param == "pyproject")


@pytest.fixture
def shop(tmp_path, monkeypatch):
    return open_shop(tmp_path, monkeypatch, modern=True)


def open_shop(tmp_path, monkeypatch, *, modern):
    shop = Shop(tmp_path, modern=modern)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop.folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    monkeypatch.setattr(
        samples,
        "_load_catalogue",
        lambda: ([samples._archive(row) for row in shop.rows], []),
    )
    return shop


def test_archives_of_both_kinds_are_fetched_and_nothing_in_them_runs(any_shop, tmp_path):
    shop = any_shop
    found = shop.fetch()
    assert [f.label for f in found] == ["one", "two", "three"]
    assert [f.path.read_bytes() for f in found] == [*shop.data.values(), b"bbb"]
    assert not (tmp_path / "canary").exists()
    assert all("MIT" in line for line in shop.lines)
    assert not [f for f in shop.files() if ".partial" in f]


def test_what_is_in_the_cache_is_not_fetched_again(shop, monkeypatch):
    first = shop.fetch()
    monkeypatch.setattr(subprocess, "run", None)
    assert shop.fetch() == first


def test_the_demo_fetches_only_its_own(shop):
    found = shop.fetch(demo_only=True)
    assert [f.label for f in found] == ["three"]
    assert not any("sashiko-a" in f for f in shop.files())


@pytest.mark.parametrize("victim", ["archives/sashiko-a-1.0.tar.gz", "files/*/*one.bin"])
def test_a_half_written_file_is_never_taken_as_whole(shop, victim):
    shop.fetch()
    (path,) = shop.cache.glob(victim)
    for file in shop.cache.glob("files/*/*one.bin"):
        file.unlink() if "archives" in victim else None
    data = path.read_bytes() if path.exists() else b""
    path.write_bytes(data[: len(data) // 2])
    assert next(f.path.read_bytes() for f in shop.fetch()) == shop.data["data/one.bin"]


def test_an_archive_with_another_sha256_is_refused(shop):
    shop.rows[0]["sha256"] = "0" * 64
    with pytest.raises(BadInputError, match=r"sashiko-a.*sha256 is not the one") as error:
        shop.fetch()
    assert "\n" not in str(error.value)
    assert shop.files() == []


def test_an_archive_that_pip_did_not_check_is_checked_again(shop, monkeypatch, tmp_path):
    write = "open(sys.argv[sys.argv.index('-d') + 1] + '/sashiko-a-1.0.tar.gz', 'w').write('no')"
    (tmp_path / "python").write_text(f"#!{sys.executable}\nimport sys\n{write}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BadInputError, match=r"sashiko-a-1\.0\.tar\.gz: its sha256 is not the one"):
        shop.fetch()
    assert shop.files() == []


def test_a_member_with_another_sha256_is_refused(shop):
    shop.rows[0]["files"][1]["sha256"] = "0" * 64
    with pytest.raises(BadInputError, match=r"two\.bin does not have the sha256"):
        shop.fetch()
    assert not list(shop.cache.glob("files/*/*two.bin"))


def test_a_member_that_is_not_there_is_named(shop):
    shop.rows[0]["files"][0]["path"] = "sashiko-a-1.0/data/none.bin"
    with pytest.raises(BadInputError, match=r"no member sashiko-a-1\.0/data/none\.bin"):
        shop.fetch()


def test_offline_says_so_in_one_sentence(shop, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(
        BadInputError, match=r"pip could not fetch it .* check the network"
    ) as error:
        shop.fetch()
    assert "\n" not in str(error.value)


def test_without_pip_the_way_out_is_named(shop, monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BadInputError, match="ensurepip"):
        shop.fetch()


def test_two_processes_may_fetch_at_once(shop):
    program = (
        "import sys, yaml; from pathlib import Path; from domains import samples\n"
        "rows = yaml.safe_load(sys.stdin)\n"
        "samples._load_catalogue = lambda: ([samples._archive(r) for r in rows], [])\n"
        f"found = samples.fetch_samples(Path({str(shop.cache)!r}), report=lambda line: None)\n"
        "assert all(samples.file_digest(f.path) == f.meta['sha256'] for f in found)\n"
    )
    command = [sys.executable, "-c", program]
    jobs = [subprocess.Popen(command, stdin=subprocess.PIPE, text=True) for _ in range(2)]
    for job in jobs:
        job.stdin.write(yaml.safe_dump(shop.rows))
        job.stdin.close()
    assert [job.wait() for job in jobs] == [0, 0]
    assert len(shop.files()) == 5


# --- local files ------------------------------------------------------------------------------


def local(name, data, label="x"):
    return SampleFile(label, "ct", Path(name), "train", label, "MIT", True, False,
                      {"sha256": sha256(data), "kind": "image", "source": "local"})  # fmt: skip


def test_local_files_are_found_anywhere_below_and_checked(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.bin").write_bytes(b"right")
    (tmp_path / "a.bin").write_bytes(b"wrong")  # the same name elsewhere does not matter
    wanted = [local("a.bin", b"right"), local("a.bin", b"right", "y"), local("b.bin", b"b", "z")]
    lines = []
    found = find_local(tmp_path, wanted, lines.append)
    assert [(f.label, f.path) for f in found] == [
        ("x", tmp_path / "deep/er/a.bin"), ("y", tmp_path / "deep/er/a.bin"),
    ]  # fmt: skip
    assert "1 local files checked, 1 of the list not there" in lines[0]


def test_a_local_file_with_another_sha256_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"wrong")
    with pytest.raises(BadInputError, match=r"a\.bin: its sha256 is not the one"):
        find_local(tmp_path, [local("a.bin", b"right")], print)


def test_extra_must_be_a_folder(tmp_path):
    with pytest.raises(BadInputError, match="not a folder"):
        find_local(tmp_path / "none", [], print)


# --- the catalogue ----------------------------------------------------------------------------


def test_labels_are_public_names_and_unique():
    labels = [s.label for s in catalogue()]
    assert len(set(labels)) == len(labels)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*", label) for label in labels)


def test_no_split_divides_a_patient_or_scene_but_the_one_that_is_documented():
    splits = {}
    for s in catalogue():
        splits.setdefault(s.group, set()).add(s.split)
    divided = {group for group, found in splits.items() if len(found) > 1}
    assert divided == {"stroke"}  # calibration on other slices of one person, as data.md has it
    stroke = [s for s in catalogue() if s.group == "stroke"]
    assert {s.split for s in stroke} == {"train", "validation"}


def test_parts_of_one_file_do_not_overlap():
    by_file = {}
    for s in catalogue():
        if "slices" in s.meta:
            by_file.setdefault(s.meta["sha256"], []).append(s.meta["slices"])
    assert len(by_file) == 3
    for parts in by_file.values():
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(parts))


def test_what_ships_has_a_licence_that_allows_it():
    allowed = {"BSD-3-Clause", "BSD-2-Clause", "MIT", "Apache-2.0"}
    assert {s.licence for s in catalogue() if s.ships} == allowed
    assert [s.label for s in catalogue() if not s.ships] == ["china"]


def test_the_demo_needs_only_packages_and_only_test_data():
    demo = [s for s in catalogue() if s.demo]
    assert {s.label for s in demo} == {
        "lung2", "brain2", "china", "sample-geotiff", "pan2", "bikes-3",
    }  # fmt: skip
    assert all(s.split == "test" and s.meta["source"] != "local" for s in demo)


# --- the real archives ------------------------------------------------------------------------

SHAPES = {
    "lung1": (1, 48, 512, 512), "lung2": (1, 61, 512, 512), "aorta": (1, 191, 167, 233),
    "torso": (1, 112, 101, 122), "brain1": (1, 25, 256, 256), "brain2": (1, 23, 256, 256),
    "abdomen": (1, 20, 91, 117), "las-vegas": (1, 1, 1300, 1300), "pan1": (1, 1, 600, 600),
    "ms1": (4, 1, 300, 300), "pan2": (1, 1, 403, 600), "china": (3, 1, 427, 640),
    "sample-geotiff": (1, 1, 900, 900), "bikes-1": (3, 107, 272, 640),
    "bikes-2": (3, 50, 272, 640), "bikes-3": (3, 55, 272, 640),
}  # fmt: skip


@pytest.fixture(scope="session")
def real():
    from flows.config import Home

    return {s.label: s for s in fetch_samples(Home().cache / "samples", report=lambda line: None)}


@pytest.fixture(scope="session")
def real_items(real):
    from domains.registry import load_domain

    whole = {}
    for s in real.values():
        if s.path not in whole:
            whole[s.path] = load_domain(s.domain).read(s.path)
    return {label: samples.sample_item(whole[s.path], s) for label, s in real.items()}


@pytest.mark.samples
def test_the_real_samples_read_as_the_catalogue_says(real, real_items):
    shapes = {label: item.pixels.shape for label, item in real_items.items()}
    assert {label: shapes[label] for label in SHAPES} == SHAPES
    for label, item in real_items.items():
        assert item.record.item_id == label
        assert item.record.shape == item.pixels.shape
        assert item.record.split == real[label].split


@pytest.mark.samples
def test_the_film_is_cut_where_its_scenes_change(real):
    """The five largest leaps from frame to frame are the cuts; one lies within the train part."""
    from domains.city.reader import read

    film = read(real["bikes-1"].path).pixels[:, :, ::4, ::4].astype(float)
    leaps = np.abs(np.diff(film, axis=1)).mean(axis=(0, 2, 3))
    cuts = set((np.argsort(leaps)[-5:] + 1).tolist())
    bounds = {b for n in (1, 2, 3) for b in real[f"bikes-{n}"].meta["slices"]}
    assert bounds == {30, 137, 187, 242}
    assert cuts == bounds | {76}


@pytest.mark.samples
def test_patients_lie_on_their_backs_and_scenes_hold_no_empty_border(real_items):
    for label in ("lung1", "lung2"):
        item = real_items[label]
        bone = (item.pixels[0] > 300).nonzero()
        body = (item.pixels[0] > -300).nonzero()
        assert bone[1].mean() > body[1].mean()  # the spine lies below the middle of the picture
    for label in ("pan2", "pan3", "ms2", "ms3"):
        assert real_items[label].pixels.min() > 0
