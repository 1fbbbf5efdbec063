"""`sashiko train` end to end on a tiny dataset: killed with -9, it goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from domains.base import BadInputError, Item, ItemRecord
from flows.api_train import train
from flows.config import ComputeSettings, TrainSettings
from flows.store import DatasetWriter


def photograph(number: int, split: str) -> Item:
    """A smooth random colour image with edges."""
    rng = np.random.default_rng(number)
    field = np.cumsum(np.cumsum(rng.normal(size=(3, 1, 64, 64)), axis=2), axis=3)
    pixels = (127.5 + 60 * np.tanh(field / 20)).astype(np.uint8)
    record = ItemRecord(
        item_id=f"photo-{number}", domain="city", shape=(3, 1, 64, 64), dtype="uint8",
        units="intensity", source_digest=f"{number:064x}", source_format="png", split=split,
        meta={"value_range": [0.0, 255.0]},
    )  # fmt: skip
    return Item(pixels, record)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "photos.zarr"
    with DatasetWriter(path) as writer:
        for number in range(4):
            writer.add(photograph(number, "validation" if number == 3 else "train"))
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))


def settings(dataset, output, **changes) -> TrainSettings:
    values = {
        "name": "small", "data": [dataset], "output": output, "conditions": {"city": 1.0},
        "network": {"widths": [8, 8], "depths": [1, 1], "num_features": 8}, "patch_size": 32,
        "batch_size": 4, "num_steps": 30, "warmup_steps": 2, "dtype": "float32",
        "checkpoint_every_s": 0.0, "log_every_steps": 1, "picture_every_steps": 10,
        "compute": ComputeSettings(executor="inline"), "num_threads": 1,
    }  # fmt: skip
    return TrainSettings(**{**values, **changes})


def losses(run: Path) -> dict[int, float]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return {reading["step"]: reading["loss"] for reading in map(json.loads, lines)}


def test_killed_with_9_it_goes_on_to_the_undisturbed_curve(dataset, tmp_path):
    undisturbed = train(settings(dataset, tmp_path / "a"))
    driver = tmp_path / "driver.py"
    driver.write_text(
        textwrap.dedent("""
        import sys
        from flows.api_train import train
        from flows.config import TrainSettings
        train(TrainSettings.model_validate_json(sys.argv[1]))
    """)
    )
    asked = settings(dataset, tmp_path / "b")
    process = subprocess.Popen([sys.executable, driver, asked.model_dump_json()], env=os.environ)
    log = tmp_path / "b" / "small" / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 5):
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = losses(log.parent)
    assert 5 <= max(before) < 30

    resumed = train(asked)

    after = losses(log.parent)
    assert after == pytest.approx(losses(tmp_path / "a" / "small"), rel=1e-6)
    # It went on from a checkpoint: the first steps were not taken a second time.
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps.count(1) == steps.count(2) == 1
    assert resumed.metrics == pytest.approx(undisturbed.metrics, abs=1e-3)


def test_a_finished_model_says_what_it_learned_from(dataset, tmp_path):
    from diffusion_core.model import Model

    events = []
    result = train(settings(dataset, tmp_path), events.append)
    model = Model.load(result.model_path)

    assert model.digest == result.digest
    assert model.prior("city").prior_mean.shape == (3,)
    assert {s["item"] for s in model.config["sources"]} == {f"photo-{n}" for n in range(4)}
    card = (result.model_path / "MODEL_CARD.md").read_text()
    assert "photo-0" in card
    assert "Not for" in card
    assert events[-1].done == events[-1].total
    assert set(result.metrics) == {f"city/sigma-{s}" for s in ("0.05", "0.1", "0.2", "0.5")}


def test_a_run_of_that_name_with_other_settings_is_refused(dataset, tmp_path):
    train(settings(dataset, tmp_path, num_steps=2))
    with pytest.raises(BadInputError, match="other settings"):
        train(settings(dataset, tmp_path, num_steps=2, learning_rate=1.0))


def test_missing_data_and_unknown_conditions_are_named(dataset, tmp_path):
    with pytest.raises(BadInputError, match="no training image for ct"):
        train(settings(dataset, tmp_path, conditions={"ct": 1.0}))
    with pytest.raises(BadInputError, match="no domain knows the condition 'x-ray'"):
        train(settings(dataset, tmp_path / "b", conditions={"x-ray": 1.0}))


@pytest.mark.ray
def test_two_ray_workers_give_the_curve_of_one(dataset, tmp_path):
    """float32 sums in another order: 1e-4 of the loss over these steps."""
    alone = settings(dataset, tmp_path / "a", num_steps=6)
    train(alone)
    pair = ComputeSettings(executor="ray", num_workers=2)
    train(settings(dataset, tmp_path / "b", num_steps=6, compute=pair))
    rank0 = losses(tmp_path / "b" / "small")
    assert list(rank0) == list(range(1, 7))
    from safetensors.torch import load_file

    ends = [
        load_file(p / "small" / "checkpoints" / "step-000000006" / "module.safetensors")
        for p in (tmp_path / "a", tmp_path / "b")
    ]
    for name, value in ends[0].items():
        assert (value - ends[1][name]).abs().max() < 1e-4, name


def test_a_new_condition_begins_as_one_that_the_model_knows(dataset, tmp_path):
    import torch

    from diffusion_core.model import Model, save_model
    from diffusion_core.noise.draws import KeyedDraws
    from flows.api_train import new_network

    old = settings(dataset, tmp_path, conditions={"city-grey": 0.5, "city": 0.5})
    module = new_network(old)
    with torch.no_grad():  # a new network is the identity: let it depend on its condition
        for parameter in module.parameters():
            parameter.add_(0.3 * KeyedDraws(0, "weights").normal(0, parameter[None])[0])
    start = tmp_path / "start"
    save_model(start, module, {"city-grey": 1, "city": 3}, {}, "a card", {})
    asked = settings(
        dataset, tmp_path, conditions={"city": 0.3, "city-log": 0.7}, init_from=start,
        init_conditions={"city-log": "city-grey"},
    )  # fmt: skip
    network, before = new_network(asked), Model.load(start).module
    x, sigma = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8), torch.tensor([0.3])
    with torch.no_grad():
        now = [network(x, sigma, torch.tensor([i])) for i in (0, 1)]
        then = [before(x, sigma, torch.tensor([i])) for i in (1, 0)]
    for ours, theirs in zip(now, then, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (now[0] - now[1]).abs().max() > 1e-3
    with pytest.raises(BadInputError, match="init_conditions"):
        new_network(asked.model_copy(update={"init_conditions": {}}))
