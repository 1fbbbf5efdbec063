"""Evaluate: the same measurements for all, figures as closed forms have them, nothing twice."""

from __future__ import annotations

import json

import numpy as np
import pytest
from evaluation_kit import GREY, TASKS, settings, use_known_baselines
from PIL import Image

from domains.base import BadInputError, Item
from domains.mri.domain import MRI
from flows.api_evaluate import choose_methods, evaluate
from flows.config import Home, load_task
from flows.engine.restored import open_restored
from flows.scoring import score_entries
from flows.store import Dataset, DatasetWriter, Measurements
from flows.tracking import open_client

KEYS = {
    "domain", "task", "item", "slice", "group", "region", "method", "nfe", "num_operator_calls",
    "model_digest", "seconds", "peak_bytes", "psnr", "ssim", "psnr_hole", "psnr_body", "ssim_body",
    "edge_error", "z_gradient_error", "residual",
}  # fmt: skip


@pytest.fixture(scope="module")
def site(clean_site):
    """A folder with images, a model and a home, and one evaluation of all methods."""
    return clean_site, evaluate(settings(clean_site))


def log_lines(root):
    return (root / "log").read_text().splitlines()


def pick(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_every_method_has_a_row_for_every_slice_and_the_json_says_the_same(site):
    root, result = site
    assert all(row.keys() == KEYS for row in result.rows)
    solvers = ["covprox", "diffpir", "dds", "kriging"]
    for task in TASKS:
        methods = {*solvers, *load_task(task).baselines}
        keys = {(r["item"], r["slice"], r["method"]) for r in pick(result.rows, task=task)}
        slices = [("still", 0), *(("frames", z) for z in range(5))]
        assert keys == {(item, z, m) for item, z in slices for m in methods}
    assert len(result.rows) == 6 * (6 + 7)
    assert json.loads((root / "out" / "results.json").read_text()) == result.rows
    assert "| residual |" in (root / "out" / "README.md").read_text()


def test_solvers_cost_the_same_number_of_evaluations_and_classical_methods_none(site):
    _, result = site
    for row in result.rows:
        classical = row["method"] not in {"covprox", "diffpir", "dds"}
        assert row["nfe"] == (0 if classical else 12)
        assert (row["model_digest"] is None) == (row["method"] in {"biharmonic", "tv", "telea"})
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 0


def test_the_figures_of_a_flat_image_are_those_of_the_formula(site):
    root, result = site
    flat = (GREY + 1) / 2
    measured = Measurements(result.measurements).read("frames", "inpaint-strokes")
    truth = Dataset(root / "clean.zarr").read("frames").pixels / 255.0
    hole = ~measured.arrays["mask"][:, 0].astype(bool)  # (z h w)
    for row in pick(result.rows, method="telea", item="frames"):
        squared = (truth[:, row["slice"]] - flat) ** 2
        assert row["psnr"] == pytest.approx(-10 * np.log10(squared.mean()), abs=1e-4)
        inside = squared[:, hole[row["slice"]]]
        assert row["psnr_hole"] == pytest.approx(-10 * np.log10(inside.mean()), abs=1e-4)


def test_known_pixels_have_no_residual_and_the_hole_decides_where_the_task_says_so(site):
    _, result = site
    exact = pick(result.rows, task="inpaint-strokes", method="tv")
    assert [row["residual"] for row in exact] == pytest.approx([0] * 6, abs=1e-6)
    assert {row["region"] for row in exact} == {"hole"}
    assert {row["region"] for row in pick(result.rows, task="inpaint-random70")} == {"image"}


def test_again_with_one_method_more_computes_that_method_alone(site):
    root, first = site
    before = log_lines(root)
    again = evaluate(settings(root, tasks=["inpaint-random70"], methods=["covprox", "telea"]))
    fresh = log_lines(root)[len(before) :]
    assert set(fresh) == {f"telea inpaint-random70 {item}" for item in ("still", "frames")}
    assert again.num_reused == 2
    mine = pick(again.rows, method="covprox")
    assert mine == pick(first.rows, method="covprox", task="inpaint-random70")
    assert again.measurements != first.measurements


def test_solvers_that_are_not_standard_can_be_asked_for_by_name(site):
    root, first = site
    nfe = {"ddrm": 12, "pigdm": 36, "red-diff": 12}  # one with a product through the network
    assert not nfe.keys() & {row["method"] for row in first.rows}
    result = evaluate(settings(root, tasks=["inpaint-random70"], methods=list(nfe)))
    assert {row["method"]: row["nfe"] for row in result.rows} == nfe
    assert not result.quarantined


def test_another_seed_is_another_measurement(site):
    root, first = site
    changes = {"tasks": ["inpaint-random70"], "methods": ["biharmonic"], "seed": 7}
    other = evaluate(settings(root, **changes))
    assert other.num_reused == 0
    assert other.facts["Measurements"] != first.facts["Measurements"]


def test_the_table_ranks_and_names_the_gain(site):
    _, result = site
    text = result.table(colour=False, width=120)
    assert "\x1b" not in text
    assert "\x1b" in result.table(colour=True, width=120)
    for task in TASKS:
        assert task in text
    assert "best classical" in text
    assert text.count("covprox") == 2


def test_runs_means_and_pictures_are_in_mlflow(site):
    root, result = site
    client = open_client(Home(home=root / "home", mlflow_uri=None))
    experiment = client.get_experiment_by_name("sashiko-evaluate")
    runs = client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])
    run = runs[0]
    rows = pick(result.rows, task="inpaint-strokes", method="telea")
    logged = run.data.metrics["inpaint-strokes/telea/psnr_hole"]
    assert logged == pytest.approx(np.mean([row["psnr_hole"] for row in rows]))
    assert run.data.params["model_digest"] == result.model.digest
    found = {a.path for a in client.list_artifacts(run.info.run_id, "pictures")}
    assert found == {f"pictures/{task}.png" for task in TASKS}


def test_losing_mlflow_fails_nothing(site, tmp_path, monkeypatch, caplog):
    root, _ = site
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("SASHIKO_MLFLOW_URI", "http://127.0.0.1:9")
    result = evaluate(settings(root, tasks=["inpaint-random70"], methods=["biharmonic"]))
    assert result.json_path.is_file()
    assert "cannot be used" in caplog.text
    assert len(list((tmp_path / "elsewhere" / "mlflow-spool").glob("*.jsonl"))) == 1


def test_a_folder_of_pictures_will_do_and_a_broken_one_is_told(site, tmp_path):
    pixels = (np.mgrid[0:32, 0:40][1] * 6).astype(np.uint8)
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "b.png").write_text("no picture")
    changes = {"input": folder, "output": tmp_path / "out", "methods": ["telea"]}
    result = evaluate(settings(tmp_path, tasks=["inpaint-random70"], **changes))
    assert len(result.rows) == 1
    assert result.model is None
    assert len(result.quarantined) == 1
    again = evaluate(settings(tmp_path, tasks=["inpaint-random70"], **changes))
    assert again.num_reused == 1
    assert sorted(p.name for p in (tmp_path / "out").glob(".*")) in ([], [".work"])


def test_a_truth_that_was_not_measured_is_refused(site, tmp_path):
    root, result = site
    data = Dataset(root / "clean.zarr")
    with DatasetWriter(tmp_path / "other.zarr") as writer:
        for record in data.items():
            writer.add(Item(data.read(record.item_id).pixels + 1, record))
    restored = open_restored(root / "out")
    tasks = {name: load_task(name) for name in TASKS}
    entries = [e for e in restored.items() if e.task == "inpaint-strokes"]
    stores = Dataset(tmp_path / "other.zarr"), Measurements(result.measurements)
    with pytest.raises(BadInputError, match="was not made of the image"):
        list(score_entries(entries, restored, *stores, tasks))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": ["inpaint-nothing"]}, "unknown task 'inpaint-nothing'"),
        ({"methods": ["magic"]}, "unknown method 'magic': choose one of covprox"),
        ({"model": "nowhere"}, "no model at nowhere"),
        ({"items": ["ghost"]}, "ghost"),
        ({"tasks": []}, "no task"),
        ({"tasks": ["ct-sparse60"]}, "ct-sparse60"),
    ],
)
def test_what_cannot_be_evaluated_gets_one_sentence(site, tmp_path, changes, sentence):
    root, _ = site
    with pytest.raises(ValueError, match=sentence) as refused:
        evaluate(settings(root, output=tmp_path / "out", **changes))
    assert "\n" not in str(refused.value)


def test_a_method_runs_on_the_tasks_that_it_fits(monkeypatch, tmp_path):
    use_known_baselines(monkeypatch, tmp_path / "log")
    monkeypatch.setattr(MRI, "baselines", lambda self: {"wavelet": None, "tv": None})
    tasks = {name: load_task(name) for name in ("inpaint-random70", "kspace-x4")}
    assert choose_methods(tasks, ["wavelet", "covprox"]) == {
        "inpaint-random70": ["covprox"],
        "kspace-x4": ["wavelet", "covprox"],
    }
    assert choose_methods(tasks, ["telea"]) == {"inpaint-random70": ["telea"]}
