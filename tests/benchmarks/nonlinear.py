"""JPEG, clipping, phase retrieval and blur that varies: CovProx beside classical methods, in dB.

    python -m tests.benchmarks.nonlinear --data TEST.zarr [--task jpeg-q10 ...] [--model DIR]

TEST.zarr holds the sample items of the test split (`sashiko samples`). Rows, one an image and
method, land in tests/benchmarks/results/nonlinear.json; what is there is kept. Settings were
chosen on validation photographs (berlin, pan3, bikes-2) and slices of lung1, with three exceptions:
those of jpeg-q20 are guessed from jpeg-q10, hybrid input-output has Fienup's, and CovProx's first
settings on JPEG, eight levels with fresh noise, were given up when a test window showed the loss.

    jpeg-q10, jpeg-q20   4:4:4; the decoded image is what there is. TV and non-local means of it,
                         and one evaluation of the denoiser
    clip-fifth           the brightest fifth of all values clipped, after noise of .05: as clipped,
                         and TV with the clipped likelihood
    phase-retrieval      moduli of the twice oversampled transform, noise .05 (CT at 128^2): the
                         best by data of 4 runs of hybrid input-output, where CovProx starts too
    deblur-lens ...      the task's own frozen baselines (configs/baselines) and kriging; CovProx
                         as the model was calibrated for the task, if it was
    despeckle-l4         --model DIR: one that knows city-log (configs/train-speckle.yaml)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from skimage.metrics import structural_similarity
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

from diffusion_core.model import Model
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import (
    JPEG,
    ROUNDING_STD,
    JPEGCoefficients,
    PhaseRetrieval,
    Saturation,
)
from diffusion_core.posterior import make_solver
from diffusion_core.protocols import Data, NoiseModel, Signal
from domains.classical import TVSettings, minimise_tv_masked
from domains.registry import load_domain
from flows.config import config_path, load_method, load_task
from flows.engine.methods import baseline_params
from flows.store import Dataset
from tests.benchmarks import ours
from tests.benchmarks.cases import TEST, Case, Part, cases, cut, shrunk
from tests.benchmarks.phase import best_by_data, hybrid_input_output, onto
from tests.benchmarks.rows import Rows, paired

RESULTS = Path(__file__).parent / "results" / "nonlinear.json"
LINEAR = ("deblur-lens", "deblur-motion", "ct-lowdose", "despeckle-l4")
NONLINEAR = ("jpeg-q10", "jpeg-q20", "clip-fifth", "phase-retrieval")
BRIGHTEST_SHARE, SIGMA_Y = 0.2, 0.05
PHASE_SIDE_PX, NUM_RESTARTS = 128, 4
NUM_ITEMS = 4
"""Of a task; phase retrieval has 2 CT slices and 3 windows."""

COVPROX: Mapping[str, tuple[int, float, float, Mapping[str, Any]]] = {
    # As in denoise-25 every pixel is seen: fresh noise on top would count the data twice.
    "jpeg-q10": (2, 0.25, 0.16, {"inflation": [1e6, 4.0], "zeta": 0.0}),
    "jpeg-q20": (2, 0.25, 0.1, {"inflation": [1e6, 4.0], "zeta": 0.0}),
    "clip-fifth": (8, 1.0, 0.05, {}),
    "phase-retrieval": (12, 0.5, 0.05, {"max_steps": 30}),
}
"""Levels, the first, the last, and options."""


@dataclass(frozen=True)
class Scene:
    """A clean image (1 c h w) in network units, and what is measured of it."""

    name: str
    condition: str
    x0: Signal
    draws: KeyedDraws
    operator: Any
    y: Data
    noise: NoiseModel


@dataclass(frozen=True)
class Began(PhaseRetrieval):
    """Phase retrieval that starts somewhere."""

    start: Signal | None = None

    def initial(self, y: Data) -> Signal:
        """Where it starts."""
        return super().initial(y) if self.start is None else self.start


def scenes(dataset: Dataset, task: str) -> Iterator[Scene]:
    """Test images measured by a nonlinear operator; noise is keyed by their source."""
    for part in _parts(task):
        domain, item = load_domain(dataset.record(part.label).domain), cut_part(dataset, part)
        ((condition, views), *_) = domain.training_windows(item).items()
        x0 = torch.from_numpy(np.ascontiguousarray(views[0][:, 0]))[None].float()
        draws = KeyedDraws(0, item.record.source_digest)
        h, w = x0.shape[-2:]
        noise = SIGMA_Y * draws.normal(0, x0, 20)
        if task == "clip-fifth":
            limit = float(np.quantile(x0.numpy(), 1 - BRIGHTEST_SHARE))
            operator: Any = Saturation(gain=1.0, low=-2.0, high=limit)
            yield Scene(part.name, condition, x0, draws, operator, operator.A(x0 + noise),
                        GaussianNoise(SIGMA_Y))  # fmt: skip
        elif task == "phase-retrieval":
            operator = PhaseRetrieval((h, w))
            Ax = operator.A(x0)
            y = (Ax + SIGMA_Y * draws.normal(0, Ax, 20)).clamp_min(0)
            yield Scene(part.name, condition, x0, draws, operator, y, GaussianNoise(SIGMA_Y))
        else:
            operator = JPEGCoefficients(int(task.removeprefix("jpeg-q")), (h, w))
            y = operator.data_of(JPEG(operator.quality).A(x0))
            yield Scene(part.name, condition, x0, draws, operator, y, GaussianNoise(ROUNDING_STD))


def _parts(task: str) -> list[Part]:
    if task != "phase-retrieval":
        return spread(TEST["city"])
    grey = [part for part in TEST["city"] if part.label in {"sample-geotiff", "pan2"}]
    return [*(replace(part, shrink=4) for part in TEST["ct"][1::4]), *spread(grey)[1:]]


def cut_part(dataset: Dataset, part: Part) -> Any:
    """A window of 256^2, or a CT slice of 128^2."""
    if part.shrink == 4:
        return shrunk(dataset.read(part.label, slice(part.z, part.z + 1)), 4)
    return cut(dataset, part)


def covprox(task: str, scene: Scene, model: Model) -> tuple[Signal, int]:
    """CovProx with the settings of the task."""
    levels, first, last, options = COVPROX[task]
    solver = make_solver("covprox", model.prior(scene.condition), options)
    sigmas = power_sigmas(levels, first, last, 3.0)
    denoise = model.denoiser(scene.condition)
    done = solver(denoise, scene.operator, scene.y, scene.noise, sigmas, scene.draws)
    return done.x, done.num_denoiser_calls


def jpeg_methods(task: str, scene: Scene, model: Model) -> dict[str, Callable[[], Any]]:
    """On the decoded image, and CovProx on the coefficients."""
    codec = JPEG(scene.operator.quality)
    decoded = codec.A(scene.x0)
    weight, strength = (0.02, 0.035) if scene.operator.quality < 15 else (0.015, 0.025)

    def denoiser() -> tuple[Signal, int]:
        level = torch.tensor([0.16 if scene.operator.quality < 15 else 0.1])
        return model.denoiser(scene.condition)(decoded, level), 1

    return {
        "decoded": lambda: (decoded, 0),
        "tv": lambda: (_like(decoded, denoise_tv_chambolle, weight=weight), 0),
        "nlm": lambda: (
            _like(decoded, denoise_nl_means, patch_size=5, patch_distance=6, h=strength), 0
        ),
        "denoiser": denoiser,
        "covprox": lambda: covprox(task, scene, model),
    }  # fmt: skip


def _like(x: Signal, method: Callable[..., Any], **settings: Any) -> Signal:
    """A method of scikit-image on one image in [0, 1]."""
    image = ((x[0] + 1) / 2).permute(1, 2, 0).numpy()
    done = np.asarray(method(image, channel_axis=-1, **settings)).reshape(image.shape)
    return torch.from_numpy(done).permute(2, 0, 1)[None].float() * 2 - 1


def clip_methods(task: str, scene: Scene, model: Model) -> dict[str, Callable[[], Any]]:
    """As clipped; total variation that knows of the clipping; CovProx."""
    y, limit = scene.y, scene.operator.high

    return {
        "clipped": lambda: (y, 0),
        "tv": lambda: (clipped_tv(y, limit), 0),
        "covprox": lambda: covprox(task, scene, model),
    }


def clipped_tv(y: Signal, limit: float, strength: float = 14.0, num_rounds: int = 6) -> Signal:
    """Total variation; a clipped datum pulls where x is below the limit, and is silent above."""
    settings = TVSettings(strength=strength, num_iterations=100, step=0.05)
    x, weights = y, torch.full_like(y, SIGMA_Y**-2)
    for _ in range(num_rounds):
        heard = (y < limit) | (x < limit)
        x = minimise_tv_masked(heard, torch.where(heard, y, 0.0), x, weights, settings)
    return x


def phase_methods(task: str, scene: Scene, model: Model) -> dict[str, Callable[[], Any]]:
    """Hybrid input-output, and CovProx from where it ends."""
    y = scene.y.expand(NUM_RESTARTS, *scene.y.shape[1:]).contiguous()

    @cache
    def reduced() -> Signal:
        runs = hybrid_input_output(scene.operator, y, scene.draws)
        return best_by_data(scene.operator, scene.y, runs)

    def restored() -> tuple[Signal, int]:
        began = Began(scene.operator.shape, start=reduced())
        x, nfe = covprox(task, replace(scene, operator=began), model)
        return onto(x, scene.x0), nfe

    return {
        "hybrid-input-output": lambda: (onto(reduced(), scene.x0), 0),
        "covprox": restored,
    }


METHODS = {"jpeg-q10": jpeg_methods, "jpeg-q20": jpeg_methods, "clip-fifth": clip_methods,
           "phase-retrieval": phase_methods}  # fmt: skip


def figures(x: Signal, truth: Signal) -> dict[str, float]:
    """PSNR in dB and SSIM on [0, 1], clipped."""
    a, b = (((v[0].double() + 1) / 2).clamp(0, 1) for v in (x, truth))
    psnr = -10 * float((a - b).square().mean().log10())
    ssim = structural_similarity(a.numpy(), b.numpy(), channel_axis=0, data_range=1.0)
    return {"psnr": round(psnr, 4), "ssim": round(float(ssim), 4)}


def run_nonlinear(dataset: Dataset, task: str, model: Model, rows: Rows) -> None:
    """Every method on every scene."""
    for scene in scenes(dataset, task):
        for name, method in METHODS[task](task, scene, model).items():
            if rows.get(task, scene.name, name) is None:
                start = time.perf_counter()
                x, nfe = method()
                seconds = round(time.perf_counter() - start, 3)
                put(rows, task, scene.name, name, nfe, figures(x, scene.x0), seconds)


def run_linear(dataset: Dataset, task: str, model: Model, rows: Rows) -> None:
    """CovProx and kriging beside the frozen baselines; the measured image itself, if it is one."""
    parts = TEST[load_task(task).domain]
    if task == "despeckle-l4":
        parts = [p for p in parts if p.label in {"sample-geotiff", "pan2", "bikes-3"}]
    for case in cases(dataset, task, spread(parts)):
        for name in ("as-measured", *case.task.baselines, "kriging", "covprox"):
            if rows.get(task, case.name, name) is None and _suits(case, name):
                done = restore(case, name, model)
                put(rows, task, case.name, name, done.nfe, case.figures(done.x), done.seconds)


def spread(parts: Any, most: int = NUM_ITEMS) -> list[Part]:
    """At most so many parts, evenly over them."""
    count = min(most, len(parts))
    return [parts[(2 * n + 1) * len(parts) // (2 * count)] for n in range(count)]


def _suits(case: Case, name: str) -> bool:
    return name != "as-measured" or case.problem.y.shape == case.problem.shape


def restore(case: Case, name: str, model: Model) -> ours.Run:
    """One method on one case."""
    problem = case.problem
    if name in {"covprox", "kriging"}:
        own = ours.covprox(case.task.name, load_method(case.task.name).num_levels, model.path)
        method = own if name == "covprox" else ours.Method(name, name, own.sigmas)
        return ours.run(method, case, model)
    start = time.perf_counter()
    params = baseline_params(case.task.name, name)
    x = (
        problem.y
        if name == "as-measured"
        else case.domain.baselines()[name](case.measurement, problem, params)
    )
    return ours.Run(x, 0, time.perf_counter() - start)


def put(
    rows: Rows, task: str, item: str, method: str, nfe: int, figures: Mapping[str, float], s: float
) -> None:
    """Keep a row and say so."""
    row = {"task": task, "item": item, "method": method, "nfe": nfe, "seconds": round(s, 3)}
    row |= {key: round(value, 4) for key, value in figures.items()}
    rows.put(row)
    click.echo(row)


def table(rows: Rows) -> str:
    """PSNR and SSIM by task and method, and CovProx less the method: mean, and its range."""
    lines = ["| task | method | items | NFE | PSNR dB | SSIM | s | CovProx less it, dB (range) |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    found = list(rows)
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in found):
        part = {r["item"]: r for r in found if (r["task"], r["method"]) == (task, method)}
        mean = {k: float(np.mean([r[k] for r in part.values()]))
                for k in ("nfe", "psnr", "ssim", "seconds")}  # fmt: skip
        less = ""
        if method != "covprox":
            best = {r["item"]: r["psnr"] for r in found
                    if (r["task"], r["method"]) == (task, "covprox")}  # fmt: skip
            gaps = [best[i] - r["psnr"] for i, r in part.items() if i in best]
            gap = paired(found, task, "covprox", method).mean
            less = f"{gap:+.2f} ({min(gaps):+.2f} to {max(gaps):+.2f})" if gaps else ""
        lines.append(
            f"| {task} | {method} | {len(part)} | {mean['nfe']:.0f} | {mean['psnr']:.2f} "
            f"| {mean['ssim']:.3f} | {mean['seconds']:.1f} | {less} |"
        )
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--task", "tasks", multiple=True, type=click.Choice([*NONLINEAR, *LINEAR]),
              default=[*NONLINEAR, *LINEAR[:-1]])  # fmt: skip
@click.option("--model", type=click.Path(path_type=Path), help="Directory; default the starter.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--threads", default=1, show_default=True)
def main(
    data: Path, tasks: tuple[str, ...], model: Path | None, results: Path, threads: int
) -> None:
    """Run what is missing, and print the table."""
    torch.set_num_threads(threads)
    rows, dataset = Rows(results), Dataset(data)
    loaded = Model.load(model or config_path("models", "starter"), dtype=torch.bfloat16)
    with torch.no_grad():
        for task in tasks:
            run = run_nonlinear if task in NONLINEAR else run_linear
            run(dataset, task, loaded, rows)
    click.echo(table(rows))


if __name__ == "__main__":
    main()
