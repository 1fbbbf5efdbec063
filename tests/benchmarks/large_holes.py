"""Large holes: ours with and without its coarse scales, against biharmonic, Telea and kriging.

    python -m tests.benchmarks.large_holes --data DATASET [--on validation] [--pictures FOLDER]

DATASET holds the sample items of the split (`sashiko samples`). Cases are windows of images with a
square, a half, a removed vehicle, a wedge without data or clouds missing, and nothing wrong with
the rest. PSNR is that of the hole alone, on [0, 1]; `boundary` is domains.metrics.boundary_ratio
(1: no step at the border is seen; the truth has its own). Starter model in float32, the method's
own settings. Rows go to results/large_holes.json; --pictures keeps a strip a case: what is given,
biharmonic, Telea, ours (mean), a sample of ours, the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from domains.base import Item
from domains.metrics import boundary_ratio, psnr, to_unit
from domains.registry import load_domain
from flows.config import MethodSettings, config_path
from flows.engine.block import Restorer
from flows.engine.plan import make_plan
from flows.store import Dataset, MeasurementWriter
from flows.tune import Selection, cut
from tests.benchmarks.rows import Rows

RESULTS = Path(__file__).parent / "results" / "large_holes.json"
Array = np.ndarray[Any, Any]
Hole = Callable[[int, int], Array]


def box(height: int, width: int, top: float = 0.5, left: float = 0.5) -> Hole:
    """A rectangle whose centre lies at these shares of the image."""

    def make(h: int, w: int) -> Array:
        missing = np.zeros((h, w), bool)
        y, x = round(top * h) - height // 2, round(left * w) - width // 2
        missing[max(y, 0) : y + height, max(x, 0) : x + width] = True
        return missing

    return make


def half(h: int, w: int) -> Array:
    """The right half."""
    return np.broadcast_to(np.arange(w) >= w // 2, (h, w)).copy()


def wedge(h: int, w: int) -> Array:
    """A corner beyond a slanted edge, as where a scene was turned upright."""
    rows, columns = np.ogrid[:h, :w]
    return np.asarray(columns > 0.35 * w + 0.55 * rows * w / h)


def clouds(h: int, w: int) -> Array:
    """Three clouds, each of some discs."""
    rows, columns = np.ogrid[:h, :w]
    missing = np.zeros((h, w), bool)
    side = min(h, w)
    discs = (
        *((0.30, 0.30, 0.20), (0.36, 0.48, 0.17), (0.24, 0.44, 0.12)),
        *((0.75, 0.72, 0.22), (0.68, 0.88, 0.14)),
        (0.80, 0.18, 0.07),
    )
    for y, x, radius in discs:
        missing |= (rows - y * h) ** 2 + (columns - x * w) ** 2 < (radius * side) ** 2
    return missing


@dataclass(frozen=True)
class Case:
    """A window of an item, and what of it is missing."""

    part: Selection
    hole: Hole


_SQUARE = (256, 256)
CASES: Mapping[str, Mapping[str, Case]] = {
    "test": {
        "square-china": Case(Selection("china", size=_SQUARE), box(128, 128)),
        "square-atlanta": Case(Selection("sample-geotiff", size=_SQUARE), box(128, 128)),
        "square-rotterdam": Case(Selection("pan2", size=_SQUARE), box(128, 128)),
        "half-china": Case(Selection("china", size=_SQUARE), half),
        "vehicle-bikes": Case(Selection("bikes-3", size=(256, 320)), box(130, 150, 0.6, 0.5)),
        "wedge-atlanta": Case(Selection("sample-geotiff", size=_SQUARE), wedge),
        "clouds-rotterdam": Case(Selection("pan2", size=(320, 320)), clouds),
    },
    "validation": {
        "square-berlin-01": Case(Selection("berlin-01", shrink=6, size=_SQUARE), box(128, 128)),
        "square-berlin-02": Case(Selection("berlin-02", shrink=6, size=_SQUARE), box(128, 128)),
        "square-berlin-03": Case(Selection("berlin-03", shrink=6, size=_SQUARE), box(128, 128)),
        "half-berlin-03": Case(Selection("berlin-03", shrink=8, size=_SQUARE), half),
        "vehicle-bikes": Case(Selection("bikes-2", size=(256, 320)), box(130, 150, 0.6, 0.5)),
        "wedge-rotterdam": Case(Selection("pan3", size=_SQUARE), wedge),
        "clouds-rotterdam": Case(Selection("pan3", size=(320, 320)), clouds),
    },
}
METHODS: Mapping[str, MethodSettings] = {
    "biharmonic": MethodSettings(name="biharmonic", kind="baseline"),
    "telea": MethodSettings(name="telea", kind="baseline"),
    "kriging": MethodSettings(name="kriging"),
    "covprox-fine-alone": MethodSettings(name="covprox", options={"large_holes": False}),
    "covprox": MethodSettings(name="covprox"),
    "covprox-sample": MethodSettings(name="covprox", options={"mode": "sample"}),
}
SHOWN = ("biharmonic", "telea", "covprox", "covprox-sample")


def restored(item: Item, missing: Array, methods: Mapping[str, MethodSettings]) -> dict[str, Array]:
    """The item by each method, (c h w) in source units, by way of the engine."""
    domain = load_domain(item.record.domain)
    measured = domain.given(item, mask=missing, kernel=None, scale=None, sigma_y=0.0)
    found: dict[str, Array] = {}
    with TemporaryDirectory() as folder:
        store = Path(folder, "m.zarr")
        with MeasurementWriter(store) as writer:
            writer.add(measured)
        worker = Restorer()
        for name, method in methods.items():
            asked = MethodSettings(**method.model_dump(include=method.model_fields_set))
            model = config_path("models", "starter")
            plan = make_plan(store, Path(folder, "out"), asked, model, dtype="float32")
            [planned] = plan.items
            [block] = planned.blocks()
            measurement = worker.read(store, planned, block)
            overview = worker.overview(store, planned, block)
            found[name] = worker.compute(measurement, planned, block, overview)[0][:, 0]
    return found


def figures(item: Item, image: Array, missing: Array) -> dict[str, float]:
    """PSNR of the hole, and the step at its border."""
    offset, gain = load_domain(item.record.domain).unit_scale(item.pixels, item.record)
    clean, shown = (to_unit(x, offset, gain) for x in (item.pixels[:, 0], image))
    return {
        "psnr_hole": round(psnr(clean, shown, missing), 3),
        "boundary": round(boundary_ratio(shown, missing), 3),
        "boundary_of_truth": round(boundary_ratio(clean, missing), 3),
    }


def strip(item: Item, missing: Array, found: Mapping[str, Array]) -> Array:
    """What is given, by some methods, and the truth, side by side: (h w 3) bytes."""
    offset, gain = load_domain(item.record.domain).unit_scale(item.pixels, item.record)
    truth = item.pixels[:, 0].astype(np.float64)
    given = np.where(missing, 1 / gain + offset, truth)  # white
    panels = [given, *(found[name] for name in SHOWN), truth]
    shown = [np.rint(255 * to_unit(panel, offset, gain)).astype(np.uint8) for panel in panels]
    rgb = [np.broadcast_to(panel, (3, *panel.shape[1:])) for panel in shown]
    gap = np.full((3, rgb[0].shape[1], 4), 255, np.uint8)
    parts = [part for panel in rgb for part in (panel, gap)][:-1]
    return np.concatenate(parts, axis=2).transpose(1, 2, 0)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: hole PSNR and step at the border, a line a case."""
    names = [name for name in METHODS if any(r["method"] == name for r in rows)]
    lines = ["| case | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    by_case: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row["item"], {})[row["method"]] = row
    for case, found in by_case.items():
        cells = [f"{r['psnr_hole']:.2f}, {r['boundary']:.2f}" for r in map(found.get, names) if r]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    means = [
        f"{np.mean([f[n]['psnr_hole'] for f in by_case.values()]):.2f}, "
        f"{np.mean([f[n]['boundary'] for f in by_case.values()]):.2f}"
        for n in names
    ]
    return "\n".join([*lines, "| mean | " + " | ".join(means) + " |"])


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--on", default="test", type=click.Choice(list(CASES)), show_default=True)
@click.option("--case", "cases", multiple=True, help="Only these.")
@click.option("--pictures", type=click.Path(path_type=Path))
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def main(data: Path, on: str, cases: tuple[str, ...], pictures: Path | None, output: Path) -> None:
    """Measure and print."""
    from PIL import Image

    dataset, rows = Dataset(data), Rows(output)
    for name in cases or CASES[on]:
        case = CASES[on][name]
        item = cut(dataset, case.part)
        missing = case.hole(*item.pixels.shape[2:])
        found = restored(item, missing, METHODS)
        for method, image in found.items():
            rows.put({"task": on, "item": name, "method": method, **figures(item, image, missing)})
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            Image.fromarray(strip(item, missing, found)).save(pictures / f"{name}.jpg", quality=85)
        click.echo(table([row for row in rows if row["task"] == on]))


if __name__ == "__main__":
    main()
