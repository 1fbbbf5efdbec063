"""Many blocks and large items: what is kept in memory, what is read, and what is written how."""

import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from engine_kit import lines, make_store, method, tiny_plan
from PIL import Image
from tiny_domain import tiny_item, tiny_measurement

from domains.base import Item, ItemRecord
from domains.registry import load_domain
from flows import handover
from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.grid import Grid
from flows.engine.objects import LocalObjects
from flows.engine.receipt import Account, Chunk, Receipt, chunk_keys, load_receipt, seal, unseal
from flows.engine.receipt_book import ReceiptBook
from flows.engine.restored import open_restored
from flows.store import Measurements, MeasurementWriter
from flows.store_files import entries_digest

KIT = Path(__file__).parents[1] / "kit"


def manifest_of(path: Path, items: int, slices: int) -> Path:
    """A store that is all manifest: whoever plans reads nothing else."""
    path.mkdir()
    group = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
    (path / "zarr.json").write_text(json.dumps(group))
    entry = one_entry(path.parent / "one.zarr", slices)
    entries = []
    for number in range(items):
        record = {**entry["record"], "item_id": f"item-{number:05d}"}
        entries.append({**entry, "record": record, "digest": f"{number:064x}"})
    kind = {"kind": "sashiko-measurements", "format": 1}
    manifest = {**kind, "digest": entries_digest(entries), "entries": entries}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def one_entry(path: Path, slices: int) -> dict:
    """What a store says of an item, as if it had many slices."""
    item = tiny_item("item", np.zeros((1, 1, 16, 16)))
    with MeasurementWriter(path) as writer:
        writer.add(tiny_measurement(item, np.ones((1, 1, 16, 16), bool), "inpaint-random70"))
    [entry] = json.loads((path / "manifest.json").read_text())["entries"]
    record = {**entry["record"], "shape": [1, slices, 16, 16], "domain": "city"}
    return {**entry, "record": record}


@pytest.fixture
def item(tmp_path):
    """An item of 12 slices, each cut into 3 x 4 tiles of several chunks."""
    grid = Grid((2, 12, 170, 235), 1, 64, 64, 96)
    return replace(tiny_plan(make_store(tmp_path / "s.zarr"), tmp_path).items[0], grid=grid)


def receipt_of(item, block: int, **changes) -> Receipt:
    keys = chunk_keys(item, item.grid.block(block))
    chunks = tuple(Chunk(key, 10**10 + block, f"{block:064x}") for key in keys)
    account = Account(0.1 + block, 12, 34, 2**40, (0.1, 1 / 3), block % 2 == 1, -1e30, 2.5)
    return replace(Receipt(item.key, block, f"{block:06d}-{'ab' * 16}", chunks, account), **changes)


# --- receipts in memory --------------------------------------------------------------------------


def test_packed_receipts_come_out_as_they_went_in(item):
    book, kept = ReceiptBook(item), {}
    for block in (7, 3, 143, 0):
        book[block] = kept[block] = receipt_of(item, block)
    book[5] = kept[5] = receipt_of(item, 5, account=Account(1.0, 0, 0, 0))
    assert dict(book) == kept
    assert list(book) == sorted(kept)
    del book[3]
    assert (3 in book, 7 in book, 4 in book, 999 in book, len(book)) == (
        *[False, True, False] * 1,
        False,
        4,
    )
    with pytest.raises(KeyError):
        book[3]
    with pytest.raises(KeyError):
        del book[3]
    book[7] = receipt_of(item, 7)
    assert len(book) == 4
    book.clear()
    assert (len(book), dict(book)) == (0, {})


def test_packed_receipts_take_a_fraction_of_the_memory(item):
    many = replace(item, grid=replace(item.grid, shape=(2, 200, 170, 235)))

    def bytes_of(kept) -> int:
        kept[0] = receipt_of(many, 0)  # what is made once is not counted
        tracemalloc.start()
        for block in range(many.num_blocks):
            kept[block] = receipt_of(many, block)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size

    assert bytes_of(ReceiptBook(many)) < bytes_of({}) / 2


def test_a_receipt_of_other_chunks_is_none(tmp_path):
    plan = tiny_plan(make_store(tmp_path / "m.zarr"), tmp_path / "out")
    first, objects = plan.items[0], LocalObjects(tmp_path / "out")
    lacking = {"format": 1, "key": first.key, "block": 0, "attempt": "a", "chunks": []}
    account = {"seconds": 1, "nfe": 0, "num_operator_calls": 0, "peak_bytes": 1}
    key = f"{first.work}/receipts/000000.json"
    objects.create(key, seal({**lacking, "account": account}))
    assert unseal(objects.get(key)) is not None
    assert load_receipt(objects, first, 0) is None
    assert objects.exists(f"{key}.corrupt-0")


@pytest.mark.parametrize("tile", [64, 1024])
def test_every_chunk_knows_its_block(tmp_path, tile):
    plan = tiny_plan(make_store(tmp_path / "m.zarr"), tmp_path / "out")
    cut = replace(plan.items[0], grid=Grid((2, 5, 1300, 2100), 2, tile, tile, 96))
    for block in cut.blocks():
        for key in chunk_keys(cut, block):
            index = tuple(int(n) for n in key.split("/")[1:])
            assert cut.grid.block_of_chunk(index) == block.index


def test_a_block_found_damaged_before_the_work_begins_is_computed_once(tmp_path):
    log = tmp_path / "log"
    plan = tiny_plan(make_store(tmp_path / "m.zarr"), tmp_path / "out", method(log=str(log)))

    class StopError(Exception):
        pass

    def stop(event):
        if event.kind == "published":
            raise StopError

    def keep(*_):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalObjects, "adopt", keep)
        with pytest.raises(Exception, match="cannot be published"):
            run_plan(plan, InlineExecutor())
    staged = sorted((tmp_path / "out").glob(".work/*/stage/*"))
    for path in staged[:2]:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert run_plan(plan, InlineExecutor()).num_computed == 12 - 6 + 2
    assert lines(log) == 12 + 2


# --- the plan ------------------------------------------------------------------------------------


def test_a_hundred_thousand_blocks_are_planned_by_the_command_without_ray_prefect_or_torch(
    tmp_path,
):
    code = """
import json, sys
from flows.engine.grid import Grid
made = []
block = Grid.block
Grid.block = lambda grid, index: made.append(index) or block(grid, index)
from flows.cli import cli
code = cli(sys.argv[1:], standalone_mode=False)
heavy = [m for m in ("torch", "ray", "prefect", "mlflow") if m in sys.modules]
sys.stderr.write(json.dumps({"heavy": heavy, "blocks": len(made)}))
"""
    store = manifest_of(tmp_path / "m.zarr", 10, 10_000)
    asked = ["restore", "--plan", "--input", str(store), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *asked, "--model", "starter", "--workers", "3"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stderr) == {"heavy": [], "blocks": 0}
    assert "10 items, 100000 blocks, 3 workers" in done.stdout
    assert "a worker:" in done.stdout
    assert not (tmp_path / "out").exists()
    planned = json.loads(
        subprocess.run(
            [sys.executable, "-c", code, *asked, "--model", "starter", "--json"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    one, other, *_ = planned["items"]
    (tmp_path / "out/manifests").mkdir(parents=True)
    (tmp_path / f"out/manifests/{one['key']}.json").touch()
    receipts = tmp_path / f"out/.work/{other['key']}/receipts"
    receipts.mkdir(parents=True)
    for block in range(9_000):
        (receipts / f"{block:06d}.json").touch()
    (receipts / "000000.json.corrupt-0").touch()
    again = subprocess.run(
        [sys.executable, "-c", code, *asked, "--model", "starter"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(again.stderr) == {"heavy": [], "blocks": 0}
    assert "done already: 1 item, 19000 blocks" in again.stdout


def test_a_long_plan_names_its_heaviest_items_and_counts_the_rest(tmp_path):
    from flows.answers import MAX_ROWS, plan_text
    from flows.engine.forecast import foretell

    plan = tiny_plan(manifest_of(tmp_path / "m.zarr", MAX_ROWS + 7, 1), tmp_path / "out")
    text = plan_text(plan, foretell(plan))
    assert text.count("\nitem-") == MAX_ROWS
    assert "... and 7 items more" in text


def test_the_foretold_memory_of_the_driver_does_not_grow_with_the_volume(tmp_path):
    def driver(slices: int) -> float:
        plan = tiny_plan(make_store(tmp_path / f"{slices}.zarr", items=1), tmp_path / "out")
        big = replace(plan.items[0], grid=Grid((1, slices, 512, 512), 4, 512, 512, 0))
        return replace(plan, items=(big,)).driver_peak_bytes

    assert driver(16 * 64) < 1.05 * driver(64)


# --- large items ---------------------------------------------------------------------------------


def test_a_block_reads_a_window_of_a_large_plane_and_gets_the_bytes_of_the_whole(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("flows.store.MAX_CANVAS_PX", 600 * 600)
    monkeypatch.setattr("flows.engine.grid.MAX_CANVAS_PX", 600 * 600)
    store = make_store(tmp_path / "m.zarr", items=1, shape=(2, 2, 601, 1100))
    pieces = list((store / "measurements/item-0/given/y/c/0/0").iterdir())
    assert len(pieces) == 2
    measurements = Measurements(store)
    whole = measurements.read("item-0", "given")
    box = measurements.read("item-0", "given", slice(1, 2), (slice(40, 200), slice(500, 530)))
    np.testing.assert_array_equal(box.y, whole.y[1:2, :, 40:200, 500:530])
    np.testing.assert_array_equal(box.arrays["mask"], whole.arrays["mask"][1:2, :, 40:200, 500:530])
    assert box.record.shape == (2, 1, 601, 1100)
    for path in (store / "measurements/item-0/given/y/c/1/0").glob("1/*"):
        path.unlink()  # the lower pieces of slice 1: blocks of slice 0 need none of them
    plan = tiny_plan(store, tmp_path / "out", block_size=128)
    from flows.engine.block import Restorer

    worker = Restorer()
    blocks = [b for b in plan.items[0].blocks() if b.read.z0 == 0 or b.read.y1 <= 512]
    assert len(blocks) > 60
    for block in blocks[-3:]:
        assert worker.read(store, plan.items[0], block).y.shape[2:] == block.read.shape[1:]


def record_of(domain: str, shape, dtype: str, kind: str, **more) -> ItemRecord:
    return ItemRecord(
        item_id="a",
        domain=domain,
        shape=shape,
        dtype=dtype,
        units="intensity",
        source_digest="0" * 64,
        source_format=kind,
        **more,
    )


def both(tmp_path: Path, record: ItemRecord, low: float, high: float) -> tuple[Path, Path]:
    """An item of noise written at once and part by part."""
    pixels = np.random.default_rng(1).uniform(low, high, record.shape).astype(np.float32)
    domain = load_domain(record.domain)
    reads: list = []

    def read(z, y, x):
        reads.append(pixels[:, z, y, x].size)
        return pixels[:, z, y, x]

    whole = domain.write(Item(pixels, record), tmp_path / "whole")
    parts = domain.write_large(record, read, tmp_path / "parts")
    assert max(reads) < pixels.size
    assert whole.suffixes == parts.suffixes
    return whole, parts


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 700, 1030), (3, 1, 700, 515), (4, 1, 520, 9), (3, 2, 90, 600)]
)
@pytest.mark.parametrize("layout", ["interleaved", "planar"])
def test_a_large_tiff_holds_what_a_small_one_would(tmp_path, dtype, shape, layout):
    record = record_of("city", shape, dtype, "tiff", meta={"layout": layout})
    whole, parts = both(tmp_path, record, -20, 300)
    one, other = (tifffile.imread(path) for path in (whole, parts))
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)
    with tifffile.TiffFile(parts) as file:
        assert file.pages[0].is_tiled


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", ["opaque", ""])
def test_a_large_png_holds_what_a_small_one_would(tmp_path, dtype, channels, alpha):
    import cv2

    record = record_of("city", (channels, 1, 300, 257), dtype, "png", meta={"alpha": alpha})
    files = both(tmp_path, record, -20, 300 if dtype == "uint8" else 70000)
    one, other = (
        cv2.imread(str(path), cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH) for path in files
    )
    assert one.dtype == other.dtype == dtype
    np.testing.assert_array_equal(
        one.reshape(300, 257, -1)[..., :1], other.reshape(300, 257, -1)[..., :1]
    )
    np.testing.assert_array_equal(one, other)
    if dtype == "uint8":  # Pillow knows no 16-bit colour
        with Image.open(files[1]) as image:
            assert ("A" in image.mode) == (alpha == "opaque")
            image.verify()


@pytest.mark.parametrize("domain", ["ct", "mri"])
@pytest.mark.parametrize("codes", ["LPS", "RAS", "LPI", "PLS", "ARI"])
def test_a_large_volume_holds_what_a_small_one_would(tmp_path, domain, codes):
    affine = (
        (-0.5, 0.1, 0.0, 3.0),
        (0.0, -0.7, 0.0, 4.0),
        (0.0, 0.0, 2.5, 5.0),
        (0.0, 0.0, 0.0, 1.0),
    )
    meta = {"orientation": codes, "num_source_dims": 4, "nifti_worlds": {"qform_code": 1}}
    record = record_of(domain, (1, 7, 12, 9), "int16", "nifti", affine=affine, meta=meta)
    one, other = (nibabel.load(path) for path in both(tmp_path, record, -1200, 3000))
    np.testing.assert_array_equal(one.get_fdata(), other.get_fdata())
    assert one.header == other.header


def test_a_volume_that_must_be_turned_is_left_to_the_writer_of_small_ones(tmp_path):
    record = record_of("ct", (1, 7, 12, 9), "int16", "nifti", meta={"orientation": "ASL"})
    assert load_domain("ct").write_large(record, lambda *_: None, tmp_path / "x") is None
    assert not list(tmp_path.iterdir())


def test_large_items_are_handed_over_part_by_part(tmp_path, monkeypatch):
    """Through a run: the same file as at once, and no read of more than a part."""
    from evaluation_kit import picture

    from flows.api_restore import restore
    from flows.config import ComputeSettings, MethodSettings, RestoreSettings

    (tmp_path / "in").mkdir()
    pixels = np.moveaxis(picture(1, (3, 1, 300, 200))[:, 0], 0, -1)
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")

    def files(output: str) -> Path:
        return restore(
            RestoreSettings(
                input=tmp_path / "in",
                output=tmp_path / output,
                domain="city",
                sigma_y=0.1,
                method=MethodSettings(name="tv", kind="baseline"),
                compute=ComputeSettings(executor="inline"),
            )
        ).files[0]

    whole = np.asarray(Image.open(files("whole")))
    monkeypatch.setattr(handover, "LARGE_ITEM_BYTES", 1000)
    [entry] = open_restored(tmp_path / "whole").items()
    read = type(open_restored(tmp_path / "whole")).read
    sizes: list[int] = []

    def seen(*args, **kwargs):
        found = read(*args, **kwargs)
        sizes.append(found.size)
        return found

    monkeypatch.setattr("flows.engine.restored.Restored.read", seen)
    np.testing.assert_array_equal(np.asarray(Image.open(files("parts"))), whole)
    assert max(sizes) < np.prod(entry.record.shape)
