"""Slices and frames restored each by itself, and jointly: PSNR, and the error along the stack.

    python -m tests.benchmarks.sequences --data DATASET --clip vtest.avi
    python -m tests.benchmarks.sequences --data DATASET --split validation
    python -m tests.benchmarks.sequences --data DATASET --clip vtest.avi --pictures infra/pictures

DATASET holds the sample items (`sashiko samples`); vtest.avi is of Debian's opencv-doc. Stacks are
windows of the samples, as STACKS says, 12 or 16 slices of about 96^2: whole items would take hours.
For every stack and task the same measurement is restored with every coupling that is asked for (0:
each slice by itself), at 12 evaluations with the product's settings (denoising takes 2), and each
slice's PSNR (of the hole where the task looks at holes) and error along z are averaged.

`linear-bound` is what neighbours can tell at all, where slices are seen in white noise: the gain of
the best linear filter of 3 slices x 5 x 5 pixels of the denoised stack, fitted on the truth itself.
No filter of that kind that does not know the truth does as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad, unfold

from diffusion_core.model import Model
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.posterior import make_solver
from domains.base import Array, Domain, Item, Measurement, Problem, Task
from domains.files import select
from domains.imaging import Units, measure
from domains.metrics import hole_of, mean_score, score
from domains.registry import load_domain
from flows.config import config_path, load_task
from flows.store import Dataset
from tests.benchmarks.ours import covprox
from tests.benchmarks.rows import Row, Rows

RESULTS = Path(__file__).parent / "results" / "sequences.json"
NUM_LEVELS = 12
ALONE, COUPLINGS = 0.0, (0.1, 0.3)

Crop = tuple[int, int, int, int]


@dataclass(frozen=True)
class Stack:
    """A window of a sample: slices or frames start..stop by step, (top, left, height, width)."""

    label: str
    split: str
    slices: tuple[int, int]
    crop: Crop
    tasks: Sequence[str]

    def read(self, dataset: Dataset, clip: Path | None) -> Item:
        """The window; of the clip where no sample has its name."""
        first, last = self.slices
        if self.label == "vtest":
            if clip is None:
                raise click.UsageError("--clip says where vtest.avi is")
            return select(load_domain("city").read(clip).slices(first, last), crop=self.crop)
        return select(dataset.read(self.label, slice(first, last)), crop=self.crop)


CT = ("denoise-25", "ct-lowdose", "ct-sparse60", "slices-missing")
MRI = ("denoise-25", "kspace-x4-real")
CLIP = ("denoise-25", "inpaint-random70", "video-strokes", "sr-x4", "deblur-gauss", "video-missing")

STACKS = (
    Stack("torso", "validation", (40, 52), (0, 12, 96, 96), CT),
    Stack("lung1", "validation", (10, 22), (192, 192, 96, 96), ("denoise-25", "slices-missing")),
    Stack("brain1", "validation", (4, 20), (80, 80, 96, 96), MRI),
    Stack("bikes-2", "validation", (0, 12), (60, 200, 96, 128), CLIP),
    Stack("lung2", "test", (22, 34), (192, 192, 96, 96), CT),
    Stack("brain2", "test", (4, 20), (80, 80, 96, 96), MRI),
    Stack("abdomen", "test", (2, 18), (0, 10, 88, 96), MRI),
    Stack("bikes-3", "test", (8, 20), (60, 200, 96, 128), CLIP),
    Stack("vtest", "test", (100, 112), (200, 300, 96, 128), CLIP),
)
"""lung1 and brain1 are of the training's items; what is fitted on validation stacks is one number,
the coupling. Slices of torso and abdomen lie 3 mm apart, of the lungs 5, of the brains 6.5."""


@dataclass(frozen=True)
class Case:
    """A stack, measured."""

    stack: Stack
    task: Task
    domain: Domain
    truth: Item
    measurement: Measurement
    problem: Problem

    def figures(self, x: Tensor) -> dict[str, float]:
        """Means over the slices."""
        pixels = self.pixels(x)
        return mean_score(score(self.domain, self.truth, pixels, region=hole_of(self.problem)))

    def pixels(self, x: Tensor) -> Array:
        """Network units (b c h w) to source units (c z h w)."""
        shown: Array = self.problem.to_source(x.float()).numpy().swapaxes(0, 1)
        return shown


def cases(stacks: Sequence[Stack], dataset: Dataset, clip: Path | None) -> Iterator[Case]:
    """Every stack, measured as every one of its tasks says, with seed 0."""
    for stack in stacks:
        item = stack.read(dataset, clip)
        domain = load_domain(item.record.domain)
        for name in stack.tasks:
            task = load_task(name)
            if task.domain != domain.name:  # white noise is for every image
                measurement = _noisy(item, domain, task)
            else:
                measurement = domain.simulate(item, task, 0)
            problem = domain.problem(measurement)
            truth = domain.as_measured(item, measurement.record)
            yield Case(stack, task, domain, truth, measurement, problem)


def _noisy(item: Item, domain: Domain, task: Task) -> Measurement:
    """White noise on an image of CT or MRI, on the scale of the metrics."""
    low, gain = domain.unit_scale(item.pixels, item.record)
    params = {"scale_q": 1 / gain} if domain.name == "mri" else {}
    return measure(item, Units(low, low + 1 / gain), task, 0, params, {})


def restored(case: Case, model: Model, coupling: float) -> Tensor:
    """The stack as the product restores it, but for the coupling."""
    ours = covprox(case.task.name, NUM_LEVELS if case.task.operator != "identity" else 2)
    options = {**ours.options, "z_coupling": coupling} if coupling else ours.options
    solver = make_solver("covprox", model.prior(case.problem.condition), options)
    denoise = model.denoiser(case.problem.condition)
    draws = KeyedDraws(0, case.truth.record.source_digest)
    p = case.problem
    with torch.no_grad():
        return solver(denoise, p.operator, p.y, p.noise, ours.sigmas, draws).x


def linear_bound(case: Case, model: Model) -> dict[str, float]:
    """Figures of the best linear filter over neighbours, fitted on the truth."""
    x0 = case.domain.truth_signal(case.truth, case.measurement).float()
    mu = restored(case, model, ALONE)
    neighbours = (torch.cat([mu[:1], mu[:-1]]), mu, torch.cat([mu[1:], mu[-1:]]))
    columns = [unfold(pad(part, (2, 2, 2, 2), mode="reflect"), 5) for part in neighbours]
    A = torch.cat(columns, dim=1).transpose(1, 2).flatten(0, 1).double()
    A = torch.cat([A, torch.ones(len(A), 1, dtype=A.dtype)], dim=1)
    b = x0.flatten(2).transpose(1, 2).flatten(0, 1).double()
    ridge = 1e-6 * torch.eye(A.shape[1], dtype=A.dtype)
    fitted = A @ torch.linalg.solve(A.T @ A + ridge, A.T @ b)
    planes = fitted.reshape(len(mu), -1, mu.shape[1]).transpose(1, 2)
    return case.figures(planes.reshape(mu.shape))


def row_of(case: Case, method: str, coupling: float, figures: Mapping[str, float]) -> Row:
    """A row of the results."""
    names = ("psnr", "psnr_hole", "ssim", "z_gradient_error")
    kept: dict[str, Any] = {n: round(figures[n], 6) for n in names if n in figures}
    stack = case.stack
    named = {"item": stack.label, "split": stack.split, "task": case.task.name, "method": method}
    return {**named, "z_coupling": coupling, "num_images": case.problem.shape[0], **kept}


def run(case: Case, model: Model, rows: Rows, couplings: Sequence[float]) -> None:
    """Restore a case every way whose row is not there."""

    def wanted(method: str) -> bool:
        return rows.get(case.task.name, case.stack.label, method) is None

    for coupling in (ALONE, *couplings):
        method = f"jointly-{coupling:g}" if coupling else "alone"
        if wanted(method):
            rows.put(row_of(case, method, coupling, case.figures(restored(case, model, coupling))))
    for name in case.task.baselines:
        if name.endswith("-z") and wanted(name):
            x = case.domain.baselines()[name](case.measurement, case.problem, {})
            rows.put(row_of(case, name, 0.0, case.figures(x)))
    if case.task.operator == "identity" and wanted("linear-bound"):
        rows.put(row_of(case, "linear-bound", 0.0, linear_bound(case, model)))


def table(rows: Rows) -> str:
    """What joint restoration changes, a line a stack and task."""
    lines = ["| stack | task | alone: dB, error along z | coupling | jointly: dB | error along z |"]
    lines.append("|---" * 6 + "|")
    for row in sorted(rows, key=lambda r: (r["split"], r["item"], r["task"], r["z_coupling"])):
        alone = rows.get(row["task"], row["item"], "alone")
        if alone is None or row["method"] == "alone":
            continue
        main = "psnr_hole" if "psnr_hole" in row else "psnr"
        before, after = alone["z_gradient_error"], row["z_gradient_error"]
        lines.append(
            f"| {row['item']} ({row['split']}) | {row['task']} | {alone[main]:.2f}, {before:.5f} | "
            f"{row['method']} | {row[main]:.2f} ({row[main] - alone[main]:+.2f}) | "
            f"{after:.5f} ({after / before - 1:+.0%}) |"
        )
    return "\n".join(lines)


SHOWN = (("bikes-3", "video-strokes"), ("vtest", "denoise-25"), ("abdomen", "denoise-25"))
"""What the pictures show: the profile of each, and the clip of the first."""


def draw(folder: Path, case: Case, model: Model, coupling: float) -> None:
    """A profile along the stack, and a clip: each alone, jointly, and true, side by side.

    The profile is the middle row of every slice, below each other: what is steady stands as lines.
    """
    results = [restored(case, model, c) for c in (ALONE, coupling)]
    stacks = [*(case.pixels(x) for x in results), case.truth.pixels]
    low, gain = case.domain.unit_scale(case.truth.pixels, case.truth.record)
    grey = [np.clip((np.asarray(s, np.float64) - low) * gain, 0, 1) for s in stacks]
    middle = grey[0].shape[2] // 2
    profiles = [np.repeat(s[:, :, middle], 8, axis=1).repeat(3, axis=2) for s in grey]
    name = f"sequence-{case.stack.label}-{case.task.name}"
    _image(_beside(profiles)).save(folder / f"{name}.png", optimize=True)
    num_frames = grey[0].shape[1]
    each = [[s[:, z].repeat(2, axis=1).repeat(2, axis=2) for s in grey] for z in range(num_frames)]
    first, *rest = (_image(_beside(frame)) for frame in each)
    playing = {"save_all": True, "append_images": rest, "duration": 120, "loop": 0}
    first.save(folder / f"{name}.webp", quality=70, **playing)


def _beside(images: Sequence[Array]) -> Array:
    """Images (c h w) side by side, white between them."""
    gap = np.ones((*images[0].shape[:2], 6))
    return np.concatenate([part for image in images for part in (image, gap)][:-1], axis=2)


def _image(unit: Array) -> Image.Image:
    """(c h w) on [0, 1] as a picture."""
    levels = np.round(255 * unit).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(levels if levels.shape[2] == 3 else levels[..., 0])


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--clip", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(["test", "validation"]), default="test")
@click.option("--only", multiple=True, help="Stacks of these labels.")
@click.option("--task", "tasks", multiple=True, help="These tasks alone.")
@click.option("--coupling", "couplings", type=float, multiple=True, default=COUPLINGS)
@click.option("--pictures", type=click.Path(path_type=Path), help="Draw, and measure nothing.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    data: Path,
    clip: Path | None,
    split: str,
    only: Sequence[str],
    tasks: Sequence[str],
    couplings: Sequence[float],
    pictures: Path | None,
    results: Path,
) -> None:
    """Restore every stack alone and jointly, and write the figures."""
    rows, dataset = Rows(results), Dataset(data)
    model = Model.load(config_path("models", "starter"), dtype=torch.bfloat16)
    chosen = [s for s in STACKS if s.split == split and (not only or s.label in only)]
    if tasks:
        chosen = [replace(s, tasks=[t for t in s.tasks if t in tasks]) for s in chosen]
    for case in cases(chosen, dataset, clip):
        click.echo(f"{case.stack.label} {case.task.name}")
        if pictures is not None:
            if (case.stack.label, case.task.name) in SHOWN:
                draw(pictures, case, model, couplings[0])
            continue
        run(case, model, rows, couplings)
    if pictures is None:
        click.echo(table(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
