"""Which averaged weights are shipped, and who may train: scores, lengths, resumption, the lock."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_kit import dataset_of, settings

from diffusion_core.model import Model
from domains.base import BadInputError
from flows.api_train import new_network, recipe_of, train
from flows.training.choice import score_and_keep
from flows.training.run_folder import only_one
from flows.training.score import restoration_score
from flows.training.validation import validation_images

SMALL_SCORE = {"num_images": 1, "side": 32, "num_levels": 2}


pytestmark = pytest.mark.usefixtures("registry_home")


def blurred(module, amount):
    """The network with weights that are off by keyed noise."""
    from diffusion_core.noise.draws import KeyedDraws

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * KeyedDraws(0, "w").normal(0, parameter[None])[0])
    return module.eval()


def test_the_best_by_restoration_is_shipped_and_every_candidate_is_told(dataset, tmp_path):
    """At so high a rate the last weights are not the best: the choice must not be the newest."""
    asked = settings(
        dataset, tmp_path, num_steps=8, ema_snapshots=4, ema_lengths=[0.05, 0.2],
        score={**SMALL_SCORE, "every_steps": 3}, ema_decay=0.5,
    )  # fmt: skip
    result = train(asked)
    run = tmp_path / "small"

    scored = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in scored] == [3, 6]
    best = max(scored, key=lambda entry: entry["score_db"])
    assert [p.name for p in (run / "best").iterdir()] == [f"step-{best['step']:09d}"]
    readings = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(0 < reading["peak_share"] < 1 for reading in readings)
    assert [reading["step"] for reading in readings if "score_share" in reading] == [4, 7]
    config = Model.load(result.model_path).config
    scores = config["restoration_scores_db"]
    assert list(scores) == ["newest", f"best-step-{best['step']}", "length-0.05", "length-0.2"]
    assert scores[f"best-step-{best['step']}"] == pytest.approx(best["score_db"], abs=1e-3)
    assert config["average"] == max(scores, key=scores.get)
    shipped = Model.load(result.model_path).module
    assert restoration_score(asked, shipped.eval()).db == pytest.approx(
        scores[config["average"]], abs=0.02
    )  # float16 in the file
    card = (result.model_path / "MODEL_CARD.md").read_text()
    assert f"| {config['average']} |" in card
    assert len(list((run / "snapshots").iterdir())) == 4

    told = asked.model_copy(update={"score": asked.score.model_copy(update={"decides": False})})
    newest = Model.load(train(told).model_path).config
    assert (newest["average"], newest["restoration_scores_db"]) == ("newest", {})
    assert len(newest["curve"]["points"]) == len(config["curve"]["points"]) == 3


def test_the_curve_goes_on_through_the_parts_of_a_training(dataset, tmp_path):
    """From nothing, and from there: megapixels and hours add up, the last is what is shipped."""
    score = {**SMALL_SCORE, "every_steps": 2}
    first = train(settings(dataset, tmp_path, num_steps=5, score=score))
    points = Model.load(first.model_path).config["curve"]["points"]
    assert [p["megapixels"] for p in points] == [
        pytest.approx(steps * 4 * 32**2 / 1e6, abs=1e-4) for steps in (2, 4, 5)
    ]
    readings = [
        json.loads(line) for line in (tmp_path / "small/log.jsonl").read_text().splitlines()
    ]
    spent = sum(4 * 32**2 / 1e6 / reading["megapixels_per_s"] for reading in readings)
    assert points[-1]["hours"] == pytest.approx(spent / 3600, abs=2e-6)
    scored = [json.loads(x) for x in (tmp_path / "small/scores.jsonl").read_text().splitlines()]
    assert points[1]["score_db"] == pytest.approx(scored[1]["score_db"], abs=1e-3)

    more = {"name": "more", "num_steps": 3, "init_from": first.model_path, "seed": 7}
    second = train(settings(dataset, tmp_path, **more, score=score))
    joined = Model.load(second.model_path).config["curve"]["points"]
    assert joined[:3] == points
    assert joined[-1]["megapixels"] == pytest.approx(8 * 4 * 32**2 / 1e6, abs=1e-4)
    assert joined[-1]["hours"] > points[-1]["hours"]
    shipped = Model.load(second.model_path).module.eval()
    asked = settings(dataset, tmp_path, score=score)
    assert joined[-1]["score_db"] == pytest.approx(restoration_score(asked, shipped).db, abs=0.02)
    start = Model.load(first.model_path).module.eval()
    of_other_seed = restoration_score(settings(dataset, tmp_path, score=score, seed=7), start).db
    assert of_other_seed == pytest.approx(points[-1]["score_db"], abs=0.02), "float16 in the file"
    card = (second.model_path / "MODEL_CARD.md").read_text()
    assert f"| {joined[0]['score_db']:.2f} |" in card.split("## Restoration against training")[1]

    other = {**more, "name": "other", "score": {**score, "num_levels": 1}}
    begun = Model.load(train(settings(dataset, tmp_path, **other)).model_path)
    assert begun.config["curve"]["points"][0]["megapixels"] == 0.0  # scored otherwise: anew
    unscored = train(settings(dataset, tmp_path, name="unscored", num_steps=2))
    assert Model.load(unscored.model_path).config["curve"] == {}
    assert "Restoration against" not in (unscored.model_path / "MODEL_CARD.md").read_text()


def test_validation_images_are_the_same_for_every_seed(dataset, tmp_path):
    """Or the scores of two parts of a training could not stand in one curve."""
    drawn = [
        validation_images(
            settings(dataset, tmp_path, conditions={"city-grey": 1.0}, seed=seed), 4, 32
        )["city-grey"]
        for seed in (1, 2)
    ]
    assert len(drawn[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert not torch.equal(drawn[0][0], drawn[0][2])


def test_curves_pictures_and_the_machine_s_figures_are_in_mlflow(dataset, tmp_path):
    from flows.tracking import open_client

    train(settings(dataset, tmp_path, num_steps=4, score={**SMALL_SCORE, "every_steps": 2},
                   picture_every_steps=2))  # fmt: skip
    client = open_client()
    experiment = client.get_experiment_by_name("sashiko-train")
    [run] = client.search_runs([experiment.experiment_id])
    told = run.data.metrics
    assert {"loss", "megapixels_per_s", "peak_share", "rate", "score_db", "score/city/pool4"} <= {
        *told
    }
    assert told["system/process_memory_megabytes"] > 100
    assert 0 < told["system/system_memory_usage_percentage"] <= 100
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 4
    assert len(client.get_metric_history(run.info.run_id, "score_db")) == 2
    assert len(client.list_artifacts(run.info.run_id, "pictures")) == 2
    peak = float(run.data.params["peak_teraflop_per_s"])
    work = float(run.data.params["training_flop_per_pixel"])
    rate = told["megapixels_per_s"] * work / 1e6
    assert told["teraflop_per_s"] == pytest.approx(rate, rel=1e-3)
    assert told["peak_share"] == pytest.approx(rate / peak, rel=0.05)


def test_a_worse_network_scores_less_and_only_the_best_is_kept(dataset, tmp_path):
    asked = settings(dataset, tmp_path, score=SMALL_SCORE)
    plain = new_network(asked).eval()  # the identity but for c_skip: a Wiener filter
    worse = blurred(new_network(asked), 0.3)
    score = restoration_score(asked, plain)
    assert set(score.parts) == {"city/random70", "city/pool4"}
    assert score.db == pytest.approx(sum(score.parts.values()) / 2)
    assert restoration_score(asked, worse).db < score.db - 0.5
    assert restoration_score(asked, plain).db == score.db

    run = tmp_path / "run"
    run.mkdir()
    for step, module in ((10, worse), (20, plain), (30, worse), (40, plain)):
        score_and_keep(asked, run, step, module)
    assert [p.name for p in (run / "best").iterdir()] == ["step-000000020"]
    other = asked.model_copy(update={"score": asked.score.model_copy(update={"num_levels": 1})})
    score_and_keep(other, run, 50, worse)  # scored otherwise: not comparable
    assert [p.name for p in (run / "best").iterdir()] == ["step-000000050"]


def test_other_lengths_can_be_tried_when_the_training_is_over(dataset, tmp_path):
    asked = settings(dataset, tmp_path, num_steps=4, ema_snapshots=2, score=SMALL_SCORE)
    train(asked)
    log = (tmp_path / "small" / "log.jsonl").read_text()
    again = train(asked.model_copy(update={"ema_lengths": [0.25]}))
    assert list(Model.load(again.model_path).config["restoration_scores_db"]) == [
        "newest", "length-0.25"
    ]  # fmt: skip
    assert (tmp_path / "small" / "log.jsonl").read_text() == log
    with pytest.raises(BadInputError, match=r"other settings \(ema_snapshots\)"):
        train(asked.model_copy(update={"ema_snapshots": 3}))


def test_a_model_made_before_the_choice_was_known_is_left_as_it_is(dataset, tmp_path):
    """What `calibrate` gave it since must not be lost to a newer version's settings."""
    asked = settings(dataset, tmp_path, num_steps=1)
    made = train(asked)
    file = made.model_path / "config.json"
    config = json.loads(file.read_text())
    for name in ("score", "ema_lengths", "ema_snapshots", "micro_batch", "level_mass"):
        del config["training"][name]
    file.write_text(json.dumps(config))
    digests = made.model_path / "digests.json"
    known = json.loads(digests.read_text())
    import hashlib

    digests.write_text(
        json.dumps({**known, "config.json": hashlib.sha256(file.read_bytes()).hexdigest()})
    )
    before = file.read_bytes()
    train(asked)
    assert file.read_bytes() == before


def test_without_validation_images_a_score_is_refused_before_anything_is_written(tmp_path):
    data = dataset_of(tmp_path / "train.zarr", range(3))
    for wrong in ({"score": {"every_steps": 5}}, {"ema_snapshots": 2}):
        with pytest.raises(BadInputError, match="no validation image to score"):
            train(settings(data, tmp_path / "runs", **wrong))
    assert not (tmp_path / "runs").exists()


HOLDER = """
import sys, time
from pathlib import Path
from flows.training.run_folder import only_one
with only_one(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_commands_cannot_train_one_name_at_once_and_a_killed_one_leaves_it_free(
    dataset, tmp_path
):
    run = tmp_path / "small"
    command = [sys.executable, "-c", HOLDER, str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(BadInputError, match="being trained by another command") as caught:
        train(settings(dataset, tmp_path, num_steps=1))
    assert "\n" not in str(caught.value)
    assert [p.name for p in run.iterdir()] == ["lock"]
    process.kill()
    process.wait()
    process.stdout.close()
    with only_one(run):
        pass
    train(settings(dataset, tmp_path, num_steps=1))


def test_shares_of_the_levels_are_those_that_were_given(dataset, tmp_path):
    from diffusion_core.training.loss import levels_of

    asked = settings(dataset, tmp_path, level_mass=[1, 2, 1], sigma_range=(0.1, 2.7))
    sigma = levels_of(0, 4000, recipe_of(asked).density)
    edges = [0.1 * 3**k for k in range(4)]  # even in ln sigma
    counts = [((sigma >= a) & (sigma < b)).float().mean().item()
              for a, b in pairwise(edges)]  # fmt: skip
    assert counts == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


def test_a_micro_batch_leaves_the_run_s_curve_and_may_change_on_the_way(dataset, tmp_path):
    def losses(run: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]

    train(settings(dataset, tmp_path / "a", num_steps=3))
    train(settings(dataset, tmp_path / "b", num_steps=3, micro_batch=2))
    assert losses(tmp_path / "b" / "small") == pytest.approx(
        losses(tmp_path / "a" / "small"), rel=1e-3
    )
    train(settings(dataset, tmp_path / "b", num_steps=3, micro_batch=1))  # not refused


def test_a_best_that_was_kept_and_damaged_stops_the_choice(dataset, tmp_path):
    """Weights of another network in the best's place are not shipped."""
    asked = settings(dataset, tmp_path, num_steps=3, score={**SMALL_SCORE, "every_steps": 2})
    train(asked)
    file = next((tmp_path / "small" / "best").iterdir()) / "ema.safetensors"
    weights = load_file(file)
    weights.pop("log_variance.bias")
    save_file(weights, file)
    (tmp_path / "small" / "model" / "config.json").unlink()
    with pytest.raises(RuntimeError, match=r"log_variance\.bias"):
        train(asked)
