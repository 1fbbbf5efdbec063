"""The curve of a model trained in parts: what was seen adds up, and which weights a point has."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from diffusion_core.model import Model, store_card_section
from diffusion_core.networks.local_unet import LocalUNet
from diffusion_core.networks.precond import Preconditioned
from diffusion_core.training.power import LENGTHS, PowerAverage, save_snapshot
from domains.base import Item
from flows.config import config_path
from flows.store import Dataset, DatasetWriter
from flows.tune import Selection
from tests.benchmarks import training_curve
from tests.benchmarks.linear_convergence import picture
from tests.benchmarks.training_curve import Point, points_of

RECIPE = {
    "name": "part",
    "num_steps": 100,
    "conditions": {"ct": 1.0},
    "network": {"widths": [8, 8, 8], "depths": [1, 1, 1], "num_features": 8},
}


def part(folder, patch_size, batch_size, readings, end):
    """A run's folder: the log has (step, MP/s), the model's one weight is `end`."""
    model = folder / "model"
    model.mkdir(parents=True)
    recipe = {**RECIPE, "patch_size": patch_size, "batch_size": batch_size}
    (model / "config.json").write_text(json.dumps({"training": recipe}))
    save_file({"w": torch.tensor([end])}, model / "weights.safetensors")
    lines = [json.dumps({"step": step, "megapixels_per_s": rate}) for step, rate in readings]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_parts_follow_each_other_in_megapixels_and_hours(tmp_path):
    # 50 steps of 4 x 100^2 are 2 MP at .5 MP/s, 50 more at .25: 4 s + 8 s; then 10 of .0128 MP.
    first = part(tmp_path / "one", 100, 4, [(50, 0.5), (100, 0.25)], 1.0)
    second = part(tmp_path / "two", 32, 2, [(10, 0.02048)], 2.0)
    points = list(points_of([first, second], 0.05))
    assert [(p.name, float(p.weights["w"])) for p in points] == [("one/100", 1.0), ("two/10", 2.0)]
    assert [p.megapixels for p in points] == pytest.approx([4.0, 4.02048])
    assert [p.hours * 3600 for p in points] == pytest.approx([12.0, 13.0])


def test_points_on_the_way_are_the_averages_of_the_snapshots(tmp_path):
    """With weights that grow as the step, an average of length 5% lags by about 5% of it."""
    run = part(tmp_path / "one", 100, 4, [(50, 0.5), (100, 0.5)], 100.0)
    module = Preconditioned(LocalUNet(num_conditions=1, **RECIPE["network"]), 0.5)
    weight = next(iter(module.parameters()))
    averages = [PowerAverage(module, length) for length in LENGTHS]
    for step in range(1, 101):
        with torch.no_grad():
            weight.fill_(float(step))
        for average in averages:
            average.update(module, step)
        if step % 25 == 0:
            save_snapshot(run / "snapshots", step, averages)
    points = list(points_of([run], 0.05))
    assert [p.name for p in points] == ["one/25", "one/50", "one/75", "one/100"]
    name = next(iter(dict(module.named_parameters())))
    lags = [
        1 - float(p.weights[name].mean()) / s for p, s in zip(points[1:3], (50, 75), strict=True)
    ]
    assert all(0.02 < lag < 0.1 for lag in lags)
    assert [p.hours for p in points] == pytest.approx([h / 3600 for h in (0, 4, 4, 8)])


def test_a_kept_curve_is_told_to_the_card_and_nothing_is_measured_again(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(config_path("models", "starter"), model)
    figures = dict.fromkeys(("denoising_db", *training_curve.TASKS), 30.0)
    run = part(tmp_path / "one", 100, 4, [(100, 0.5)], 1.0)
    row = {
        "how": training_curve.how_of(model),
        "point": "one/100",
        "megapixels": 4.0,
        "hours": 0.5,
        **figures,
    }
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    arguments = ["--data", tmp_path, "--model", model, "--run", run, "--card"]
    made = CliRunner().invoke(
        training_curve.main, [*map(str, arguments), "--output", str(tmp_path / "rows.json")]
    )
    assert made.exit_code == 0, made.output
    card = (model / "MODEL_CARD.md").read_text()
    assert "| 4 | 0.50 | 30.00 |" in card.split(f"## {training_curve.HEADING}")[1]
    assert store_card_section(model, "Nothing", "else"), "the model is whole"


def test_a_point_is_measured_with_its_own_weights(tmp_path, monkeypatch):
    """And a row counts only for the settings that it was made with."""
    item = picture("city", 64)
    with DatasetWriter(tmp_path / "data.zarr") as writer:
        meta = {"value_range": (0, 255)}
        writer.add(Item(item.pixels, replace(item.record, split="validation", meta=meta)))
    monkeypatch.setattr(training_curve, "TASKS", ("inpaint-random70",))
    monkeypatch.setattr(training_curve, "NUM_LEVELS", 2)
    monkeypatch.setattr(training_curve, "read_parts", lambda _: {"city": [Selection("synthetic")]})
    path = config_path("models", "starter")
    model = Model.load(path)
    measure = training_curve.Measure(model, Dataset(tmp_path / "data.zarr"))
    good = {name: value.clone() for name, value in model.module.state_dict().items()}
    bad = {name: 0.5 * value for name, value in good.items()}
    with torch.no_grad():
        rows = [measure.row(Point("x", 1.0, 1.0, weights)) for weights in (good, bad, good)]
    assert rows[0] == rows[2]
    for figure in ("denoising_db", "inpaint-random70"):
        assert rows[1][figure] < rows[0][figure] - 0.5
    before = training_curve.how_of(path)
    monkeypatch.setattr(training_curve, "NUM_LEVELS", 3)
    assert training_curve.how_of(path) != before
