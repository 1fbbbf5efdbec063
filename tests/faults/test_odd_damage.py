"""Damage that no disk does by itself: folders for files, loops of links, lost manifests."""

import errno
import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest
from damage_kit import content_of, flip_a_bit
from engine_kit import (
    image_settings,
    make_store,
    method,
    published,
    put_images,
    same,
    tiny_plan,
)

from domains.base import BadInputError
from flows import api_upkeep
from flows.api_restore import restore
from flows.api_upkeep import verify
from flows.config import ComputeSettings, RestoreSettings
from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.fencing import DRIVERS, driving, living_drivers
from flows.engine.garbage import collect_garbage
from flows.engine.objects import LocalObjects, StoreError
from flows.engine.receipt import set_aside
from flows.engine.restored import open_restored
from flows.engine.verify import verify_output
from flows.store import MeasurementWriter
from flows.store_files import remove_abandoned


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("in") / "m.zarr", items=3, shape=(1, 2, 12, 16))


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("undisturbed")
    run(store, output)
    return published(output)


def run(store: Path, output: Path):
    return run_plan(tiny_plan(store, output), InlineExecutor(), sleep=lambda _: None)


def damaged(output: Path) -> dict[str, str]:
    return {d.file: d.fault for d in verify(output).outputs["."].damages}


def folder_for(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop_for(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def file_for_its_folder(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"no folder")


ODD = {"folder": folder_for, "loop": loop_for}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("place", ["0/c/0/1/0/0", "zarr.json", "ledger.json"])
def test_odd_damage_is_named_and_what_else_is_damaged_too(store, undisturbed, tmp_path, odd, place):
    run(store, tmp_path)
    one, other, _ = open_restored(tmp_path).items()
    ODD[odd](one.path / place)
    flip_a_bit(other.path / "0/c/0/0/0/0")
    told = {
        str((one.path / place).relative_to(tmp_path)): "unreadable",
        str((other.path / "0/c/0/0/0/0").relative_to(tmp_path)): "altered",
    }
    assert damaged(tmp_path) == told
    assert set(verify(tmp_path, hide_damaged=True).hidden) == {one.key, other.key}
    run(store, tmp_path)
    assert damaged(tmp_path) == {}
    assert same(published(tmp_path), undisturbed)


def test_a_file_where_a_folder_of_chunks_should_be_is_named_for_every_chunk(store, tmp_path):
    run(store, tmp_path)
    entry = open_restored(tmp_path).items()[0]
    file_for_its_folder(entry.path / "0/c/0")
    place = entry.path.relative_to(tmp_path)
    assert damaged(tmp_path) == {f"{place}/0/c/0/{z}/0/0": "unreadable" for z in range(2)}


@pytest.mark.parametrize("odd", [*ODD, "nowhere"])
def test_what_stands_in_place_of_a_manifest_is_named_and_the_next_run_makes_the_item_anew(
    store, undisturbed, tmp_path, odd
):
    run(store, tmp_path)
    manifest = min((tmp_path / "manifests").iterdir())
    if odd == "nowhere":
        manifest.unlink()
        manifest.symlink_to("not-there")
    else:
        ODD[odd](manifest)
    assert damaged(tmp_path) == {f"manifests/{manifest.name}": "unreadable"}
    assert run(store, tmp_path).num_computed == 2
    assert damaged(tmp_path) == {}
    assert same(published(tmp_path), undisturbed)


def test_what_may_not_be_read_is_named_and_the_rest_looked_at(store, tmp_path, monkeypatch):
    run(store, tmp_path)
    one, other, _ = open_restored(tmp_path).items()
    flip_a_bit(other.path / "0/c/0/0/0/0")
    get, names = LocalObjects.get, LocalObjects.names
    kept = str(one.path.relative_to(tmp_path))

    def forbidden(self, key):
        if key.startswith(f"{kept}/0/c"):
            raise PermissionError(errno.EACCES, "Permission denied", key)
        return get(self, key)

    def unlisted(self, prefix):
        if prefix == ".work":
            raise PermissionError(errno.EACCES, "Permission denied", prefix)
        return names(self, prefix)

    monkeypatch.setattr(LocalObjects, "get", forbidden)
    monkeypatch.setattr(LocalObjects, "names", unlisted)
    assert damaged(tmp_path) == {
        ".work": "unreadable",
        f"{kept}/0/c/0/0/0/0": "unreadable",
        f"{kept}/0/c/0/1/0/0": "unreadable",
        str((other.path / "0/c/0/0/0/0").relative_to(tmp_path)): "altered",
    }


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT])
def test_a_file_server_that_is_gone_says_nothing_of_any_object(store, tmp_path, monkeypatch, code):
    run(store, tmp_path)

    def fails(self, key):
        raise OSError(code, os.strerror(code), key)

    monkeypatch.setattr(LocalObjects, "get", fails)
    with pytest.raises(OSError, match=os.strerror(code)):
        verify(tmp_path)


# --- manifests that are gone ---------------------------------------------------------------------


def test_a_manifest_that_is_gone_is_named_and_gc_leaves_its_pixels(store, undisturbed, tmp_path):
    run(store, tmp_path)
    manifest = min((tmp_path / "manifests").iterdir())
    key = manifest.name.removesuffix(".json")
    [entry] = [e for e in open_restored(tmp_path).items() if e.key == key]
    manifest.unlink()
    [damage] = verify(tmp_path).outputs["."].damages
    assert (damage.file, damage.fault) == (f"manifests/{key[:12]}...json", "missing")
    assert str(entry.path.relative_to(tmp_path)) in damage.next_step
    assert verify(tmp_path, hide_damaged=True).hidden == ()
    before = content_of(entry.path)
    for dry_run in (True, False):
        found = collect_garbage(LocalObjects(tmp_path), min_age_s=0, dry_run=dry_run)
        assert "its manifest is gone" in " ".join(found.notes)
        assert str(entry.path.relative_to(tmp_path)) not in [
            k for g in found.garbage for k in g.keys
        ]
    assert content_of(entry.path) == before
    run(store, tmp_path)
    assert damaged(tmp_path) == {}
    assert same(published(tmp_path), undisturbed)
    collect_garbage(LocalObjects(tmp_path), min_age_s=-1)
    assert not entry.path.exists(), "once another folder is published the old one is garbage"


def test_the_folder_of_a_publisher_that_died_is_no_lost_item(store, tmp_path, monkeypatch):
    create = LocalObjects.create

    def dies(self, key, data, **how):
        if key.startswith("manifests/"):
            raise KeyboardInterrupt
        return create(self, key, data, **how)

    with monkeypatch.context() as patch:
        patch.setattr(LocalObjects, "create", dies)
        with pytest.raises(KeyboardInterrupt):
            run(store, tmp_path)
    assert list((tmp_path / "items").rglob("*.ome.zarr"))
    assert damaged(tmp_path) == {}


def test_a_manifest_that_was_set_aside_is_not_gone(store, tmp_path):
    run(store, tmp_path)
    entry = open_restored(tmp_path).items()[0]
    flip_a_bit(entry.path / "0/c/0/0/0/0")
    verify(tmp_path, hide_damaged=True)
    assert damaged(tmp_path) == {}


# --- set aside what was judged, and nothing else -------------------------------------------------


def test_a_manifest_that_was_made_anew_meanwhile_is_not_set_aside(
    store, undisturbed, tmp_path, monkeypatch
):
    run(store, tmp_path)
    entry = open_restored(tmp_path).items()[0]
    flip_a_bit(entry.path / "0/c/0/0/0/0")

    def look_and_be_late(objects, on_event):
        found = verify_output(objects, on_event)
        verify(tmp_path, hide_damaged=True)  # another person's, and then a run
        run(store, tmp_path)
        return found

    with monkeypatch.context() as patch:
        calls = iter([look_and_be_late, verify_output])
        patch.setattr(api_upkeep, "verify_output", lambda *a: next(calls)(*a))
        assert verify(tmp_path, hide_damaged=True).hidden == ()
    assert same(published(tmp_path), undisturbed)


def test_what_appears_between_the_look_and_the_move_goes_back(tmp_path, monkeypatch):
    objects = LocalObjects(tmp_path)
    objects.create("manifests/k.json", b"untrue")
    rename = LocalObjects.rename

    def late(self, key, new_key):
        self.path(key).unlink()
        self.create(key, b"true")
        return rename(self, key, new_key)

    with monkeypatch.context() as patch:
        patch.setattr(LocalObjects, "rename", late)
        assert not set_aside(objects, "manifests/k.json", b"untrue")
    assert objects.get("manifests/k.json") == b"true"
    assert objects.names("manifests") == ["k.json"]
    with monkeypatch.context() as patch:
        patch.setattr(LocalObjects, "rename", lambda *_: pytest.fail("moved unseen"))
        assert not set_aside(objects, "manifests/k.json", b"untrue")
    assert set_aside(objects, "manifests/k.json", b"true")
    assert objects.names("manifests") == ["k.json.corrupt-0"]
    assert not set_aside(objects, "manifests/k.json", b"true")


def test_a_driver_that_finds_pixels_gone_leaves_the_manifest_of_another_alone(
    store, undisturbed, tmp_path, monkeypatch
):
    from flows.engine import publish

    run(store, tmp_path)
    entry = open_restored(tmp_path).items()[0]
    manifest = publish.load_manifest(LocalObjects(tmp_path), entry.key)
    shutil.rmtree(entry.path)
    run(store, tmp_path)  # another driver was quicker
    assert publish.reject_hollow(LocalObjects(tmp_path), manifest)
    assert same(published(tmp_path), undisturbed)


# --- file systems without hard links -------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_where_nothing_can_be_created_whole_the_run_is_refused_before_it_computes(
    store, tmp_path, monkeypatch, code
):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    log = tmp_path / "log"
    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(Exception, match=r"no hard links .*; choose an output on another"):
        run_plan(tiny_plan(store, tmp_path / "out", method(log=str(log))), InlineExecutor())
    assert not log.exists()
    assert not list((tmp_path / "out").rglob("stage"))
    with pytest.raises(StoreError, match="no hard links"):
        LocalObjects(tmp_path / "other").require_links()
    reads = []
    monkeypatch.setattr("flows.given.read_file", lambda *_: reads.append(1))
    images = put_images(tmp_path / "images", 1)
    with pytest.raises(BadInputError, match="no hard links"):
        restore(image_settings(images, tmp_path / "out"))
    assert reads == []
    assert list(tmp_path.rglob("*.partial")) == []
    with pytest.raises(StoreError, match="no hard links"):
        LocalObjects(tmp_path / "other").create("a", b"half", durable=False)
    assert not (tmp_path / "other/a").exists()


# --- leases and records --------------------------------------------------------------------------


def test_records_are_replaced_whole(tmp_path, monkeypatch):
    objects = LocalObjects(tmp_path)
    objects.replace("quarantine/a.json", json.dumps({"n": 1}).encode())
    inode = (tmp_path / "quarantine/a.json").stat().st_ino
    with (tmp_path / "quarantine/a.json").open("rb") as reader:
        objects.replace("quarantine/a.json", b"x" * 5)
        assert json.loads(reader.read()) == {"n": 1}, "who reads has the one before, whole"
    assert (tmp_path / "quarantine/a.json").stat().st_ino != inode
    assert objects.names("quarantine") == ["a.json"]
    assert objects.hidden("quarantine") == []


def test_a_lease_from_the_future_is_that_of_a_clock_that_was_set_back(tmp_path):
    objects, tomorrow = LocalObjects(tmp_path), time.time() + 86400
    with driving(objects, "c" * 64):
        [lease] = (tmp_path / DRIVERS).iterdir()
        os.utime(lease, (tomorrow, tomorrow))
        assert living_drivers(objects) == [], "a dead one would live for ever"
        os.utime(lease)
        assert len(living_drivers(objects)) == 1


def test_a_driver_that_began_by_a_clock_set_back_since_protects_all_it_may_have_written(tmp_path):
    objects = LocalObjects(tmp_path)
    objects.put(".work/files-1/draft", b"1")
    with driving(objects, "c" * 64):
        [lease] = (tmp_path / DRIVERS).iterdir()
        told = json.loads(lease.read_text())
        lease.write_text(json.dumps({**told, "started_s": told["started_s"] + 86400}))
        assert collect_garbage(objects, min_age_s=-3600).garbage == ()
        lease.write_text(json.dumps(told))
        old = told["started_s"] - 7200
        for path in (tmp_path / ".work/files-1/draft", tmp_path / ".work/files-1"):
            os.utime(path, (old, old))
        assert len(collect_garbage(objects, min_age_s=-3600).garbage) == 1


# --- places --------------------------------------------------------------------------------------


def test_files_that_a_link_leads_out_of_the_output_are_not_written(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    images = put_images(tmp_path / "images", 1)
    elsewhere.mkdir()
    out.mkdir()
    (out / "files").symlink_to(elsewhere)
    result = restore(image_settings(images, out))
    assert [q.kind for q in result.quarantined] == ["input"]
    assert "leads out of the output by a link" in result.quarantined[0].reason
    assert list(elsewhere.iterdir()) == []
    assert len(result.published) == 1


def test_an_output_inside_a_store_is_refused(store, tmp_path):
    before = content_of(store)
    for place in (store / "out", store / "measurements/item-0/out"):
        settings = RestoreSettings(
            input=store, output=place, method=method(), compute=ComputeSettings(executor="inline")
        )
        with pytest.raises(BadInputError, match=r"inside the store .*m\.zarr"):
            restore(settings)
    assert content_of(store) == before


def test_a_writer_in_a_container_of_the_same_host_name_is_not_taken_for_dead(tmp_path, monkeypatch):
    place = tmp_path / "m.zarr"
    with MeasurementWriter(place):
        [staging] = tmp_path.glob(".m.zarr.staging@*")
        who, _, code = staging.name.removeprefix(".m.zarr.staging@").split("@")
        assert Path("/proc/sys/kernel/random/boot_id").read_text().strip() in who, "of this machine"
        no_process = 2**22 + 7  # beyond what Linux counts to
        dead = tmp_path / f".m.zarr.staging@{who}@{no_process}@{code}"
        other = tmp_path / f".m.zarr.staging@{who[:-1]}x@{no_process}@{code}"
        host = tmp_path / f".m.zarr.staging@{socket.gethostname()}@{no_process}@{code}"
        boot = tmp_path / f".m.zarr.staging@x{who[1:]}@{no_process}@{code}"
        for folder in (dead, other, host, boot):
            folder.mkdir()
        remove_abandoned(place)
        assert not dead.exists()
        assert all(folder.exists() for folder in (staging, other, host, boot))
