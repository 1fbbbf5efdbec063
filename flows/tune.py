"""Tune the classical baselines once on validation items, and freeze what was found.

    python -m flows.tune --task ct-sparse60 --data DATASET

DATASET holds the sample items (`sashiko samples`, `flows.api_data.ingest_samples`). Each method's
parameters are searched one after the other along ordered candidates, by the mean PSNR over the
validation items (of the hole, where the task counts the hole), and written to
configs/baselines/TASK.yaml. Test items are never used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml

from domains.base import Array, BadInputError, Domain, Item, Measurement, Problem, Task
from domains.files import select
from domains.metrics import hole_of, mean_score, score
from domains.registry import load_domain
from flows.config import config_path, load_task
from flows.store import Dataset

Params = dict[str, Any]
Space = Mapping[str, Sequence[Any]]
Report = Callable[[str], None]

MIN_GAIN_DB = 0.03
"""A candidate must gain so much to be taken: first come the cheaper or plainer ones."""


@dataclass(frozen=True)
class Selection:
    """A part of a sample item that baselines are tuned on.

    Attributes:
        label: of the item.
        num_slices: evenly spread, at the middles of equal parts of the item.
        size: (height, width) of a centre crop; None takes the whole plane.
        shrink: average squares of so many pixels a side first.
    """

    label: str
    num_slices: int = 1
    size: tuple[int, int] | None = None
    shrink: int = 1


VALIDATION: Mapping[str, Sequence[Selection]] = {
    # lung1 and brain1 are training items, of which classical methods learn nothing; they have the
    # pixel sizes and matrices of the test items. The one validation scan of CT, 122 x 101 pixels of
    # 3 mm, does not: filters tuned on it cost backprojection 2 dB on a scan of 512^2.
    "ct": (Selection("lung1", 2),),
    "mri": (
        Selection("stroke-t2-b", 3),
        Selection("stroke-flair-b", 3),
        Selection("brain1", 3),
    ),
    # The berlin photographs have 8 megapixels: shrunk, they are as sharp as the test's.
    "city": (
        Selection("berlin-01", size=(256, 256), shrink=4),
        Selection("berlin-02", size=(256, 256), shrink=4),
        Selection("berlin-03", size=(256, 256), shrink=4),
        Selection("pan3", size=(256, 256)),
        Selection("ms3", size=(180, 300)),
        Selection("bikes-2", size=(256, 256)),
    ),
}

STRENGTHS = tuple(float(f"{2 ** (k / 2):.2g}") for k in range(-4, 16))  # 0.25 to 180
RADII = (2.0, 3.0, 5.0, 8.0, 12.0, 20.0)

SEARCH: Mapping[str, Mapping[str, Space]] = {
    "parallel-beam": {
        "fbp": {
            "window": ("ramp", "shepp-logan", "cosine", "hann"),
            "cutoff": (1.0, 0.8, 0.65, 0.55, 0.45, 0.38, 0.32, 0.26, 0.2),
        },
        "fbp-nlm": {
            "window": ("hann",),
            "cutoff": (1.0, 0.8, 0.65, 0.55, 0.45, 0.38, 0.32, 0.26),
            "strength": (0.01, 0.015, 0.02, 0.03, 0.045, 0.06, 0.09),
        },
        "sirt": {"num_iterations": (10, 15, 20, 25, 30, 40, 50, 70)},
        "tv": {"edge": (0.0125, 0.05), "strength": STRENGTHS, "num_iterations": (20, 30, 60)},
    },
    "fourier": {
        "zero-filled": {},
        "wavelet": {"wavelet": ("db4", "db2", "haar"), "strength": STRENGTHS, "num_levels": (4, 3)},
        "tv": {"edge": (0.1,), "num_iterations": (30, 60), "strength": STRENGTHS},
    },
    "multi-coil": {
        "zero-filled": {},
        "wavelet": {"wavelet": ("db4", "db2", "haar"), "strength": STRENGTHS, "num_levels": (4,)},
    },
    "pool-rows": {"linear-z": {}, "cubic-z": {}},
    "mask": {
        "as-it-is": {},
        "linear-z": {},
        "cubic-z": {},
        "biharmonic": {"smoothing": (0.0, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8)},
        "telea": {"radius_px": RADII},
        "navier-stokes": {"radius_px": RADII},
        "tv": {"step": (0.1, 0.05, 0.02), "num_iterations": (50, 100, 200), "strength": STRENGTHS},
    },
    "pool": {
        "bicubic": {},
        "tv": {"edge": (0.1,), "num_iterations": (15, 30), "strength": STRENGTHS},
    },
    "blur": {
        "wiener": {"balance": (0.003, 0.01, 0.03, 0.06, 0.1, 0.2)},
        "richardson-lucy": {"num_iterations": (5, 10, 15, 20, 30, 45)},
        "tv": {"edge": (0.1,), "num_iterations": (15, 30), "strength": STRENGTHS},
    },
    "varying-blur": {
        "richardson-lucy": {"num_iterations": (5, 10, 15, 20, 30, 45)},
        "tv": {"edge": (0.1,), "num_iterations": (15, 30), "strength": STRENGTHS},
    },
    "downsample": {
        "bicubic": {},
        "tv": {"edge": (0.1,), "num_iterations": (15, 30), "strength": STRENGTHS},
    },
    "mosaic": {
        "bilinear": {},
        "tv": {"edge": (0.1,), "num_iterations": (15, 30), "strength": STRENGTHS},
    },
    "jpeg-blocks": {
        "decoded": {},
        "decoded-nlm": {
            "patch_size": (5, 7),
            "patch_distance": (6, 9),
            "strength": (0.5, 0.35, 0.25, 0.17, 0.12, 0.08, 0.05),
        },
        "decoded-tv": {"num_iterations": (50, 100), "strength": STRENGTHS},
    },
    "identity": {
        "nlm": {"patch_size": (5, 7), "patch_distance": (6, 9), "strength": (0.5, 0.7, 0.9, 1.1)},
        "tv": {"num_iterations": (50, 100), "strength": STRENGTHS},
        "inversion": {},
        "gamma": {"gamma": (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.5)},
        "clahe": {
            "clip_limit": (0.01, 0.005, 0.002, 0.001, 0.0005),
            "num_tiles": (8, 4, 2, 1),
        },
        "anscombe-nlm": {
            "strength": (0.3, 0.4, 0.5, 0.7, 0.9),
            "patch_size": (5, 7),
            "patch_distance": (6, 9),
        },
    },
}
"""Operator -> method -> parameter -> ordered candidates; a search begins at START or the first."""

START: Mapping[str, Any] = {"strength": 8.0, "smoothing": 0.0}


@dataclass(frozen=True)
class Case:
    """One validation item, measured."""

    domain: Domain
    truth: Item
    measurement: Measurement
    problem: Problem
    hole: Array | None

    def figure(self, task: Task, method: str, params: Mapping[str, Any]) -> float:
        """PSNR in dB, mean over slices; of the hole where the task counts the hole."""
        x = self.domain.baselines()[method](self.measurement, self.problem, params)
        restored = self.problem.to_source(x).numpy().swapaxes(0, 1)
        figures = mean_score(score(self.domain, self.truth, restored, region=self.hole))
        return figures["psnr_hole" if task.region == "hole" else "psnr"]


@dataclass(frozen=True)
class Tuned:
    """What was found for one method: parameters, and the mean PSNR over the validation items."""

    params: Params
    psnr_db: float


def tune(
    task: Task, dataset: Dataset, methods: Iterable[str] | None = None, report: Report | None = None
) -> dict[str, Tuned]:
    """Search the parameters of a task's baselines.

    Args:
        task: the protocol.
        dataset: holds the items of VALIDATION.
        methods: which; None takes all that the task names.
        report: told of each evaluation.

    Raises:
        BadInputError: if the dataset lacks an item.
    """
    if task.domain not in VALIDATION or task.operator not in SEARCH:
        raise BadInputError(
            f"task '{task.name}': no validation items or no search are known for it; write its "
            "parameters into the baselines/ folder of its domain"
        )
    cases = [case_of(task, cut(dataset, part)) for part in VALIDATION[task.domain]]
    found = {}
    for method in task.baselines if methods is None else methods:
        evaluate = _evaluator(task, method, cases, report or (lambda _: None))
        found[method] = search(evaluate, SEARCH[task.operator][method])
    return found


def search(evaluate: Callable[[Params], float], space: Space, num_rounds: int = 2) -> Tuned:
    """Climb along each parameter's ordered candidates in turn.

    Args:
        evaluate: parameters to a figure of merit, in dB.
        space: ordered candidates of each parameter.
        num_rounds: over all parameters; ends early when nothing moved.
    """
    place = {name: _start_of(name, values) for name, values in space.items()}
    known: dict[tuple[int, ...], float] = {}

    def figure(at: Mapping[str, int]) -> float:
        key = tuple(at.values())
        if key not in known:
            known[key] = evaluate({name: space[name][i] for name, i in at.items()})
        return known[key]

    for _ in range(num_rounds):
        before = dict(place)
        for name, values in space.items():
            place = _climb(place, name, len(values), figure)
        if place == before:
            break
    return Tuned({name: space[name][i] for name, i in place.items()}, figure(place))


def _climb(
    place: dict[str, int], name: str, count: int, figure: Callable[[Mapping[str, int]], float]
) -> dict[str, int]:
    """Move one parameter up or down its candidates as long as it gains."""
    for direction in (1, -1):
        moved = False
        while 0 <= place[name] + direction < count:
            onward = {**place, name: place[name] + direction}
            if figure(onward) < figure(place) + MIN_GAIN_DB:
                break
            place, moved = onward, True
        if moved:
            break
    return place


def _start_of(name: str, values: Sequence[Any]) -> int:
    return values.index(START[name]) if START.get(name) in values else 0


def _evaluator(
    task: Task, method: str, cases: Sequence[Case], report: Report
) -> Callable[[Params], float]:
    def evaluate(params: Params) -> float:
        figures = [case.figure(task, method, params) for case in cases]
        each = " ".join(f"{figure:.2f}" for figure in figures)
        report(f"{task.name} {method} {params}: {np.mean(figures):.3f} dB ({each})")
        return float(np.mean(figures))

    return evaluate


def cut(dataset: Dataset, part: Selection) -> Item:
    """A selection of the dataset, whole pixels only."""
    z = dataset.record(part.label).shape[1]
    slices = [int((i + 0.5) * z / part.num_slices) for i in range(part.num_slices)]
    item = shrunk(select(dataset.read(part.label), slices=slices), part.shrink)
    if part.size is None:
        return item
    (h, w), (height, width) = item.pixels.shape[2:], part.size
    return select(item, crop=((h - height) // 2, (w - width) // 2, height, width))


def shrunk(item: Item, factor: int) -> Item:
    """The means of factor x factor squares, rounded where the source holds integers."""
    if factor == 1:
        return item
    c, z, h, w = item.pixels.shape
    h, w = h // factor, w // factor
    squares = item.pixels[..., : h * factor, : w * factor].reshape(c, z, h, factor, w, factor)
    means = squares.mean(axis=(3, 5), dtype=np.float64)
    if np.issubdtype(item.pixels.dtype, np.integer):
        means = np.rint(means)
    pixels = means.astype(item.pixels.dtype)
    spacing = item.record.spacing_mm
    if spacing is not None:
        spacing = (spacing[0], spacing[1] * factor, spacing[2] * factor)
    return Item(pixels, replace(item.record, shape=pixels.shape, spacing_mm=spacing))


def case_of(task: Task, item: Item) -> Case:
    """An item measured as the task says, with seed 0."""
    domain = load_domain(task.domain)
    measurement = domain.simulate(item, task, 0)
    problem = domain.problem(measurement)
    truth = domain.as_measured(item, measurement.record)
    return Case(domain, truth, measurement, problem, hole_of(problem))


def frozen_path(task: str) -> Path:
    """Where a task's frozen parameters lie."""
    return config_path("baselines", f"{task}.yaml")


def freeze(task: Task, found: Mapping[str, Tuned], path: Path) -> None:
    """Write parameters and figures; methods that were not tuned now keep theirs."""
    old = yaml.safe_load(path.read_text()) if path.is_file() else {}
    methods = dict(old.get("methods", {}))
    figures = dict(old.get("validation_psnr_db", {}))
    for name, tuned in found.items():
        methods[name] = tuned.params
        figures[name] = round(tuned.psnr_db, 2)
    order = list(itertools.chain(task.baselines, sorted(set(methods) - set(task.baselines))))
    values = {
        "methods": {name: methods[name] for name in order if name in methods},
        "validation_psnr_db": {name: figures[name] for name in order if name in figures},
    }
    items = ", ".join(f"{part.label} ({part.num_slices})" for part in VALIDATION[task.domain])
    where = " in the hole" if task.region == "hole" else ""
    path.write_text(
        "# Parameters of the classical methods, frozen. Made by\n"
        f"#   python -m flows.tune --task {task.name} --data DATASET\n"
        f"# on validation items (slices): {items};\n"
        f"# validation_psnr_db is their mean PSNR{where}, seed 0.\n"
        + yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    )


@click.command(help=__doc__)
@click.option("--task", "names", multiple=True, required=True, help="Task; may be repeated.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Dataset of samples.")
@click.option("--method", "methods", multiple=True, help="Only these methods.")
def main(names: Sequence[str], data: Path, methods: Sequence[str]) -> None:
    """Tune and freeze."""
    try:
        dataset = Dataset(data)
        for name in names:
            task = load_task(name)
            found = tune(task, dataset, methods or None, click.echo)
            freeze(task, found, frozen_path(name))
    except BadInputError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
