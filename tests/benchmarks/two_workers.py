"""Two Ray workers against one with the same global batch: are the loss curves the same?

    python -m tests.benchmarks.two_workers --data DATASET

One network of the starter's kind (narrower, that it takes minutes) is trained by `sashiko train`'s
own function four times: in this process, by one Ray worker, by two, which draw half of every batch
each, and in this process again with the gradients of two halves added. Patches, noise levels and
noise are keyed by the sample's number, gradients are averaged: what differs is the order of sums,
which training magnifies step by step, and Muon's bfloat16 more. The last run shows how far that
alone goes. results/two_workers.json holds the curves and the largest differences; they are
absolute, since this loss may pass through 0.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from flows.api_train import train
from flows.config import ComputeSettings, TrainSettings, config_path, read_settings

RESULTS = Path(__file__).parent / "results" / "two_workers.json"
TOLERANCE = 3e-3
"""Of the loss at every step of a hundred, in which it falls from 1.2 to .3."""
RUNS = {
    "inline": ComputeSettings(executor="inline"),
    "one worker": ComputeSettings(executor="ray", num_workers=1, num_gpus_per_worker=0),
    "two workers": ComputeSettings(executor="ray", num_workers=2, num_gpus_per_worker=0),
    "halves added": ComputeSettings(executor="inline"),
}
BATCH = 8


def settings_of(data: Path, num_steps: int, output: Path, run: str) -> TrainSettings:
    """The tiny configuration's network and rates, every step logged."""
    settings = read_settings(TrainSettings, config_path("train-tiny.yaml"), [])
    return settings.model_copy(
        update={
            "data": [data], "output": output, "num_steps": num_steps, "log_every_steps": 1,
            "batch_size": BATCH, "micro_batch": BATCH // 2 if run == "halves added" else 0,
            "compute": RUNS[run], "picture_every_steps": 10**6, "dtype": "float32",
            "num_threads": 1, "calibration_items": [], "warmup_steps": 10,
        }
    )  # fmt: skip


def curve_of(run: Path) -> list[float]:
    """The loss of every step."""
    readings = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [reading["loss"] for reading in sorted(readings, key=lambda r: r["step"])]


def difference(one: list[float], other: list[float]) -> float:
    """The largest difference of two curves at a step."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def comparison(curves: dict[str, list[float]]) -> dict[str, Any]:
    """Differences of the curves, and whether they are within the tolerance."""
    pairs = [("one worker", "inline"), ("two workers", "one worker"), ("halves added", "inline")]
    found = {f"{a}, {b}": difference(curves[a], curves[b]) for a, b in pairs}
    return {
        "tolerance": TOLERANCE,
        "largest_difference": {name: float(f"{value:.3g}") for name, value in found.items()},
        "within_tolerance": found["two workers, one worker"] <= TOLERANCE,
        "loss": {name: [round(loss, 6) for loss in curve] for name, curve in curves.items()},
    }


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--steps", default=100, show_default=True)
def main(data: Path, steps: int) -> None:
    """Train four times, compare, and keep the curves."""
    curves: dict[str, list[float]] = {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            settings = settings_of(data.resolve(), steps, Path(folder), name)
            train(settings)
            curves[name] = curve_of(Path(folder) / settings.name)
    found = {
        "steps": steps,
        "batch_size": settings.batch_size,
        "patch_size": settings.patch_size,
        "dtype": settings.dtype,
        **comparison(curves),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(json.dumps({k: v for k, v in found.items() if k != "loss"}, indent=1) + "\n")


if __name__ == "__main__":
    main()
