"""Explain: the pixels of restore, figures as closed forms have them, no name of a file."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_kit import INLINE, picture, settings
from PIL import Image

import flows.engine.grid
import flows.report.explained as pictures_of
from diffusion_core.operators import Saturation
from domains.base import BadInputError
from domains.city.domain import City
from flows.api_data import simulate
from flows.api_evaluate import evaluate
from flows.api_explain import explain
from flows.api_restore import restore
from flows.cli import run
from flows.config import ExplainSettings, MethodSettings, RestoreSettings, SimulateSettings
from flows.engine.restored import open_restored
from flows.explaining import averaged_down
from flows.report import write_report
from flows.store import Measurements


@pytest.fixture(scope="module")
def site(clean_site):
    """A home, a model, and measurements of noisy and of exact pixels."""
    for name in ("inpaint-random70", "inpaint-strokes"):
        output = clean_site / f"{name}.zarr"
        simulate(SimulateSettings(dataset=clean_site / "clean.zarr", tasks=[name], output=output))
    return clean_site


def asked(root, task="inpaint-random70", **changes) -> ExplainSettings:
    given = {
        "input": root / f"{task}.zarr",
        "output": root / "explained",
        "model": str(root / "model"),
        "method": MethodSettings(name="covprox", num_levels=3),
        "items": ["frames"],
        "num_seeds": 2,
        "compute": INLINE,
    }
    return ExplainSettings(**{**given, **changes})


@pytest.fixture(scope="module")
def noisy(site):
    return explain(asked(site, slices=[1, 4], output=site / "noisy"))


def test_what_is_explained_are_the_pixels_that_restore_makes(site, noisy):
    request = asked(site)
    same = {"input": request.input, "model": request.model, "method": request.method}
    out = site / "restored"
    done = restore(RestoreSettings(**same, output=out, dtype="float32", compute=INLINE))
    entry = next(e for e in done.published if e.item_id == "frames")
    pixels = open_restored(out).read(entry)
    assert [one.slice for one in noisy.explained] == [1, 4]
    for one in noisy.explained:
        assert np.array_equal(one.restored, pixels[:, one.slice])
        assert one.window == (0, 32, 0, 32)


def test_the_film_has_a_frame_a_level_and_the_levels_their_figures(noisy):
    one = noisy.explained[0]
    assert [frame.sigma for frame in one.film] == [level.sigma for level in one.levels]
    assert len(one.film) == one.nfe == 3
    assert all(frame.pixels.shape == (3, 32, 32) for frame in one.film)
    assert not np.array_equal(one.film[0].pixels, one.film[1].pixels)
    for level in one.levels:
        assert level.moved > 0
        assert level.steps > 0
        assert level.left <= 1e-2
        assert level.residual > one.residual  # D has not heard the data
    assert one.left_out == ()


def test_the_invented_part_of_exact_pixels_is_the_hole(site):
    one = explain(asked(site, "inpaint-strokes")).explained[0]
    assert one.slice == 2  # the middle one
    measured = Measurements(site / "inpaint-strokes.zarr").read("frames", one.task)
    missing = ~measured.arrays["mask"][2, 0].astype(bool)
    x = one.restored / 127.5 - 1
    centred = x - x.mean(axis=(1, 2), keepdims=True)
    share = (centred[:, missing] ** 2).sum() / (centred**2).sum()
    assert one.invented.share == pytest.approx(share, rel=1e-4)
    assert not one.invented.amplitude[~missing].any()
    shown = one.invented.determined[:, missing]
    assert np.ptp(shown, axis=1) == pytest.approx(0, abs=1e-3)  # the mean, where nothing is known
    assert one.exact_data
    assert one.steadiness.noise is None
    assert one.left_out == ("answer to 1% of the noise: the data are exact",)
    assert one.steadiness.image.gain > 0


def test_seeds_and_changes_are_told_as_they_are(site, noisy):
    found = noisy.explained[0].steadiness
    assert found.num_seeds == 2
    assert found.seed_spread > 0
    assert found.seed_spread_over_error is None
    assert found.reference == "kriging"
    assert found.noise.gain > 0
    other = explain(asked(site, slices=[1], seed=1)).explained[0]
    first = noisy.explained[0].restored.astype(np.float64)
    expected = np.sqrt(((first - other.restored) ** 2 / 2).mean()) / 255
    assert found.seed_spread == pytest.approx(expected, rel=1e-4)


def test_kriging_has_no_film_no_chance_and_a_gain_of_one(site):
    way = MethodSettings(name="kriging", options={"tolerance": 1e-6, "max_steps": 500})
    one = explain(asked(site, method=way)).explained[0]
    assert one.film == one.levels == ()
    assert one.nfe == 0
    assert "does not ask the network" in one.left_out[0]
    assert one.invented.beyond < one.invented.share
    assert one.steadiness.seed_spread == 0.0
    assert one.steadiness.noise.gain == pytest.approx(1.0, abs=0.02)
    assert one.steadiness.image.gain == pytest.approx(1.0, abs=0.02)


def test_other_solvers_have_a_film_and_say_that_they_tell_no_more(site):
    way = MethodSettings(name="diffpir", num_levels=3)
    one = explain(asked(site, method=way)).explained[0]
    assert len(one.film) == 3
    assert all(level.moved is None and level.steps is None for level in one.levels)
    assert one.left_out == ("data steps: diffpir does not tell how far they moved it",)


def test_of_a_nonlinear_measurement_it_says_what_is_left_out(site, monkeypatch):
    plain = City.problem

    def clipped(self, measurement):
        problem = plain(self, measurement)
        operator = Saturation(gain=1.0)
        return replace(problem, operator=operator, y=operator.A(torch.nan_to_num(problem.y)))

    monkeypatch.setattr(City, "problem", clipped)
    one = explain(asked(site)).explained[0]
    assert one.invented is None
    assert one.steadiness.reference == ""
    assert one.steadiness.image.gain is None
    assert one.steadiness.image.moved > 0
    assert [words.split(":")[0] for words in one.left_out] == ["what the prior invented", "gains"]
    assert len(one.film) == 3


def test_of_a_plane_in_blocks_the_middle_one_is_explained(site, monkeypatch):
    monkeypatch.setattr(flows.engine.grid, "MAX_CANVAS_PX", 16 * 16)
    one = explain(asked(site, items=["still"], block_size=16)).explained[0]
    assert one.window == (16, 32, 16, 32)
    assert one.restored.shape == (1, 16, 16)
    assert one.invented.amplitude.shape == (16, 16)
    assert one.film[0].pixels.shape == (1, 16, 16)


def test_the_page_the_pictures_and_the_numbers_say_the_same(site, noisy):
    html = noisy.page.read_text()
    assert html.count("<img ") == 4
    assert html.count('src="data:image/webp;base64,') == 4
    assert "http" not in html.replace('http-equiv="Content-Security-Policy"', "")
    told = json.loads(noisy.json_path.read_text())
    assert told == noisy.to_json()
    assert {"film", "restored", "record"}.isdisjoint(told[0])
    assert set(told[0]["invented"]) == {"share", "std", "steps", "left", "beyond"}
    assert f"{told[0]['invented']['share']:.1%} of the energy" in html
    names = {path.name for path in (site / "noisy" / "pictures").iterdir()}
    for z in (1, 4):
        assert f"inpaint-random70-frames-{z}-film.png" in names
        assert f"inpaint-random70-frames-{z}-invented.png" in names
    strip = np.asarray(Image.open(site / "noisy/pictures/inpaint-random70-frames-1-film.png"))
    assert strip.shape[1] > 4 * 200


def test_pictures_are_lettered_in_what_their_font_has(noisy, monkeypatch):
    drawn = []

    def listen(tiles, title="", **_):
        drawn.extend([title, *(text for tile in tiles for text in tile[:2])])
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(pictures_of, "figure_strip", listen)
    one = noisy.explained[0]
    grey = tuple(replace(frame, pixels=frame.pixels[:1]) for frame in one.film)
    shown = replace(one.invented, determined=one.invented.determined[:1])
    scan = replace(one, record=replace(one.record, units="HU"), restored=one.restored[:1],
                   film=grey, invented=shown)  # fmt: skip
    pictures_of.film(scan)
    pictures_of.map_picture(scan)
    assert any("(-600 \N{PLUS-MINUS SIGN} 750 HU)" in text for text in drawn)
    assert all(text.encode("latin-1") is not None for text in drawn)


def test_images_of_a_folder_are_told_by_id_and_never_by_name(site, tmp_path):
    for folder, pixels in (("photos", picture(1, (1, 1, 32, 40))[0, 0]), ("masks", hole())):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "jane-doe.png")
    done = explain(
        asked(site, items=None, input=tmp_path / "photos", domain="city",
              mask=str(tmp_path / "masks"), output=tmp_path / "out")
    )  # fmt: skip
    (one,) = done.explained
    assert one.item.startswith("city-")
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in left} == {".html", ".json", ".png"}
    assert not any("jane" in str(path) or b"jane" in path.read_bytes() for path in left)


def hole():
    mask = np.zeros((32, 40), np.uint8)
    mask[10:20, 10:20] = 255
    return mask


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": MethodSettings(name="telea", kind="baseline")}, "'telea' is a classical"),
        ({"items": ["nobody"]}, "holds no item 'nobody': it has frames, still"),
        ({"slices": [5]}, "frames: has no slice 5: it has 5"),
    ],
)
def test_what_cannot_be_explained_is_said_in_a_sentence(site, changes, words):
    with pytest.raises(BadInputError, match=words):
        explain(asked(site, **changes))


def test_the_command_answers_in_words_and_in_json(site, capsys):
    line = ["explain", "--input", f"{site / 'inpaint-random70.zarr'}", "--item", "frames"]
    line += ["--model", f"{site / 'model'}", "--output", f"{site / 'told'}", "--levels", "2"]
    assert run([*line, "--seeds", "2", "--slice", "0"]) == 0
    words, progress = capsys.readouterr()
    assert [line[:5] for line in progress.splitlines()] == [f"[{n}/4]" for n in range(5)]
    assert "4 of 4 restorations" in progress
    assert "What the prior invented: " in words
    assert "of the image's energy; it is judged by another prior" in words
    assert "Over 2 seeds the picture varies by" in words
    assert run([*line, "--seeds", "2", "--slice", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["steadiness"]["num_seeds"] == 2
    assert run([*line, "--seeds", "1"]) == 2
    assert "--seeds" in capsys.readouterr().err


def test_an_evaluation_explains_its_first_items_where_it_is_asked(site):
    out = site / "evaluated"
    result = evaluate(settings(site, output=out, explain=1, methods=["covprox"]))
    assert [(one.task, one.item) for one in result.explained] == [
        ("inpaint-random70", "still"),
        ("inpaint-strokes", "still"),
    ]
    row = next(r for r in result.rows if r["item"] == "still" and r["task"] == "inpaint-random70")
    one = result.explained[0]
    assert one.residual == pytest.approx(row["residual"], rel=1e-3)
    rmse = 10 ** (-row["psnr"] / 20)
    over = one.steadiness.seed_spread_over_error
    assert over == pytest.approx(one.steadiness.seed_spread / rmse, rel=0.05)
    assert len(json.loads((out / "explain.json").read_text())) == 2
    page = write_report(result, site / "report").read_text()
    assert page.count('class="explained"') == 2
    assert page.count("The film</dt>") == 1
    assert (site / "report/pictures/inpaint-strokes-still-0-film.png").is_file()


def test_a_report_without_explanations_has_no_word_of_them(site):
    result = evaluate(settings(site, output=site / "plain", methods=["telea"]))
    assert result.explained == ()
    page = write_report(result, site / "report-plain").read_text()
    assert 'class="explained"' not in page
    assert "The film" not in page


def test_large_frames_are_averaged_down_by_whole_pixels():
    pixels = np.arange(2 * 9 * 12, dtype=np.float32).reshape(2, 9, 12)
    small = averaged_down(pixels, most=4)
    assert small.shape == (2, 3, 4)
    assert small[1, 2, 3] == pixels[1, 6:, 9:].mean()
    assert np.array_equal(averaged_down(pixels, most=12), pixels)
