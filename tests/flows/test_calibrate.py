"""Calibration: the search climbs, what it finds is kept with the model, and used by a plan."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from evaluation_kit import make_model, picture

from diffusion_core.model import (
    BadModelError,
    model_digest,
    solver_settings,
    store_solver_settings,
)
from diffusion_core.posterior.calibration import NothingOpenError
from domains.base import BadInputError, Item, ItemRecord
from flows import api_calibrate, calibration
from flows.api_calibrate import calibrate, figures_table
from flows.calibration import (
    Bench,
    fit_mean,
    fit_sample,
    log_correlation_of,
    prototype,
    psnr_of,
    spread_of,
)
from flows.config import CalibrateSettings, MethodSettings, load_method, load_task
from flows.engine.methods import resolve_method
from flows.knobs import LEAST_SIGMA_MAX, Knobs, climb, knots_of
from flows.store import DatasetWriter
from flows.tune import case_of

TASK = "inpaint-random70"


def record(name: str, shape, split="validation") -> ItemRecord:
    return ItemRecord(name, "city", shape, "uint8", "intensity", "5" * 64, "png", split=split)


def clean(number: int = 3, side: int = 32) -> Item:
    pixels = picture(number, (1, 1, side, side))
    return Item(pixels, record(f"still-{number}", pixels.shape))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("calibrate")
    with DatasetWriter(root / "data.zarr") as writer:
        writer.add(clean(3))
        writer.add(clean(4))
        test = picture(5, (1, 1, 32, 32))
        writer.add(Item(test, record("for-test", test.shape, "test")))
    make_model(root / "model")
    return root


def asked(root: Path, **changes) -> CalibrateSettings:
    given = {
        "model": str(root / "model"),
        "data": root / "data.zarr",
        "tasks": [TASK],
        "levels": {"mean": [2], "sample": [2]},
        "num_samples": 2,
        "dtype": "float32",
    }
    return CalibrateSettings(**{**given, **changes})


@pytest.fixture(scope="module")
def bench(root: Path) -> Bench:
    from diffusion_core.model import Model

    task = load_task(TASK)
    return Bench(Model.load(root / "model"), [case_of(task, clean())], task.region)


# --- the search ----------------------------------------------------------------------------------


def test_the_climb_finds_the_best_of_every_knob():
    target = Knobs(0.9, 0.02, (2.0, 4.0, 8.0), (1.0, 0.8, 0.2), 0.5, local=False)

    def figure(knobs: Knobs) -> float:
        pairs = [(np.log(knobs.sigma_max), np.log(0.9)), (np.log(knobs.sigma_min), np.log(0.02))]
        pairs += list(zip(np.log(knobs.inflation), np.log(target.inflation), strict=True))
        pairs += list(zip(knobs.zeta, target.zeta, strict=True))
        pairs += [(knobs.momentum, target.momentum), (knobs.local, target.local)]
        return -sum((float(a) - float(b)) ** 2 for a, b in pairs)

    found = Knobs(0.5, 0.05)
    for step in (1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25):
        onward = climb(found, figure, step)
        assert figure(onward) >= figure(found)
        found = onward
    assert not found.local
    assert found.sigma_max == pytest.approx(0.9, rel=0.15)
    assert found.sigma_min == pytest.approx(0.02, rel=0.2)
    assert found.momentum == pytest.approx(0.5, abs=0.1)
    assert found.inflation[2] == pytest.approx(8.0, rel=0.3)
    assert found.zeta[1:] == pytest.approx((0.8, 0.2), abs=0.12)


def test_a_trifle_is_not_taken():
    start = Knobs(0.5, 0.05)
    assert climb(start, lambda k: 0.001 * k.sigma_max, 1.0) == start


def test_knobs_stay_in_their_bounds():
    def size(k: Knobs) -> float:
        return k.sigma_max + k.sigma_min + sum(k.zeta) + k.momentum + sum(k.inflation)

    for figure in (size, lambda k: -size(k)):
        knobs = Knobs(0.5, 0.05)
        for _ in range(12):
            knobs = climb(knobs, figure, 1.0)
        assert 0.004 <= knobs.sigma_min <= 0.15 < LEAST_SIGMA_MAX <= knobs.sigma_max <= 3.0
        assert all(0 <= z <= 1.3 for z in knobs.zeta)
        assert all(0.2 <= c <= 10.0 for c in knobs.inflation)
        assert 0 <= knobs.momentum <= 0.9


def test_a_start_below_the_bound_is_left_where_the_task_has_it():
    """A move down must not end above it, at the bound."""
    found = climb(Knobs(0.25, 0.05), lambda k: float(k.sigma_max == LEAST_SIGMA_MAX), 1.0)
    assert found.sigma_max == 0.25


def test_settings_and_knobs_are_each_others_inverse():
    own = load_method("ct-sparse60")
    knobs = Knobs(0.9, 0.02, (2.0, 4.0, 8.0), (1.0, 0.8, 0.2), 0.5, local=False)
    settings = knobs.settings(own, 5)
    assert (settings.num_levels, settings.options["tolerance"]) == (5, own.options["tolerance"])
    assert Knobs.of(settings) == knobs
    assert knots_of([1.0, 3.0]) == (1.0, 2.0, 3.0)


def test_a_bench_restores_as_the_engine_does(bench, root):
    # The same settings, draws and measurement through the solver itself.
    from diffusion_core.model import Model
    from diffusion_core.noise.draws import KeyedDraws
    from diffusion_core.noise.schedules import power_sigmas
    from diffusion_core.posterior import make_solver

    settings = MethodSettings(num_levels=3, options={"zeta": 0.5})
    (rollout,) = bench.run(settings)
    case = case_of(load_task(TASK), clean())
    problem, model = case.problem, Model.load(root / "model")
    solver = make_solver("covprox", model.prior(problem.condition), settings.options)
    draws = KeyedDraws(0, case.truth.record.source_digest, (0, 0, 0))
    sigmas = power_sigmas(3, 0.5, 0.05, 3.0)
    with torch.no_grad():
        denoise = model.denoiser(problem.condition)
        x = solver(denoise, problem.operator, problem.y, problem.noise, sigmas, draws).x
    assert torch.equal(rollout.chains[0].m, x)
    unit = problem.to_source(x).numpy() / 255
    error = np.mean((unit[:, 0] - case.truth.pixels[0] / 255) ** 2)
    assert psnr_of(rollout) == pytest.approx(-10 * np.log10(error), abs=1e-4)


def test_samples_differ_and_count_unknown_pixels_alone(bench):
    settings = MethodSettings(num_levels=2, options={"mode": "sample"})
    (rollout,) = bench.run(settings, 3)
    a, b, _ = (chain.m for chain in rollout.chains)
    assert not torch.equal(a, b)
    assert float(rollout.unknown.double().mean()) == pytest.approx(0.7, abs=0.05)
    assert bench.run(settings)[0].unknown is None, "the task counts the whole image"


def test_a_fit_is_not_worse_than_the_task_file_where_it_was_fitted(bench):
    own = load_method(TASK)
    lines: list[str] = []
    knobs, fit = fit_mean(bench, own, 2, report=lines.append)
    assert fit.figures["psnr_db"] >= fit.figures["psnr_task_file_db"] - 1e-3
    assert fit.figures["psnr_db"] == pytest.approx(bench.psnr(fit.settings), abs=1e-3)
    assert Knobs.of(fit.settings).sigma_max == pytest.approx(knobs.sigma_max, rel=0.01)
    assert len(lines) > 10
    assert all("levels" in line for line in lines)


def test_a_sample_fit_has_one_inflation_a_level_and_none_of_the_mean_modes_options(bench):
    own = load_method(TASK)
    fit = fit_sample(bench, own, 3, num_samples=4)
    assert len(fit.settings.options["inflation"]) == 3
    kept = {k: fit.settings.options[k] for k in ("mode", "zeta", "momentum")}
    assert kept == {"mode": "sample", "zeta": 1.0, "momentum": 0.0}
    (rollout,) = bench.run(fit.settings, 4)
    assert fit.figures["log_correlation"] == pytest.approx(log_correlation_of([rollout]), abs=1e-2)
    assert fit.settings.options["local"]
    assert fit.settings.options["adapt"]
    assert fit.figures["v_over_b"] == pytest.approx(spread_of(rollout).ratio, rel=0.02)


def test_where_no_level_can_be_calibrated_one_inflation_serves_the_chain(bench, monkeypatch):
    monkeypatch.setattr(calibration, "fit_inflation", lambda rollouts: [1.0, 50.0, 100.0])
    own = load_method(TASK)
    fit = fit_sample(bench, own, 3, num_samples=4)
    (c,) = fit.settings.options["inflation"]
    (found,) = bench.run(fit.settings, 4)
    assert fit.figures["v_over_b"] == pytest.approx(spread_of(found).ratio, rel=0.02)
    begun = {**fit.settings.options, "inflation": [3.0]}
    (first,) = bench.run(fit.settings.model_copy(update={"options": begun}), 4)
    assert abs(np.log(spread_of(found).ratio)) <= abs(np.log(spread_of(first).ratio)) + 0.02
    assert 0.1 <= c <= 100


def test_the_prototype_is_what_it_was():
    own = load_method("ct-sparse60")
    fixed = prototype(own, 8, "mean")
    assert (fixed.sigma_max, fixed.sigma_min, fixed.rho, fixed.num_levels) == (0.5, 0.05, 3.0, 8)
    expected = {"mode": "mean", "inflation": 4.0, "zeta": 1.0, "tolerance": 0.005}
    assert fixed.options == expected


# --- what is stored ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(root: Path) -> Path:
    output = root / "calibrated"
    calibrate(asked(root, output=output))
    return output


def test_fits_are_stored_with_a_copy_of_the_model(root, calibrated):
    assert solver_settings(root / "model") == {}, "the model itself is as it was"
    document = solver_settings(calibrated)
    fits = document["tasks"][TASK]["covprox"]
    assert {mode: list(found) for mode, found in fits.items()} == {"mean": ["2"], "sample": ["2"]}
    assert fits["mean"]["2"]["items"] == ["still-3", "still-4"], "validation items, no others"
    command = "sashiko calibrate MODEL --data DATASET --task inpaint-random70 --mode mean"
    assert fits["mean"]["2"]["command"] == command
    assert str(root) not in json.dumps(document)
    assert "| inpaint-random70 | mean | 2 |" in (calibrated / "MODEL_CARD.md").read_text()
    assert model_digest(calibrated) != model_digest(root / "model")


def test_a_plan_resolves_to_what_was_fitted(calibrated):
    from test_engine_plan import entry

    document = solver_settings(calibrated)
    fit = document["tasks"][TASK]["covprox"]["mean"]["2"]
    found = resolve_method(MethodSettings(num_levels=2), entry(TASK), document)
    assert found.sigma_max == fit["sigma_max"]
    assert found.options == fit["options"]


def test_what_is_fitted_is_not_fitted_again(root, calibrated, monkeypatch):
    before = model_digest(calibrated)
    monkeypatch.setattr(api_calibrate, "_fit", lambda *_: pytest.fail("fitted again"))
    result = calibrate(asked(root, model=str(calibrated)))
    assert (result.digest, result.model_path) == (before, calibrated)
    assert "| inpaint-random70 | sample | 2 |" in result.table()


def test_what_is_fitted_again_is_fitted_from_the_task_file_as_at_first(root, calibrated, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(calibrated, model)
    (fit,) = solver_settings(model)["tasks"][TASK]["covprox"]["mean"].values()
    wrong = {**fit, "sigma_max": 3.0, "options": {**fit["options"], "zeta": [0.0, 0.0, 0.0]}}
    store_solver_settings(model, {"tasks": {TASK: {"covprox": {"mean": {"2": wrong}}}}}, "none")
    calibrate(asked(root, model=str(model), modes=["mean"], again=True))
    (found,) = solver_settings(model)["tasks"][TASK]["covprox"]["mean"].values()
    assert found == fit


def test_a_run_that_was_stopped_goes_on_where_it_was(root, tmp_path, monkeypatch):
    done = []
    fit = api_calibrate._fit

    def stopped(*arguments):
        done.append(arguments[3:5])
        if len(done) == 2:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(api_calibrate, "_fit", stopped)
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrate(asked(root, output=output, modes=["sample"], levels={"sample": [2, 3]}))
    assert list(solver_settings(output)["tasks"][TASK]["covprox"]["sample"]) == ["2"]
    calibrate(asked(root, output=output, modes=["sample"], levels={"sample": [2, 3]}))
    assert done == [("sample", 2), ("sample", 3), ("sample", 3)]
    assert list(solver_settings(output)["tasks"][TASK]["covprox"]["sample"]) == ["2", "3"]


def test_nothing_else_is_overwritten_nor_another_model_taken(root, tmp_path):
    thesis = tmp_path / "work" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years")
    with pytest.raises(BadModelError, match="no model's: name another folder"):
        calibrate(asked(root, output=thesis.parent, modes=["sample"]))
    assert [p.name for p in thesis.parent.iterdir()] == ["thesis.tex"]
    assert list(tmp_path.iterdir()) == [thesis.parent], "nothing half-written is left"
    other = tmp_path / "other"
    make_model(other, seed=1)
    with pytest.raises(BadInputError, match="holds another model"):
        calibrate(asked(root, output=other, modes=["sample"]))


def test_images_can_be_named(root, tmp_path):
    parts = tmp_path / "parts.yaml"
    parts.write_text(yaml.safe_dump({"city": [{"label": "still-4", "size": [24, 24]}]}))
    settings = asked(root, output=tmp_path / "out", parts=parts, modes=["sample"])
    result = calibrate(settings)
    assert result.fits[TASK]["covprox"]["sample"]["2"]["items"] == ["still-4"]
    parts.write_text("city: 3")
    with pytest.raises(BadInputError, match=r"parts.yaml: it does not list images"):
        calibrate(settings)


def test_what_cannot_be_calibrated_is_said(root, tmp_path):
    with pytest.raises(BadInputError, match="no validation item of the domain 'ct'"):
        calibrate(asked(root, tasks=["ct-sparse20"], output=tmp_path / "out"))
    with pytest.raises(BadInputError, match="say where with --output"):
        calibrate(asked(root, model="starter"))


@pytest.mark.parametrize("mode", ["mean", "sample"])
def test_an_image_whose_data_leave_nothing_open_is_named_with_its_task(root, tmp_path, mode):
    # Strokes, whose hole counts: here they missed the second image.
    def known_throughout(task, item):
        case = case_of(task, item)
        if item.record.item_id != "still-4":
            return case
        return replace(case, hole=np.zeros_like(case.hole))

    task, output = "inpaint-strokes", tmp_path / "out"
    with (
        patch("flows.tune.case_of", known_throughout),
        pytest.raises(
            BadInputError,
            match=rf"'inpaint-strokes' cannot be calibrated in {mode} mode on still-4: .*--parts",
        ),
    ):
        calibrate(asked(root, tasks=[task], modes=[mode], output=output))
    assert not output.exists()


def test_images_that_are_exact_together_are_all_named(root, tmp_path):
    with (
        patch.object(api_calibrate, "_fit", side_effect=NothingOpenError),
        pytest.raises(BadInputError, match="on still-3, still-4: the data leave no pixel"),
    ):
        calibrate(asked(root, output=tmp_path / "out", modes=["sample"]))


def test_the_table_leaves_blank_what_was_not_measured():
    entry = {"figures": {"psnr_db": 30.123, "psnr_task_file_db": 29.0, "psnr_prototype_db": 28.5}}
    sample = {"figures": {"v_over_b": 1.04}}
    tasks = {"sr-x4": {"covprox": {"mean": {"8": entry}, "sample": {"20": sample}}}}
    assert figures_table(tasks).splitlines()[2:] == [
        "| sr-x4 | mean | 8 | 28.50 | 29.00 | 30.12 |  |",
        "| sr-x4 | sample | 20 |  |  |  | 1.04 |",
    ]
    assert asdict(Knobs(1.0, 0.1))["local"] is True
