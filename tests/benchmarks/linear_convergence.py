"""How fast the linear solves of every shipped task converge: relative residuals by CG steps.

    python -m tests.benchmarks.linear_convergence [--size 256] [--sigma 0.2]

Each task measures a synthetic image of its domain; the system is the one that CovProx solves at
noise level sigma with the starter's covariance (inflation 4), S from pixel to pixel. `steps` is 0
where the solve is a closed form. `plain` is CG on the dual system without a preconditioner, for
comparison. Printed, and written to tests/benchmarks/results/linear_convergence.json.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy import ndimage

from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.linear import Accuracy, data_step
from diffusion_core.posterior.linear.base import DualStep, Update
from domains.base import Item, ItemRecord, Problem
from domains.registry import load_domain
from flows.config import config_path, load_task, task_names

STEPS = (5, 10, 20, 40)
INFLATION = 4.0
RESULTS = Path(__file__).parent / "results" / "linear_convergence.json"


def picture(domain: str, size: int) -> Item:
    """Random fields with edges; in CT and MRI inside a round body, in the domain's own units."""
    rng = np.random.default_rng(zlib.crc32(domain.encode()))
    channels = 3 if domain == "city" else 1
    field = ndimage.gaussian_filter(rng.standard_normal((channels, 1, size, size)), (0, 0, 4, 4))
    field = (field + 0.02 * (field > 0)) / field.std()
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    body = np.hypot(x, y) < 0.85
    pixels = {
        "city": np.clip(128 + 45 * field, 0, 255),
        "ct": np.where(body, 40 + 150 * field, -1000),
        "mri": np.where(body, 500 + 120 * field, 0),
    }[domain]
    dtype = "int16" if domain == "ct" else "uint8" if domain == "city" else "uint16"
    units = "HU" if domain == "ct" else "intensity"
    record = ItemRecord(
        item_id="synthetic",
        domain=domain,
        shape=pixels.shape,
        dtype=dtype,
        units=units,
        source_digest="0" * 64,
        source_format="nrrd",
        spacing_mm=(5.0, 0.7, 0.7),
    )
    return Item(pixels.round().astype(dtype), record)


def convergence(problem: Problem, truth: torch.Tensor, sigma: float) -> dict[str, Any]:
    """Relative residuals after STEPS, of the task's own solve and of plain dual CG."""
    name = f"covariance-{problem.condition}.safetensors"
    table = CovarianceTable.load(config_path("models", "starter") / name)
    mu = torch.from_numpy(ndimage.gaussian_filter(truth.numpy(), (0, 0, 1, 1)))
    step = data_step(problem.operator)
    Ax = problem.operator.A(mu)
    variance, residual = problem.noise.variance(Ax), problem.y - Ax

    def solve(form: Any, padding: int) -> Callable[[int], Update]:
        covariance = table.at(sigma).on(mu, INFLATION, padding)
        return lambda n: form(covariance, variance, residual, Accuracy(0.0, n))

    ours, plain = solve(step, step.padding), solve(DualStep(problem.operator), 0)
    return {
        "form": type(step).__name__,
        "steps": ours(STEPS[-1]).num_steps,
        "relative_residual": [ours(n).relative_residual for n in STEPS],
        "plain": [plain(n).relative_residual for n in STEPS],
    }


@click.command(help=__doc__)
@click.option("--size", default=256, show_default=True, help="Side of the images, pixels.")
@click.option("--sigma", default=0.2, show_default=True, help="Noise level of the denoiser.")
@click.option("--task", "names", multiple=True, help="Default: all whose condition has a table.")
def main(size: int, sigma: float, names: tuple[str, ...]) -> None:
    """Print the table and write it."""
    rows = {}
    click.echo(f"{'task':24}{'form':18}" + "".join(f"{n:>10}" for n in STEPS) + "   plain")
    for name in names or task_names():
        task = load_task(name)
        domain, item = load_domain(task.domain), picture(task.domain, size)
        measurement = domain.simulate(item, task, 0)
        problem = domain.problem(measurement)
        tables = config_path("models", "starter")
        if not (tables / f"covariance-{problem.condition}.safetensors").is_file():
            continue
        row = convergence(problem, domain.truth_signal(item, measurement), sigma)
        rows[name] = row
        figures = "".join(f"{r:10.1e}" for r in row["relative_residual"])
        plain = " ".join(f"{r:.0e}" for r in row["plain"])
        click.echo(f"{name:24}{row['form']:18}{figures}   {plain}")
    RESULTS.parent.mkdir(exist_ok=True)
    record = {"size": size, "sigma": sigma, "after_steps": STEPS, "tasks": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
