"""`sashiko generate`: images with their provenance, the same again, and clear refusals."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_kit import make_model
from PIL import Image
from pydantic import ValidationError

from diffusion_core.model import BadModelError, Model, model_digest
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.samplers.start import gaussian_start
from domains.base import BadInputError
from domains.registry import load_domain
from flows import cli, quiet
from flows.api_generate import _Source, generate
from flows.config import GenerateSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def settings(model, output, **changes):
    values = {
        "domain": "city", "output": output, "model": str(model), "num": 2, "size": 40,
        "num_levels": 3, "seed": 5,
    }  # fmt: skip
    return GenerateSettings(**{**values, **changes})


def pixels_of(result):
    with np.load(result.output / "samples.npz", allow_pickle=False) as file:
        return file["pixels"]


def test_images_come_with_arrays_previews_and_provenance(model, tmp_path):
    result = generate(settings(model, tmp_path / "out"))
    pixels = pixels_of(result)
    assert pixels.shape == (2, 3, 40, 40)
    facts = json.loads((result.output / "provenance.json").read_text())
    assert facts["model"]["digest"] == result.model_digest == model_digest(model)
    assert facts["sampler"] == "heun"
    assert facts["seed"] == 5
    assert facts["sigmas"][0] == 4.0
    assert facts["sigmas"][-1] == 0.0
    assert len(facts["sigmas"]) == 4
    assert facts["num_denoiser_calls"] == 2 * 3 - 1  # the last interval costs one
    assert result.files == ("city-000.png", "city-001.png")
    for name, digest in facts["sha256"].items():
        assert hashlib.sha256((result.output / name).read_bytes()).hexdigest() == digest
    with Image.open(result.output / "city-001.png") as preview:
        assert "generated" in preview.text["Description"]
        shown = np.asarray(preview)
    expected = np.clip(pixels[1], 0, 255).round().transpose(1, 2, 0)
    np.testing.assert_allclose(shown, expected, atol=1)


def test_an_image_depends_on_its_number_and_seed_alone(model, tmp_path):
    two = pixels_of(generate(settings(model, tmp_path / "two")))
    three = pixels_of(generate(settings(model, tmp_path / "three", num=3)))
    np.testing.assert_array_equal(two, three[:2])
    assert abs(three[0] - three[1]).mean() > 1
    other = pixels_of(generate(settings(model, tmp_path / "other", seed=6)))
    assert abs(two - other).mean() > 1


def test_a_condition_can_be_chosen_and_samplers_differ(model, tmp_path):
    grey = {
        name: pixels_of(
            generate(settings(model, tmp_path / name, condition="city-grey", num=1, sampler=name))
        )
        for name in ("euler", "churn")
    }
    assert grey["euler"].shape == (1, 1, 40, 40)
    assert not np.array_equal(grey["euler"], grey["churn"])


def test_the_start_has_the_prior_s_mean_and_spectrum_under_the_noise(model):
    prior = Model.load(model).prior("city-grey")
    like = torch.empty(40, 1, 32, 32, dtype=torch.float64)
    x = gaussian_start(prior, like, 0.5, KeyedDraws(0, "start"))
    mean = prior.prior_mean.item()
    power = prior.prior().spectrum(64, 64)[0]
    whole = torch.cat([power, power[:, 1:-1].flip(1)], dim=1)
    assert x.var().item() + (x.mean().item() - mean) ** 2 == pytest.approx(
        whole.mean().item() + 0.25, rel=0.15
    )
    flat = replace(
        prior,
        prior_mean=torch.tensor([0.37]),
        prior_log_spectrum=power.new_full((1, len(prior.log_frequencies)), -20.0),
    )
    bright = gaussian_start(flat, like, 0.5, KeyedDraws(0, "start"))
    assert bright.mean().item() == pytest.approx(0.37, abs=4 * 0.5 / math.sqrt(like.numel()))
    bare = gaussian_start(None, like, 0.5, KeyedDraws(0, "start"))
    assert bare.std().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    ("condition", "x", "value"),
    [("ct", 0.0, 500.0), ("city", 0.0, 127.5), ("city-log", -1.0, 1.0), ("mri", 1.0, 1.0)],
)
def test_images_are_shown_in_the_units_of_the_field(condition, x, value):
    shown = load_domain(condition.partition("-")[0]).generated(condition, np.full((1, 1, 2, 2), x))
    np.testing.assert_allclose(shown.pixels, value, rtol=1e-5)


def test_a_complex_image_is_shown_by_its_magnitude():
    x = np.array([0.3, -0.4]).reshape(1, 2, 1, 1)
    np.testing.assert_allclose(load_domain("mri").generated("mri-complex", x).pixels, 0.5)


def test_what_cannot_be_generated_is_said(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(BadInputError, match="something already"):
        generate(settings(model, tmp_path / "full"))
    with pytest.raises(BadInputError, match="no condition 'ct'"):
        generate(settings(model, tmp_path / "out", condition="ct"))
    with pytest.raises(BadModelError, match="not trained for 'ct'"):
        generate(settings(model, tmp_path / "out", domain="ct"))
    with pytest.raises(ValidationError, match="num"):
        settings(model, tmp_path / "out", num=0)
    assert not (tmp_path / "out").exists()


def test_the_command_answers_and_refuses_in_one_sentence(
    model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(quiet, "hush", lambda: None)
    common = ["generate", "--domain", "city", "--model", str(model), "--size", "32"]
    common += ["--levels", "2", "--num", "1", "--output", str(tmp_path / "out")]
    assert cli.run([*common, "--sampler", "runge"]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert "--sampler" in err
    assert cli.run([*common, "--sampler", "dpm-solver"]) == 0
    assert "generated: 1 images" in capsys.readouterr().out
    assert cli.run(common) == 2
    assert "something already" in capsys.readouterr().err


def steps(clip):
    """Mean change from a frame to the next."""
    return float(abs(np.diff(clip, axis=0)).mean())


def test_frames_of_a_clip_hang_together_and_clips_do_not(model, tmp_path):
    asked = {"frames": 5, "size": 32, "frame_coupling": 0.0}
    result = generate(settings(model, tmp_path / "clip", **asked))
    clips = pixels_of(result)
    assert clips.shape == (2, 5, 3, 32, 32)
    stills = pixels_of(generate(settings(model, tmp_path / "stills", num=5, size=32)))
    assert steps(clips[0]) < 0.5 * steps(stills)
    assert float(abs(clips[0] - clips[1]).mean()) > 0.5 * steps(stills)
    one = generate(settings(model, tmp_path / "one", frames_alike=math.inf, **asked))
    assert steps(pixels_of(one)[0]) < 1e-3 * steps(stills), "one noise, one image"


def test_a_clip_is_shown_as_a_film_and_says_how_it_was_made(model, tmp_path):
    result = generate(settings(model, tmp_path / "out", num=1, frames=4, size=32))
    with Image.open(result.output / result.files[0]) as film:
        assert film.n_frames == 4
        assert "generated" in film.text["Description"]
        film.seek(3)
        last = np.asarray(film.convert("RGB"))
    expected = np.clip(pixels_of(result)[0, 3], 0, 255).round().transpose(1, 2, 0)
    np.testing.assert_allclose(last, expected, atol=1)
    facts = json.loads((result.output / "provenance.json").read_text())
    assert (facts["num_frames"], facts["frame_coupling"]) == (4, 0.01)


def test_the_frames_of_a_clip_are_coupled_at_every_level(model, tmp_path):
    source = _Source(
        Model.load(model, dtype=torch.float32),
        "city",
        settings(model, tmp_path, frames=4, frame_coupling=0.3),
    )
    scene = KeyedDraws(0, "scene").normal(0, torch.empty(1, 3, 32, 32))
    mu = 0.3 * scene + 0.05 * KeyedDraws(0, "errors").normal(0, torch.empty(4, 3, 32, 32))
    assert steps(source._coupled(mu, 0.5).numpy()) < 0.5 * steps(mu.numpy())
    alone = source._coupled(mu[:1], 0.5)
    assert torch.equal(alone, mu[:1])
