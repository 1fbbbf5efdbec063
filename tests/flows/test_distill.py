"""`sashiko distill` end to end on a tiny dataset: killed, restored with, and refused elsewhere."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sample_kit import sample_path
from train_kit import dataset_of, settings

from diffusion_core.model import DISTILLED, BadModelError, Model, solver_settings
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.posterior import make_solver
from domains.base import BadInputError
from domains.metrics import mean_score, score
from domains.registry import load_domain
from flows import cli
from flows.api_distill import distill
from flows.api_evaluate import evaluate
from flows.api_train import new_network, train
from flows.config import (
    DISTILLED_STARTER,
    ComputeSettings,
    DistillSettings,
    EvaluateSettings,
    MethodSettings,
    config_path,
    load_task,
    read_settings,
)
from flows.engine.methods import resolve_method
from flows.registry import resolve_model
from flows.training.card import NOT_TOLD
from flows.training.distilling import student_options
from flows.tune import case_of

INLINE = ComputeSettings(executor="inline")
MASK = {"kind": "mask", "params": {"missing_share": [0.4, 0.8], "sigma_y": 0.05}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("distill")


@pytest.fixture(scope="module", autouse=True)
def _home(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SASHIKO_HOME", str(root / "home"))
        yield


@pytest.fixture(scope="module")
def data(root):
    return dataset_of(root / "data.zarr", range(4))


@pytest.fixture(scope="module")
def teacher(root, data):
    return train(settings(data, root / "teacher")).model_path


def asked(data, teacher, output, **changes):
    """Of a small distillation, in this process."""
    values = settings(data, output).model_dump(exclude={"network", "init_from"})
    values |= {"name": "student", "init_from": teacher, "operators": {"city": [MASK]}}
    values |= {"levels": [0.3, 0.1], "num_steps": 12, "consistency": 0.1}
    return DistillSettings(**{**values, **changes})


@pytest.fixture(scope="module")
def student(root, data, teacher):
    return distill(asked(data, teacher, root / "student"))


def losses(run):
    lines = (run / "log.jsonl").read_text().splitlines()
    return {reading["step"]: reading["loss"] for reading in map(json.loads, lines)}


def test_a_student_is_a_model_directory_with_its_teacher_s_tables(student, teacher):
    model, own = Model.load(student.model_path), Model.load(teacher)
    assert model.is_distilled
    assert not own.is_distilled
    assert model.digest == student.digest
    assert model.config["network"]["widths"] == own.config["network"]["widths"]
    assert model.prior("city").log_spectrum.equal(own.prior("city").log_spectrum)
    assert model.config["started_from"] == own.digest
    assert solver_settings(student.model_path)[DISTILLED]["levels"] == [0.3, 0.1]
    assert DISTILLED not in solver_settings(teacher)
    assert set(student.metrics) == {f"city/mask/{count}" for count in range(3)}
    card = (student.model_path / "MODEL_CARD.md").read_text()
    for words in ("no denoiser", "photo-0", "| city | mask |", "Not for", "city/mask/2"):
        assert words in card
    assert own.digest[:12] in card


def test_killed_with_9_a_distillation_goes_on_to_the_undisturbed_curve(
    data, teacher, student, tmp_path
):
    driver = tmp_path / "driver.py"
    driver.write_text(
        textwrap.dedent("""
        import sys
        from flows.api_distill import distill
        from flows.config import DistillSettings
        distill(DistillSettings.model_validate_json(sys.argv[1]))
    """)
    )
    wanted = asked(data, teacher, tmp_path)
    process = subprocess.Popen([sys.executable, driver, wanted.model_dump_json()], env=os.environ)
    log = tmp_path / "student" / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 4):
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 4 <= max(losses(log.parent)) < 12

    resumed = distill(wanted)

    expected = losses(student.model_path.parent)
    assert losses(log.parent) == pytest.approx(expected, rel=1e-6)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps.count(1) == steps.count(2) == 1
    assert resumed.metrics == pytest.approx(student.metrics, abs=1e-3)


def test_given_again_the_command_leaves_a_finished_student_as_it_is(student, data, teacher, root):
    file = student.model_path / "weights.safetensors"
    before = file.stat().st_mtime_ns
    again = distill(asked(data, teacher, root / "student"))
    assert again.digest == student.digest
    assert file.stat().st_mtime_ns == before
    with pytest.raises(BadInputError, match=r"other settings \(consistency\)"):
        distill(asked(data, teacher, root / "student", consistency=0.2))


def evaluated(data, model, output, *methods, **changes):
    return evaluate(
        EvaluateSettings(
            input=data, tasks=["inpaint-random70"], model=str(model), output=output,
            items=["photo-3"], methods=list(methods), compute=INLINE, **changes,
        )
    )  # fmt: skip


@pytest.mark.parametrize("count", [None, 1, 2])
def test_evaluate_restores_with_a_student_in_as_many_evaluations_as_asked(
    student, data, tmp_path, count
):
    result = evaluated(data, student.model_path, tmp_path, "distilled", "kriging", num_levels=count)
    rows = {row["method"]: row for row in result.rows}
    assert rows["distilled"]["nfe"] == (count or 2)
    assert rows["kriging"]["nfe"] == 0
    assert rows["distilled"]["model_digest"] == student.digest
    assert rows["distilled"]["psnr"] > 15
    assert rows["distilled"]["psnr"] != rows["kriging"]["psnr"]


def test_a_restoration_with_a_student_is_the_same_bit_for_bit(student, data, tmp_path):
    first, again = (
        evaluated(data, student.model_path, tmp_path / name, "distilled") for name in "ab"
    )
    assert [r["psnr"] for r in first.rows] == [r["psnr"] for r in again.rows]
    assert first.keys == again.keys


def test_restore_takes_the_student_s_own_method_with_a_student(student, data, tmp_path):
    from flows.api_data import simulate
    from flows.api_restore import restore
    from flows.config import RestoreSettings, SimulateSettings

    store = tmp_path / "measured.zarr"
    simulate(
        SimulateSettings(dataset=data, tasks=["inpaint-random70"], output=store, items=["photo-0"])
    )
    asked_for = {"input": store, "model": str(student.model_path), "compute": INLINE}
    result = restore(RestoreSettings(output=tmp_path / "out", **asked_for))
    (entry,) = result.published
    assert (entry.method, entry.nfe, entry.model_digest) == ("distilled", 2, student.digest)

    from flows.api_explain import explain
    from flows.config import ExplainSettings

    with pytest.raises(BadInputError, match="have no film to be explained"):
        explain(ExplainSettings(output=tmp_path / "explained", **asked_for))


def test_a_user_s_mask_is_filled_by_a_student_wide_holes_too(student, tmp_path):
    """Wide holes are filled from a coarse scale first, by kriging: no denoiser is asked for."""
    from flows.api_restore import restore
    from flows.config import RestoreSettings

    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.normal(size=(160, 150, 3)), axis=0)
    pixels = np.clip(128 + 8 * smooth, 0, 255).astype(np.uint8)
    missing = np.zeros((160, 150), bool)
    missing[20:150, 10:140] = True
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos/a.png")
    Image.fromarray((missing * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    result = restore(
        RestoreSettings(
            input=tmp_path / "photos", domain="city", mask=str(tmp_path / "mask.png"),
            model=str(student.model_path), output=tmp_path / "out", compute=INLINE,
        )
    )  # fmt: skip
    assert [entry.method for entry in result.published] == ["distilled"]
    restored = np.asarray(Image.open(tmp_path / "out/files/a.png"))
    assert np.array_equal(restored[~missing], pixels[~missing])


def test_other_solvers_and_models_are_refused_in_a_sentence(student, teacher, data, tmp_path):
    with pytest.raises(BadInputError, match="needs a distilled model: make one"):
        evaluated(data, teacher, tmp_path, "distilled")
    with pytest.raises(BadInputError, match="a distilled one, which 'covprox' cannot use"):
        evaluated(data, student.model_path, tmp_path, "covprox")
    with pytest.raises(BadInputError, match="for 2 evaluations at most, not 3"):
        evaluated(data, student.model_path, tmp_path, "distilled", num_levels=3)
    with pytest.raises(BadModelError, match="is a distilled model and no denoiser"):
        Model.load(student.model_path).denoiser("city")
    with pytest.raises(BadModelError, match="is no distilled model"):
        Model.load(teacher).student("city")


def test_evaluations_asked_for_hold_for_other_solvers_too(teacher, data, tmp_path):
    result = evaluated(data, teacher, tmp_path, "covprox", "tv", num_levels=3)
    assert {row["method"]: row["nfe"] for row in result.rows} == {"covprox": 3, "tv": 0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_from": None}, "names no teacher"),
        ({"init_from": Path("nowhere")}, "names no teacher"),
        ({"operators": {"city": [{"kind": "shear"}]}}, "no operator 'shear'"),
        ({"operators": {"city": [{"kind": "mask"}]}}, "'missing_share' must be a number"),
        ({"patch_size": 30}, "a patch of 30 pixels does not divide"),
        (
            {"conditions": {"mri": 1.0}, "operators": {"mri": [MASK]}},
            "has no covariance table for 'mri'",
        ),
    ],
)
def test_what_cannot_be_distilled_is_told_before_anything_is_written(
    data, teacher, tmp_path, changes, words
):
    with pytest.raises(BadInputError, match=words):
        distill(asked(data, teacher, tmp_path, **changes))
    assert not (tmp_path / "student").exists()


def test_a_student_goes_on_from_a_student_with_all_that_it_learned(student, data, tmp_path):
    """Its inputs' weights and its head among it, which begin at 0 with a teacher."""
    further = asked(data, student.model_path, tmp_path, num_steps=2, patch_size=48)
    start = Model.load(student.model_path)
    added = ("num_conditions", "num_inputs")
    network = {k: v for k, v in start.config["network"].items() if k not in added}
    module = new_network(further.model_copy(update={"network": network}))
    begun, learned = module.state_dict(), start.module.state_dict()
    assert all(torch.equal(begun[name], learned[name]) for name in learned)
    assert begun["network.stem.weight"][:, 24:].abs().max() > 0

    again = Model.load(distill(further).model_path)
    assert again.is_distilled
    assert again.config["started_from"] == start.digest
    assert again.config["network"] == start.config["network"]
    tables = [model.prior("city").prior_log_spectrum for model in (again, start)]
    assert torch.equal(*tables)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"operators": {}}, "the condition 'city' has no operator"),
        ({"levels": []}, "at least 1"),
        ({"levels": [0.2, 0.0]}, "greater than 0"),
        ({"inflation": [1.0, 2.0, 3.0]}, "give one, or one a level"),
    ],
)
def test_settings_that_make_no_chain_are_refused(data, teacher, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        asked(data, teacher, tmp_path, **changes)


def test_a_regressor_s_estimate_is_its_network_s(data, teacher, tmp_path):
    result = distill(
        asked(data, teacher, tmp_path, levels=[0.3], final_data_step=False, num_steps=3)
    )
    options = solver_settings(result.model_path)[DISTILLED]
    assert options == {"levels": [0.3], "inflation": 4.0, "final_data_step": False}
    assert set(result.metrics) == {"city/mask/0", "city/mask/1"}


def test_the_resolved_method_has_all_that_its_pixels_depend_on(student):
    from flows.store import MeasurementEntry

    entry = MeasurementEntry.__new__(MeasurementEntry)
    for name, value in {"task": "inpaint-random70", "operator": "mask", "noise": {}}.items():
        object.__setattr__(entry, name, value)
    known = solver_settings(student.model_path)
    found = resolve_method(None, entry, known)
    assert (found.name, found.kind, found.num_levels) == ("distilled", "solver", 2)
    assert found.options["levels"] == [0.3, 0.1]
    assert resolve_method(found, entry, known) == found, "what is resolved stays as it is"
    one = resolve_method(MethodSettings(num_levels=1, options={"inflation": 2.0}), entry, known)
    assert (one.num_levels, one.options["inflation"]) == (1, 2.0)


def test_the_command_distils_and_says_a_mistake_in_one_sentence(data, teacher, tmp_path, capsys):
    config = tmp_path / "distill.yaml"
    values = asked(data, teacher, tmp_path / "runs", num_steps=1).model_dump(
        mode="json", exclude_unset=True
    )
    config.write_text(json.dumps(values))
    assert cli.run(["distill", str(config)]) == 0
    assert "digest" in capsys.readouterr().out
    assert cli.run(["distill", str(config), "--set", "levls=[1]"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "levls" in line
    assert "levels" in line


def recipe(name):
    return read_settings(DistillSettings, config_path(f"distill-{name}.yaml"))


@pytest.mark.parametrize("name", ["starter-1", "starter-2", "starter-3", "starter", "regressor"])
def test_the_shipped_recipes_can_be_measured(name):
    from flows.training.distilling import check_operators

    check_operators(recipe(name))


def test_the_shipped_recipes_differ_in_what_they_say():
    first, regressor = recipe("starter-1"), recipe("regressor")
    own = {"name", "levels", "final_data_step", "consistency", "inflation"}
    alike = regressor.model_dump(exclude=own)
    assert alike == first.model_dump(include=set(alike)), "one budget, one network, one mix"
    parts = [recipe(name) for name in ("starter-1", "starter-2", "starter-3", "starter")]
    for before, after in itertools.pairwise(parts):
        assert after.init_from == Path(f"runs/{before.name}/model")
        assert (after.levels, after.inflation) == (before.levels, before.inflation)
    assert len({part.seed for part in parts}) == len(parts)


def test_the_shipped_student_is_the_recipe_s_and_restores_in_four_evaluations():
    """A head's slice whose every fourth line was measured: far above its start, and better with
    each evaluation."""
    model = Model.load(resolve_model(DISTILLED_STARTER).path)
    asked = recipe("starter").model_dump(mode="json", exclude=NOT_TOLD)
    assert {**model.config["training"], "network": asked["network"]} == asked
    assert solver_settings(model.path)[DISTILLED] == student_options(recipe("starter"))

    head = load_domain("mri").read(sample_path("brain2")).slices(10, 11)
    case = case_of(load_task("kspace-x4-real"), head)
    problem, psnr = case.problem, []
    for count in range(5):
        name = DISTILLED if count else "kriging"
        options = student_options(recipe("starter")) if count else {"tolerance": 1e-4}
        solver = make_solver(name, model.prior(problem.condition), options)
        sigmas = power_sigmas(max(count, 1), 1.0, 0.5)
        denoise = model.student(problem.condition)
        with torch.no_grad():
            draws = KeyedDraws(0, "slice")
            x = solver(denoise, problem.operator, problem.y, problem.noise, sigmas, draws).x
        restored = problem.to_source(x).numpy().swapaxes(0, 1)
        psnr.append(mean_score(score(case.domain, case.truth, restored))["psnr"])
    assert psnr[1] > psnr[0] + 3
    assert psnr == sorted(psnr)
