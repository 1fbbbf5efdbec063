"""A page of made-up results on real-looking pictures: two windows, a hole, three and two images."""

from __future__ import annotations

import numpy as np

from domains.base import ItemRecord
from domains.metrics import psnr, to_unit
from flows.config import load_task
from flows.report.cases import Case, View, choose
from flows.report.page import ModelFacts, Page, TaskStory
from flows.report.rows import summarise

HARM = "<script>document.documentElement.dataset.harm = 1</script>"
ERRORS = {"covprox": 0.02, "diffpir": 0.03, "kriging": 0.06, "tv": 0.05, "fbp": 0.12, "telea": 0.1}


def scan(number: int) -> np.ndarray:
    """A disc of tissue with air in it, (1 48 48) in HU."""
    rows, columns = np.mgrid[-1:1:48j, -1:1:48j]
    radius = np.hypot(rows, columns)
    hu = np.where(radius < 0.8, 40.0, -1000.0)
    hu[np.hypot(rows - 0.1 * number, columns + 0.2) < 0.25] = -600.0
    return hu[None]


def photo(number: int) -> np.ndarray:
    """Stripes, (3 40 64) on 0..255."""
    rows, columns = np.mgrid[0:40, 0:64]
    bands = [127 + 100 * np.sin((rows * i + columns) / (4.0 + number)) for i in range(3)]
    return np.round(np.stack(bands))


def story(task_name: str, images: list[np.ndarray], units: str, scale: tuple[float, float]):
    """A task with every method on every image, errors as ERRORS says."""
    task = load_task(task_name)
    rng = np.random.default_rng(1)
    item = f"item-{task.domain}"
    methods = ["covprox", "diffpir", "kriging", "tv", "fbp" if task.domain == "ct" else "telea"]
    rows, restored = [], {}
    for z, truth in enumerate(images):
        for method in methods:
            # The error of each method differs from image to image, so gains do too.
            size = ERRORS[method] * (1 + (0.3 * z if method == "covprox" else 0.0)) / scale[1]
            pixels = truth + size * rng.standard_normal(truth.shape)
            restored[method, z] = pixels
            figure = psnr(to_unit(truth, *scale), to_unit(pixels, *scale))
            rows.append(row(task, item, z, method, figure))
    (summary,) = summarise(rows)
    shape = (len(images[0]), len(images), *images[0].shape[1:])
    record = ItemRecord(item, task.domain, shape, "float32", units, "00", "synthetic")
    shown = (summary.best_classical.method, "covprox")
    cases = [
        Case(
            item=item,
            slice=z,
            why=why,
            record=record.slices(z, z + 1),
            scale=scale,
            truth=images[z],
            view=view(images[z], restored, z, task.operator),
            restored={method: restored[method, z] for method in shown},
            rows={r["method"]: r for r in rows if r["slice"] == z},
        )
        for (_, z), why in choose(summary, rows)
    ]
    return TaskStory(task, summary, rows, cases)


def row(task, item, z, method, figure):
    hole = task.region == "hole"
    return {
        "domain": task.domain, "task": task.name, "item": item, "slice": z, "group": item,
        "region": task.region, "method": method, "model_digest": "ab" * 32,
        "nfe": 12 if method in {"covprox", "diffpir"} else 0, "num_operator_calls": 30,
        "seconds": 1.25, "peak_bytes": 5 * 2**28, "psnr": figure, "ssim": 0.9,
        "psnr_hole": figure - 3 if hole else None, "psnr_body": None if hole else figure - 1,
        "ssim_body": None if hole else 0.8,
        "edge_error": 0.01, "residual": 1.0,
    }  # fmt: skip


def view(truth, restored, z, operator):
    if operator == "mask":
        missing = np.zeros(truth.shape[1:], bool)
        missing[10:20, 10:30] = True
        return View("known pixels", truth, missing)
    return View("FBP", restored["fbp", z])


def synthetic_page() -> Page:
    """Five CT slices of which three are shown, and two photographs with a hole."""
    return Page(
        title="A page of tests & checks",
        stories=[
            story("ct-sparse60", [scan(i) for i in range(5)], "HU", (-1000.0, 1 / 3000)),
            story("inpaint-strokes", [photo(i) for i in range(2)], "intensity", (0.0, 1 / 255)),
        ],
        models=[ModelFacts("tiny", "cd" * 32, "3", f"# Card\n\n{HARM}\n\n![x](y.png)", {"a": "b"})],
        facts=[("Seed", "0"), ("Odd", HARM)],
    )
