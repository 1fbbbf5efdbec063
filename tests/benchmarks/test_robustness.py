"""Assumptions are as wrong as they say, the data stay, and where nothing is wrong no dB is lost."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from diffusion_core.model import Model
from domains.base import BadInputError, Item
from domains.keyed import keyed_rng
from flows.config import config_path, load_task
from flows.store import Dataset, DatasetWriter
from tests.benchmarks import robustness
from tests.benchmarks.cases import Part
from tests.benchmarks.linear_convergence import picture
from tests.benchmarks.robustness import KEY, RIGHT, Study, Trial
from tests.benchmarks.rows import Rows

STARTER = config_path("models", "starter")


def case_of(task, domain=None, size=64):
    protocol = load_task(task)
    return robustness.case_of(protocol, "picture", picture(domain or protocol.domain, size))


def truth_of(case):
    return case.domain.truth_signal(case.truth, case.measurement)


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize(
    "task", ["denoise-25", "inpaint-random70", "ct-sparse60", "kspace-x4-real", "deblur-gauss"]
)
def test_the_solver_is_told_another_noise_than_the_data_have(task, factor):
    right = case_of(task)
    wrong = robustness.noise_told(right, factor)
    Ax = right.problem.operator.A(truth_of(right))
    ratio = wrong.problem.noise.variance(Ax) / right.problem.noise.variance(Ax)
    torch.testing.assert_close(ratio, torch.full_like(ratio, factor**2))
    assert bool((wrong.problem.y == right.problem.y).all())
    # As the data have it: the square of each residual over the variance that is true of it.
    residual = (right.problem.y - Ax).abs().square() / right.problem.noise.variance(Ax)
    heard = residual[right.problem.operator.measured(torch.ones_like(right.problem.y)).abs() > 0]
    parts = 2 if right.problem.y.is_complex() else 1
    if task != "ct-sparse60":  # another projector made them
        assert float(heard.mean()) / parts == pytest.approx(1.0, abs=0.1)


def test_denoising_runs_at_the_level_that_is_believed_and_nothing_else_does():
    for task, follows in (("denoise-25", True), ("deblur-gauss", False)):
        right = case_of(task)
        levels = robustness.method_of(right, STARTER).sigmas
        wrong = robustness.method_of(robustness.noise_told(right, 0.5), STARTER).sigmas
        torch.testing.assert_close(wrong, levels * (0.5 if follows else 1.0))
    denoising = load_task("denoise-25")
    levels = robustness.method_of(case_of("denoise-25"), STARTER).sigmas
    assert float(levels[-1]) == pytest.approx(denoising.noise["sigma_y"])


@pytest.mark.parametrize(
    ("task", "unit", "nothing"),
    [("inpaint-random70", "pixels", -1.0), ("kspace-x4", "samples", 0), ("kspace-x4", "lines", 0)],
)
def test_two_percent_of_what_was_measured_read_nothing(task, unit, nothing):
    right = case_of(task, size=200)
    known, believed = (robustness.dead(right, unit, known=k) for k in (True, False))
    y, read = right.measurement.y, known.measurement.y
    assert (believed.measurement.y == read).all()
    mask = np.broadcast_to(right.measurement.arrays["mask"], (1, 1, *y.shape[2:]))
    told = np.broadcast_to(believed.measurement.arrays["mask"], mask.shape)
    alive = np.broadcast_to(known.measurement.arrays["mask"], mask.shape)
    assert (told == mask).all()
    assert (alive <= mask).all()
    lost = np.broadcast_to(mask & ~alive, y.shape)
    assert (read[lost] == nothing).all()
    assert (read[~lost] == y[~lost]).all()
    assert (y[lost] != nothing).mean() > 0.99
    # 200 / 4 = 50 lines, of which one.
    assert lost.sum() / np.broadcast_to(mask, y.shape).sum() == pytest.approx(0.02, rel=1e-3)
    if unit == "lines":
        assert sorted(set(lost[0, 0].sum(axis=0))) == [0, 200]
    else:
        assert lost[0, 0].any(axis=0).sum() > 5
    assert bool((believed.problem.operator.mask == torch.from_numpy(mask)).all())


def test_a_mask_loses_places_of_every_slice_by_its_own_draw():
    mask = np.arange(400).reshape(2, 1, 1, 200) % 2 == 0
    rngs = [keyed_rng(0, "x", "dead", z) for z in range(2)]
    left = robustness.without(mask, 0.02, rngs)
    assert mask.sum(axis=(1, 2, 3)).tolist() == [100, 100]
    assert left.sum(axis=(1, 2, 3)).tolist() == [98, 98]
    assert (left[0] != left[1]).any()


def width_px(kernel):
    """Root mean square distance from the centre of mass."""
    rows, columns = np.indices(kernel.shape)
    weights = kernel.astype(np.float64) / kernel.sum()
    centre = [(weights * axis).sum() for axis in (rows, columns)]
    return float(np.sqrt((weights * ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2)).sum()))


@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize(("task", "tolerance"), [("deblur-gauss", 2e-3), ("deblur-motion", 1e-2)])
def test_the_kernel_is_believed_ten_percent_off(task, tolerance, factor):
    right = case_of(task)
    wrong = robustness.kernel_told(right, factor)
    kernels = [case.measurement.arrays["kernel"] for case in (right, wrong)]
    # Sizes of motion are odd: 55 and 67 for 61.
    foreseen = factor if task == "deblur-gauss" else {0.9: 55 / 61, 1.1: 67 / 61}[factor]
    assert width_px(kernels[1]) / width_px(kernels[0]) == pytest.approx(foreseen, rel=tolerance)
    assert float(kernels[1].sum()) == pytest.approx(1.0, abs=1e-5)
    assert (wrong.measurement.y == right.measurement.y).all()
    assert bool((wrong.problem.operator.kernel == torch.from_numpy(kernels[1])).all())


@pytest.mark.parametrize("hu", [20, -50])
def test_a_scanners_offset_is_in_the_data_and_is_taken_off_what_is_restored(hu):
    for task in ("denoise-25", "ct-sparse60"):
        right = case_of(task, "ct")
        moved = robustness.offset(right, hu)
        assert (moved.truth.pixels == right.truth.pixels).all()
        seen = truth_of(right) + hu / 1500
        gap = moved.problem.y - right.problem.y
        # Of counts only the expected ones are known.
        foreseen = right.problem.operator.A(torch.full_like(seen, hu / 1500))
        if task == "denoise-25":
            torch.testing.assert_close(gap, foreseen, rtol=0, atol=1e-5)
        else:
            assert float(gap.mean()) == pytest.approx(float(foreseen.mean()), rel=0.02)
        assert moved.figures(seen)["psnr"] > 120
        # A restoration that missed the offset is off by it, but where it is clipped.
        off = moved.figures(truth_of(right))["psnr"]
        assert -1e-6 < off - 20 * np.log10(3000 / abs(hu)) < 4


def test_noise_of_denoising_is_the_same_on_ct_as_on_photographs():
    for domain in ("ct", "city"):
        case = case_of("denoise-25", domain)
        noise = case.problem.y - truth_of(case)
        assert float(noise.std()) == pytest.approx(50 / 255, rel=0.05)


@pytest.fixture
def dataset(tmp_path):
    with DatasetWriter(tmp_path / "pictures.zarr") as writer:
        for domain in ("city", "mri"):
            item = picture(domain, 64)
            writer.add(Item(item.pixels, replace(item.record, item_id=domain)))
    return Dataset(tmp_path / "pictures.zarr")


ASSUMED = (
    Study(
        "deblur-gauss",
        [Part("city")],
        [
            Trial("noise x1", partial(robustness.noise_told, factor=1.0)),
            Trial("kernel x1", partial(robustness.kernel_told, factor=1.0)),
        ],
    ),
    Study(
        "denoise-25",
        [Part("city")],
        [
            Trial("noise x1", partial(robustness.noise_told, factor=1.0)),
            Trial("wrong", partial(robustness.noise_told, factor=0.25)),
        ],
    ),
)


def test_nothing_wrong_loses_nothing_wrong_loses_and_what_is_known_is_not_run_again(
    dataset, tmp_path, monkeypatch
):
    model = Model.load(STARTER)
    rows = Rows(tmp_path / "rows.json", KEY)
    with torch.no_grad():
        robustness.run([dataset], ASSUMED, model, rows, 4)
    losses = {"right": [], "wrong": []}
    for row in rows:
        if row["assumption"] != RIGHT.name:
            losses["right" if "x1" in row["assumption"] else "wrong"].append(row["loss_db"])
    assert losses["right"] == [0.0] * 6
    # A quarter of the noise believed: nearly all of it stays.
    assert len(losses["wrong"]) == 2
    assert min(losses["wrong"]) > 3
    assert {row["method"] for row in rows} == {"covprox", "tv"}
    assert all(np.isfinite(row["psnr"]) for row in rows)

    def restored_again(*_):
        raise AssertionError

    monkeypatch.setattr(robustness, "restore", restored_again)
    again = Rows(tmp_path / "rows.json", KEY)
    robustness.run([dataset], ASSUMED, model, again, 4)
    monkeypatch.setattr(robustness, "weights_digest", lambda _: "other weights")
    with pytest.raises(AssertionError):
        robustness.run([dataset], ASSUMED, model, again, 4)


def test_an_item_that_no_dataset_holds_is_named(dataset):
    assert robustness.holder([dataset], "mri") is dataset
    with pytest.raises(BadInputError, match="no item 'brain9'"):
        robustness.holder([dataset], "brain9")


def row(method, assumption, psnr, loss=None, item="lung2/11/0,0"):
    found = {"task": "ct-sparse60", "domain": "ct", "item": item, "method": method}
    found |= {"assumption": assumption, "psnr": psnr}
    return found if loss is None else found | {"loss_db": loss}


def test_the_table_says_what_each_loses_and_which_is_ahead_then(tmp_path):
    rows = Rows(tmp_path / "rows.json", KEY)
    items = [part.name for part in robustness.TEST["ct"][:2]]
    for item, more in zip(items, (0.0, 1.0), strict=True):
        rows.put(row("covprox", "right", 40.0 + more, item=item))
        rows.put(row("tv", "right", 37.0, item=item))
        rows.put(row("covprox", "noise x2", 39.0, 1.0 + more, item=item))
        rows.put(row("tv", "noise x2", 35.0, 2.0, item=item))
    lines = robustness.table(rows).splitlines()
    assert (
        "| ct-sparse60 | ct | noise x2 | 2 | +1.50 (+1.00 to +2.00) | +2.00 (+2.00 to +2.00) | "
        "+4.00 | +3.50 |"
    ) in lines
    rows.put({**row("covprox", "right", 30.0, item="brain2/4/0,0"), "task": "kspace-x4"})
    rows.put({**row("tv", "right", 26.0, item="brain2/4/0,0"), "task": "kspace-x4"})
    assert (
        "| T1 | 1 | 30.00 | 26.00 | +4.00 (+4.00 to +4.00) |" in robustness.table(rows).splitlines()
    )


def test_every_trial_is_held_against_one_that_runs_before_it():
    for study in robustness.STUDIES:
        names = [RIGHT.name, *(trial.name for trial in study.trials)]
        assert len(set(names)) == len(names)
        for trial in study.trials:
            assert names.index(trial.against) < names.index(trial.name)
        assert len(study.parts) >= 4
