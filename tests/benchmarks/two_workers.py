"""Two Ray workers against one with the same global batch: are the loss curves the same?

    python -m tests.benchmarks.two_workers --data DATASET

One network of the starter's kind (narrower, that it takes minutes) is trained by `sashiko train`'s
own function three times: in this process, by one Ray worker, and by two, which draw half of every
batch each. Patches, noise levels and noise are keyed by the sample's number, gradients are
averaged: what differs is the order of float32 sums, which training magnifies step by step.
results/two_workers.json holds the curves and the largest relative differences.
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
TOLERANCE = 1e-3
"""Of the loss, relative, at every step: stated in the README."""
RUNS = {
    "inline": ComputeSettings(executor="inline"),
    "one worker": ComputeSettings(executor="ray", num_workers=1, num_gpus_per_worker=0),
    "two workers": ComputeSettings(executor="ray", num_workers=2, num_gpus_per_worker=0),
}


def settings_of(
    data: Path, num_steps: int, output: Path, compute: ComputeSettings
) -> TrainSettings:
    """The tiny configuration's network and rates, every step logged."""
    settings = read_settings(TrainSettings, config_path("train-tiny.yaml"), [])
    return settings.model_copy(
        update={
            "data": [data], "output": output, "num_steps": num_steps, "log_every_steps": 1,
            "batch_size": 8, "picture_every_steps": 10**6, "dtype": "float32", "num_threads": 1,
            "calibration_items": [], "warmup_steps": 10, "compute": compute,
        }
    )  # fmt: skip


def curve_of(run: Path) -> list[float]:
    """The loss of every step."""
    readings = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [reading["loss"] for reading in sorted(readings, key=lambda r: r["step"])]


def difference(one: list[float], other: list[float]) -> float:
    """The largest difference of two curves at a step, relative to the first."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--steps", default=100, show_default=True)
def main(data: Path, steps: int) -> None:
    """Train three times, compare, and keep the curves."""
    curves: dict[str, list[float]] = {}
    for name, compute in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            settings = settings_of(data.resolve(), steps, Path(folder), compute)
            train(settings)
            curves[name] = curve_of(Path(folder) / settings.name)
    differences = {
        "one worker, inline": difference(curves["inline"], curves["one worker"]),
        "two workers, one worker": difference(curves["one worker"], curves["two workers"]),
    }
    found: dict[str, Any] = {
        "steps": steps,
        "batch_size": settings.batch_size,
        "patch_size": settings.patch_size,
        "dtype": settings.dtype,
        "tolerance": TOLERANCE,
        "largest_relative_difference": {k: float(f"{v:.3g}") for k, v in differences.items()},
        "within_tolerance": max(differences.values()) <= TOLERANCE,
        "loss": {name: [round(loss, 6) for loss in curve] for name, curve in curves.items()},
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(json.dumps({k: v for k, v in found.items() if k != "loss"}, indent=1) + "\n")


if __name__ == "__main__":
    main()
