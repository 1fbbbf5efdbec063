"""Guides from files to results: aligned or refused, part of a result's name, cut with the image."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from evaluation_kit import INLINE
from PIL import Image
from train_kit import kill_training, photograph
from train_kit import settings as train_settings

from diffusion_core.model import GUIDED, Model, save_model
from diffusion_core.networks.local_unet import LocalUNet
from diffusion_core.networks.precond import ConditionedDenoiser, Preconditioned
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.posterior.covariance import fit_covariance
from domains.base import BadInputError, Item
from domains.files import file_digest
from domains.guides import measured_with, posed, with_guides
from domains.registry import load_domain
from domains.validity import INVALID, pack
from flows.api_data import ingest, simulate
from flows.api_evaluate import evaluate
from flows.api_restore import restore
from flows.api_train import train
from flows.cli import run
from flows.config import (
    EvaluateSettings,
    IngestSettings,
    MethodSettings,
    RestoreSettings,
    SimulateSettings,
)
from flows.engine import grid
from flows.engine.restored import open_restored
from flows.store import Dataset, DatasetWriter, Measurements
from flows.store_check import verify_store

pytestmark = pytest.mark.usefixtures("registry_home")

CONDITIONS = {"mri": 1, "mri-complex": 2, "city-grey": 1}
GUIDES = {"mri": ["t1"], "mri-complex": ["t1"], "city-grey": ["pan"]}
FEW = MethodSettings(name="covprox", num_levels=2)
SHAPE = (24, 32, 3)
"""(x, y, z) of a volume."""


def make_model(path: Path, *, guided: bool) -> Path:
    """An untrained network; with guides it has the same weights, and others for them."""
    network = LocalUNet(3, (8, 8), (1, 1), 8, num_guides=2 if guided else 0)
    with torch.no_grad():
        for level, (_, parameter) in enumerate(network.named_parameters()):
            parameter.copy_(0.1 * KeyedDraws(0, "weights").normal(level, parameter))
    module = Preconditioned(network).eval().requires_grad_(requires_grad=False)
    tables = {}
    for index, (name, channels) in enumerate(CONDITIONS.items()):
        image = KeyedDraws(1, name).normal(0, torch.empty(1, channels, 32, 32)).cumsum(2) / 8
        denoise = ConditionedDenoiser(module, index, channels)
        tables[name] = fit_covariance(denoise, [image], sigmas=(0.05, 0.2, 0.7))
        if guided:  # as of a model that errs much less with its guides
            own = tables[name]
            tables[f"{name}{GUIDED}"] = replace(own, log_spectrum=own.log_spectrum - 3)
    save_model(path, module, CONDITIONS, tables, "# Tiny\n", {"guides": GUIDES} if guided else {})
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[bool, Path]:
    """Plain and guided, by whether it is guided."""
    folder = tmp_path_factory.mktemp("models")
    return {guided: make_model(folder / str(guided), guided=guided) for guided in (False, True)}


def put(path: Path, values: np.ndarray, shift_mm: float = 0.0) -> Path:
    """A NIfTI volume of 1 mm voxels, shifted along x."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[0, 3] = shift_mm
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), path)
    return path


def volume(seed: int, shape=SHAPE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.abs(rng.normal(size=shape).cumsum(axis=0).cumsum(axis=1))


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """T2 of two heads, and T1 of both."""
    for number, name in enumerate(("ann/scan", "bob/scan")):
        put(tmp_path / f"t2/{name}.nii.gz", volume(number))
        put(tmp_path / f"t1/{name}.nii.gz", volume(10 + number))
    return tmp_path


def asked(folder: Path, model: Path, output: str = "out", **changes) -> RestoreSettings:
    values = {
        "input": folder / "t2", "output": folder / output, "domain": "mri", "sigma_y": 0.2,
        "model": str(model), "method": FEW, "compute": INLINE, "dtype": "float32",
        "guides": {"t1": folder / "t1"}, **changes,
    }  # fmt: skip
    return RestoreSettings(**values)


def pixels(result) -> list[np.ndarray]:
    """Of the published items, in the order of the input's files."""
    restored = open_restored(result.output)
    entries = sorted(result.published, key=lambda e: e.item_id)
    return [np.asarray(restored.read(entry)) for entry in entries]


# --- what is given, and what is not ---------------------------------------------------------------


def test_without_a_guide_the_model_gives_the_bytes_of_the_plain_one(head, models):
    plain = restore(asked(head, models[False], "plain", guides={}))
    without = restore(asked(head, models[True], "without", guides={}))
    shown = restore(asked(head, models[True], "shown"))
    assert all(np.array_equal(a, b) for a, b in zip(pixels(plain), pixels(without), strict=True))
    difference = [np.abs(a - b).max() for a, b in zip(pixels(plain), pixels(shown), strict=True)]
    assert min(difference) > 1e-3


def test_a_result_is_named_by_what_its_guide_holds_and_says_which_it_was(head, models):
    first = restore(asked(head, models[True]))
    (head / "t1").rename(head / "elsewhere")
    again = restore(asked(head, models[True], guides={"t1": head / "elsewhere"}))
    assert {e.key for e in again.published} == {e.key for e in first.published}
    assert again.num_computed == 0
    without = restore(asked(head, models[True], guides={}))
    put(head / "elsewhere/ann/scan.nii.gz", volume(99))
    changed = restore(asked(head, models[True], guides={"t1": head / "elsewhere"}))
    keys = [{e.key for e in result.published} for result in (first, without, changed)]
    assert not keys[0] & keys[1]
    assert len(keys[0] & keys[2]) == 1, "the other head's guide is as it was"

    told = [e.facts["record"]["meta"].get("guides", {}) for e in changed.published]
    shown = {file_digest(path) for path in (head / "elsewhere").rglob("*.nii.gz")}
    assert {guides["t1"]["source_sha256"] for guides in told} == shown
    assert all("guides" not in e.facts["record"]["meta"] for e in without.published)


def test_equal_images_with_different_guides_are_two_items(head, models):
    put(head / "t2/bob/scan.nii.gz", volume(0))  # ann's
    result = restore(asked(head, models[True]))
    one, other = pixels(result)
    assert not np.array_equal(one, other)
    put(head / "t1/bob/scan.nii.gz", volume(10))  # ann's too
    assert len(restore(asked(head, models[True])).published) == 1


def test_an_image_without_a_guide_goes_without_and_it_is_told(head, models):
    """In one run, by one worker: neither sees the other's guide or covariance."""
    shown = restore(asked(head, models[True], "shown"))
    without = restore(asked(head, models[True], "without", guides={}))
    apart = [image for result in (shown, without) for image in pixels(result)]
    (head / "t1/bob/scan.nii.gz").unlink()
    events = []
    result = restore(asked(head, models[True]), events.append)
    for image in pixels(result):
        assert sum(np.array_equal(image, other) for other in apart) == 1
    assert len(result.published) == 2
    told = [event.message for event in events if event.kind == "warning"]
    assert told == ["1 of 2 images have no guide 't1': they go without"]
    guides = [e.facts["record"]["meta"].get("guides") for e in result.published]
    assert guides.count(None) == 1


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t1: put(t1, volume(5, (24, 30, 3))), "has 3 x 30 x 24 pixels and the image 3 x 32"),
        (lambda t1: put(t1, volume(5), shift_mm=2.0), "lies elsewhere, 2 pixels away"),
        (lambda t1: put(t1, np.ones(SHAPE)), "has one value everywhere"),
        (lambda t1: t1.write_bytes(b"no volume"), "plain text"),
    ],
)
def test_a_guide_of_another_grid_or_none_at_all_puts_its_image_in_quarantine(
    head, models, spoil, reason
):
    spoil(head / "t1/ann/scan.nii.gz")
    result = restore(asked(head, models[True]))
    assert len(result.published) == 1
    (bad,) = result.quarantined
    assert reason in bad.reason
    assert "its guide 't1'" in bad.reason
    assert "ann" not in bad.reason


def test_a_small_shift_by_rounding_is_no_other_grid(head, models):
    put(head / "t1/ann/scan.nii.gz", volume(10), shift_mm=0.05)
    assert len(restore(asked(head, models[True])).published) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"guides": {"flair": "t1"}}, "not trained with the guide 'flair' .it knows t1"),
        ({"model": "starter"}, "not trained with the guide 't1' .it knows none"),
        ({"guides": {"t1": "nowhere"}}, "there is no such guide 't1'"),
        ({"guides": {"t1": "other"}}, "no file there has the name of an image"),
        ({"guides": {"t1": "t1/ann/scan.nii.gz"}}, "one guide 't1' for 2 images"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused_in_a_sentence(head, models, changes, reason):
    put(head / "other/carol.nii.gz", volume(3))
    guides = changes.get("guides", {"t1": "t1"})
    own = {"guides": {name: head / place for name, place in guides.items()}}
    with pytest.raises(BadInputError, match=reason) as refused:
        restore(asked(head, changes.get("model", models[True]), **own))
    assert "\n" not in str(refused.value)
    assert not (head / "out" / ".work").exists()


def test_the_command_takes_guides_by_name(head, models, capsys):
    line = ["restore", "--domain", "mri", "--input", str(head / "t2"), "--sigma-y", "0.2",
            "--output", str(head / "out"), "--model", str(models[True]), "--levels", "2",
            "--executor", "inline", "--no-prefect"]  # fmt: skip
    assert run([*line, "--guide", f"t1={head / 't1'}"]) == 0
    assert run([*line, "--guide", "t1"]) == 2
    assert "is not NAME=PATH" in capsys.readouterr().err
    assert run([*line, "--guide", f"T 1={head / 't1'}"]) == 2


def test_guides_that_lie_among_the_images_are_no_images(head, models):
    (head / "t1").rename(head / "t2" / "t1")
    result = restore(asked(head, models[True], guides={"t1": head / "t2" / "t1"}))
    assert len(result.published) == 2


# --- tiles, bands, larger canvases ----------------------------------------------------------------


def scene(folder: Path, bands: int, size: tuple[int, int], pan_size: tuple[int, int]) -> None:
    """A picture of so many bands and a finer one of a single band."""
    rng = np.random.default_rng(4)
    for name, count, (h, w) in (("ms", bands, size), ("pan", 1, pan_size)):
        (folder / name).mkdir()
        planes = rng.normal(size=(count, h, w)).cumsum(1).cumsum(2)
        values = np.uint8(127 + 100 * np.tanh(planes / 30))
        if count == 1:
            Image.fromarray(values[0]).save(folder / name / "scene.png")
        else:
            tifffile.imwrite(
                folder / name / "scene.tif",
                np.moveaxis(values, 0, 2),
                photometric="minisblack",
                planarconfig="contig",
            )


def given(folder: Path, model: Path, output: str, **changes) -> RestoreSettings:
    return asked(
        folder, model, output, input=folder / "ms", domain="city",
        **{"guides": {"pan": folder / "pan"}, **changes},
    )  # fmt: skip


def test_a_guide_is_cut_into_blocks_with_its_image(tmp_path, models, monkeypatch):
    scene(tmp_path, 1, (150, 260), (150, 260))
    way = MethodSettings(name="diffpir", num_levels=2, options={"start": "adjoint"})
    whole = restore(given(tmp_path, models[True], "whole", method=way))
    monkeypatch.setattr(grid, "MAX_CANVAS_PX", 100**2)
    blocks = restore(given(tmp_path, models[True], "blocks", method=way, block_size=64))
    assert blocks.num_blocks > whole.num_blocks == 1
    (a,), (b,) = pixels(whole), pixels(blocks)
    assert np.abs(a - b).max() < 0.05  # of 255
    without = restore(given(tmp_path, models[True], "none", method=way, guides={}))
    assert np.abs(a - pixels(without)[0]).max() > 1


def test_a_panchromatic_picture_guides_coarse_bands_on_the_grid_that_is_wanted(tmp_path, models):
    scene(tmp_path, 4, (20, 24), (80, 96))
    result = restore(given(tmp_path, models[True], "out", scale=4, sigma_y=0.0))
    (image,) = pixels(result)
    assert image.shape == (4, 1, 80, 96)
    without = restore(given(tmp_path, models[True], "none", scale=4, sigma_y=0.0, guides={}))
    assert (np.abs(image - pixels(without)[0]).max(axis=(1, 2, 3)) > 1).all(), "in every band"
    with pytest.raises(BadInputError, match="has 1 x 80 x 96 pixels and the image 1 x 40 x 48"):
        restore(given(tmp_path, models[True], "bad", scale=2, sigma_y=0.0))


def test_every_band_of_a_frame_has_the_guide_of_that_frame():
    domain = load_domain("city")
    item = photograph(0, "test")
    frames = np.repeat(item.pixels[:1], 4, axis=0).repeat(2, axis=1)
    record = replace(item.record, shape=frames.shape)
    guide = np.stack([item.pixels[1, 0], item.pixels[2, 0]])[None]
    other = Item(guide, replace(record, shape=guide.shape))
    item = with_guides(Item(frames, record), {"pan": other})
    measurement = domain.given(item, mask=None, kernel=None, scale=None, sigma_y=0.1)
    problem = posed(domain, measured_with(domain, measurement, item))
    assert problem.shape == (8, 1, 64, 64)
    shown = problem.guides["pan"][:, 0].numpy()
    assert all(np.array_equal(shown[b], item.guides["pan"][0, b // 4]) for b in range(8))
    assert not np.array_equal(shown[3], shown[4])


def test_where_a_guide_s_file_has_no_data_it_is_not_given():
    item = photograph(0, "test")
    band = item.pixels[:1].copy()
    band[0, 0, :9, :20] = 255
    missing = np.zeros((1, 64, 64), bool)
    missing[0, :9, :20] = True
    meta = {**item.record.meta, INVALID: pack(missing)}
    record = replace(item.record, shape=band.shape, meta=meta)
    shown = with_guides(item, {"pan": Item(band, record)})
    assert np.array_equal(np.isnan(shown.guides["pan"][0]), missing)
    assert shown.record.meta["guides"]["pan"]["high"] < 255, "nor is its range that of no data"
    nothing = replace(record, meta={**meta, INVALID: pack(np.ones((1, 64, 64), bool))})
    with pytest.raises(BadInputError, match="'pan' holds no data"):
        with_guides(item, {"pan": Item(band, nothing)})


def test_in_shared_batches_a_guide_stays_with_its_image(head, models):
    alone = pixels(restore(asked(head, models[True], "alone")))
    shared = pixels(restore(asked(head, models[True], "shared", batch_px=2**16)))
    assert max(np.abs(a - b).max() / a.max() for a, b in zip(alone, shared, strict=True)) < 1e-4


def test_beyond_the_picture_a_guide_is_not_given(tmp_path, models):
    """A blurred picture's unknown has a larger canvas; slices run first, bands within them."""
    domain = load_domain("city")
    scene(tmp_path, 1, (40, 48), (40, 48))
    item = domain.read(tmp_path / "ms/scene.png")
    other = domain.read(tmp_path / "pan/scene.png")
    item = with_guides(item, {"pan": other})
    measurement = domain.given(item, mask=None, kernel=np.ones((9, 9)), scale=None, sigma_y=0.01)
    problem = posed(domain, measured_with(domain, measurement, item))
    guide = problem.guides["pan"]
    assert guide.shape == problem.shape
    assert problem.shape[2] > 40
    top, left = measurement.params["margin"]
    inside = guide[..., top : top + 40, left : left + 48]
    assert torch.equal(inside[0, 0], torch.from_numpy(item.guides["pan"][0, 0]))
    assert guide.isfinite().sum() == 40 * 48


# --- datasets, evaluation, training ---------------------------------------------------------------


def ingested(head: Path, name: str = "heads.zarr", **changes) -> Path:
    values = {"source": head / "t2", "domain": "mri", "output": head / name, "split": "train"}
    ingest(IngestSettings(**{**values, "guides": {"t1": head / "t1"}, **changes}))
    return head / name


def test_a_dataset_keeps_guides_on_the_grid_and_range_of_their_own(head):
    path = ingested(head)
    dataset = Dataset(path)
    assert dataset.digest != Dataset(ingested(head, "bare.zarr", guides={})).digest
    for record in dataset.items():
        item = dataset.read(record.item_id)
        low, high = np.percentile(item.guides["t1"], [0.1, 99.9])
        assert (low, high) == pytest.approx((-1, 1), abs=1e-5)
        part = dataset.read(record.item_id, slice(1, 3))
        assert np.array_equal(part.guides["t1"], item.guides["t1"][:, 1:3])
    assert verify_store(dataset).intact
    files = sorted(path.glob("items/*/guide-t1/c/**/*"))
    chunk = next(file for file in files if file.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    assert not verify_store(Dataset(path)).intact


def test_guides_are_of_no_influence_on_what_is_measured(head):
    stores = []
    for name, changes in (("a.zarr", {}), ("b.zarr", {"guides": {}})):
        dataset = ingested(head, name, **changes)
        to = head / f"meas-{name}"
        simulate(SimulateSettings(dataset=dataset, tasks=["kspace-x4"], output=to))
        stores.append(Measurements(to))
    for one, other in zip(stores[0].entries(), stores[1].entries(), strict=True):
        a, b = (s.read(e.item_id, e.task) for s, e in zip(stores, (one, other), strict=True))
        assert np.array_equal(a.y, b.y)
        assert set(a.arrays) - set(b.arrays) == {"guide-t1"}
        assert one.digest != other.digest


def test_evaluation_shows_the_guides_of_a_folder(head, models):
    def psnr(name, **changes):
        values = {"input": head / "t2", "tasks": ["kspace-x4-real"], "model": str(models[True]),
                  "output": head / name, "methods": ["covprox", "zero-filled"],
                  "compute": INLINE, "dtype": "float32", "guides": {"t1": head / "t1"}}  # fmt: skip
        rows = evaluate(EvaluateSettings(**{**values, **changes})).rows
        return {m: [r["psnr"] for r in rows if r["method"] == m] for m in values["methods"]}

    shown, without = psnr("shown"), psnr("without", guides={})
    assert shown["zero-filled"] == without["zero-filled"]
    assert shown["covprox"] != without["covprox"]
    with pytest.raises(BadInputError, match="holds the guides that it was ingested with"):
        psnr("dataset", input=ingested(head))


def photographs(path: Path) -> Path:
    """Four photographs with their brightness as a guide, the last for validation, one without."""
    with DatasetWriter(path) as writer:
        for number in range(4):
            item = photograph(number, "validation" if number == 3 else "train")
            grey = item.pixels.mean(axis=0, keepdims=True)
            record = replace(item.record, shape=grey.shape)
            guides = {"pan": Item(grey, record)} if number else {}
            writer.add(with_guides(item, guides))
    return path


def learned(path: Path) -> dict[int, float]:
    readings = map(json.loads, path.read_text().splitlines())
    return {reading["step"]: reading["loss"] for reading in readings}


def test_a_guided_run_killed_with_9_goes_on_to_the_undisturbed_curve(tmp_path):
    dataset = photographs(tmp_path / "photos.zarr")
    changes = {"guides": {"city": ["pan"]}, "num_steps": 16}
    undisturbed = train(train_settings(dataset, tmp_path / "a", **changes))
    interrupted = train_settings(dataset, tmp_path / "b", **changes)
    log = kill_training(interrupted, tmp_path)
    assert max(learned(log)) < 16
    resumed = train(interrupted)
    expected = learned(undisturbed.model_path.parent / "log.jsonl")
    assert learned(log) == pytest.approx(expected, rel=1e-6)

    model = Model.load(resumed.model_path)
    assert model.guides("city") == ["pan"]
    assert model.module.network.guide_stem.weight.abs().max() > 0
    plain, own = (model.prior("city", guided=guided) for guided in (False, True))
    assert not torch.equal(plain.log_spectrum, own.log_spectrum)


def test_training_that_drops_every_guide_is_training_without(tmp_path):
    dataset = photographs(tmp_path / "photos.zarr")
    same = {"num_steps": 3, "log_every_steps": 1}
    dropped = train_settings(
        dataset, tmp_path, name="dropped", guides={"city": ["pan"]}, guide_drop_share=1.0, **same
    )
    bare = train_settings(dataset, tmp_path, name="bare", **same)
    models = [Model.load(train(asked).model_path) for asked in (dropped, bare)]
    with_stem, plain = (model.module.state_dict() for model in models)
    assert with_stem.pop("network.guide_stem.weight").abs().max() == 0
    assert all(torch.equal(with_stem[name], plain[name]) for name in plain)


def test_a_guided_model_goes_on_with_the_same_guides_only(tmp_path):
    dataset = photographs(tmp_path / "photos.zarr")
    same = {"num_steps": 2, "guides": {"city": ["pan"]}}
    first = train(train_settings(dataset, tmp_path, name="first", **same))
    again = {**same, "init_from": first.model_path}
    train(train_settings(dataset, tmp_path, name="second", **again))
    with pytest.raises(BadInputError, match=r"knows other guides .pan. than"):
        train(train_settings(dataset, tmp_path, name="third", **{**again, "guides": {}}))
    with pytest.raises(ValueError, match="'ct' is none of the run's conditions"):
        train_settings(dataset, tmp_path, guides={"ct": ["pan"]})
