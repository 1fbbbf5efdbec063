"""Little data: slices that were chosen and no others, corrections of low rank, an end by score."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError
from safetensors.torch import load_file
from train_kit import settings

from diffusion_core.model import Model
from domains.base import BadInputError, Item, ItemRecord
from flows.api_learning_curve import Gain, Point, gain_of, learning_curve, verdict_on
from flows.api_train import learned_from, recipe_of, steps_left, train
from flows.config import FewSettings, StopSettings, TrainSettings, config_path, read_settings
from flows.store import Dataset, DatasetWriter
from flows.training.few import HELD_OUT, chosen_slices
from flows.training.plan import plan_training
from flows.training.run_folder import run_path
from flows.training.stopping import has_ended, scores_by_step

pytestmark = pytest.mark.usefixtures("registry_home")

QUICK_SCORE = {"every_steps": 2, "num_images": 2, "side": 32, "num_levels": 2}


def volume(name="scan", depth=12, split="train", changed=(), value=0):
    """Smooth slices in arbitrary units; those in `changed` hold something else."""
    rng = np.random.default_rng(7)
    field = np.cumsum(np.cumsum(rng.normal(size=(1, depth, 48, 48)), axis=2), axis=3)
    pixels = (500 + 200 * np.tanh(field / 20)).astype(np.float32)
    pixels[:, list(changed)] = value
    record = ItemRecord(
        item_id=name, domain="mri", shape=pixels.shape, dtype="float32", units="intensity",
        source_digest=f"{1:064x}", source_format="nifti", split=split,
        spacing_mm=(1.0, 1.0, 1.0),
    )  # fmt: skip
    return Item(pixels, record)


def dataset_of(path, *items):
    with DatasetWriter(path) as writer:
        for item in items:
            writer.add(item)
    return path


def few_settings(data, output, **changes):
    values = {"conditions": {"mri": 1.0}, "num_steps": 4, "few": {"slices": 6, "held_out": 2}}
    return settings(data, output, **{**values, **changes})


@pytest.fixture
def scans(tmp_path):
    return dataset_of(tmp_path / "scans.zarr", volume())


def shipped(result):
    return load_file(result.model_path / "weights.safetensors")


@pytest.mark.parametrize("draw", [0, 1, 2])
@pytest.mark.parametrize(("wanted", "held_out"), [(2, 1), (7, 2), (9, 0), (0, 3)])
def test_slices_are_spread_and_none_is_both_learned_from_and_held_out(wanted, held_out, draw):
    few = FewSettings(slices=wanted, held_out=held_out, draw=draw)
    learned, others = chosen_slices([5, 0, 14], few)
    one = [(item, z) for item, slices in enumerate(learned) for z in slices]
    other = [(item, z) for item, slices in enumerate(others) for z in slices]
    assert not set(one) & set(other)
    assert (len(one), len(other)) == ((wanted or 19) - held_out, held_out)
    at = sorted(z + (5 if item else 0) for item, z in one + other)
    assert len(set(at)) == len(at)
    assert max(np.diff([-1, *at, 19])) <= 2 * 19 / (wanted or 19) + 1
    assert chosen_slices([5, 0, 14], few) == (learned, others)


def test_another_draw_takes_other_slices():
    drawn = {str(chosen_slices([40], FewSettings(slices=6, draw=n))) for n in range(4)}
    assert len(drawn) == 4


def test_what_was_not_chosen_is_never_read(scans, tmp_path):
    """Other slices hold something else, NaN: the same weights, bit by bit."""
    asked = few_settings(scans, tmp_path / "a", score=QUICK_SCORE)
    first = train(asked)
    learned, held_out = chosen_slices([12], FewSettings(slices=6, held_out=2))
    others = set(range(12)) - {*learned[0], *held_out[0]}
    poisoned = volume(changed=others, value=np.nan)
    elsewhere = dataset_of(tmp_path / "poisoned.zarr", poisoned)
    second = train(few_settings(elsewhere, tmp_path / "b", score=QUICK_SCORE))
    a, b = shipped(first), shipped(second)
    assert all(torch.equal(a[name], b[name]) for name in a)

    told = {s["item"]: s for s in Model.load(first.model_path).config["sources"]}
    assert set(told) == {"scan", "scan" + HELD_OUT}
    assert told["scan"]["shape_czhw"] == [1, 4, 48, 48]
    assert told["scan" + HELD_OUT]["split"] == "validation"
    changed = dataset_of(tmp_path / "changed.zarr", volume(changed=learned[0][:1], value=1.0))
    third = train(few_settings(changed, tmp_path / "c", score=QUICK_SCORE))
    assert any(not torch.equal(a[name], w) for name, w in shipped(third).items())


def test_validation_items_are_kept_where_no_slice_is_held_out(tmp_path):
    data = dataset_of(
        tmp_path / "two.zarr", volume(), volume("other", depth=3, split="validation")
    )  # fmt: skip
    asked = few_settings(data, tmp_path, few={"slices": 3}, score=QUICK_SCORE)
    sources = Model.load(train(asked).model_path).config["sources"]
    assert [(s["item"], s["split"]) for s in sources] == [
        ("scan", "train"), ("other", "validation")
    ]  # fmt: skip
    some = few_settings(data, tmp_path, name="some", few={"slices": 3, "held_out": 1})
    known = learned_from(some, some.data, tmp_path).data
    assert [r.item_id for r in Dataset(known[0]).items()] == ["scan", "scan" + HELD_OUT]


def test_too_few_slices_and_senseless_settings_are_refused(scans, tmp_path):
    with pytest.raises(BadInputError, match="hold 12 slices: 13 to take"):
        train(few_settings(scans, tmp_path / "runs", few={"slices": 13}))
    assert not (tmp_path / "runs").exists()
    for wrong, named in (
        ({"few": {"slices": 2, "held_out": 2}}, "cannot be held out"),
        ({"low_rank": 4}, "init_from"),
        ({"stop": {"patience": 2}}, "score.every_steps"),
    ):
        with pytest.raises(ValidationError, match=named):
            few_settings(scans, tmp_path, **wrong)


def test_a_plan_counts_the_few_slices_and_leaves_no_file(scans, tmp_path):
    home = Path(os.environ["SASHIKO_HOME"])
    before = sorted(home.rglob("few-*"))
    plan = plan_training(few_settings(scans, tmp_path / "runs", score=QUICK_SCORE))
    assert plan.data_bytes == 4 * 48 * 48 * 4
    assert sorted(home.rglob("few-*")) == before
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def start(scans, tmp_path):
    return train(few_settings(scans, tmp_path, name="start", num_steps=8)).model_path


def test_low_rank_corrections_are_shipped_as_plain_weights(start, scans, tmp_path):
    asked = few_settings(
        scans, tmp_path, init_from=start, low_rank=2, score=QUICK_SCORE, learning_rate=0.05
    )
    result = train(asked)
    model = Model.load(result.model_path)
    assert model.config["training"]["low_rank"] == 2
    before, after = load_file(start / "weights.safetensors"), shipped(result)
    assert set(before) == set(after)
    ranks = {}
    for name, weight in after.items():
        change = (weight.float() - before[name].float()).flatten(1) if weight.ndim == 4 else None
        if change is None:
            same = torch.equal(weight, before[name])
            assert same != name.startswith("log_variance"), name
        elif change.abs().max() > 0:
            values = torch.linalg.svdvals(change)
            ranks[name] = float(values[2:].square().sum() / values.square().sum())
    assert ranks
    assert max(ranks.values()) < 0.02, "what is left is the rounding to float16"


def test_a_start_that_nothing_betters_is_what_is_shipped(start, scans, tmp_path):
    asked = few_settings(
        scans, tmp_path, init_from=start, num_steps=20, learning_rate=0.9, ema_decay=0.0,
        score=QUICK_SCORE, stop={"patience": 2},
    )  # fmt: skip
    events = []
    result = train(asked, events.append)
    config = Model.load(result.model_path).config
    assert config["average"] == "best-step-0"
    assert config["num_steps"] == 4
    assert any("stopped: the last 2 scores" in event.message for event in events)
    before, after = load_file(start / "weights.safetensors"), shipped(result)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(config["curve"]["points"]) >= 2


def test_a_training_ends_after_so_many_scores_without_a_gain():
    scores = {0: 30.0, 10: 31.0, 20: 30.9, 30: 31.0, 40: 31.2, 50: 31.1}
    two = StopSettings(patience=2)
    assert [step for step in scores if has_ended(two, scores, step)] == [30, 40, 50]
    assert not has_ended(StopSettings(), scores, 50)
    assert not has_ended(StopSettings(patience=3), scores, 50)
    demanding = StopSettings(patience=2, min_gain_db=1.5)
    assert [step for step in scores if has_ended(demanding, scores, step)] == [20, 30, 40, 50]
    assert not has_ended(two, {}, 0)


def test_killed_on_the_way_it_ends_at_the_same_step_with_the_same_weights(start, scans, tmp_path):
    def asked(output):
        return few_settings(
            scans, output, init_from=start, num_steps=60, learning_rate=0.3, score=QUICK_SCORE,
            stop={"patience": 3}, name="stopped",
        )  # fmt: skip

    whole = train(asked(tmp_path / "a"))
    scores = scores_by_step(tmp_path / "a" / "stopped")
    last = max(scores)
    assert 6 <= last < 60
    driver = "import sys; from flows.api_train import train; from flows.config import TrainSettings"
    driver += "\ntrain(TrainSettings.model_validate_json(sys.argv[1]))"
    killed = asked(tmp_path / "b")
    process = subprocess.Popen(
        [sys.executable, "-c", driver, killed.model_dump_json()], env=os.environ
    )
    log = tmp_path / "b" / "stopped" / "scores.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 2):
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = train(killed)
    assert scores_by_step(tmp_path / "b" / "stopped") == pytest.approx(scores, abs=1e-4)
    assert resumed.num_steps == whole.num_steps == last
    a, b = shipped(whole), shipped(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert steps_left(killed, run_path(killed)) == 0
    patient = killed.model_copy(update={"stop": StopSettings(patience=100)})
    assert steps_left(patient, run_path(patient)) == 60 - last


def test_the_shipped_recipe_is_one_for_the_starter(scans):
    from flows.api_train import learned_from, new_network, resolved
    from flows.training.checks import check_data, check_settings

    changes = [f"data=[{scans}]", "few.slices=8", "patch_size=48", "low_rank=4"]
    asked = resolved(read_settings(TrainSettings, config_path("train-few-shot.yaml"), changes))
    check_settings(asked)
    check_data(learned_from(asked, asked.data, scans.parent))
    module = new_network(asked)
    learning = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert learning < 0.1 * sum(p.numel() for p in module.parameters())
    assert recipe_of(asked).score_every_steps


def test_a_curve_says_what_each_number_of_slices_is_worth(start, scans, tmp_path):
    asked = few_settings(
        scans, tmp_path / "runs", name="more", init_from=start, few=None, score=QUICK_SCORE
    )
    found = learning_curve(asked, [4, 2], draws=2, set_aside=3)
    assert [point.slices for point in found.points] == [0, 2, 4]
    assert [len(point.scores) for point in found.points] == [1, 2, 2]
    assert all(len(row) == 8 for point in found.points for row in point.scores)
    [gain] = found.gains
    assert (gain.fewer, gain.more) == (2, 4)
    assert gain.db == pytest.approx(found.points[2].db - found.points[1].db)
    assert gain.low <= gain.db <= gain.high
    written = json.loads((found.path / "curve.json").read_text())
    assert written["verdict"] == found.verdict
    assert (found.path / "curve.png").read_bytes().startswith(b"\x89PNG")
    aside = {z for s in Dataset(next(Path(os.environ["SASHIKO_HOME"]).rglob("few-*"))).items()
             for z in s.meta["slices"]}  # fmt: skip
    assert aside <= set(range(12))
    learned = [
        json.loads((tmp_path / "runs" / f"more-{n}-{d}" / "model" / "config.json").read_text())
        for n in (2, 4) for d in (0, 1)
    ]  # fmt: skip
    assert [s["shape_czhw"][1] for m in learned for s in m["sources"]] == [1, 1, 1, 1, 3, 1, 3, 1]
    with pytest.raises(BadInputError, match="hold 9 slices beside those set aside"):
        learning_curve(asked, [2, 10], set_aside=3)
    with pytest.raises(BadInputError, match="two numbers of slices"):
        learning_curve(asked, [4])


def test_gains_are_paired_and_their_intervals_hold_what_they_should():
    """Of normal gains with known spreads: the interval covers the true one nine times in ten."""
    rng = np.random.default_rng(0)
    covered, trials = 0, 600
    for _ in range(trials):
        images = rng.normal(30, 3, size=6)  # large, and common to both
        fewer = [[float(v) for v in images + rng.normal(0, 0.05, 6)] for _ in range(3)]
        more = [[float(v) for v in images + 0.5 + shift + rng.normal(0, 0.05, 6)]
                for shift in rng.normal(0, 0.1, 3)]  # fmt: skip
        gain = gain_of(Point(4, fewer), Point(8, more))
        covered += gain.low <= 0.5 <= gain.high
    assert 0.84 < covered / trials < 0.97


def test_the_verdict_follows_the_last_gain_and_its_interval():
    first = Gain(2, 4, 0.8, 0.5, 1.1)
    assert "more data would help, 16 slices by about +0.20 dB" in verdict_on(
        [first, Gain(4, 8, 0.4, 0.2, 0.6)]
    )
    assert "less than 0.1 dB" in verdict_on([first, Gain(4, 8, 0.0, -0.05, 0.05)])
    assert "cannot be told yet" in verdict_on([first, Gain(4, 8, 0.1, -0.3, 0.5)])


def test_the_command_refuses_what_is_no_list_of_numbers(scans):
    from flows.cli import cli

    told = CliRunner().invoke(cli, ["train", "configs/train-few-shot.yaml", "--curve", "2,four"])
    assert told.exit_code == 2
    assert "'2,four' is no list of whole numbers" in told.output
