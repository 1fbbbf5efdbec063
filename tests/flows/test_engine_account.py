"""Seams, the account of a run and its log of events: found by eye, by hand, by an own reading."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engine_kit import lines, make_store, method, recorder, tiny_plan

from flows import answers
from flows.config import ComputeSettings, MethodSettings, RestoreSettings
from flows.engine import receipt as receipts
from flows.engine.account import Book, RunAccount, WorstSeam, add_accounts, fold
from flows.engine.campaign import run_plan
from flows.engine.event_log import EventLog, log_path, read_events
from flows.engine.events import Event
from flows.engine.executor import InlineExecutor
from flows.engine.grid import Grid
from flows.engine.restored import open_restored
from flows.engine.seams import measure_seams
from flows.watch import ProgressArtifact

TILE = 64


def picture(seed: int = 0, shape: tuple[int, int, int, int] = (2, 3, 330, 420)) -> np.ndarray:
    """Correlated noise with the 8-px blocks of a coarse JPEG, each with an offset of its own."""
    rng = np.random.default_rng(seed)
    c, z, h, w = shape
    smooth = rng.standard_normal(shape).cumsum(axis=-1).cumsum(axis=-2) / 60
    blocks = rng.standard_normal((c, z, -(-h // 8), -(-w // 8)))
    return (smooth + np.kron(blocks, np.ones((8, 8)))[..., :h, :w]).astype(np.float32)


def stepped(pixels: np.ndarray, step: float, tile: int = TILE) -> np.ndarray:
    """Every other tile lifted, as a chess board."""
    y, x = np.indices(pixels.shape[2:]) // tile
    return (pixels + step * ((y + x) % 2)).astype(np.float32)


def seams_of(pixels: np.ndarray, tile: int = TILE, reads: list | None = None):
    grid = Grid(pixels.shape, 1, tile, tile, 96)

    def read(index):
        if reads is not None:
            reads.append(index)
        y, x = grid.chunk[2:]
        at = pixels[:, index[1], index[2] * y : (index[2] + 1) * y, index[3] * x :][..., :x]
        out = np.zeros(grid.chunk, np.float32)
        out[:, 0, : at.shape[1], : at.shape[2]] = at
        return out

    return measure_seams(grid, read)


# --- seams ---------------------------------------------------------------------------------------


def test_without_a_seam_the_metric_is_one_within_its_noise():
    z = [seams_of(picture(seed)).z for seed in range(12)]
    assert abs(np.mean(z)) < 1
    assert 0.3 < np.std(z) < 2
    assert max(np.abs(z)) < 4


def test_a_step_between_blocks_is_found():
    clean, seamed = seams_of(picture()), seams_of(stepped(picture(), 3.0))
    assert seamed.z > 5
    assert seamed.ratio > clean.ratio + 5 * clean.standard_error


@pytest.mark.parametrize("axis", [2, 3])
def test_a_step_across_one_axis_alone_is_found(axis):
    pixels = picture()
    lifted = np.indices(pixels.shape)[axis] // TILE % 2
    assert seams_of(pixels + 3 * lifted.astype(np.float32)).z > 5


def test_the_ratio_is_that_of_the_gradients_as_numpy_takes_them():
    pixels = picture(shape=(1, 1, 128, 128))  # one border each way, all chunks whole
    across = beside = 0.0
    for axis in (2, 3):
        steps = np.abs(np.diff(pixels.astype(float), axis=axis))
        line = [np.take(steps, k - 1, axis=axis).sum() for k in (64, 40, 48, 56, 72, 80, 88)]
        across, beside = across + line[0], beside + np.mean(line[1:])
    found = seams_of(pixels)
    assert found.ratio == pytest.approx(across / beside, rel=1e-6)
    assert found.num_stretches == 4


def test_the_noise_is_that_of_pictures_drawn_again():
    drawn = [seams_of(picture(seed, (1, 1, 330, 420))) for seed in range(25)]
    spread = np.std([s.ratio for s in drawn])
    assert np.mean([s.standard_error for s in drawn]) == pytest.approx(spread, rel=0.5)


def test_slices_that_repeat_each_other_are_no_further_evidence():
    one = picture(shape=(1, 1, 330, 420))
    many = seams_of(np.repeat(one, 9, axis=1))
    alone = seams_of(one)
    assert (many.ratio, many.z) == pytest.approx((alone.ratio, alone.z), rel=1e-6)


def test_every_chunk_is_read_once_and_what_was_not_cut_has_no_seam():
    reads: list = []
    seams_of(picture(), reads=reads)
    assert len(reads) == len(set(reads)) == 3 * 6 * 7
    whole = Grid((1, 1, 64, 64), 1, 64, 64, 0)
    assert measure_seams(whole, lambda _: pytest.fail("nothing is to be read")) is None


def test_flat_pictures_have_no_seam_and_flat_blocks_have():
    flat = np.zeros((1, 1, 192, 192), np.float32)
    assert (seams_of(flat).ratio, seams_of(flat).z) == (1.0, 0.0)
    assert seams_of(stepped(flat, 1.0)).ratio > 100
    json.dumps(asdict(seams_of(stepped(flat, 1.0))), allow_nan=False)


# --- a run ---------------------------------------------------------------------------------------


@pytest.fixture
def cut(tmp_path, monkeypatch):
    """A plan of two items of 2 slices, each slice cut into 3 x 4 tiles."""
    monkeypatch.setattr("flows.engine.grid.MAX_CANVAS_PX", 64 * 64)
    store = make_store(tmp_path / "m.zarr", items=2, shape=(1, 2, 170, 235))

    def plan(output: str, *ways: MethodSettings, **settings):
        return tiny_plan(store, tmp_path / output, *ways, block_size=64, **settings)

    return plan


def run(plan, handler=None, **settings):
    return run_plan(plan, InlineExecutor(), handler, **settings)


def logs(plan) -> list[Path]:
    return sorted((plan.output / "campaigns" / plan.campaign).glob("events-*.jsonl"))


def test_seams_are_measured_in_every_run_and_kept_with_the_item(cut):
    plan = cut("out")
    account = run(plan).account
    entries = open_restored(plan.output).items()
    for entry in entries:
        pixels = open_restored(plan.output).read(entry)
        assert entry.facts["seams"] == pytest.approx(asdict(seams_of(pixels)), rel=1e-5)
        assert entry.facts["seams"]["z"] < 4
        inside = json.loads((entry.path / "zarr.json").read_text())["attributes"]["sashiko"]
        assert inside["seams"] == entry.facts["seams"]
    worst = max(entries, key=lambda e: e.facts["seams"]["z"])
    assert account.num_cut == 2
    assert account.worst_seam.item_id == worst.item_id
    assert "seams" in "\n".join(answers.account_lines(account))


def test_a_block_that_is_off_shows_in_the_run_that_made_it(cut, monkeypatch):
    stage = receipts.stage_block

    def lifted(objects, item, block, attempt, pixels):
        return stage(objects, item, block, attempt, pixels + 300 * (block.index % 2))

    monkeypatch.setattr("flows.engine.worker.stage_block", lifted)
    worst = run(cut("out")).account.worst_seam
    assert worst.ratio > 10
    assert worst.z > 3


def test_whole_planes_have_no_seam(tmp_path):
    result = run(tiny_plan(make_store(tmp_path / "m.zarr"), tmp_path / "out"))
    assert result.published[0].facts["seams"] is None
    assert (result.account.num_cut, result.account.worst_seam) == (0, None)


def test_the_account_counts_what_was_done_now_and_before(cut, tmp_path):
    once = str(tmp_path / "once")
    log = tmp_path / "log"
    plan = cut("out", method("stumble", once=once, log=str(log)))
    account = run(replace(plan, items=plan.items[:1])).account
    assert account.retries == {"transient": 1}
    assert (account.num_computed, account.num_published) == (24, 1)
    assert account.num_pixels == 2 * 170 * 235
    [entry] = open_restored(plan.output).items()
    assert account.device_seconds == pytest.approx(entry.seconds)
    stored = sum(p.stat().st_size for p in entry.path.glob("0/c/**/*") if p.is_file())
    assert account.num_bytes == stored
    assert account.peak_bytes == entry.peak_bytes
    again = run(plan).account
    assert (again.num_reused, again.num_computed) == (1, 24)
    assert again.num_cut == 2
    assert lines(log) == 48


def test_blocks_with_receipts_are_told_as_found(cut):
    class StopError(Exception):
        pass

    def stop(event):
        if event.kind == "block" and event.done == 5:
            raise StopError

    plan = cut("out")
    with pytest.raises(StopError):
        run(plan, stop)
    account = run(plan).account
    assert (account.num_receipted, account.num_computed) == (5, 43)
    first, second = (fold(read_events(path)) for path in logs(plan))
    assert {first.num_computed, second.num_computed} == {5, 43}


def test_what_is_given_up_is_counted(cut):
    plan = cut("out", method("refuse", where=["item-1"]))
    account = run(plan).account
    assert (account.num_quarantined, account.num_published) == (1, 1)


# --- the log -------------------------------------------------------------------------------------


def test_the_log_holds_every_event_and_folds_to_the_same_account(cut):
    events, handler = recorder()
    plan = cut("out")
    result = run(plan, handler, run="night")
    path = log_path(plan.output, plan.campaign, "night")
    assert logs(plan) == [path]
    read = list(read_events(path))
    assert [(e.kind, e.done, e.message) for e in read] == [
        (e.kind, e.done, e.message) for e in events
    ]
    again = fold(read)
    for name, value in asdict(result.account).items():
        told = asdict(again)[name]
        if name == "worst_seam":
            assert told.pop("item_id") == value.pop("item_id")
        assert told == pytest.approx(value, rel=1e-4)


def test_windows_share_a_log_and_runs_do_not(cut):
    plan = cut("out")
    for window in plan.windows(1):
        run(window, run="one")
    run(plan)
    assert len(logs(plan)) == 2
    whole = fold(read_events(log_path(plan.output, plan.campaign, "one")))
    assert whole.num_computed == plan.num_blocks


def test_a_torn_line_is_left_out(tmp_path):
    log = EventLog(tmp_path / "a" / "events-x.jsonl")
    for number in range(3):
        log(Event("block", number, 3, "umlaut ü", {"eta_s": 1 / 3}))
    log.close()
    log.close()
    data = log.path.read_bytes()
    log.path.write_bytes(data[:-9])
    assert [event.done for event in read_events(log.path)] == [0, 1]
    assert next(read_events(log.path)).message == "umlaut ü"


def test_a_log_that_cannot_be_written_stops_no_run(cut, caplog):
    plan = cut("out")
    folder = log_path(plan.output, plan.campaign, "x").parent
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    assert len(run(plan).published) == 2
    assert "the work goes on" in caplog.text


def test_a_disk_that_fills_under_the_log_stops_no_run(cut, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flows.engine.event_log.os.write", full)
    assert len(run(cut("out")).published) == 2
    assert caplog.text.count("the work goes on") == 1


# --- the end -------------------------------------------------------------------------------------


def test_accounts_of_windows_add_up():
    seam = WorstSeam("a", 1.1, 0.1, 1.0)
    one = RunAccount(seconds=2, num_pixels=4, peak_bytes=7, retries={"worker": 1}, worst_seam=seam)
    two = RunAccount(
        seconds=3, peak_bytes=5, retries={"worker": 2, "lost": 1}, worst_seam=replace(seam, z=2.0)
    )
    total = add_accounts([one, two])
    assert (total.seconds, total.num_pixels, total.peak_bytes) == (5, 4, 7)
    assert total.retries == {"worker": 3, "lost": 1}
    assert total.worst_seam.z == 2.0
    assert add_accounts([]) == RunAccount()


def test_restore_answers_with_the_account_and_keeps_it(tmp_path):
    from flows.api_restore import restore

    settings = RestoreSettings(
        input=make_store(tmp_path / "m.zarr"),
        output=tmp_path / "out",
        method=method(),
        compute=ComputeSettings(executor="inline"),
    )
    result = restore(settings)
    assert result.account.num_computed == result.num_computed == 12
    [kept] = (tmp_path / "out" / "campaigns" / result.campaign).glob("account-*.json")
    assert json.loads(kept.read_text())["num_computed"] == 12
    text = answers.restored_text(result)
    assert "computed    12 blocks" in text
    assert "MP/s" in text
    assert "retries" not in text
    assert answers.account_lines(restore(settings).account) == []


def test_the_book_does_not_count_a_block_that_a_dead_worker_had_done():
    book = Book()
    book(Event("block", 1, 2, "", {"fresh": False, "seconds": 1.0}))
    assert book.account().num_computed == 0


def test_the_progress_artifact_is_moved_every_few_seconds_and_at_the_end(monkeypatch):
    now, shown = 0.0, []
    artifact = ProgressArtifact("k", every_s=5.0, clock=lambda: now)
    monkeypatch.setattr(artifact, "_show", shown.append)
    for done in range(101):
        now = done * 0.1
        artifact(Event("block", done, 100, ""))
    assert shown == [0.0, 50.0, 100.0]


# --- another grid, the same pixels ---------------------------------------------------------------


def test_another_block_size_gives_the_same_pixels_to_a_thousandth_of_the_range(
    tmp_path, monkeypatch
):
    """The shipped model in float32: a strip cut into 7 blocks, 4, and 2, each beyond its halo."""
    from evaluation_kit import picture

    from domains.base import Item, ItemRecord
    from domains.registry import load_domain
    from flows.config import config_path, load_task
    from flows.engine.block import Restorer
    from flows.engine.plan import make_plan
    from flows.store import MeasurementWriter

    monkeypatch.setattr("flows.engine.grid.MAX_CANVAS_PX", 32 * 32)
    shape = (1, 1, 64, 440)
    record = ItemRecord("a", "city", shape, "uint8", "intensity", "0" * 64, "png")
    item = Item(picture(2, shape), record)
    with MeasurementWriter(tmp_path / "m.zarr") as writer:
        writer.add(load_domain("city").simulate(item, load_task("inpaint-random70"), 0))
    found = []
    for size in (64, 128, 256):
        plan = make_plan(
            tmp_path / "m.zarr",
            tmp_path / "out",
            MethodSettings(num_levels=2),
            config_path("models", "starter"),
            dtype="float32",
            block_size=size,
        )
        worker, pixels = Restorer(), np.zeros(shape, np.float32)
        for block in plan.items[0].blocks():
            measured = worker.read(plan.measurements, plan.items[0], block)
            overview = worker.overview(plan.measurements, plan.items[0], block)
            values, _ = worker.compute(measured, plan.items[0], block, overview)
            pixels[..., block.write.x0 : block.write.x1] = values
        found.append(pixels)
    assert plan.num_blocks == 2
    for other in found[:-1]:
        assert 0 < np.abs(other - found[-1]).max() < 1e-3 * 255


# --- freed memory --------------------------------------------------------------------------------


def test_freed_memory_is_given_back_by_the_megabyte(monkeypatch):
    """A trim takes a millisecond: as long as half of the engine's work at a small block."""
    from flows.engine import memory

    trims = []
    library = SimpleNamespace(malloc_trim=lambda pad: trims.append(pad))
    monkeypatch.setattr("flows.engine.memory.ctypes.CDLL", lambda name: library)
    monkeypatch.setattr("flows.engine.memory.sys.platform", "linux")
    monkeypatch.setattr("flows.engine.memory._untrimmed", 0)
    for _ in range(64):
        memory.give_back(memory.TRIM_BYTES // 16)
    assert trims == [0] * 4
    memory.give_back(5 * memory.TRIM_BYTES)
    assert trims == [0] * 5
