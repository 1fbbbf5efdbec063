"""A model directory: what was saved is what is loaded, and nothing else is."""

import json
import pickle

import pytest
import torch

from diffusion_core.model import (
    BadModelError,
    Model,
    model_digest,
    save_model,
    solver_settings,
    store_card_section,
    store_solver_settings,
)
from diffusion_core.networks.local_unet import LocalUNet
from diffusion_core.networks.precond import Preconditioned
from diffusion_core.noise.streams import seeded_initialisation, training_noise


@pytest.fixture
def saved(tmp_path):
    with seeded_initialisation(0):
        module = Preconditioned(LocalUNet(2, (8, 8), (1, 1), num_features=8))
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path / "model"
    save_model(path, module, {"ct": 1, "city": 3}, {}, "# card\n", {"note": "test"})
    return path, module


def test_a_loaded_model_denoises_as_the_saved_one(saved):
    path, module = saved
    x = training_noise(0, 0, torch.empty(1, 3, 20, 20))
    sigma = torch.tensor([0.3])
    model = Model.load(path)
    with torch.no_grad():
        expected = module(x, sigma, torch.tensor([1]))
    # Weights are stored in float16: 11 bits.
    assert torch.allclose(model.denoiser("city")(x, sigma), expected, atol=2e-2)
    assert model.config["note"] == "test"
    assert model.digest == model_digest(path)


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json", "MODEL_CARD.md"])
def test_an_altered_file_is_refused(saved, name):
    path, _ = saved
    raw = bytearray((path / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (path / name).write_bytes(raw)
    with pytest.raises(BadModelError, match=f"{name} is missing or not the file"):
        Model.load(path)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(BadModelError, match="not a model directory"):
        Model.load(tmp_path)
    (tmp_path / "digests.json").write_text("[1, 2")
    with pytest.raises(BadModelError, match="cannot be read"):
        Model.load(tmp_path)


def test_a_digest_list_cannot_point_outside_the_directory(saved):
    path, _ = saved
    outside = path.parent / "secret"
    outside.write_text("x")
    listing = json.loads((path / "digests.json").read_text())
    import hashlib

    listing["../secret"] = hashlib.sha256(b"x").hexdigest()
    (path / "digests.json").write_text(json.dumps(listing))
    with pytest.raises(BadModelError, match="secret"):
        model_digest(path)


def test_an_unknown_condition_is_named(saved):
    path, _ = saved
    with pytest.raises(BadModelError, match="not trained for 'mri'"):
        Model.load(path).denoiser("mri")
    with pytest.raises(BadModelError, match="no covariance table"):
        Model.load(path).prior("ct")


class Canary:
    def __reduce__(self):
        return (pytest.fail, ("a planted pickle ran",))


def test_a_planted_pickle_never_runs(saved):
    path, _ = saved
    (path / "weights.safetensors").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(BadModelError):
        Model.load(path)


def test_solver_settings_are_stored_shown_and_covered_by_the_digests(saved):
    path, _ = saved
    before = model_digest(path)
    assert solver_settings(path) == {}
    fits = {"tasks": {"sr-x4": {"covprox": {"mean": {"8": {"sigma_max": 0.7}}}}}}
    digest = store_solver_settings(path, fits, "| task | dB |\n|---|---|\n")
    assert solver_settings(path) == fits
    assert digest == model_digest(path) == Model.load(path).digest != before
    assert "## Solver settings\n\n| task | dB |" in (path / "MODEL_CARD.md").read_text()
    (path / "solver.json").write_text("{}")
    with pytest.raises(BadModelError, match=r"solver.json is missing or not the file"):
        Model.load(path)


def test_new_solver_settings_replace_the_old_and_leave_the_rest(saved, tmp_path):
    path, _ = saved
    store_solver_settings(path, {"a": 1}, "old words")
    card = (path / "MODEL_CARD.md").read_text()
    other = tmp_path / "deeper" / "other"
    store_solver_settings(path, {"b": 2}, "new words", other)
    assert solver_settings(path) == {"a": 1}, "the model itself is not touched"
    assert solver_settings(other) == {"b": 2}
    text = (other / "MODEL_CARD.md").read_text()
    assert "new words" in text
    assert "old words" not in text
    assert text.startswith("# card\n")
    assert card.startswith("# card\n")
    for name in ("weights.safetensors", "config.json"):
        assert (other / name).read_bytes() == (path / name).read_bytes()
    assert not list(path.parent.glob(".*.partial"))


def test_a_section_of_the_card_is_replaced_where_it_stands(saved):
    path, _ = saved
    first = model_digest(path)
    store_card_section(path, "Results", "old words")
    store_solver_settings(path, {"a": 1}, "| settings |")
    store_card_section(path, "Results on others", "kept")
    digest = store_card_section(path, "Results", "new words\n")
    text = (path / "MODEL_CARD.md").read_text()
    assert text == (
        "# card\n\n## Results\n\nnew words\n\n## Solver settings\n\n| settings |\n\n"
        "## Results on others\n\nkept\n"
    )
    assert digest == model_digest(path) != first
    assert solver_settings(path) == {"a": 1}
    assert not list(path.parent.glob(".*.partial"))


def test_an_altered_model_is_given_no_settings(saved):
    path, _ = saved
    (path / "config.json").write_text("{}")
    with pytest.raises(BadModelError, match=r"config.json is missing or not the file"):
        store_solver_settings(path, {}, "")
