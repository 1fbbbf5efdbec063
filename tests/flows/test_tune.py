"""The tuning: the search climbs, the cut is what it says, and what is frozen can be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from domains.base import Item, ItemRecord, Task
from domains.registry import load_domain
from flows.config import config_path, load_task, task_names
from flows.store import Dataset, DatasetWriter
from flows.tune import (
    SEARCH,
    Selection,
    Tuned,
    case_of,
    cut,
    freeze,
    frozen_path,
    search,
    shrunk,
)


def test_search_climbs_to_the_best_candidate_of_each_parameter() -> None:
    calls: list[dict[str, Any]] = []

    def figure(params: dict[str, Any]) -> float:
        calls.append(params)
        return -((params["a"] - 3.0) ** 2) - 5.0 * float(params["b"] != "fine")

    space = {"a": (1.0, 2.0, 3.0, 4.0, 5.0), "b": ("coarse", "fine")}
    assert search(figure, space) == Tuned({"a": 3.0, "b": "fine"}, 0.0)
    assert len(calls) < 10
    assert len({str(c) for c in calls}) == len(calls), "nothing is evaluated twice"


def test_search_starts_at_the_usual_strength_and_climbs_down_too() -> None:
    tuned = search(lambda p: -abs(p["strength"] - 2.0), {"strength": (1.0, 2.0, 4.0, 8.0, 16.0)})
    assert tuned.params == {"strength": 2.0}


def test_search_takes_no_candidate_for_a_trifle() -> None:
    tuned = search(lambda p: 0.001 * p["num_iterations"], {"num_iterations": (10, 20)})
    assert tuned.params == {"num_iterations": 10}


def test_search_of_a_method_without_parameters_is_one_evaluation() -> None:
    assert search(lambda _: 7.0, {}) == Tuned({}, 7.0)


def _record(pixels: np.ndarray[Any, Any]) -> ItemRecord:
    shape: Any = pixels.shape
    return ItemRecord("photo", "city", shape, pixels.dtype.name, "intensity", "0" * 64, "png")


def test_cut_spreads_slices_crops_the_centre_and_averages_squares(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (1, 6, 20, 24)).astype(np.uint8)
    with DatasetWriter(tmp_path / "ds.zarr") as writer:
        writer.add(Item(pixels, _record(pixels)))
    dataset = Dataset(tmp_path / "ds.zarr")
    item = cut(dataset, Selection("photo", 2, size=(4, 6), shrink=2))
    means = pixels[:, [1, 4]].reshape(1, 2, 10, 2, 12, 2).mean(axis=(3, 5))
    np.testing.assert_array_equal(item.pixels, np.rint(means)[..., 3:7, 3:9])
    assert item.pixels.dtype == np.uint8
    assert item.record.shape == (1, 2, 4, 6)
    whole = Item(pixels, _record(pixels))
    assert shrunk(whole, 1) is whole


def test_shrinking_keeps_the_size_of_the_patient() -> None:
    pixels = np.zeros((1, 2, 8, 12), dtype=np.int16)
    record = ItemRecord(
        "scan", "ct", (1, 2, 8, 12), "int16", "HU", "0" * 64, "nrrd", spacing_mm=(5.0, 0.5, 0.75)
    )
    assert shrunk(Item(pixels, record), 2).record.spacing_mm == (5.0, 1.0, 1.5)
    assert shrunk(Item(pixels, _record(pixels)), 2).record.spacing_mm is None


def test_a_case_is_judged_in_the_hole_where_the_task_counts_the_hole() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (3, 1, 24, 24)).astype(np.uint8)
    item = Item(pixels, _record(pixels))
    params = {"pattern": "random", "missing_share": 0.5}
    noise = {"kind": "gaussian", "sigma_y": 0.0}
    image = Task("a", "city", "mask", params, noise)
    hole = Task("b", "city", "mask", params, noise, region="hole")
    case = case_of(image, item)
    # Half the pixels are exact, so the image's error is half the hole's: 3 dB.
    gain = case.figure(image, "biharmonic", {}) - case.figure(hole, "biharmonic", {})
    assert gain == pytest.approx(10 * np.log10(2), abs=1e-6)


def test_frozen_parameters_are_kept_when_another_method_is_tuned(tmp_path: Path) -> None:
    task, path = load_task("inpaint-strokes"), tmp_path / "inpaint-strokes.yaml"
    freeze(task, {"tv": Tuned({"strength": 5.6}, 20.004)}, path)
    freeze(task, {"biharmonic": Tuned({"smoothing": 0.0}, 19.0)}, path)
    values = yaml.safe_load(path.read_text())
    assert values["methods"] == {"biharmonic": {"smoothing": 0.0}, "tv": {"strength": 5.6}}
    assert list(values["methods"]) == ["biharmonic", "tv"], "in the task's order"
    assert values["validation_psnr_db"]["tv"] == 20.0
    assert "python -m flows.tune --task inpaint-strokes" in path.read_text()


def test_every_task_of_the_demo_is_frozen() -> None:
    demo = yaml.safe_load(config_path("demo.yaml").read_text())["tasks"]
    assert [name for name in demo if not frozen_path(name).is_file()] == []


@pytest.mark.parametrize("name", [n for n in task_names() if frozen_path(n).is_file()])
def test_frozen_parameters_cover_each_method_of_the_task(name: str) -> None:
    task = load_task(name)
    frozen = yaml.safe_load(frozen_path(name).read_text())["methods"]
    known = load_domain(task.domain).baselines()
    for method in task.baselines:
        assert method in known
        assert set(frozen[method]) == set(SEARCH[task.operator][method])
