"""`restore`: measurements or damaged images in, published items and files out."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from engine_kit import kinds, make_store, method, published, recorder
from evaluation_kit import make_model, picture
from PIL import Image

from diffusion_core.model import Model
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.posterior import make_solver
from domains.base import BadInputError, Item
from domains.registry import load_domain
from flows.api_restore import collect, plan, prepare, restore, restore_window
from flows.config import ComputeSettings, MethodSettings, RestoreSettings, config_path
from flows.damage import Damage, missing_pixels, nodata_pixels, read_kernel
from flows.engine.campaign import CampaignError
from flows.engine.events import ignore
from flows.engine.executor import InlineExecutor
from flows.engine.methods import CONVERGED, solver_options
from flows.engine.plan import PlanRefusedError
from flows.engine.restored import open_restored
from flows.store import DatasetWriter, Measurements, MeasurementWriter

INLINE = ComputeSettings(executor="inline")
FILL = MethodSettings(name="telea", kind="baseline")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def photos(tmp_path: Path) -> tuple[Path, Path]:
    """Two photographs, one in a subfolder, and their masks: a white box of 6 x 8."""
    images, masks = tmp_path / "photos", tmp_path / "masks"
    for name, number in (("bridge", 0), ("walk/street", 1)):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (masks / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = picture(number, (3, 1, 40, 48))[:, 0].transpose(1, 2, 0)
        Image.fromarray(pixels).save(images / f"{name}.png")
        mask = np.zeros((40, 48), np.uint8)
        mask[10:16, 20:28] = 255
        Image.fromarray(mask).save(masks / f"{name}.png")
    return images, masks


def settings(source: Path, output: Path, **changes) -> RestoreSettings:
    return RestoreSettings(input=source, output=output, compute=INLINE, **changes)


def filled(photos, output: Path, **changes) -> RestoreSettings:
    images, masks = photos
    values = {"domain": "city", "mask": str(masks), "method": FILL, **changes}
    return settings(images, output, **values)


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


# --- damaged images ------------------------------------------------------------------------------


def test_a_folder_of_damaged_photographs_comes_back_under_its_own_names(photos, tmp_path):
    output = tmp_path / "out"
    result = restore(filled(photos, output))
    names = {str(p.relative_to(output / "files")) for p in result.files}
    assert names == {"bridge.png", "walk/street.png"}
    for name in names:
        before, after = pixels_of(photos[0] / name), pixels_of(output / "files" / name)
        known = pixels_of(photos[1] / name) == 0
        assert np.array_equal(before[known], after[known]), "known pixels stay as they are"
        assert np.abs(before - after)[~known].max() > 0
        assert np.abs(before - after)[~known].mean() < 40


def test_each_file_has_its_provenance_beside_it(photos, tmp_path):
    output = tmp_path / "out"
    result = restore(filled(photos, output))
    beside = json.loads((output / "files/bridge.json").read_text())
    entry = next(e for e in result.published if e.key == beside["key"])
    assert beside["file"] == "bridge.png"
    assert beside["campaign"] == result.campaign
    assert beside["residual"] == entry.residual
    assert beside["exact_data"] is True
    assert beside["residual"] < 1e-5, "a fill keeps what was measured"
    assert beside["model_digest"] is None


def test_no_name_of_a_file_is_written_into_any_other(photos, tmp_path):
    images, _ = photos
    (images / "Miller-Anna.png").write_bytes(b"no image")
    output = tmp_path / "out"
    restore(filled(photos, output))
    for path in (p for p in output.rglob("*") if p.is_file()):
        content = path.read_bytes().lower()
        assert b"miller" not in content, path
        assert b"street" not in content or path.name == "street.json", path
    assert "miller" not in " ".join(str(p) for p in output.rglob("*")).lower()


def test_what_cannot_be_read_is_quarantined_and_the_rest_is_restored(photos, tmp_path):
    images, _ = photos
    (images / "broken.png").write_text("not a picture")
    Image.new("L", (48, 40)).save(images / "unmasked.png")
    events, handler = recorder()
    result = restore(filled(photos, tmp_path / "out"), handler)
    assert len(result.published) == 2
    assert {q.source.name: q.reason for q in result.quarantined} == {
        "broken.png": "not a readable PNG image (by its first bytes it is plain text); "
        "export it again",
        "unmasked.png": f"no mask in {photos[1]} has the image's name; add one, or leave it out",
    }
    assert all(q.item_id.startswith("input-") for q in result.quarantined)
    assert kinds(events).count("quarantined") == 2
    records = [json.loads(p.read_text()) for p in (tmp_path / "out/quarantine").glob("*.json")]
    assert sorted(r["reason"] for r in records) == sorted(q.reason for q in result.quarantined)


def test_nothing_usable_is_a_mistake_of_the_user(photos, tmp_path):
    for image in photos[0].rglob("*.png"):
        image.write_text("not a picture")
    with pytest.raises(BadInputError, match=r"bridge.png: not a readable .* 1 others"):
        restore(filled(photos, tmp_path / "out"))


def test_copies_of_an_image_are_restored_once_and_written_twice(photos, tmp_path):
    images, masks = photos
    for folder in (images, masks):
        (folder / "copy.png").write_bytes((folder / "bridge.png").read_bytes())
    result = restore(filled(photos, tmp_path / "out"))
    assert len(result.published) == 2
    assert len(result.files) == 3
    assert np.array_equal(*(pixels_of(tmp_path / f"out/files/{n}.png") for n in ("copy", "bridge")))


def test_masks_below_the_input_are_no_images(photos, tmp_path):
    images, masks = photos
    masks.rename(images / "masks")
    result = restore(filled((images, images / "masks"), tmp_path / "out"))
    assert len(result.published) == 2
    assert result.quarantined == ()


def test_a_second_run_computes_nothing_and_writes_nothing(photos, tmp_path):
    asked = filled(photos, tmp_path / "out")
    first = restore(asked)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/files").rglob("*")}
    second = restore(asked)
    assert (second.num_computed, second.num_reused) == (0, 2)
    assert second.files == first.files
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out/files").rglob("*")}


def test_another_result_for_the_same_image_stands_beside_the_first(photos, tmp_path):
    restore(filled(photos, tmp_path / "out"))
    before = (tmp_path / "out/files/bridge.png").read_bytes()
    other = MethodSettings(name="biharmonic", kind="baseline")
    result = restore(filled(photos, tmp_path / "out", method=other))
    assert (tmp_path / "out/files/bridge.png").read_bytes() == before
    assert all("--biharmonic-" in path.name for path in result.files)
    assert len(open_restored(tmp_path / "out").items()) == 4


def test_a_file_lost_between_provenance_and_image_is_written_by_the_next_run(photos, tmp_path):
    restore(filled(photos, tmp_path / "out"))
    image = tmp_path / "out/files/bridge.png"
    before = image.read_bytes()
    image.unlink()
    assert image in restore(filled(photos, tmp_path / "out")).files
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"domain": None}, "need --domain"),
        ({"domain": "sea"}, "unknown domain 'sea'"),
        ({"mask": None}, "say what is wrong"),
        ({"scale": 2}, "give one of --mask, --kernel, --scale and --scale-z"),
        ({"mask": "/nowhere"}, "no such mask file"),
        (
            {"method": MethodSettings(name="magic", kind="baseline")},
            "unknown method 'magic': .*telea",
        ),
    ],
)
def test_settings_that_make_no_sense_are_told_in_one_sentence(photos, tmp_path, changes, sentence):
    with pytest.raises(BadInputError, match=sentence) as caught:
        restore(filled(photos, tmp_path / "out", **changes))
    assert "\n" not in str(caught.value)


def test_a_missing_input_and_an_empty_folder_are_told(tmp_path):
    for source, sentence in ((tmp_path / "x", "no such"), (tmp_path, "no city files")):
        with pytest.raises(BadInputError, match=sentence):
            restore(settings(source, tmp_path / "out", domain="city", scale=2))


def test_a_model_that_is_not_there_is_told_before_any_image_is_read(photos, tmp_path):
    told, listen = recorder()
    asked = filled(photos, tmp_path / "out", method=None, model=str(tmp_path / "nowhere"))
    with pytest.raises(BadInputError, match="nowhere"):
        restore(asked, listen)
    assert told == []
    assert not (tmp_path / "out").exists()


def test_masks_and_kernels_are_read_as_people_save_them(tmp_path):
    jpeg_like = np.array([[[[3, 120, 140, 255]]]], np.uint8)
    assert missing_pixels(jpeg_like).tolist() == [[[False, False, True, True]]]
    ones = np.array([[[[0, 1]]]], np.uint8)
    assert missing_pixels(ones).tolist() == [[[False, True]]]
    for kind in (np.int16, np.uint16, np.int32):  # a byte's white, as volumes hold it
        assert missing_pixels(jpeg_like.astype(kind)).tolist() == [[[False, False, True, True]]]
    assert missing_pixels(np.array([[[[0.0, 60, 90]]]])).tolist() == [[[False, True, True]]]
    assert not missing_pixels(np.zeros((1, 1, 2, 2), np.uint8)).any()
    for labels in (np.array([[[[0, 2]]]], np.uint8), np.array([[[[0, 900]]]], np.int16)):
        with pytest.raises(BadInputError, match="nothing in it is white"):
            missing_pixels(labels)
    red = np.zeros((3, 1, 2, 2), np.uint8)
    red[0] = 255
    with pytest.raises(BadInputError, match="reach 85 of 255"):
        missing_pixels(red)
    kernel = np.array([[0.0, 1.0], [2.0, 1.0]])
    np.save(tmp_path / "k.npy", kernel)
    np.savetxt(tmp_path / "k.txt", kernel)
    Image.fromarray(kernel.astype(np.uint8)).save(tmp_path / "k.png")
    for name in ("k.npy", "k.txt", "k.png"):
        assert np.array_equal(read_kernel(tmp_path / name), kernel)
    (tmp_path / "k.csv").write_text("a,b")
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    for name in ("k.csv", "cube.npy", "none.npy"):
        with pytest.raises(BadInputError, match="kernel"):
            read_kernel(tmp_path / name)


@pytest.mark.parametrize(
    ("moved", "fits"),
    [(np.eye(4), True), (np.diag([-1.0, 1, 1, 1]), False), (np.diag([1.0, 1, 2, 1]), False)],
)
def test_a_mask_that_lies_elsewhere_than_its_volume_is_refused(tmp_path, moved, fits):
    affine = np.array([[1.0, 0, 0, -9], [0, 1, 0, -8], [0, 0, 3, 4], [0, 0, 0, 1]])
    values = np.zeros((20, 24, 3), np.int16)
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "a.nii.gz")
    values[3:9, 4:7] = 255
    (tmp_path / "masks").mkdir()
    nibabel.save(nibabel.Nifti1Image(values, moved @ affine), tmp_path / "masks/a.nii.gz")
    domain = load_domain("ct")
    asked = RestoreSettings(input=tmp_path, output=tmp_path / "out", mask=str(tmp_path / "masks"))
    damage, item = Damage.of(asked, domain), domain.read(tmp_path / "a.nii.gz")
    if fits:
        missing = damage.missing(item, "a", damage.mask_of("a"), domain)
        assert missing.sum() == 6 * 3 * 3
        return
    with pytest.raises(BadInputError, match="its mask: it lies elsewhere"):
        damage.missing(item, "a", damage.mask_of("a"), domain)


def test_nodata_pixels_are_those_that_are_so_in_every_band(photos):
    item = load_domain("city").read(photos[0] / "bridge.png")
    pixels = np.maximum(item.pixels, 1)
    pixels[:, 0, 3, 4] = 0
    pixels[0, 0, 7, 7] = 0
    scene = replace(item.record, meta={**item.record.meta, "geotiff": {"nodata": None}})
    assert np.argwhere(nodata_pixels(Item(pixels, scene))).tolist() == [[0, 3, 4]]
    with pytest.raises(BadInputError, match="no-data value 0"):
        nodata_pixels(Item(np.maximum(pixels, 1), scene))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_black_of_a_photograph_is_not_taken_for_missing(name, tmp_path):
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / name)
    with pytest.raises(BadInputError, match=r"no value for pixels without data.*GeoTIFF"):
        nodata_pixels(load_domain("city").read(tmp_path / name))


# --- measurement stores --------------------------------------------------------------------------


def test_a_measurement_store_is_restored_to_files_named_by_item(tmp_path):
    store = make_store(tmp_path / "m.zarr")
    result = restore(settings(store, tmp_path / "out", method=method("twice")))
    assert {str(p.relative_to(tmp_path / "out/files")) for p in result.files} == {
        "given/item-0.npy",
        "given/item-1.npy",
    }
    written = np.load(tmp_path / "out/files/given/item-0.npy")
    np.testing.assert_array_equal(written, published(tmp_path / "out")["item-0", "twice"])
    assert Measurements(store).entries()[0].record == result.published[0].record


def test_a_dataset_or_a_store_with_a_mask_is_refused(tmp_path, photos):
    with DatasetWriter(tmp_path / "clean.zarr") as writer:
        writer.add(load_domain("city").read(photos[0] / "bridge.png"))
    with pytest.raises(BadInputError, match="sashiko simulate"):
        restore(settings(tmp_path / "clean.zarr", tmp_path / "out", method=FILL))
    store = make_store(tmp_path / "m.zarr")
    with pytest.raises(BadInputError, match="leave out --mask"):
        restore(settings(store, tmp_path / "out", mask="x", method=method("twice")))


def test_windows_restore_what_one_run_restores(tmp_path):
    store = make_store(tmp_path / "m.zarr", items=3)
    asked = settings(store, tmp_path / "out", method=method("twice"), window_items=2)
    whole = restore(asked.model_copy(update={"output": tmp_path / "whole"}))
    job = prepare(asked, ignore)
    windows = job.windows()
    assert [len(window.items) for window in windows] == [2, 1]
    with InlineExecutor() as executor:
        result = collect(job, [restore_window(job, w, executor, ignore) for w in windows])
    assert result.campaign == whole.campaign
    assert [e.key for e in result.published] == [e.key for e in whole.published]
    assert result.num_blocks == whole.num_blocks


def test_a_run_of_which_nothing_comes_fails_by_whose_fault_it_is(tmp_path):
    store = make_store(tmp_path / "m.zarr")
    with pytest.raises(BadInputError, match="nothing could be restored: item-0"):
        restore(settings(store, tmp_path / "out", method=method("refuse")))
    with pytest.raises(CampaignError, match="nothing could be restored: item-0: RuntimeError"):
        restore(settings(store, tmp_path / "out", method=method("stumble")))


def test_the_plan_is_what_restore_does_and_leaves_nothing(photos, tmp_path):
    asked = filled(photos, tmp_path / "out")
    planned = plan(asked)
    assert not (tmp_path / "out").exists()
    assert planned.num_blocks == 2
    assert restore(asked).campaign == planned.campaign
    with pytest.raises(PlanRefusedError, match=r"limit is 1e-09 GB"):
        plan(asked.model_copy(update={"compute": ComputeSettings(memory_limit_bytes=1)}))


def test_planning_with_a_model_imports_neither_torch_nor_ray_nor_prefect(model, tmp_path):
    store = make_store(tmp_path / "m.zarr")
    code = f"""
import sys
from flows.api_restore import plan
from flows.config import RestoreSettings
planned = plan(RestoreSettings(input={str(store)!r}, output="out", model={str(model)!r}))
assert planned.items[0].model.digest
print([name for name in ("torch", "ray", "prefect", "mlflow") if name in sys.modules])
"""
    kit = str(Path(__file__).parents[1] / "kit")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": kit, "PATH": ""},
    )
    assert done.stdout.strip() == "[]"


# --- solvers -------------------------------------------------------------------------------------


def test_every_band_of_every_frame_has_noise_of_its_own(model, tmp_path):
    """Two equal frames of two equal bands, in a block each: no two of the four have equal noise."""
    plane = picture(0, (1, 1, 40, 48))
    record = load_domain("city").read(_saved(plane, tmp_path / "p.png")).record
    pixels = np.broadcast_to(plane, (2, 2, 40, 48)).copy()
    item = Item(pixels, replace(record, shape=pixels.shape))
    given = load_domain("city").given(
        item, mask=np.zeros((40, 48), bool), kernel=None, scale=None, sigma_y=0.5
    )
    with MeasurementWriter(tmp_path / "m.zarr") as writer:
        writer.add(given)
    way = MethodSettings(name="diffpir", num_levels=2, sigma_max=0.7, sigma_min=0.3, rho=3.0)
    asked = settings(tmp_path / "m.zarr", tmp_path / "out", model=str(model), method=way)
    restore(asked.model_copy(update={"slices_per_block": 1}))
    restored = open_restored(tmp_path / "out")
    planes = restored.read(restored.items()[0]).reshape(4, -1)
    assert len({plane.tobytes() for plane in planes}) == 4


def _saved(plane: np.ndarray, path: Path) -> Path:
    Image.fromarray(plane[0, 0]).save(path)
    return path


@pytest.mark.parametrize("name", ["covprox", "diffpir", "dds", "kriging"])
def test_the_engine_publishes_what_the_solver_returns(photos, model, tmp_path, name):
    """The same solver, called without the engine, on the same measurement and keyed noise."""
    way = MethodSettings(name=name, num_levels=3, sigma_max=0.7, sigma_min=0.05, rho=3.0)
    asked = filled(photos, tmp_path / "out", method=way, model=str(model), sigma_y=0.05, seed=5)
    asked = asked.model_copy(update={"dtype": "float32"})
    job = prepare(asked, ignore)
    store = Measurements(job.plan.measurements)
    measurements = {e.item_id: store.read(e.item_id, "given") for e in store.entries()}
    restore(asked)
    entry = open_restored(tmp_path / "out").items()[0]
    measurement = measurements[entry.item_id]
    problem = load_domain("city").problem(measurement)
    loaded = Model.load(model)
    options = solver_options(job.plan.items[0].method.options)
    solver = make_solver(name, loaded.prior("city"), options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        direct = solver(
            loaded.denoiser("city"),
            problem.operator,
            problem.y,
            problem.noise,
            power_sigmas(3, 0.7, 0.05, 3.0),
            KeyedDraws(5, entry.record.source_digest),
        )
    torch.set_num_threads(threads)
    expected = problem.to_source(direct.x).numpy().swapaxes(0, 1)
    np.testing.assert_array_equal(open_restored(tmp_path / "out").read(entry), expected)
    assert entry.nfe == (0 if name == "kriging" else 3)
    assert entry.num_operator_calls == direct.num_operator_calls
    assert entry.model_digest == loaded.digest


def test_tiles_of_a_large_photograph_equal_the_whole_and_seams_do_not_show(
    model, tmp_path, monkeypatch
):
    """Pixelwise data step, float32: what is left is the network's reach beyond the halo."""
    asked = large_photograph(tmp_path, (300, 340), hole_px=1, sigma_y=0.05).model_copy(
        update={
            "method": MethodSettings(name="diffpir", num_levels=4, options={"start": "adjoint"}),
            "model": str(model),
            "block_size": 64,
        }
    )
    whole = restore(asked)
    monkeypatch.setattr("flows.engine.grid.MAX_CANVAS_PX", 128 * 128)
    tiles = restore(asked.model_copy(update={"output": tmp_path / "tiles"}))
    assert (whole.num_blocks, tiles.num_blocks) == (1, 5 * 6)
    assert furthest_apart(tmp_path / "out", tmp_path / "tiles") < 1e-3 * 255


@pytest.mark.parametrize(("hole_px", "sigma_y"), [(1, 0.05), (20, 0.0)])
def test_covprox_in_blocks_equals_covprox_at_once(tmp_path, monkeypatch, hole_px, sigma_y):
    """The shipped model in float32, its covariance tapered and its solves converged either way."""
    asked = large_photograph(tmp_path, (64, 360), hole_px=hole_px, sigma_y=sigma_y).model_copy(
        update={"method": MethodSettings(num_levels=2), "block_size": 128}
    )
    monkeypatch.setattr("flows.engine.grid.MAX_CANVAS_PX", 64 * 64)
    tiles = restore(asked)
    with monkeypatch.context() as at_once:
        at_once.setattr("flows.engine.grid.Grid.reach", 96)
        whole = restore(
            asked.model_copy(
                update={
                    "output": tmp_path / "whole",
                    "block_size": 512,
                    "method": MethodSettings(num_levels=2, options=CONVERGED),
                }
            )
        )
    assert (whole.num_blocks, tiles.num_blocks) == (1, 3)
    assert furthest_apart(tmp_path / "out", tmp_path / "whole") < 1e-3 * 255


def large_photograph(folder: Path, size: tuple[int, int], *, hole_px: int, sigma_y: float):
    """Settings that restore a photograph with half of its pixels missing, or squares apart."""
    image = picture(2, (1, 1, *size))[0, 0]
    mask = np.random.default_rng(0).random(size) < 0.5
    if hole_px > 1:
        rows, columns = (np.arange(n) // hole_px % 2 == 1 for n in size)
        mask = rows[:, None] & columns
    for place, values in (("image", image), ("mask", np.where(mask, 255, 0).astype(np.uint8))):
        (folder / place).mkdir()
        Image.fromarray(values).save(folder / place / "a.png")
    return settings(
        folder / "image",
        folder / "out",
        domain="city",
        mask=str(folder / "mask"),
        sigma_y=sigma_y,
        model=str(config_path("models", "starter")),
        dtype="float32",
    )


def furthest_apart(*places: Path) -> float:
    """Largest difference between the one image restored in each place."""
    one, other = (next(iter(published(place).values())) for place in places)
    return float(np.abs(one - other).max())


def test_a_large_plane_is_denoised_in_tiles_with_the_same_result(
    photos, model, tmp_path, monkeypatch
):
    way = MethodSettings(name="dds", num_levels=2)
    asked = filled(photos, tmp_path / "one", method=way, model=str(model), dtype="float32")
    restore(asked)
    monkeypatch.setattr("flows.engine.block.DENOISER_PLANE_PX", 100)
    monkeypatch.setattr("flows.engine.block.DENOISER_TILE_PX", 16)
    restore(asked.model_copy(update={"output": tmp_path / "two"}))
    one, other = published(tmp_path / "one"), published(tmp_path / "two")
    for key in one:
        np.testing.assert_allclose(one[key], other[key], atol=1e-3 * 255)


def test_a_model_that_changes_under_a_plan_stops_the_run(photos, tmp_path):
    path = make_model(tmp_path / "model")
    asked = filled(photos, tmp_path / "out", method=MethodSettings(name="dds"), model=str(path))
    job = prepare(asked, ignore)
    changed = replace(job.plan.items[0].model, digest="0" * 64)
    items = tuple(replace(item, model=changed) for item in job.plan.items)
    with InlineExecutor() as executor, pytest.raises(CampaignError, match="changed since the plan"):
        restore_window(job, replace(job.plan, items=items), executor, ignore)


def test_an_option_or_a_condition_that_is_not_known_quarantines_with_a_sentence(
    photos, model, tmp_path
):
    way = MethodSettings(name="dds", options={"wings": 2})
    with pytest.raises(BadInputError, match="no option 'wings'"):
        restore(filled(photos, tmp_path / "out", method=way, model=str(model)))
