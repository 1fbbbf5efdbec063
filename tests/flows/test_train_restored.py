"""`sashiko train` on measurements that are no pictures, as the images that are made of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from kspace_kit import lines, scan, write_bart
from safetensors.torch import load_file
from train_kit import dataset_of, photograph, settings

from diffusion_core.model import CARD, Model
from domains.base import BadInputError, Item, ItemRecord, Task
from domains.registry import load_domain
from flows.api_data import ingest
from flows.api_train import resolved, train
from flows.config import IngestSettings, config_path
from flows.store import DatasetWriter, Measurements, MeasurementWriter
from flows.training.filling import ByModel
from flows.training.plan import plan_training
from flows.training.sources import open_sources

pytestmark = pytest.mark.usefixtures("registry_home")

EVERY_SECOND_LINE = Task(
    "half",
    "mri",
    "fourier",
    {"acceleration": 2.0, "centre_share": 0.2, "phase": "zero"},
    {"kind": "snr", "snr_db": 35.0},
)
MRI = {"conditions": {"mri": 1.0}, "num_steps": 4, "calibration_items": ["head-0"]}


def head(number, split="train"):
    """Discs in each other, four slices."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[-1:1:48j, -1:1:40j]
    slices = []
    for _ in range(4):
        image = 60.0 * (np.hypot(x, y) < 0.8)
        for _ in range(5):
            (cy, cx), r = rng.uniform(-0.4, 0.4, 2), rng.uniform(0.1, 0.4)
            image = image + rng.uniform(-40, 60) * (np.hypot(x - cx, y - cy) < r)
        slices.append(np.maximum(image, 0))
    pixels = np.stack(slices)[None].astype(np.float32)
    record = ItemRecord(
        item_id=f"head-{number}", domain="mri", shape=pixels.shape, dtype="float32",
        units="intensity", source_digest=f"{number:064x}", source_format="nifti", split=split,
        spacing_mm=(6.0, 1.0, 1.0),
    )  # fmt: skip
    return Item(pixels, record)


def heads(path, task=EVERY_SECOND_LINE, numbers=range(4)):
    """Their k-space, every second line of it; the last is for validation."""
    with MeasurementWriter(path) as writer:
        for number in numbers:
            item = head(number, "validation" if number == 3 else "train")
            writer.add(load_domain("mri").simulate(item, task, 0))
    return path


def filled(store, output, by, **changes):
    return settings(store, output, **{**MRI, "corruption": {"filled_by": by}, **changes})


def shipped(result):
    return load_file(result.model_path / "weights.safetensors")


def rms(a):
    return float(np.sqrt(np.mean(np.square(a))))


def the_first_of(path):
    """A store's first measurement, and its entry."""
    store = Measurements(path)
    entry = store.entries()[0]
    return store.read(entry.item_id, entry.task), entry


@pytest.fixture
def first_part(tmp_path):
    """k-space, and a model that learned from what total variation makes of it."""
    store = heads(tmp_path / "k.zarr")
    return store, train(filled(store, tmp_path, "tv"))


def test_a_first_part_learns_from_a_classical_methods_images_and_a_second_from_its_own(
    first_part, tmp_path
):
    store, first = first_part
    truth = load_domain("mri").training_windows(head(0))["mri"][0]
    errors = {}
    for by in ("zero-filled", "tv", config_path("models", "starter")):
        [source] = open_sources(filled(store, tmp_path, by))
        record = source.items()[0]
        errors[str(by)] = rms(source.windows(record)["mri"][0] - truth)
    by_zeros, by_tv, by_starter = errors.values()
    assert by_tv < 0.7 * by_zeros
    assert by_starter < 0.4 * by_zeros

    asked = filled(store, tmp_path, first.model_path, name="second", init_from=first.model_path)
    second = train(asked)
    [source] = open_sources(asked)
    assert not source.has_holes
    made = ByModel(Model.load(first.model_path), {}).restored(*the_first_of(store))
    measurement = the_first_of(store)[0]
    lines_of = np.fft.fft2(made.pixels[0], norm="ortho")[:, None] * measurement.arrays["mask"]
    assert rms(abs(lines_of - measurement.y)) < 0.05 * rms(abs(measurement.y)), "as measured"
    expected = load_domain("mri").training_windows(made)["mri"][0]
    assert np.array_equal(source.windows(record)["mri"][0], expected)
    for result, by in ((first, "tv"), (second, first.digest)):
        assert Model.load(result.model_path).config["filled_by"] == by
        told = "'tv'" if by == "tv" else f"model {by[:12]}"
        assert f"restored by {told}, and" in (result.model_path / CARD).read_text()
    a, b = shipped(first), shipped(second)
    assert any(not torch.equal(a[key], b[key]) for key in a)


def test_data_that_were_not_measured_change_no_bit_and_measured_ones_do(tmp_path):
    """Lines outside the mask are whatever the scanner left there."""
    results = []
    for name, where in (("plain", None), ("outside", False), ("inside", True)):
        with MeasurementWriter(tmp_path / f"{name}.zarr") as writer:
            for number in range(2):
                one = load_domain("mri").simulate(head(number), EVERY_SECOND_LINE, 0)
                if where is not None:
                    chosen = np.broadcast_to(one.arrays["mask"] == where, one.y.shape)
                    one.y[chosen] += np.float32(5.0)
                writer.add(one)
        asked = filled(tmp_path / f"{name}.zarr", tmp_path / name, "tv", num_steps=2)
        results.append(shipped(train(asked)))
    plain, outside, inside = results
    assert all(torch.equal(plain[key], outside[key]) for key in plain)
    assert any(not torch.equal(plain[key], inside[key]) for key in plain)


def test_raw_scans_of_a_folder_teach_magnitudes_and_complex_images(tmp_path):
    (tmp_path / "scans/p").mkdir(parents=True)
    k = scan(65, 48).k * lines(48)
    write_bart(tmp_path / "scans/p/first", k)
    np.save(tmp_path / "scans/second.npy", (1.5 * k[..., ::-1, :]).astype(np.complex64))
    store = tmp_path / "raw.zarr"
    ingest(IngestSettings(source=tmp_path / "scans", domain="mri", output=store, split="train"))
    both = {"conditions": {"mri": 0.5, "mri-complex": 0.5}, "calibration_items": []}
    with pytest.raises(BadInputError, match="'tv' restores no multi-coil of mri: name one of"):
        train(filled(store, tmp_path / "refused", "tv", **both))
    result = train(filled(store, tmp_path, "wavelet", **both))
    assert Model.load(result.model_path).conditions == {"mri": 1, "mri-complex": 2}
    [source] = open_sources(filled(store, tmp_path, "wavelet", **both))
    views = source.windows(source.items()[0])["mri"]
    assert views[0].shape == (1, 1, 48, 65) or views[0].shape == (1, 1, 65, 48)
    assert views[0].min() >= -1, "a magnitude"


def test_noisy_pictures_are_restored_too(tmp_path):
    store = tmp_path / "noisy.zarr"
    task = Task("noisy", "city", "identity", {}, {"kind": "gaussian", "sigma_y": 0.1})
    with MeasurementWriter(store) as writer:
        for number in range(2):
            writer.add(load_domain("city").simulate(photograph(number, "train"), task, 0))
    city = {"conditions": {"city": 1.0}, "calibration_items": []}
    [source] = open_sources(filled(store, tmp_path, "tv", **city))
    truth = load_domain("city").training_windows(photograph(0, "train"))["city"][0]
    assert rms(source.windows(source.items()[0])["city"][0] - truth) < 0.1
    assert train(filled(store, tmp_path, "tv", **city)).num_steps == 4


def test_counting_restores_nothing(tmp_path, monkeypatch):
    store = heads(tmp_path / "k.zarr")

    def restored(*_):
        raise AssertionError("restored what is only counted")

    monkeypatch.setattr(ByModel, "restored", restored)
    asked = filled(store, tmp_path, "starter")
    plan = plan_training(resolved(asked))
    assert plan.num_items == 3
    assert plan.data_bytes == 3 * 4 * 48 * 40 * 4


def test_the_starter_fills_by_its_name(tmp_path, monkeypatch):
    asked = resolved(filled(tmp_path / "k.zarr", tmp_path, "starter"))
    assert asked.corruption.filled_by == config_path("models", "starter")
    with pytest.raises(BadInputError, match="names a distilled model, which is no denoiser"):
        open_sources(resolved(filled(heads(tmp_path / "k.zarr"), tmp_path, "starter-distilled")))
    (tmp_path / "tv").mkdir()  # a folder of that name is none
    monkeypatch.chdir(tmp_path)
    asked = resolved(filled(tmp_path / "k.zarr", tmp_path, "tv"))
    assert str(asked.corruption.filled_by) == "tv"


@pytest.mark.parametrize(
    ("corruption", "named"),
    [
        (None, r"set corruption=\{filled_by"),
        ({"kind": "mask"}, r"set corruption=\{filled_by"),
        ({"filled_by": "tvv"}, r"nor a classical method: .*tv"),
    ],
)
def test_what_cannot_restore_is_refused_before_anything_is_written(corruption, named, tmp_path):
    store, output = heads(tmp_path / "k.zarr"), tmp_path / "runs"
    with pytest.raises(BadInputError, match=named):
        train(settings(store, output, **MRI, corruption=corruption))
    assert not output.exists()


def test_a_classical_method_of_other_measurements_is_named(tmp_path):
    store = heads(tmp_path / "k.zarr")
    named = "'biharmonic' restores no fourier of mri: name one of tv, wavelet, zero-filled, or a"
    with pytest.raises(BadInputError, match=named):
        train(filled(store, tmp_path / "runs", "biharmonic"))


def test_clean_images_need_no_filling(tmp_path):
    clean = dataset_of(tmp_path / "clean.zarr", range(4))
    with pytest.raises(BadInputError, match="`data` holds images alone: leave it out"):
        train(settings(clean, tmp_path / "runs", corruption={"filled_by": "tv"}))
    assert not (tmp_path / "runs").exists()


def test_every_condition_without_validation_images_gets_its_covariances(tmp_path):
    """More items of one kind than are looked at, before the first of another."""
    with DatasetWriter(tmp_path / "all.zarr") as writer:
        for number in range(5):
            writer.add(photograph(number, "train"))
        writer.add(head(0))
    both = {"conditions": {"city": 0.5, "mri": 0.5}, "num_steps": 1}
    made = Model.load(train(settings(tmp_path / "all.zarr", tmp_path, **both)).model_path)
    for condition in both["conditions"]:
        assert made.prior(condition).prior_mean.isfinite().all()
    card = (made.path / CARD).read_text()
    assert "Of city, mri there was no validation image" in card


def test_an_image_that_was_measured_twice_is_refused(tmp_path):
    other = replace(EVERY_SECOND_LINE, name="other")
    with MeasurementWriter(tmp_path / "k.zarr") as writer:
        for task in (EVERY_SECOND_LINE, other):
            writer.add(load_domain("mri").simulate(head(0), task, 0))
    with pytest.raises(BadInputError, match="holds head-0 twice"):
        train(filled(tmp_path / "k.zarr", tmp_path / "runs", "tv"))
