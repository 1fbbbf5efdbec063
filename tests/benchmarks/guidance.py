"""T2 from every eighth line of k-space, with T1 of the same head given, withheld, or never learned.

    python -m tests.benchmarks.guidance --source FOLDER --work FOLDER data
    sashiko train configs/train-guided.yaml --set data='[WORK/train-guided.zarr,
        WORK/validation-guided.zarr]' --set output=WORK/runs
    ... the same with --set name=unguided --set guide_drop_share=1
    python -m tests.benchmarks.guidance --source FOLDER --work FOLDER table

FOLDER has stroke_t1.nii.gz and stroke_t2.nii.gz, one head (guidance_data.py says how it is split).
Rows, one a slice, draw of the lines and way, land in tests/benchmarks/results/guidance.json. Each
way has its settings chosen on the validation slices, from the same few, before the test slices
are restored; rows denoising-SIGMA are one evaluation of the network on the true slices in noise:

    starter            as shipped, without T1
    unguided           fine-tuned on the same samples, T1 always dropped
    withheld           the guided model, T1 not given
    guided             the same model, T1 given; covariance as measured without T1
    guided-own-table   the same, covariance as measured with T1
    wrong-guide        as guided-own-table, T1 of the slices turned upside down: no one's anatomy
    tv, zero-filled    classical, frozen parameters
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from diffusion_core.model import Model
from diffusion_core.networks.precond import guided
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.posterior import make_solver
from diffusion_core.protocols import Denoiser
from domains.base import Domain, Item, Measurement, Problem
from domains.guides import as_channels, measured_with, posed
from domains.metrics import score
from domains.registry import load_domain
from flows.config import config_path, load_method, load_task
from flows.engine.methods import baseline_params
from flows.store import Dataset
from tests.benchmarks.guidance_data import datasets
from tests.benchmarks.ours import covprox
from tests.benchmarks.rows import Rows, paired

RESULTS = Path(__file__).parent / "results" / "guidance.json"
TASKS = ("kspace-x8", "kspace-x4")
VALIDATION_SEEDS, TEST_SEEDS = (100,), (0, 1)
"""Of the lines that are measured, their phase and noise."""
SIGMAS = (0.2, 0.5, 1.0)
"""Noise levels at which D alone is tried."""
GRID: Mapping[str, tuple[Any, ...]] = {
    "sigma_max": (0.5,),
    "inflation": (2.0, 5.0),
}


@dataclass(frozen=True)
class Way:
    """How a problem is restored.

    Attributes:
        model: starter, guided or unguided.
        shown: whether T1 is given.
        own_table: whether the covariance is that measured with T1.
        turned: whether the T1 given is upside down.
    """

    model: str
    shown: bool = False
    own_table: bool = False
    turned: bool = False


WAYS: Mapping[str, Way] = {
    "starter": Way("starter"),
    "unguided": Way("unguided"),
    "withheld": Way("guided"),
    "guided": Way("guided", shown=True),
    "guided-own-table": Way("guided", shown=True, own_table=True),
    "wrong-guide": Way("guided", shown=True, own_table=True, turned=True),
}
RIGHT = "guided-own-table"
"""Whose settings the upside-down guide is tried with."""
CLASSICAL = ("tv", "zero-filled")


class Models:
    """The models by name, loaded when they are asked for.

    Args:
        work: folder whose runs/NAME/model they are, but for the starter.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._loaded: dict[str, Model] = {}

    def path(self, name: str) -> Path:
        """Of a model's directory."""
        if name == "starter":
            return config_path("models", "starter")
        return self._work / "runs" / name / "model"

    def has(self, name: str) -> bool:
        """Whether it was trained."""
        return self.path(name).is_dir()

    def __getitem__(self, name: str) -> Model:
        if name not in self._loaded:
            self._loaded[name] = Model.load(self.path(name), dtype=torch.bfloat16)
        return self._loaded[name]


@dataclass(frozen=True)
class Case:
    """Slices of one head, measured once."""

    domain: Domain
    truth: Item
    measurement: Measurement
    problem: Problem

    def psnr(self, x: torch.Tensor) -> list[dict[str, float]]:
        """Of a restored batch (b c h w) in network units, slice by slice."""
        restored = self.problem.to_source(x.float()).numpy().swapaxes(0, 1)
        return score(self.domain, self.truth, restored)


def case(dataset: Dataset, task: str, seed: int) -> Case:
    """The first item of a dataset, measured."""
    protocol = load_task(task)
    domain = load_domain(protocol.domain)
    item = dataset.read(dataset.items()[0].item_id)
    measurement = measured_with(domain, domain.simulate(item, protocol, seed), item)
    return Case(domain, item, measurement, posed(domain, measurement))


def settings_of(task: str) -> Iterator[dict[str, Any]]:
    """What may be chosen from: some inflations, and what the starter was calibrated to."""
    own = load_method(task)
    for values in itertools.product(*GRID.values()):
        chosen = dict(zip(GRID, values, strict=True))
        sigma_max = chosen.pop("sigma_max")
        yield {
            "levels": [own.num_levels, sigma_max, own.sigma_min, own.rho],
            "options": {**own.options, **chosen},
        }
    fitted = covprox(task, own.num_levels)
    yield {"sigmas": fitted.sigmas.tolist(), "options": dict(fitted.options)}


def restore(model: Model, way: Way, one: Case, settings: Mapping[str, Any]) -> torch.Tensor:
    """The slices of a case, (b c h w) in network units."""
    problem = one.problem
    sigmas = (
        torch.tensor(settings["sigmas"], dtype=torch.float64)
        if "sigmas" in settings
        else power_sigmas(*settings["levels"])
    )
    table = model.prior(problem.condition, guided=way.own_table)
    solver = make_solver("covprox", table, settings["options"])
    denoise = denoiser_of(model, way, one)
    draws = KeyedDraws(0, one.truth.record.source_digest, (0, 0, 0))
    with torch.no_grad():
        return solver(denoise, problem.operator, problem.y, problem.noise, sigmas, draws).x


def denoiser_of(model: Model, way: Way, one: Case) -> Denoiser:
    """D of the case's slices, with T1 or without."""
    condition = one.problem.condition
    if not way.shown:
        return model.denoiser(condition)
    guide = as_channels(one.problem, model.guide_channels)
    if guide is None:
        raise ValueError("the items have no T1")
    carrying = model.carrying_denoiser(condition)
    return guided(carrying, guide.flip(-2) if way.turned else guide)


def denoised(model: Model, way: Way, one: Case, sigma: float) -> torch.Tensor:
    """One evaluation of D on the true slices in noise: what the prior alone has of T1."""
    x0 = one.domain.truth_signal(one.truth, one.measurement)  # type: ignore[attr-defined]  # MRI's
    eps = KeyedDraws(0, "denoised").normal(0, x0)
    with torch.no_grad():
        return denoiser_of(model, way, one)(x0 + sigma * eps, torch.full((len(x0),), sigma))


def choose(model: Model, way: Way, name: str, task: str, cases: list[Case]) -> dict[str, Any]:
    """The settings of the highest mean PSNR on validation slices."""

    def mean(settings: Mapping[str, Any]) -> float:
        found = [row["psnr"] for c in cases for row in c.psnr(restore(model, way, c, settings))]
        return float(np.mean(found))

    scored = [(mean(settings), settings) for settings in settings_of(task)]
    best, settings = max(scored, key=lambda pair: pair[0])
    click.echo(f"{task} {name}: {best:.2f} dB on validation with {settings}")
    return {**settings, "validation_psnr": round(best, 4)}


def measure(
    work: Path, source: Path, models: Models, tasks: tuple[str, ...], results: Path
) -> Rows:
    """Choose settings, then restore the test slices by every way; rows that are there are kept.

    Ways whose model was not trained yet are left out.
    """
    made = datasets(source, work, guided=True)
    rows = Rows(results, ("task", "item", "method"))
    chosen_file = results.with_name("guidance-settings.json")
    chosen = json.loads(chosen_file.read_text()) if chosen_file.exists() else {}
    ways = {name: way for name, way in WAYS.items() if models.has(way.model)}
    for task in tasks:
        validation = [case(Dataset(made["validation"]), task, s) for s in VALIDATION_SEEDS]
        tests = {s: case(Dataset(made["test"]), task, s) for s in TEST_SEEDS}
        for (name, way), sigma in itertools.product(ways.items(), SIGMAS):
            if not way.own_table or way.turned:  # a table plays no part
                x = denoised(models[way.model], way, tests[0], sigma)
                put(rows, f"denoising-{sigma:g}", name, 0, tests[0], x)
        for name in CLASSICAL:
            for seed, one in tests.items():
                if rows.get(task, f"draw-{seed}/slice-0", name) is None:
                    params = baseline_params(task, name)
                    x = one.domain.baselines()[name](one.measurement, one.problem, params)
                    put(rows, task, name, seed, one, x)
        for name, way in ways.items():
            key = f"{task}/{RIGHT if way.turned else name}"
            if key not in chosen:
                chosen[key] = choose(models[way.model], way, name, task, validation)
                chosen_file.write_text(json.dumps(chosen, indent=1) + "\n")
            for seed, one in tests.items():
                if rows.get(task, f"draw-{seed}/slice-0", name) is None:
                    x = restore(models[way.model], way, one, chosen[key])
                    put(rows, task, name, seed, one, x)
    return rows


def put(rows: Rows, task: str, name: str, seed: int, one: Case, x: torch.Tensor) -> None:
    """Keep a row for each slice."""
    figures = one.psnr(x)
    for number, row in enumerate(figures):
        values = {key: round(float(row[key]), 4) for key in ("psnr", "ssim", "psnr_body")}
        item = f"draw-{seed}/slice-{number}"
        rows.put({"task": task, "item": item, "method": name, **values})


def table(rows: Rows) -> str:
    """Mean PSNR and SSIM by way, and the gain over the starter with its range over the slices."""
    found = list(rows)
    lines = [
        "| task | way | PSNR dB | SSIM | over the starter, dB (range) |",
        "|---|---|---|---|---|",
    ]
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in found):
        part = [r for r in found if (r["task"], r["method"]) == (task, method)]
        mean = {k: float(np.mean([r[k] for r in part])) for k in ("psnr", "ssim")}
        base = {r["item"]: r["psnr"] for r in found
                if (r["task"], r["method"]) == (task, "starter")}  # fmt: skip
        gaps = [r["psnr"] - base[r["item"]] for r in part if r["item"] in base]
        gain = paired(found, task, method, "starter").mean if method != "starter" else 0.0
        told = f"{gain:+.2f} ({min(gaps):+.2f} to {max(gaps):+.2f})"
        lines.append(f"| {task} | {method} | {mean['psnr']:.2f} | {mean['ssim']:.3f} | {told} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("what", type=click.Choice(["data", "table"]))
@click.option("--source", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), default=["kspace-x8"])
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(what: str, source: Path, work: Path, tasks: tuple[str, ...], results: Path) -> None:
    """Make the data, or run what is missing and print the table."""
    torch.set_num_threads(1)
    if what == "data":
        for part, path in datasets(source, work, guided=True).items():
            click.echo(f"{part}: {path}")
        return
    click.echo(table(measure(work, source, Models(work), tasks, results)))


if __name__ == "__main__":
    main()
