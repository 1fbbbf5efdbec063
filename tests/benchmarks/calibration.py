"""What calibration is worth on test images, and whether samples are as far apart as they are wrong.

    python -m tests.benchmarks.calibration --data TEST.zarr --task sr-x4 ...

TEST.zarr holds the sample items of the test split (`sashiko samples`). Settings come from three
places: the prototype's fixed ones, the task's file, and the model (`sashiko calibrate`). Rows go to
tests/benchmarks/results/calibration.json:

    mean mode     psnr_db by settings, at 8 and at 12 evaluations: one row an image
    sample mode   M samples at 8 and at 20: V/B over the unknown pixels, correlation
                  of the logarithms of variance and error of 16^2 blocks, PSNR of one sample and of
                  the mean of M; rows of one image, and the pooled row of the task (item "pooled")
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from diffusion_core.model import Model, solver_settings
from diffusion_core.posterior.calibration import RollOut
from diffusion_core.uncertainty import Spread
from flows.calibration import Bench, log_correlation_of, prototype, psnr_of, spread_of
from flows.config import MethodSettings, config_path, load_method, load_task
from flows.engine.methods import calibrated_method
from flows.store import Dataset
from flows.tune import Selection, case_of, cut

RESULTS = Path(__file__).parent / "results" / "calibration.json"
NUM_SAMPLES = 8
CHAINS = ("mean:8", "mean:12", "sample:8", "sample:20")
TEST: Mapping[str, Sequence[Selection]] = {
    "ct": (Selection("lung2", 4, shrink=2),),
    "mri": (Selection("brain2", 4),),
    "city": (
        Selection("china", size=(128, 128)),
        Selection("sample-geotiff", size=(128, 128)),
        Selection("pan2", size=(128, 128)),
        Selection("bikes-3", 3, size=(128, 128)),
    ),
    "demosaic": (
        Selection("china", size=(128, 128)),
        Selection("bikes-3", 3, size=(128, 128)),
    ),
    "ct-lowdose": (Selection("lung2", 4, shrink=4),),
}
"""Images by domain, or by task where some of the domain's have no meaning, or cost too much."""
SOURCES = ("fixed", "task file", "model")

Row = dict[str, Any]


def measure(
    model: Model,
    dataset: Dataset,
    task: str,
    chains: Sequence[tuple[str, int]],
    sources: Sequence[str],
) -> Iterator[Row]:
    """Rows of a task, for (mode, number of evaluations) and settings from `sources`."""
    protocol, own = load_task(task), load_method(task)
    items = [cut(dataset, part) for part in TEST.get(task, TEST[protocol.domain])]
    cases = [case_of(protocol, i.slices(z, z + 1)) for i in items for z in range(i.pixels.shape[1])]
    names = [f"{case.truth.record.item_id}/{_slice(case.truth.record.meta)}" for case in cases]
    bench = Bench(model, cases, protocol.region)
    fits = solver_settings(model.path).get("tasks", {}).get(task, {})
    for mode, count in chains:
        for source, method in _settings(own, fits, mode, count):
            if source not in sources:
                continue
            if mode == "mean":
                for name, rollout in zip(names, bench.run(method), strict=True):
                    figures = {"psnr_db": round(psnr_of(rollout), 3)}
                    yield _row(task, name, source, mode, count, figures)
            elif source != "task file":  # that was tuned for the mean mode
                rollouts = bench.run(method, NUM_SAMPLES)
                yield from _sample_rows(task, names, source, count, rollouts)


def _settings(
    own: MethodSettings, fits: Mapping[str, Any], mode: str, count: int
) -> Iterator[tuple[str, MethodSettings]]:
    yield "fixed", prototype(own, count, mode)
    yield "task file", own.model_copy(update={"num_levels": count})
    fitted = calibrated_method(own, fits, mode, count)
    if fitted is not own:
        yield "model", fitted


def _sample_rows(
    task: str, names: Sequence[str], source: str, count: int, rollouts: Sequence[RollOut]
) -> Iterator[Row]:
    parts = [_sample_figures(rollout) for rollout in rollouts]
    for name, figures in zip(names, parts, strict=True):
        yield _row(task, name, source, "sample", count, figures)
    ratios = [figures["v_over_b"] for figures in parts]
    pooled = {
        "v_over_b": round(sum((spread_of(r) for r in rollouts), Spread()).ratio, 3),
        "v_over_b_std_over_items": round(float(np.std(ratios)), 3),
    }
    pooled["log_correlation"] = round(log_correlation_of(rollouts), 3)
    pooled["log_correlation_mean_over_items"] = round(
        float(np.mean([figures["log_correlation"] for figures in parts])), 3
    )
    for name in ("psnr_one_sample_db", "psnr_mean_of_samples_db"):
        pooled[name] = round(float(np.mean([figures[name] for figures in parts])), 3)
    yield _row(task, "pooled", source, "sample", count, pooled)


def _sample_figures(rollout: RollOut) -> dict[str, float]:
    estimates = [chain.m for chain in rollout.chains]
    mean = torch.stack(estimates).mean(dim=0)
    decibel = -10.0 / np.log(10.0)
    figures = {
        "v_over_b": spread_of(rollout).ratio,
        "log_correlation": log_correlation_of([rollout]),
        "psnr_one_sample_db": decibel * rollout.log_error(estimates),
        "psnr_mean_of_samples_db": decibel * rollout.log_error([mean]),
    }
    return {name: round(value, 3) for name, value in figures.items()}


def _row(
    task: str, item: str, source: str, mode: str, count: int, figures: Mapping[str, float]
) -> Row:
    num_samples = NUM_SAMPLES if mode == "sample" else 1
    return {
        "task": task,
        "item": item,
        "settings": source,
        "mode": mode,
        "nfe": count,
        "num_samples": num_samples,
        **figures,
    }


def _slice(meta: Mapping[str, Any]) -> int:
    return int((meta.get("slices") or [0])[0])


def _replaced(
    row: Row, task: str, chains: Sequence[tuple[str, int]], sources: Sequence[str]
) -> bool:
    same_chain = row["task"] == task and (row["mode"], row["nfe"]) in chains
    return same_chain and row["settings"] in sources


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Test items.")
@click.option("--task", "tasks", multiple=True, required=True, help="Several can be given.")
@click.option("--chain", "chains", multiple=True, default=CHAINS, show_default=True)
@click.option("--source", "sources", multiple=True, type=click.Choice(SOURCES), default=SOURCES)
@click.option("--model", default=None, type=click.Path(path_type=Path), help="[default: starter]")
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def main(
    data: Path,
    tasks: Sequence[str],
    chains: Sequence[str],
    sources: Sequence[str],
    model: Path | None,
    output: Path,
) -> None:
    """Measure tasks; rows replace older ones of the same task, mode, evaluations and settings."""
    wanted = [(mode, int(count)) for mode, _, count in (c.partition(":") for c in chains)]
    loaded = Model.load(model or config_path("models", "starter"), dtype=torch.bfloat16)
    dataset = Dataset(data)
    for task in tasks:
        with torch.no_grad():
            rows = list(measure(loaded, dataset, task, wanted, sources))
        old = json.loads(output.read_text())["rows"] if output.is_file() else []
        kept = [row for row in old if not _replaced(row, task, wanted, sources)]
        output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"model_digest": loaded.digest, "rows": kept + rows}
        output.write_text(json.dumps(facts, indent=1) + "\n")
        for row in rows:
            click.echo(json.dumps(row))


if __name__ == "__main__":
    main()
