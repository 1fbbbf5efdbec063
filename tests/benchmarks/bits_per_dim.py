"""Bits a dimension of a model on test images, and what the learned density saves.

    python -m tests.benchmarks.bits_per_dim --data DATASET

DATASET holds the sample items (`sashiko samples`). Writes tests/benchmarks/results/bits.json: rows
of kind "bits" (a crop each, PNG's bits beside them) and of kind "variance" (a condition each).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import torch

from diffusion_core.likelihood import Bound
from diffusion_core.model import Model
from flows.bits import Crop, bits_per_dim, crop_of, fit, variance_reduction
from flows.registry import resolve_model
from flows.store import Dataset

NUM_SEEDS = 4
"""Of the noise: a bound is their mean, its standard error their spread."""
RESULTS = Path(__file__).parent / "results" / "bits.json"
# Of the validation split; each list serves one condition.
FIT = {
    "ct": ["torso"],
    "mri": ["stroke-flair-b"],
    "city": ["bikes-2", "berlin-01", "berlin-02"],
    "city-grey": ["pan3"],
}
TEST = {"ct": ["lung2"], "mri": ["brain2"], "city": ["bikes-3", "china"], "city-grey": ["pan2"]}


def crops(
    dataset: Dataset, names: list[str], slices: int, side: int
) -> list[tuple[str, int, Crop]]:
    """Evenly spread slices of each item: (item, slice, crop)."""
    found = []
    for name in names:
        item = dataset.read(name)
        depth = item.record.shape[1]
        chosen = sorted({(2 * i + 1) * depth // (2 * slices) for i in range(slices)})
        found += [(name, z, crop_of(item, z, side)) for z in chosen]
    return found


def png_bits(crop: Crop) -> float:
    """What PNG needs for the same pixels, bits a dimension."""
    steps = torch.round((crop.x0[0] + 1) / crop.bin_width).numpy()
    steps -= steps.min()
    kind = np.uint8 if steps.max() < 256 else np.uint16
    found, data = cv2.imencode(".png", steps.astype(kind).transpose(1, 2, 0))
    return 8.0 * len(data) / crop.x0.numel() if found else float("nan")


def bits_row(model: Model, name: str, z: int, crop: Crop, fitted: Any) -> dict[str, Any]:
    """The bound of one crop as a row."""
    start = time.perf_counter()
    bounds = bits_per_dim(model, crop, fitted, seeds=range(NUM_SEEDS), name=f"{name}-{z}")
    low, high = fitted.sigma_range

    def bits(part: Callable[[Bound], torch.Tensor]) -> float:
        return round(float(np.mean([float(b.in_bits(part(b))[0]) for b in bounds])), 4)

    spread = np.std([float(b.bits_per_dim[0]) for b in bounds], ddof=1) / math.sqrt(NUM_SEEDS)
    return {
        "kind": "bits",
        "condition": crop.condition,
        "item": name,
        "slice": z,
        "bits_per_dim": bits(lambda b: b.nats),
        "standard_error": round(float(spread), 4),
        "prior": bits(lambda b: b.prior),
        "diffusion": bits(lambda b: b.diffusion),
        "reconstruction": bits(lambda b: b.reconstruction),
        "quadrature_error": bits(lambda b: b.error),
        "cost_of_33_steps": bits(_cost_of_steps),
        "png_bits_per_dim": round(png_bits(crop), 4),
        "bin": crop.bin_name,
        "sigma_min": round(low, 5),
        "sigma_max": round(high, 5),
        "decoder_std": round(fitted.ends.decoder_std, 6),
        "model_digest": model.digest,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _cost_of_steps(bound: Bound) -> torch.Tensor:
    assert bound.diffusion_in_steps is not None
    return bound.diffusion_in_steps - bound.diffusion


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--model", "ref", default="starter", show_default=True)
@click.option("--side", default=128, show_default=True)
@click.option("--slices", default=2, show_default=True, help="Of each item.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS)
def main(data: Path, ref: str, side: int, slices: int, output: Path) -> None:
    """Measure and write."""
    dataset, model = Dataset(data), Model.load(resolve_model(ref).path)
    rows: list[dict[str, Any]] = []
    for condition, names in TEST.items():
        fitted = fit(model, [crop for _, _, crop in crops(dataset, FIT[condition], slices, side)])
        chosen = crops(dataset, names, slices, side)
        for name, z, crop in chosen:
            rows.append(bits_row(model, name, z, crop, fitted))
            click.echo({k: rows[-1][k] for k in ("item", "slice", "bits_per_dim")})
        found = variance_reduction(model, [crop for _, _, crop in chosen], fitted)
        least = min(found["log-uniform"], found["log-normal"])
        reduction = round(1 - found["learned"] / least, 4)
        rows.append({"kind": "variance", "condition": condition, **found, "reduction": reduction})
        click.echo({k: rows[-1][k] for k in ("condition", "reduction")})
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
