"""`sashiko train` end to end on a tiny dataset: killed with -9, it goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError
from train_kit import dataset_of, kill_training, settings

from domains.base import BadInputError
from flows.api_train import train
from flows.config import ComputeSettings, TrainSettings, config_path, read_settings

pytestmark = pytest.mark.usefixtures("registry_home")


def losses(run: Path) -> dict[int, float]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return {reading["step"]: reading["loss"] for reading in map(json.loads, lines)}


def test_killed_with_9_it_goes_on_to_the_undisturbed_curve(dataset, tmp_path):
    undisturbed = train(settings(dataset, tmp_path / "a"))
    asked = settings(dataset, tmp_path / "b")
    log = kill_training(asked, tmp_path)
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


def test_a_finished_model_keeps_what_it_was_given_since(dataset, tmp_path):
    from diffusion_core.model import solver_settings, store_solver_settings

    asked = settings(dataset, tmp_path, num_steps=2)
    first = train(asked)
    fitted = {"format": 1, "tasks": {}}
    digest = store_solver_settings(first.model_path, fitted, "none")
    again = train(asked)
    assert (again.digest, again.metrics) == (digest, first.metrics)
    assert solver_settings(again.model_path) == fitted


def test_a_run_of_that_name_with_other_settings_is_refused(dataset, tmp_path):
    train(settings(dataset, tmp_path, num_steps=2))
    with pytest.raises(BadInputError, match=r"other settings \(learning_rate\)"):
        train(settings(dataset, tmp_path, num_steps=2, learning_rate=1.0))


def test_data_is_known_by_its_content_wherever_it_lies(dataset, tmp_path):
    first = train(settings(dataset, tmp_path, num_steps=2))
    moved = dataset_of(tmp_path / "moved.zarr", range(4))
    assert train(settings(moved, tmp_path, num_steps=2)).digest == first.digest
    other = dataset_of(tmp_path / "other.zarr", (0, 1, 3))
    with pytest.raises(BadInputError, match=r"other settings \(data\)"):
        train(settings(other, tmp_path, num_steps=2))


def test_first_weights_are_known_by_their_content(dataset, tmp_path):
    start = train(settings(dataset, tmp_path, name="start", num_steps=1)).model_path
    other = train(settings(dataset, tmp_path, name="other", num_steps=2)).model_path
    asked = settings(dataset, tmp_path, num_steps=1, init_from=start)
    train(asked)
    moved = start.rename(tmp_path / "moved")
    train(asked.model_copy(update={"init_from": moved}))
    older = json.loads((tmp_path / "small" / "settings.json").read_text())
    del older["init_digest"]  # of a version that kept the path alone
    (tmp_path / "small" / "settings.json").write_text(json.dumps(older))
    train(asked.model_copy(update={"init_from": moved}))
    with pytest.raises(BadInputError, match=r"other settings \(init_from\)"):
        train(asked.model_copy(update={"init_from": other}))


def test_a_run_of_an_older_version_goes_on_with_defaults_for_what_it_does_not_know(
    dataset, tmp_path
):
    asked = settings(dataset, tmp_path, num_steps=2)
    first = train(asked)
    file = tmp_path / "small" / "settings.json"
    kept = json.loads(file.read_text())
    unknown = ("data_digests", "init_digest", "init_conditions", "uniform_share")
    older = {name: value for name, value in kept.items() if name not in unknown}
    file.write_text(json.dumps(older))
    with pytest.raises(BadInputError, match=r"\(init_conditions, uniform_share\)"):
        train(asked.model_copy(update={"uniform_share": 0.5, "init_conditions": {"a": "b"}}))
    with pytest.raises(BadInputError, match=r"\(init_from\)"):  # it kept the path alone
        train(asked.model_copy(update={"init_from": first.model_path}))
    assert train(asked).digest == first.digest
    assert json.loads(file.read_text()) == kept


def test_a_refused_or_failed_run_leaves_its_name_free(dataset, tmp_path, monkeypatch):
    for wrong in ({"conditions": {"ct": 1.0}}, {"network": {"bogus": 3}}, {"data": [tmp_path]}):
        with pytest.raises(BadInputError):
            train(settings(dataset, tmp_path / "runs", **wrong))
        assert not (tmp_path / "runs").exists()

    def killed_at_once(payload):
        (Path(payload["run"]) / "log.jsonl").write_text("half a li")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("flows.training.worker.work", killed_at_once)
        with pytest.raises(KeyboardInterrupt):
            train(settings(dataset, tmp_path / "runs", learning_rate=1.0))
    train(settings(dataset, tmp_path / "runs", num_steps=2))
    assert list(losses(tmp_path / "runs" / "small")) == [1, 2]


def test_half_a_settings_file_is_bad_input_and_is_never_written(dataset, tmp_path, monkeypatch):
    asked = settings(dataset, tmp_path, num_steps=1)
    train(asked)
    file = tmp_path / "small" / "settings.json"
    whole = file.read_bytes()
    file.write_bytes(whole[:40])
    with pytest.raises(BadInputError, match="cannot be read"):
        train(asked)
    file.write_bytes(whole)

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInputError, match="No space left on device"):
        train(asked)
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../../escaped"}, {"name": ".."}, {"name": "a/b"}, {"name": ""},
        {"num_steps": 0}, {"num_steps": -5}, {"batch_size": 0}, {"patch_size": 0},
        {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"adamw_ratio": float("inf")},
        {"ema_decay": 1.0}, {"decay_share": 1.5}, {"uniform_share": -0.1}, {"ln_sigma_std": 0.0},
        {"sigma_range": (0.0, 4.0)}, {"sigma_range": (4.0, 0.01)}, {"seed": -1},
        {"log_every_steps": 0}, {"picture_every_steps": 0}, {"checkpoint_every_s": -1.0},
        {"num_threads": -1}, {"warmup_steps": -1}, {"conditions": {}}, {"conditions": {"city": 0}},
        {"register_as": ["a/b"]}, {"least_view_scale": 2.0}, {"micro_batch": -1},
        {"ema_snapshots": -1}, {"ema_lengths": [0.3]}, {"ema_lengths": [0.0]},
        {"level_mass": [1.0, 0.0]}, {"score": {"num_levels": 0}}, {"score": {"side": 8}},
        {"prefetch_threads": 0}, {"soft_shares": {"city": 1.5}}, {"soft_shares": {"ct": 0.5}},
    ],
)  # fmt: skip
def test_numbers_and_names_out_of_range_are_refused_at_once(dataset, tmp_path, wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        settings(dataset, tmp_path, **wrong)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"network": {"bogus": 3}}, "'network'.*bogus.*widths and depths"),
        ({"network": {"widths": [8, 8], "depths": [1]}}, "'network'"),
        ({"network": {"widths": [], "depths": []}}, "'network'"),
        ({"network": {"widths": [-8], "depths": [1]}}, "'network'"),
        ({"patch_size": 34}, "patch of 34 pixels does not divide by 4.*36 does"),
        ({"patch_size": 128}, "no training image for city .of 128 pixels"),
        ({"data": [Path("/nope.zarr")]}, "/nope.zarr: not a store"),
        ({"calibration_items": ["photo-0", "brain7"]}, "calibration item 'brain7'"),
        ({"batch_size": 9}, "batch of 9 does not divide by 2 workers"),
    ],
)
def test_with_ray_a_wrong_setting_is_named_before_ray_starts(
    dataset, tmp_path, monkeypatch, wrong, named
):
    def started(*_):
        pytest.fail("Ray was started")

    monkeypatch.setattr("flows.training.on_ray.run_on_ray", started)
    pair = ComputeSettings(executor="ray", num_workers=2)
    with pytest.raises(BadInputError, match=named):
        train(settings(dataset, tmp_path, **{"compute": pair, **wrong}))


@pytest.mark.ray
def test_what_a_ray_worker_cannot_use_is_said_in_one_sentence_and_not_tried_again(
    tmp_path, monkeypatch
):
    """Only the workers read all of the data: a damaged chunk is theirs to find."""
    from ray.train.torch import TorchTrainer

    data = dataset_of(tmp_path / "damaged.zarr", range(4))
    chunks = [p for p in data.rglob("*photo-2*/pixels/c/**/*") if p.is_file()]
    chunks[0].write_bytes(b"damaged")
    fits = []
    fit = TorchTrainer.fit
    monkeypatch.setattr(TorchTrainer, "fit", lambda self: (fits.append(1), fit(self)))
    compute = ComputeSettings(executor="ray", num_workers=1)
    with pytest.raises(BadInputError, match="a chunk of items/photo-2/pixels is damaged") as caught:
        train(settings(data, tmp_path, compute=compute))
    assert "Traceback" not in str(caught.value)
    assert len(fits) == 1


def test_only_lost_workers_are_tried_again():
    from ray.exceptions import ActorDiedError
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    from flows.training.on_ray import _lost

    def lost(**failures):
        return _lost(WorkerGroupError("Traceback", dict(enumerate(failures.values()))))

    assert lost(a=RuntimeError("Connection closed by peer\nmore"), b=ActorDiedError())
    assert "HealthCheck" in lost(a=WorkerHealthCheckFailedError("killed", ActorDiedError()))
    assert "peer)" in lost(a=RuntimeError("Connection closed by peer\nmore"))
    with pytest.raises(BadInputError, match=r"^no image$"):
        lost(a=RuntimeError("Connection closed by peer"), b=BadInputError("no image"))
    with pytest.raises(KeyError):
        lost(a=KeyError("city"))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ray_s_waiting_ends_by_what_the_handlers_before_raise(name, wrapped):
    """Ray swallows what is no KeyboardInterrupt or SystemExit; Ray Train's handler exits."""
    from flows.training.on_ray import _interruptible

    class TerminationSignal(BaseException):
        pass

    def prefects(*_):
        raise TerminationSignal

    def ray_train_s(*_):
        raise SystemExit(0)

    def waiting(number):
        signal.signal(signal.SIGINT, ray_train_s)
        try:
            signal.raise_signal(number)
        except (KeyboardInterrupt, SystemExit) as error:
            if wrapped:
                raise SystemError("returned a result with an exception set") from error
            raise

    number = signal.Signals[name]
    before = signal.signal(signal.SIGTERM, prefects)
    own = signal.getsignal(signal.SIGINT)
    expected = TerminationSignal if name == "SIGTERM" else KeyboardInterrupt
    try:
        with pytest.raises(expected), _interruptible():
            waiting(number)
        assert signal.getsignal(signal.SIGTERM) is prefects
        assert signal.getsignal(signal.SIGINT) is own
        with pytest.raises(SystemError, match="Ray's own"), _interruptible():
            raise SystemError("Ray's own")
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, own)


@pytest.mark.ray
def test_ctrl_c_with_ray_is_130_and_leaves_what_to_go_on_from(dataset, tmp_path):
    compute = ComputeSettings(executor="ray", num_workers=1)
    asked = settings(dataset, tmp_path, num_steps=20_000, compute=compute)
    config = tmp_path / "train.yaml"
    config.write_text(asked.model_dump_json())
    # A shell's background jobs, of which this test may be one, ignore SIGINT.
    driver = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from flows.cli import main; main()"
    )
    command = [sys.executable, "-c", driver, "train", str(config), "--no-prefect"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "small" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("step-*")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted; the same command goes on" in err
    assert "Traceback" not in err
    assert list(checkpoints.glob("step-*"))


@pytest.mark.ray
def test_a_killed_ray_worker_is_replaced_and_the_curve_is_the_undisturbed_one(dataset, tmp_path):
    """kill -9 of one of two workers in mid-run: both begin again from the newest checkpoint."""
    import psutil

    train(settings(dataset, tmp_path / "a"))
    log = tmp_path / "b" / "small" / "log.jsonl"
    killed = []

    def kill_one(event):
        if event.kind == "train" and event.done >= 5 and not killed:
            ours = psutil.Process().children(recursive=True)
            workers = [p for p in ours if "RayTrainWorker" in " ".join(p.cmdline())]
            killed.append(workers[-1].pid)
            workers[-1].kill()

    pair = ComputeSettings(executor="ray", num_workers=2)
    # Slow enough to be met on the way: readings are told once a second.
    train(settings(dataset, tmp_path / "b", compute=pair, batch_size=4), kill_one)
    assert killed
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert max(steps) == 30
    assert steps.count(1) == 1  # from a checkpoint, not from the beginning
    assert losses(log.parent) == pytest.approx(losses(tmp_path / "a" / "small"), rel=1e-3)


def test_missing_data_and_unknown_conditions_are_named(dataset, tmp_path):
    with pytest.raises(BadInputError, match="no training image for ct"):
        train(settings(dataset, tmp_path, conditions={"ct": 1.0}))
    with pytest.raises(BadInputError, match="no domain knows the condition 'x-ray'"):
        train(settings(dataset, tmp_path / "b", conditions={"x-ray": 1.0}))


@pytest.mark.ray
def test_two_ray_workers_give_the_curve_of_one(dataset, tmp_path):
    """Sums in another order: 1e-3 of the loss at every step, which is the mean of both workers."""
    alone = settings(dataset, tmp_path / "a", num_steps=6)
    train(alone)
    pair = ComputeSettings(executor="ray", num_workers=2)
    train(settings(dataset, tmp_path / "b", num_steps=6, compute=pair))
    curve = losses(tmp_path / "b" / "small")
    assert curve == pytest.approx(losses(tmp_path / "a" / "small"), rel=1e-3)
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
    lost = asked.model_copy(update={"init_from": tmp_path / "lost"})
    with pytest.raises(BadInputError, match=r"'init_from' .*lost.* init_from=starter"):
        new_network(lost)


def test_the_recipe_for_own_data_goes_on_from_the_starter(dataset):
    import torch

    from diffusion_core.model import Model
    from flows.api_train import new_network, resolved
    from flows.training.checks import check_data, check_settings

    changes = [f"data=[{dataset}]", "conditions={city: 1.0}", "patch_size=64"]
    asked = resolved(read_settings(TrainSettings, Path("configs/train-own.yaml"), changes))
    check_settings(asked)
    check_data(asked)
    assert asked.register_as == []
    starter = Model.load(config_path("models", "starter"))
    x = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)
    city = torch.tensor([list(starter.conditions).index("city")])
    with torch.no_grad():
        then = starter.module(x, torch.tensor([0.3]), city)
        now = new_network(asked)(x, torch.tensor([0.3]), torch.tensor([0]))
    torch.testing.assert_close(now, then)
