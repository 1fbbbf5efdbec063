"""Ours on the validation images that the classical baselines are tuned on, beside their figures.

    python -m tests.benchmarks.validation --data DATASET --task T [--task T ...]

DATASET holds the sample items, as for `python -m flows.tune`, whose cuts, seeds and measurements
these are. Each is restored as `sashiko evaluate` would: by the task's solver with the starter's
settings. For choosing, and for a first look: the figures that count are those of test images
(restoration.py).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
import yaml

from diffusion_core.model import Model, solver_settings
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.posterior import make_solver
from domains.metrics import mean_score, score
from flows.config import config_path, load_task
from flows.engine.methods import resolve_method
from flows.store import Dataset
from flows.tune import VALIDATION, Case, case_of, cut, frozen_path


def restored_db(case: Case, model: Model, calibrated: dict[str, Any], region: str) -> float:
    """PSNR in dB of what ours makes of a case, of the hole where that counts."""
    measurement, problem = case.measurement, case.problem
    entry: Any = SimpleNamespace(
        task=measurement.task,
        operator=measurement.operator,
        noise=measurement.noise,
        record=measurement.record,
    )
    way = resolve_method(None, entry, calibrated)
    solver = make_solver(way.name, model.prior(problem.condition), way.options)
    sigmas = power_sigmas(way.num_levels, way.sigma_max, way.sigma_min, way.rho)
    draws = KeyedDraws(0, case.truth.record.source_digest)
    denoise = model.denoiser(problem.condition)
    with torch.no_grad():
        x = solver(denoise, problem.operator, problem.y, problem.noise, sigmas, draws).x
    pixels = problem.to_source(x).numpy().swapaxes(0, 1)
    figures = mean_score(score(case.domain, case.truth, pixels, region=case.hole))
    return figures["psnr_hole" if region == "hole" else "psnr"]


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path))
@click.option("--task", "tasks", required=True, multiple=True)
def main(data: Path, tasks: tuple[str, ...]) -> None:
    """Restore and print."""
    path = config_path("models", "starter")
    model, calibrated = Model.load(path, dtype=torch.float32), dict(solver_settings(path))
    for name in tasks:
        task = load_task(name)
        cases = [case_of(task, cut(Dataset(data), part)) for part in VALIDATION[task.domain]]
        ours = [restored_db(case, model, calibrated, task.region) for case in cases]
        each = " ".join(f"{figure:.2f}" for figure in ours)
        click.echo(f"{name}: ours {np.mean(ours):.2f} ({each})")
        frozen = frozen_path(name)
        if frozen.is_file():
            told = yaml.safe_load(frozen.read_text())["validation_psnr_db"]
            click.echo("  " + ", ".join(f"{k} {v:.2f}" for k, v in told.items()))


if __name__ == "__main__":
    main()
