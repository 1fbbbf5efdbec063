"""`sashiko train --plan` says what a training takes, starts nothing, keeps nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from train_kit import settings

from domains.base import BadInputError
from flows.answers import train_plan_text
from flows.api_train import new_network, train
from flows.config import ComputeSettings
from flows.training import plan
from flows.training.plan import plan_training
from flows.training.run_folder import only_one

pytestmark = pytest.mark.usefixtures("registry_home")


DRIVER = """
import json, sys
from flows.cli import run
code = run(["train", sys.argv[1], "--plan", "--json"])
loaded = [name for name in ("ray", "prefect", "mlflow") if name in sys.modules]
print(json.dumps({"code": code, "loaded": loaded}), file=sys.stderr)
"""


def test_the_command_starts_nothing_and_leaves_no_file(dataset, tmp_path):
    config = tmp_path / "train.yaml"
    asked = settings(dataset, tmp_path / "runs", compute=ComputeSettings(num_workers=2),
                     score={"every_steps": 10, "num_images": 1, "side": 32})  # fmt: skip
    config.write_text(asked.model_dump_json())
    env = {**os.environ, "SASHIKO_HOME": str(tmp_path / "new-home")}
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(config)], capture_output=True, text=True, env=env
    )
    assert json.loads(done.stderr.splitlines()[-1]) == {"code": 0, "loaded": []}, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    told = json.loads(done.stdout)
    assert told["num_workers"] == 2
    assert told["megapixels"] == pytest.approx(30 * 4 * 32**2 / 1e6)
    assert 0 < told["score_share"] < 1


def test_the_figures_are_those_of_the_training(dataset, tmp_path):
    asked = settings(dataset, tmp_path, num_steps=8, ema_snapshots=2)
    planned = plan_training(asked)
    model = new_network(asked)
    assert planned.num_parameters == sum(p.numel() for p in model.parameters())
    assert (planned.num_steps, planned.steps_done, planned.num_items) == (8, 0, 3)
    assert planned.data_bytes == 3 * 3 * 64 * 64 * 4
    assert planned.data_in_memory
    # Of a network this small the process is nearly all: what it grows by is foretold from below.
    assert 100e6 < planned.worker_bytes < planned.machine_bytes
    assert planned.seconds == pytest.approx(8 * planned.seconds_per_step)
    assert planned.megapixels_per_s * planned.seconds_per_step == pytest.approx(4 * 32**2 / 1e6)

    train(asked)
    run = tmp_path / "small"
    weights = [p for p in run.rglob("*.safetensors") if "covariance" not in p.name]
    used = sum(p.stat().st_size for p in weights)
    assert used <= planned.disk_bytes < 2 * used
    again = plan_training(asked)
    assert (again.steps_done, again.megapixels, again.seconds) == (8, 0.0, 0.0)
    words = train_plan_text(planned)
    assert "3 training items" in words
    assert "2 steps of 1 and of 4 samples" in words


def test_a_step_s_time_and_memory_are_those_of_the_timed_steps_carried_on(
    dataset, tmp_path, monkeypatch
):
    """A device on which a step takes 1 + 2 b seconds and 100 + 10 b MB, for b samples."""
    tried = []

    def trial(_settings, samples, _device):
        tried.append(samples)
        return plan._Trial(1 + 2 * samples, int(1e8 + 1e7 * samples), 0, 1000)

    monkeypatch.setattr(plan, "_trial", trial)
    big = settings(dataset, tmp_path, patch_size=64, batch_size=200, num_steps=10)
    whole = plan_training(big)
    assert tried == [1, plan._MOST_PIXELS // 64**2]
    assert whole.seconds_per_step == pytest.approx(401)
    assert whole.seconds == pytest.approx(4010)
    assert whole.worker_bytes == pytest.approx(2.1e9 + whole.data_bytes)
    micro = plan_training(big.model_copy(update={"micro_batch": 20}))
    assert micro.seconds_per_step == pytest.approx(401)
    assert micro.worker_bytes == pytest.approx(3e8 + whole.data_bytes)
    pair = ComputeSettings(executor="ray", num_workers=2, num_gpus_per_worker=0)
    halves = plan_training(big.model_copy(update={"compute": pair}))
    assert halves.seconds_per_step == pytest.approx(201)
    assert halves.worker_bytes == pytest.approx(1.1e9 + whole.data_bytes)
    more = plan_training(big.model_copy(update={"ema_snapshots": 5}))
    most = plan_training(big.model_copy(update={"ema_snapshots": 8}))
    assert most.disk_bytes - more.disk_bytes == 3 * 2 * 4 * whole.num_parameters


def test_data_that_does_not_fit_is_read_from_zarr_and_said_so(dataset, tmp_path):
    asked = settings(dataset, tmp_path, num_steps=2, data_memory_gb=1e-5)
    planned = plan_training(asked)
    whole = plan_training(asked.model_copy(update={"data_memory_gb": 1.0}))
    assert not planned.data_in_memory
    assert "read from Zarr" in train_plan_text(planned)
    assert planned.disk_bytes == whole.disk_bytes + planned.data_bytes


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"network": {"bogus": 3}}, "'network'"),
        ({"patch_size": 34}, "does not divide by 4"),
        ({"data": [Path("/nope.zarr")]}, "not a store"),
        ({"conditions": {"ct": 1.0}}, "no training image for ct"),
        ({"batch_size": 9, "compute": ComputeSettings(num_workers=2)}, "does not divide by 2"),
    ],
)
def test_what_training_would_refuse_is_refused(dataset, tmp_path, wrong, named):
    with pytest.raises(BadInputError, match=named):
        plan_training(settings(dataset, tmp_path / "runs", **wrong))
    assert not (tmp_path / "runs").exists()


def test_a_name_that_is_taken_or_in_use_is_refused(dataset, tmp_path):
    train(settings(dataset, tmp_path, num_steps=1))
    with pytest.raises(BadInputError, match=r"other settings \(num_steps\)"):
        plan_training(settings(dataset, tmp_path, num_steps=2))
    with only_one(tmp_path / "small"), pytest.raises(BadInputError, match="another command"):
        plan_training(settings(dataset, tmp_path, num_steps=1))


def test_without_ingested_samples_the_rest_is_told(tmp_path):
    planned = plan_training(settings(None, tmp_path, data=[]))
    assert planned.data_bytes is None
    assert "not ingested yet" in train_plan_text(planned)
