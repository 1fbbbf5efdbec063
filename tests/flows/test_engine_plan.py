"""The plan: what names a campaign, how items are cut, what is refused, and how quick it is."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from engine_kit import make_store, method, tiny_plan
from hypothesis import given
from hypothesis import strategies as st
from tiny_domain import tiny_item, tiny_measurement

from domains.base import BadInputError
from domains.ct.fold import fold_of
from domains.ct.geometry import Geometry
from flows.config import MethodSettings, config_path, load_method
from flows.engine import cost
from flows.engine import grid as grids
from flows.engine import plan as planning
from flows.engine.campaign import run_plan
from flows.engine.cost import predict
from flows.engine.executor import InlineExecutor
from flows.engine.grid import Grid, make_grid
from flows.engine.methods import HOLES, converged, resolve_method
from flows.engine.plan import ModelRef, PlanRefusedError, content_of, make_plan
from flows.engine.worker import BlockWorker
from flows.store import MeasurementEntry, MeasurementWriter

MODEL = ModelRef("/nowhere", "d" * 64, "sashiko-tiny", "3")
SOLVER = MethodSettings(name="covprox", num_levels=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("in") / "m.zarr")


def plan_of(store: Path, **changes):
    return make_plan(store, Path("out"), SOLVER, MODEL, **changes)


# --- what names a campaign -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"dtype": "float32"},
        {"device_class": "cuda"},
        {"method": MethodSettings(name="covprox", num_levels=5)},
        {"method": MethodSettings(name="covprox", num_levels=4, options={"cg_steps": 3})},
        {"model": replace(MODEL, digest="e" * 64)},
        {"items": ["item-0"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_changes_pixels_changes_the_campaign(store, changes):
    base = plan_of(store)
    merged = {"method": SOLVER, "model": MODEL, **changes}
    other = make_plan(store, Path("out"), **merged)
    assert other.campaign != base.campaign
    if "items" not in changes:
        assert not {item.key for item in base.items} & {item.key for item in other.items}


def test_a_version_that_computes_otherwise_makes_other_keys(store, monkeypatch):
    base = plan_of(store)
    monkeypatch.setattr(planning, "ALGORITHM_VERSION", planning.ALGORITHM_VERSION + 1)
    assert not {item.key for item in base.items} & {item.key for item in plan_of(store).items}


def test_the_device_is_in_the_key_itself_not_by_its_batches_alone(store):
    item = plan_of(store).items[0]
    assert content_of(replace(item, device_class="cuda")) != content_of(item)


def test_workers_paths_names_and_limits_do_not_change_the_campaign(store, tmp_path):
    base = plan_of(store)
    moved = make_store(tmp_path / "elsewhere.zarr")
    other = make_plan(
        moved,
        tmp_path / "other",
        SOLVER,
        replace(MODEL, path="/other", name="other", version="4"),
        num_workers=7,
        memory_limit_bytes=10**12,
    )
    assert other.campaign == base.campaign


def test_other_pixels_of_the_input_or_another_grid_change_the_campaign(tmp_path):
    def plan(name, value, shape=(1, 4, 2000, 1600), **settings):
        with MeasurementWriter(tmp_path / name) as writer:
            item = tiny_item("item-0", np.full(shape, value, np.float32))
            writer.add(tiny_measurement(item, np.ones((shape[1], 1, *shape[2:]), bool)))
        return tiny_plan(tmp_path / name, tmp_path / "out", **settings)

    base = plan("a", 1.0)
    assert base.items[0].grid.tiled
    assert plan("b", 1.0).campaign == base.campaign
    assert plan("c", 2.0).campaign != base.campaign
    assert plan("d", 1.0, block_size=256).campaign != base.campaign
    assert base.items[0].grid.reach == base.items[0].grid.halo == 96
    assert content_of(base.items[0])["grid"]["reach"] == 96
    whole = plan("e", 1.0, (1, 4, 200, 160)).items[0]
    assert whole.grid.reach is None
    assert "reach" not in content_of(whole)["grid"]


def test_noise_levels_are_no_part_of_a_classical_method(store):
    one, other = method("twice"), method("twice").model_copy(update={"num_levels": 99})
    assert (
        tiny_plan(store, Path("out"), one).campaign == tiny_plan(store, Path("out"), other).campaign
    )


def test_the_seed_of_a_classical_method_is_nothing(store):
    plans = [tiny_plan(store, Path("out"), seed=seed, dtype="float32") for seed in (0, 1)]
    assert plans[0].campaign == plans[1].campaign


def test_the_recorded_plan_is_json_and_holds_what_is_hashed(store):
    plan = plan_of(store)
    recorded = json.loads(json.dumps(plan.to_json()))
    assert recorded["campaign"] == plan.campaign
    assert recorded["num_blocks"] == plan.num_blocks == 12
    assert recorded["items"][0] == {
        "key": plan.items[0].key,
        **json.loads(json.dumps(content_of(plan.items[0]))),
    }


def test_windows_are_the_plan_in_parts_of_the_same_campaign(store):
    plan = tiny_plan(store, Path("out"), method("twice"), method("box-blur"))
    parts = plan.windows(3)
    assert [len(part.items) for part in parts] == [3, 1]
    assert tuple(item for part in parts for item in part.items) == plan.items
    assert {part.campaign for part in parts} == {plan.campaign}


# --- how items are cut ---------------------------------------------------------------------------


@given(
    z=st.integers(1, 9),
    h=st.integers(16, 700),
    w=st.integers(16, 700),
    block=st.sampled_from([64, 96, 200, 512]),
    operator=st.sampled_from(["mask", "fourier", "blur"]),
)
def test_write_regions_cover_every_pixel_once_and_own_whole_chunks(z, h, w, block, operator):
    most, grids.MAX_CANVAS_PX = grids.MAX_CANVAS_PX, 300 * 300
    try:
        grid = make_grid((2, z, h, w), operator, slices_per_block=4, block_size=block)
    finally:
        grids.MAX_CANVAS_PX = most
    written = np.zeros((z, h, w), int)
    owners: dict[tuple[int, ...], set[int]] = {}
    for block_ in grid:
        r, read = block_.write, block_.read
        written[r.z0 : r.z1, r.y0 : r.y1, r.x0 : r.x1] += 1
        # Far edges apart, chunks begin where write regions do: no chunk has two writers.
        for key in np.ndindex(r.z1 - r.z0, -(-h // grid.chunk[2]), -(-w // grid.chunk[3])):
            y, x = key[1] * grid.chunk[2], key[2] * grid.chunk[3]
            overlaps = (
                y < r.y1 and y + grid.chunk[2] > r.y0 and x < r.x1 and x + grid.chunk[3] > r.x0
            )
            if overlaps:
                owners.setdefault((r.z0 + key[0], key[1], key[2]), set()).add(block_.index)
        assert read.y0 % 8 == 0
        assert read.x0 % 8 == 0
        assert read.y0 in (0, r.y0 - grid.halo)
        assert read.y1 in (h, r.y1 + grid.halo)
        assert (read.z0, read.z1) == (r.z0, r.z1)
    assert (written == 1).all()
    assert all(len(blocks) == 1 for blocks in owners.values())
    assert grid.tiled == (operator == "mask" and h * w > 300 * 300 and (h > block or w > block))


def test_operators_that_see_the_plane_get_whole_planes_however_large():
    grid = make_grid((1, 10, 4096, 4096), "fourier", slices_per_block=4, block_size=512)
    assert [b.write.shape for b in grid] == [(4, 4096, 4096), (4, 4096, 4096), (2, 4096, 4096)]


def test_photographs_are_done_one_frame_at_a_time_and_tiled_when_large():
    assert make_grid((3, 7, 1536, 1536), "mask", slices_per_block=4, block_size=512).num_blocks == 7
    large = make_grid((3, 1, 1537, 1536), "mask", slices_per_block=4, block_size=512)
    assert (large.num_blocks, large.halo, large.chunk) == (12, 96, (3, 1, 512, 512))


@pytest.mark.parametrize("size", [0, 100, -8])
def test_tiles_off_the_stride_of_the_network_are_refused(size):
    with pytest.raises(ValueError, match="multiples of 8"):
        make_grid((1, 1, 64, 64), "mask", slices_per_block=1, block_size=size)


# --- what is refused -----------------------------------------------------------------------------


def test_a_plan_over_the_memory_limit_is_refused_with_the_figures(store):
    plan = tiny_plan(store, Path("out"), num_workers=3)
    limit = plan.predicted_peak_bytes
    assert tiny_plan(store, Path("out"), num_workers=3, memory_limit_bytes=limit).items
    with pytest.raises(PlanRefusedError, match=r"3 workers .* limit is .* fewer than 3 workers"):
        tiny_plan(store, Path("out"), num_workers=3, memory_limit_bytes=limit - 1)
    with pytest.raises(PlanRefusedError, match=r"1 worker and the limit is 0.001 GB: allow more"):
        tiny_plan(store, Path("out"), num_workers=1, memory_limit_bytes=1_000_000)


@pytest.mark.parametrize(
    ("size", "views", "arc"),
    [((64, 64), 720, 180.0), ((64, 64), 45, 180.0), ((48, 64), 60, 180.0), ((64, 64), 120, 120.0)],
)
def test_memory_is_foretold_for_the_views_of_a_scan_that_are_stored(size, views, arc):
    plane = make_grid((1, 1, *size), "parallel-beam", slices_per_block=1, block_size=512)

    def matrix_bytes(operator: str) -> int:
        scan = {"num_views": views, "arc_degrees": arc}
        with_matrix, without = (
            predict(plane, operator, params, SOLVER, "float32", input_bytes=0, model_bytes=0)
            for params in (scan, {})
        )
        return with_matrix.peak_bytes - without.peak_bytes

    stored = len(fold_of(Geometry(*size, (1.0, 1.0), views, arc, 91, 1.0)).stored)
    least = cost.MATRIX_BYTES_PX * stored * size[0] * size[1]
    assert least <= matrix_bytes("parallel-beam") <= 3 * least
    assert matrix_bytes("fan-beam") == cost.MATRIX_BYTES_PX * views * size[0] * size[1]


def test_predictions_grow_with_what_they_depend_on(store):
    def cost_of(**changes):
        return plan_of(store, **changes).items[0].cost

    few = make_plan(store, Path("out"), SOLVER.model_copy(update={"num_levels": 2}), MODEL)
    assert few.items[0].cost.seconds < cost_of().seconds < cost_of(dtype="float32").seconds
    one, two = (tiny_plan(store, Path("out"), num_workers=n) for n in (1, 2))
    assert one.predicted_peak_bytes < two.predicted_peak_bytes
    assert one.predicted_seconds == pytest.approx(2 * two.predicted_seconds)
    assert one.predicted_bytes == 2 * 2 * 6 * 33 * 40 * 4


MEASURED = Path(__file__).parents[1] / "benchmarks/results/plan_time.json"


@pytest.mark.parametrize(
    "row", json.loads(MEASURED.read_text()), ids=lambda r: f"{r['task']}-{r['levels']}"
)
def test_seconds_are_foretold_as_they_were_measured(row):
    """Of blocks of half a second and more: `python -m tests.benchmarks.plan_time` made the rows."""
    z, h, w = row["canvas"]
    options = {} if row["tolerance"] is None else {"tolerance": row["tolerance"]}
    told = predict(
        Grid((row["channels"], z, h, w), z, h, w, 0),
        row["operator"],
        row["params"],
        MethodSettings(name=row["method"], num_levels=row["levels"], options=options),
        "bfloat16",
        input_bytes=0,
        model_bytes=0,
        exact=row["exact"],
    )
    assert 0.8 <= told.seconds / row["cpu_s"] <= 1.25


@pytest.mark.parametrize("shape", [(1, 1, 5000, 5000), (3, 2, 1700, 2049), (1, 7, 300, 300)])
def test_the_average_block_reads_what_the_blocks_read_on_average(shape):
    grid = make_grid(shape, "mask", slices_per_block=4, block_size=512)
    reads = [block.read.num_pixels for block in grid]
    share = cost._average_read(grid)
    assert share * np.prod(grid.canvas) == pytest.approx(sum(reads) / len(reads))


def test_data_without_noise_and_an_accuracy_take_their_time(tmp_path):
    grid = make_grid((1, 1, 512, 512), "mask", slices_per_block=1, block_size=512)

    def seconds(exact: bool, **options: float) -> float:
        way = SOLVER.model_copy(update={"options": options})
        figures = {"input_bytes": 0, "model_bytes": 0, "exact": exact}
        return predict(grid, "mask", {}, way, "bfloat16", **figures).seconds

    assert seconds(exact=False) < seconds(exact=True) < seconds(exact=True, tolerance=1e-4)
    assert seconds(exact=False, tolerance=1e-5) < 3 * seconds(exact=False, tolerance=3e-5)
    assert seconds(exact=False, start="noise") < seconds(exact=False)


def test_a_solver_without_a_model_is_refused(store):
    with pytest.raises(BadInputError, match="needs a model"):
        make_plan(store, Path("out"), SOLVER)


def test_asking_for_what_the_store_does_not_hold_says_what_it_holds(store):
    with pytest.raises(BadInputError, match=r"holds item-0 \(given\), item-1 \(given\)"):
        tiny_plan(store, Path("out"), items=["item-9"])


def test_a_domain_that_is_not_installed_is_refused_at_once(store, monkeypatch):
    monkeypatch.setattr("flows.engine.plan.domain_names", lambda: ["city", "ct"])
    with pytest.raises(BadInputError, match="'tiny', which is not installed"):
        tiny_plan(store, Path("out"))


def test_names_that_could_leave_the_output_folder_are_refused(store):
    with pytest.raises(BadInputError, match="cannot name an output"):
        tiny_plan(store, Path("out"), MethodSettings(name="../up", kind="baseline"))


# --- methods -------------------------------------------------------------------------------------


def entry(task="inpaint-random70", operator="mask", sigma_y=0.05) -> MeasurementEntry:
    record = tiny_item("item-0", np.zeros((1, 1, 16, 16))).record
    noise = {"kind": "gaussian", "sigma_y": sigma_y}
    return MeasurementEntry(
        item_id="item-0",
        task=task,
        record=record,
        num_slices=1,
        operator=operator,
        params={},
        noise=noise,
        digest="digest",
        num_bytes=0,
        y_shape=(1, 1, 16, 16),
        arrays={},
        truth_digest=None,
        seed=0,
    )


def test_what_is_left_open_comes_from_the_task():
    own = load_method("inpaint-random70")
    assert resolve_method(None, entry()) == own
    fewer = resolve_method(MethodSettings(num_levels=3), entry())
    assert fewer == own.model_copy(update={"num_levels": 3})
    other = resolve_method(MethodSettings(name="diffpir"), entry())
    assert (other.name, other.sigma_max, other.num_levels) == ("diffpir", 0.7, own.num_levels)
    assert other.options == {}, "options of one solver mean nothing to another"


def test_solves_on_planes_cut_into_blocks_converge_unless_an_accuracy_is_asked_for():
    own = resolve_method(None, entry())
    assert converged(own, None).options == {**own.options, "tolerance": 3e-5, "max_steps": 300}
    asked = MethodSettings(options={"tolerance": 1e-3})
    kept = converged(resolve_method(asked, entry()), asked)
    assert (kept.options["tolerance"], kept.options["max_steps"]) == (1e-3, 300)
    dds = resolve_method(MethodSettings(name="dds"), entry())
    assert converged(dds, None) == dds, "it has no such options"


def test_a_name_that_is_no_solver_is_a_classical_method():
    assert resolve_method(MethodSettings(name="tv"), entry()).kind == "baseline"


def test_classical_methods_have_the_parameters_frozen_for_the_task():
    path = config_path("baselines", "inpaint-random70.yaml")
    frozen = yaml.safe_load(path.read_text())["methods"]["tv"]
    assert resolve_method(MethodSettings(name="tv"), entry()).options == frozen
    changed = resolve_method(MethodSettings(name="tv", options={"strength": 1.5}), entry())
    assert changed.options == {**frozen, "strength": 1.5}
    assert resolve_method(changed, entry()) == changed, "what is resolved stays as it is"


def test_a_damaged_image_is_treated_as_the_task_it_is_most_like():
    assert resolve_method(None, entry("given", "pool")) == load_method("sr-x4")
    strokes = load_method("inpaint-strokes")
    strokes = strokes.model_copy(update={"options": {**HOLES, **strokes.options}})
    assert resolve_method(None, entry("given", sigma_y=0.0)) == strokes
    assert resolve_method(None, entry("given", "weird-operator")).name == "covprox"


def test_solves_go_on_until_the_middle_of_a_hole_is_reached():
    assert not HOLES.keys() & resolve_method(None, entry()).options.keys()
    for name in ("covprox", "kriging", "diffpir"):
        assert (
            resolve_method(MethodSettings(name=name), entry("given")).options.items()
            >= HOLES.items()
        )
        box = resolve_method(MethodSettings(name=name), entry("inpaint-box"))
        assert box.options.items() >= load_method("inpaint-box").options.items() >= HOLES.items()
    asked = MethodSettings(options={"tolerance": 0.1})
    assert resolve_method(asked, entry("given")).options["tolerance"] == 0.1


FITS = {
    "tasks": {
        "inpaint-random70": {
            "covprox": {
                "mean": {
                    "8": {
                        "sigma_max": 0.9,
                        "sigma_min": 0.03,
                        "rho": 5.0,
                        "options": {"inflation": [2.0, 8.0]},
                    },
                    "12": {"sigma_max": 0.8, "sigma_min": 0.04, "rho": 3.0, "options": {}},
                },
                "sample": {
                    "8": {
                        "sigma_max": 0.6,
                        "sigma_min": 0.02,
                        "rho": 3.0,
                        "options": {"mode": "sample", "inflation": [1.2]},
                    }
                },
            }
        }
    }
}


def test_what_a_model_was_calibrated_to_comes_before_the_task_file():
    own = load_method("inpaint-random70")
    eight = resolve_method(MethodSettings(num_levels=8), entry(), FITS)
    assert (eight.sigma_max, eight.sigma_min, eight.rho) == (0.9, 0.03, 5.0)
    assert eight.num_levels == 8
    assert eight.options == {**own.options, "inflation": [2.0, 8.0]}
    # Nothing asked: the task's number of levels, 12. The nearest in ratio stands for
    # others, if it is near.
    assert resolve_method(None, entry(), FITS).sigma_max == 0.8
    far = MethodSettings(num_levels=17)
    assert resolve_method(far, entry(), FITS) == resolve_method(far, entry()), (
        "1.4 times 12 or more"
    )
    assert resolve_method(MethodSettings(num_levels=9), entry(), FITS).sigma_max == 0.9
    assert resolve_method(eight, entry(), FITS) == eight, "what is resolved stays as it is"


def test_what_the_user_sets_comes_before_the_model():
    asked = MethodSettings(num_levels=8, sigma_max=0.33, options={"inflation": 1.0})
    found = resolve_method(asked, entry(), FITS)
    assert (found.sigma_max, found.sigma_min) == (0.33, 0.03)
    assert found.options["inflation"] == 1.0


def test_modes_do_not_share_what_was_tuned_for_one():
    asked = MethodSettings(num_levels=8, options={"mode": "sample"})
    own = load_method("inpaint-random70")
    assert "momentum" in own.options
    plain = resolve_method(asked, entry())
    assert plain.options == {"mode": "sample", "local": False}
    fitted = resolve_method(asked, entry(), FITS)
    assert fitted.options == {"mode": "sample", "local": False, "inflation": [1.2]}
    assert fitted.sigma_max == 0.6


def test_other_solvers_get_the_levels_but_not_the_options_of_the_calibration():
    found = resolve_method(MethodSettings(name="diffpir", num_levels=8), entry(), FITS)
    assert (found.sigma_max, found.options) == (0.9, {})
    assert resolve_method(MethodSettings(name="tv"), entry(), FITS).kind == "baseline"


def test_a_task_that_was_not_calibrated_keeps_its_file():
    assert resolve_method(None, entry("sr-x4", "pool"), FITS) == load_method("sr-x4")


def test_a_damaged_image_gets_the_calibration_of_the_task_it_is_most_like():
    assert resolve_method(None, entry("given"), FITS).sigma_max == 0.8


def test_the_plan_reads_the_settings_of_the_model_in_use(store, tmp_path):
    # The items of the store are noisy images with holes, most like those of inpaint-random70.
    (tmp_path / "solver.json").write_text(json.dumps(FITS))
    asked = MethodSettings(name="covprox")
    plain = make_plan(store, Path("out"), asked, MODEL)
    found = make_plan(store, Path("out"), asked, replace(MODEL, path=str(tmp_path)))
    assert {item.method.sigma_max for item in found.items} == {0.8}
    assert {item.method.sigma_max for item in plain.items} != {0.8}
    assert found.campaign != plain.campaign


# --- quick ---------------------------------------------------------------------------------------


def test_planning_imports_neither_torch_nor_ray_nor_prefect(store):
    code = f"""
import sys
from pathlib import Path
from flows.config import MethodSettings
from flows.engine.plan import make_plan
plan = make_plan(Path({str(store)!r}), Path("out"), MethodSettings(name="twice", kind="baseline"))
assert plan.num_blocks == 12
print([name for name in ("torch", "ray", "prefect", "mlflow") if name in sys.modules])
"""
    kit = str(Path(__file__).parents[1] / "kit")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": kit, "PATH": ""},
    )
    assert done.stdout.strip() == "[]"


def test_blocks_are_arithmetic_and_none_is_made_in_advance():
    huge = make_grid((1, 10**6, 10**5, 10**5), "mask", slices_per_block=1, block_size=512)
    assert huge.num_blocks == 10**6 * 196**2
    assert huge.block(huge.num_blocks - 1).write.x1 == 10**5
    with pytest.raises(IndexError):
        huge.block(huge.num_blocks)


def test_places_are_absolute_since_workers_were_started_elsewhere(store, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "node").mkdir()
    monkeypatch.chdir(tmp_path)
    attempt = BlockWorker.attempt

    def elsewhere(worker, job):
        with contextlib.chdir(tmp_path / "node"):
            return attempt(worker, job)

    monkeypatch.setattr(BlockWorker, "attempt", elsewhere)
    near = Path(os.path.relpath(store))
    plan = tiny_plan(near, Path("out"))
    assert (plan.measurements, plan.output) == (tmp_path / near, tmp_path / "out")
    solved = make_plan(near, Path("out"), SOLVER, replace(MODEL, path="model"))
    assert {item.model.path for item in solved.items} == {str(tmp_path / "model")}
    assert plan.campaign == tiny_plan(store, tmp_path / "out").campaign
    result = run_plan(plan, InlineExecutor())
    assert (len(result.published), result.quarantined) == (len(plan.items), ())
    assert not list((tmp_path / "node").iterdir())
