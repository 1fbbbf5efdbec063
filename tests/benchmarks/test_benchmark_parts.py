"""What the benchmark's figures rest on: schedule, statistics, rows that survive, equal windows."""

import json
import math
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from domains.base import Item, ItemRecord
from domains.registry import load_domain
from flows.config import load_task
from tests.benchmarks import linear_convergence, projector_parts, restoration
from tests.benchmarks.cases import SIDE_PX, TEST, VALIDATION, Part, shrunk
from tests.benchmarks.ours import published_sigmas
from tests.benchmarks.peer_function import PeerFunction
from tests.benchmarks.rows import Rows, paired, summary


def row(task, item, method, psnr):
    return {"task": task, "item": item, "method": method, "psnr": psnr}


def test_the_published_levels_are_those_of_ddpm_with_most_steps_at_little_noise():
    sigmas = published_sigmas(100)
    assert len(sigmas) == 100
    assert bool((sigmas.diff() < 0).all())
    # abar_1000 = prod(1 - beta) = 4.036e-5 and abar_1 = 1 - 1e-4 (Ho et al. 2020).
    assert float(sigmas[0]) == pytest.approx(math.sqrt(1 / 4.0358e-5 - 1), rel=1e-3)
    assert float(sigmas[-1]) == pytest.approx(math.sqrt(1e-4 / (1 - 1e-4)), rel=1e-3)
    assert int((sigmas < 1).sum()) > int((sigmas > 4).sum())


def test_the_lower_bound_is_where_a_one_sided_test_at_ten_percent_stops_rejecting():
    differences = np.random.default_rng(0).normal(0.2, 0.3, 8)
    found = summary(list(differences))
    test = ttest_1samp(differences, found.lower, alternative="greater")
    assert test.pvalue == pytest.approx(0.1, abs=1e-9)


def test_differences_are_taken_between_equal_items_only():
    rows = [
        row("a", "1", "ours", 30.0),
        row("a", "2", "ours", 20.0),
        row("a", "2", "other", 21.0),
        row("b", "1", "other", 99.0),
    ]
    found = paired(rows, "a", "ours", "other")
    assert (found.mean, found.count) == (-1.0, 1)


def test_rows_are_there_when_the_file_is_opened_again_and_are_replaced_by_key(tmp_path):
    path = tmp_path / "results" / "core.json"
    rows = Rows(path)
    rows.put(row("a", "1", "ours", 30.0))
    rows.put(row("a", "2", "ours", 31.0))
    rows.put(row("a", "1", "ours", 32.0))
    again = Rows(path)
    assert again.get("a", "1", "ours") == row("a", "1", "ours", 32.0)
    assert again.get("a", "1", "other") is None
    assert len(json.loads(path.read_text())) == 2


def test_test_windows_of_one_image_do_not_overlap_and_none_is_for_validation():
    for parts in TEST.values():
        for a, b in combinations(parts, 2):
            same = (a.label, a.z) == (b.label, b.z)
            apart = max(abs(p - q) for p, q in zip(a.corner, b.corner, strict=True)) >= SIDE_PX
            assert not same or apart, (a, b)
    labels = [{p.label for parts in split.values() for p in parts} for split in (TEST, VALIDATION)]
    assert not labels[0] & labels[1]
    assert all(len(parts) >= 8 for parts in TEST.values())


def test_shrinking_keeps_the_mean_and_the_size_in_mm():
    pixels = np.arange(64, dtype=np.int16).reshape(1, 1, 8, 8) * 4
    record = ItemRecord("x", "ct", (1, 1, 8, 8), "int16", "HU", "0" * 64, "nrrd", (5.0, 0.5, 0.6))
    half = shrunk(Item(pixels, record), 2)
    assert half.pixels.dtype == np.int16
    assert half.pixels.mean() == pixels.mean()
    assert half.record.spacing_mm == (5.0, 1.0, 1.2)
    assert half.record.shape == half.pixels.shape == (1, 1, 4, 4)


def test_parts_have_names_of_their_own():
    names = [part.name for parts in TEST.values() for part in parts]
    assert len(set(names)) == len(names)
    assert Part("china", corner=(1, 2)).name == "china/0/1,2"


def test_residuals_of_the_solves_fall_with_the_steps():
    task = load_task("kspace-x4-8coil")
    domain, item = load_domain("mri"), linear_convergence.picture("mri", 64)
    measurement = domain.simulate(item, task, 0)
    problem = domain.problem(measurement)
    row = linear_convergence.convergence(problem, domain.truth_signal(item, measurement), 0.2)
    assert list(row["relative_residual"]) == sorted(row["relative_residual"], reverse=True)
    assert row["relative_residual"][1] < 0.1 * row["plain"][1]
    assert row["steps"] == linear_convergence.STEPS[-1]


def test_a_projectors_adjoint_error_is_measured():
    right = projector_parts.measured(lambda x: 2 * x, lambda y: 2 * y)
    wrong = projector_parts.measured(lambda x: 2 * x, lambda y: 2.1 * y)
    assert right["adjoint_error"] < 1e-9 < 1e-6 < wrong["adjoint_error"]
    assert right["A_seconds"] > 0


def test_a_function_of_another_environment_is_called_on_arrays():
    with PeerFunction(Path(sys.executable), "numpy", "clip") as call:
        first = call(np.array([-3.0, 0.5, 7.0]), a_min=-1.0, a_max=1.0)
        second = call(np.full((2, 2), 5.0), a_min=0.0, a_max=2.0)
    assert first.tolist() == [-1.0, 0.5, 1.0]
    assert (second == 2).all()


def test_a_function_that_fails_is_told(capfd):
    call = PeerFunction(Path(sys.executable), "numpy", "linalg")
    with call, pytest.raises(RuntimeError, match="numpy's process ended"):
        call(np.zeros(3))
    assert "not callable" in capfd.readouterr().err


def test_the_table_holds_ours_against_the_best_mean_of_the_classical_methods():
    def row(method, item, db, nfe=0):
        facts = {
            "task": "sr-x4",
            "domain": "city",
            "region": "image",
            "group": item,
            "seconds": 1.0,
        }
        return {**facts, "method": method, "item": item, "psnr": db, "ssim": 0.5, "nfe": nfe}

    rows = [
        row("covprox", "a/0", 30.0, 8), row("covprox", "b/0", 34.0, 8),
        row("tv", "a/0", 30.5), row("tv", "b/0", 30.5),
        row("kriging", "a/0", 25.0), row("kriging", "b/0", 35.0),
        row("bm3d", "a/0", 99.0), row("bm3d", "b/0", 99.0),
    ]  # fmt: skip
    text = restoration.table(rows)
    line = "| sr-x4 | 2 | 8 | 32.00, 0.500 | 30.50, 0.500 tv | +1.50 (2.83) | +0.6 | 1.0, 1.0 |"
    assert line in text
    assert "BM3D, told sigma, has 99.00 dB" in text
