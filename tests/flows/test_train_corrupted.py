"""`sashiko train` on images that lack pixels: the truth of those is never read."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from train_kit import dataset_of, photograph, settings

from diffusion_core.model import CARD, Model
from domains.base import BadInputError
from domains.registry import load_domain
from flows import cli
from flows.api_data import ingest
from flows.api_train import new_network, train
from flows.config import IngestSettings
from flows.store import Measurements, MeasurementWriter
from flows.training.plan import plan_training
from flows.training.sources import open_source, open_sources
from flows.training.validation import validation_images, without_holes

pytestmark = pytest.mark.usefixtures("registry_home")

MASKED = {"corruption": {"kind": "mask", "further": 0.1}, "num_steps": 4}


def missing_of(number):
    return np.random.default_rng(100 + number).random((64, 64)) < 0.3


def store_of(path, *, poison=None, sigma_y=0.0, numbers=range(4)):
    """Photographs that lack three pixels in ten; the third is for validation."""
    with MeasurementWriter(path) as writer:
        for number in numbers:
            item = photograph(number, "validation" if number == 3 else "train")
            missing = missing_of(number)
            measurement = load_domain("city").given(
                item, mask=missing, kernel=None, scale=None, sigma_y=sigma_y
            )
            if poison is not None:
                measurement.y[..., missing] = poison
            writer.add(measurement)
    return path


def shipped(result):
    return load_file(result.model_path / "weights.safetensors")


def test_what_hides_under_the_mask_changes_no_bit_of_the_weights(tmp_path):
    """NaN, or values that no camera gives, where nothing was measured; tables and figures too."""
    plain = train(settings(store_of(tmp_path / "a.zarr"), tmp_path / "a", **MASKED))
    for name, poison in (("nan", np.nan), ("large", 1e6)):
        store = store_of(tmp_path / f"{name}.zarr", poison=poison)
        other = train(settings(store, tmp_path / name, **MASKED))
        a, b = shipped(plain), shipped(other)
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert other.metrics == plain.metrics
        tables = [
            load_file(result.model_path / "covariance-city.safetensors")
            for result in (plain, other)
        ]
        assert all(torch.equal(tables[0][key], tables[1][key]) for key in tables[0])
    moved = store_of(tmp_path / "moved.zarr")
    store = Measurements(moved)
    first = store.entries()[0]
    measurement = store.read(first.item_id, first.task)
    known = open_source(moved).windows(first.record)["city"][0]
    assert np.isnan(known).mean() == pytest.approx(missing_of(0).mean())
    assert np.array_equal(known[:, 0][:, ~missing_of(0)], measurement.y[0][:, ~missing_of(0)])


def test_a_measured_pixel_does_change_them(tmp_path):
    first = shipped(train(settings(store_of(tmp_path / "a.zarr"), tmp_path / "a", **MASKED)))
    fewer = store_of(tmp_path / "b.zarr", numbers=(0, 1, 3))
    other = shipped(train(settings(fewer, tmp_path / "b", **MASKED)))
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_the_model_is_a_plain_one_that_any_command_loads(tmp_path):
    result = train(settings(store_of(tmp_path / "a.zarr"), tmp_path, **MASKED))
    model = Model.load(result.model_path)
    assert "sees_missing" not in model.config["network"]
    assert model.config["training"]["corruption"] == {"kind": "mask", "further": 0.1}
    assert all(np.isfinite(db) for db in result.metrics.values())
    prior = model.prior("city")
    assert prior.prior_mean.isfinite().all()


def test_it_goes_on_from_a_plain_model_and_a_plain_one_from_it(tmp_path):
    clean = dataset_of(tmp_path / "clean.zarr", range(4))
    start = train(settings(clean, tmp_path, name="start", num_steps=2)).model_path
    store = store_of(tmp_path / "a.zarr")
    adapted = train(settings(store, tmp_path, name="adapted", init_from=start, **MASKED))
    again = settings(clean, tmp_path, name="again", init_from=adapted.model_path, num_steps=2)
    assert Model.load(train(again).model_path).config["started_from"] == adapted.digest


def test_views_on_disk_give_the_samples_of_views_in_memory(tmp_path):
    store = store_of(tmp_path / "a.zarr")
    inside = shipped(train(settings(store, tmp_path / "a", **MASKED)))
    spilled = settings(store, tmp_path / "b", data_memory_gb=1e-5, **MASKED)
    outside = shipped(train(spilled))
    assert all(torch.equal(inside[key], outside[key]) for key in inside)


def test_a_network_fills_what_it_is_told_of_and_nothing_else(tmp_path):
    store = store_of(tmp_path / "a.zarr")
    asked = settings(store, tmp_path, **MASKED)
    found = validation_images(asked, 1, 61)  # no multiple of the network's stride
    module = new_network(asked).eval()
    [whole] = without_holes(module, found)["city"]
    [holed] = found["city"]
    assert holed.isnan().any()
    assert whole.isfinite().all()
    assert torch.equal(whole[~holed.isnan()], holed[~holed.isnan()])
    assert whole[holed.isnan()].std() > 0


def filled_settings(store, output, first, **changes):
    """Of a second part, that learns from what the model of the first one made of the images."""
    changes = {"name": "second", "num_steps": 4, **changes}
    return settings(store, output, corruption={"filled_by": first.model_path}, **changes)


@pytest.fixture
def first_part(tmp_path):
    """A model that learned from images that lack pixels, and their store."""
    store = store_of(tmp_path / "a.zarr")
    return store, train(settings(store, tmp_path, **MASKED))


def test_a_second_part_learns_from_the_first_ones_restorations_and_keeps_what_was_measured(
    first_part, tmp_path
):
    store, first = first_part
    asked = filled_settings(store, tmp_path, first)
    [holed], [whole] = open_sources(asked, filled=False), open_sources(asked)
    record = holed.items()[0]
    before, after = (source.windows(record)["city"][0] for source in (holed, whole))
    missing = np.isnan(before)
    assert missing.mean() == pytest.approx(0.3, abs=0.05)
    assert np.isfinite(after).all()
    assert np.array_equal(after[~missing], before[~missing])
    truth = load_domain("city").training_windows(photograph(0, "train"))["city"][0]
    error = np.sqrt(np.mean((after - truth)[missing] ** 2))
    assert error < 0.8 * truth[missing].std(), "restored from what surrounds them"
    assert (holed.has_holes, whole.has_holes) == (True, False)
    assert holed.digest != whole.digest

    second = train(asked)
    model = Model.load(second.model_path)
    assert model.config["filled_by"] == first.digest
    assert model.config["training"]["corruption"] == {"kind": "mask", "further": 0.1}
    card = (second.model_path / CARD).read_text()
    assert f"restored by model {first.digest[:12]}" in card
    assert str(tmp_path) not in card + (second.model_path / "config.json").read_text()


def test_poison_under_the_masks_reaches_no_second_part(first_part, tmp_path):
    store, first = first_part
    plain = shipped(train(filled_settings(store, tmp_path / "plain", first)))
    poisoned = store_of(tmp_path / "p.zarr", poison=1e6)
    other = shipped(train(filled_settings(poisoned, tmp_path / "poisoned", first)))
    assert all(torch.equal(plain[key], other[key]) for key in plain)


def test_what_is_filled_by_another_model_is_another_run(first_part, tmp_path):
    store, first = first_part
    train(filled_settings(store, tmp_path, first))
    other = train(settings(store, tmp_path, **{**MASKED, "name": "other", "seed": 9}))
    with pytest.raises(BadInputError, match=r"other settings \(data\)"):
        train(filled_settings(store, tmp_path, other))
    moved = tmp_path / "moved"
    shutil.copytree(first.model_path, moved)
    again = filled_settings(store, tmp_path, first, num_steps=4)
    again = again.model_copy(
        update={"corruption": again.corruption.model_copy(update={"filled_by": moved})}
    )
    assert train(again).num_steps == 4, "the same model in another place is the same run"


def test_a_model_that_cannot_fill_is_named(first_part, tmp_path):
    store, first = first_part
    asked = filled_settings(store, tmp_path / "x", first)
    corruption = asked.corruption.model_copy(update={"filled_by": tmp_path / "nothing"})
    asked = asked.model_copy(update={"corruption": corruption})
    with pytest.raises(BadInputError, match=r"'corruption\.filled_by' names no model"):
        train(asked)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "store", "named"),
    [
        ({"num_steps": 2}, {}, "set corruption"),
        (MASKED, {"sigma_y": 0.1}, r"set corruption=\{filled_by"),
        ({**MASKED, "score": {"every_steps": 2}}, {}, "lacks pixels, and what fills them"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_anything_is_written(
    changes, store, named, tmp_path
):
    data = store_of(tmp_path / "a.zarr", **store)
    with pytest.raises(BadInputError, match=named):
        train(settings(data, tmp_path / "runs", **changes))
    assert not (tmp_path / "runs").exists()


def test_a_plan_knows_the_images_that_lack_pixels(tmp_path):
    plan = plan_training(settings(store_of(tmp_path / "a.zarr"), tmp_path / "runs", **MASKED))
    assert plan.num_items == 3
    assert plan.data_bytes == 3 * 3 * 64 * 64 * 4


def test_own_photographs_with_masks_become_a_store_to_train_from(tmp_path):
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    photos.mkdir()
    masks.mkdir()
    for number in range(3):
        pixels = photograph(number, "train").pixels[:, 0].transpose(1, 2, 0)
        Image.fromarray(pixels).save(photos / f"{number}.png")
        if number < 2:
            white = (missing_of(number) * 255).astype(np.uint8)
            Image.fromarray(white).save(masks / f"{number}.png")
    output = tmp_path / "own.zarr"
    result = ingest(
        IngestSettings(source=photos, domain="city", output=output, split="train", mask=str(masks))
    )
    assert [q.path.name for q in result.quarantined] == ["2.png"]
    assert "no mask" in result.quarantined[0].reason
    source = open_source(output)
    assert result.digest == source.digest
    shares = [np.isnan(source.windows(r)["city"][0]).mean() for r in source.items()]
    assert sorted(shares) == pytest.approx(sorted(missing_of(n).mean() for n in range(2)))
    assert {record.split for record in source.items()} == {"train"}
    trained = train(settings(output, tmp_path, **MASKED))
    assert isinstance(trained.model_path, Path)


def test_the_two_commands_of_the_readme_need_no_validation_image(tmp_path, capsys):
    """The second part's filling needs the first part's covariances."""
    store = store_of(tmp_path / "a.zarr", numbers=range(3))
    config = tmp_path / "own.json"
    plain = settings(store, tmp_path / "runs", num_steps=2, picture_every_steps=1)
    config.write_text(plain.model_dump_json(exclude_unset=True))
    model = tmp_path / "runs/small/model"
    for corruption, name in (("{kind: mask}", "small"), (f"{{filled_by: {model}}}", "second")):
        asked = ["train", str(config), "--set", f"corruption={corruption}", "--set", f"name={name}"]
        assert cli.run(asked) == 0
        told = "".join(capsys.readouterr())
        assert "no validation image for city: covariance measured on training images" in told
        made = Model.load(tmp_path / "runs" / name / "model")
        assert made.prior("city").prior_mean.isfinite().all()
        card = (made.path / CARD).read_text()
        assert "Of city there was no validation image" in card
        assert not made.config["validation_psnr"], "figures of learned images would be none"
