"""A scan as the scanner left it, reconstructed from its own data: what is foretold of the rest.

    python -m tests.benchmarks.raw_kspace --scan brain_8ch.npy [--model DIR] [--picture FILE.png]

The scan (raw k-space in any format that `sashiko restore --domain mri` reads) is not simulated, and
need not be complete: a share of its samples outside the centre is hidden, the rest reconstructed,
and the hidden samples are foretold from the image through the sensitivities. Rows, one a share,
draw and method, land in tests/benchmarks/results/raw_kspace.json.

    held_out     |y - A x|^2 / sigma^2 a real number, over the hidden samples: 1 is noise alone
    fitted       the same over the samples that were given
    nrmse        |y - A x| / |y| over the hidden samples
    psnr_l1, psnr_covprox   of the magnitude, in dB, against the image that this method makes of
                 all the samples (1 is its 99.9th percentile): agreement and no truth. Whichever
                 method made the reference has the better of it

Zero-filled SENSE; conjugate-gradient SENSE stopped where it foretells most; kriging (the Gaussian
prior, no network); L1-ESPIRiT with its frozen parameters, and with the basis and strength that
foretell most in draw 0, which is tuned on the very scan and in its favour; CovProx as the product
runs it, untuned. Draw 0 is left out of all means.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from diffusion_core.model import Model
from diffusion_core.operators import MultiCoil
from domains.base import Array, Item, Measurement, Task
from domains.keyed import keyed_rng
from domains.metrics import psnr, residual
from domains.mri.coils import centre_box
from domains.mri.degradations import scale_of
from domains.mri.domain import MRI
from flows.config import config_path, load_task
from flows.engine.methods import baseline_params
from tests.benchmarks import ours
from tests.benchmarks.cases import Case
from tests.benchmarks.ours import Method, Run
from tests.benchmarks.rows import Row, Rows

RESULTS = Path(__file__).parent / "results" / "raw_kspace.json"
KEY = ("scan", "hidden", "draw", "method")
LIKE = "kspace-x4-8coil"
HIDDEN = (0.2, 0.5)
NUM_DRAWS = 6
STRENGTHS = (3.0, 6.0, 12.0, 25.0, 50.0, 91.0, 180.0)
WAVELETS = ("haar", "db4")
SENSE_STEPS = (3, 5, 8, 12, 20, 40)
Settings = dict[str, Any]
Tuned = Mapping[str, Settings]
METHODS = ("zero-filled", "cg-sense", "kriging", "wavelet", "wavelet-tuned", "covprox")


@dataclass(frozen=True)
class Trial:
    """A scan with some of its samples hidden.

    Attributes:
        given: what is reconstructed.
        hidden: the same measurement, of the hidden samples alone.
    """

    given: Case
    hidden: Measurement


def hide(measurement: Measurement, share: float, draw: int) -> Trial:
    """Hide a share of the samples outside the centre box; 0 hides none.

    Args:
        measurement: of one slice.
        share: of the samples that may be hidden.
        draw: seeds the choice.
    """
    mask = measurement.arrays["mask"]
    h, w = mask.shape[-2:]
    rows, columns = centre_box(mask[0, 0])
    near = (np.abs(np.fft.fftfreq(h, 1 / h)) <= rows // 2)[:, None] & (
        np.abs(np.fft.fftfreq(w, 1 / w)) <= columns // 2
    )
    free = np.flatnonzero(mask[0, 0] & ~near)
    rng = keyed_rng(draw, measurement.record.source_digest, "hidden", 0)
    taken = rng.permutation(free)[: round(share * len(free))]
    unseen = np.zeros(h * w, bool)
    unseen[taken] = True
    unseen = unseen.reshape(mask.shape)
    given = _of(measurement, mask & ~unseen)
    scale = {"scale_q": scale_of(given.y)}
    given = replace(given, params={**given.params, **scale})
    domain = MRI()
    truth = Item(np.zeros(given.record.shape, np.float32), given.record)
    case = Case(_task(), "scan", domain, truth, given, domain.problem(given))
    return Trial(case, replace(_of(measurement, unseen), params=given.params))


def _of(measurement: Measurement, mask: Array) -> Measurement:
    return replace(measurement, y=measurement.y * mask, arrays={"mask": mask})


def _task() -> Task:
    return load_task(LIKE)


def misfit(trial: Trial, x: torch.Tensor) -> dict[str, float]:
    """How well an image in network units explains what was given, and what was hidden."""
    problem, q = trial.given.problem, float(trial.hidden.params["scale_q"])
    given = problem.operator
    assert isinstance(given, MultiCoil)
    mask = torch.from_numpy(np.array(trial.hidden.arrays["mask"]))
    operator = MultiCoil(mask, given.sensitivities)
    y = torch.from_numpy(trial.hidden.y) / q
    seen, heard = (torch.broadcast_to(m, y.shape) for m in (given.mask, mask))
    figures = {"fitted": residual(given, problem.y, x, problem.noise, seen)[0]}
    if not bool(mask.any()):
        return figures
    gap = (y - operator.A(x)).abs().square().sum() / y.abs().square().sum()
    held_out = residual(operator, y, x, problem.noise, heard)[0]
    return {**figures, "held_out": held_out, "nrmse": float(gap.sqrt())}


def sense(case: Case, num_steps: int) -> torch.Tensor:
    """Conjugate gradients on A'A x = A'y from 0, stopped early: its only regulariser.

    Source: Pruessmann et al. 2001, doi:10.1002/mrm.1241.
    """
    A, y = case.problem.operator, case.problem.y
    x = torch.zeros(case.problem.shape)
    r = A.A_adjoint(y)
    p, rr = r, r.square().sum()
    for _ in range(num_steps):
        q = A.A_adjoint(A.A(p))
        alpha = rr / (p * q).sum()
        x, r = x + alpha * p, r - alpha * q
        p, rr = r + r.square().sum() / rr * p, r.square().sum()
    return x


def wavelet(case: Case, changes: Mapping[str, Any]) -> torch.Tensor:
    """L1-ESPIRiT."""
    params = {**baseline_params(LIKE, "wavelet"), **changes}
    return case.domain.baselines()["wavelet"](case.measurement, case.problem, params)


def restore(case: Case, name: str, tuned: Tuned, model: Model) -> Run:
    """One method on one case, timed."""
    if name in ("covprox", "kriging"):
        own = ours.covprox(LIKE, 12, model.path)
        return ours.run(own if name == "covprox" else Method(name, name, own.sigmas), case, model)
    methods: dict[str, Callable[[], torch.Tensor]] = {
        "zero-filled": lambda: case.problem.operator.A_adjoint(case.problem.y),
        "cg-sense": lambda: sense(case, **tuned["cg-sense"]),
        "wavelet": lambda: wavelet(case, {}),
        "wavelet-tuned": lambda: wavelet(case, tuned["wavelet-tuned"]),
    }
    start = time.perf_counter()
    with torch.no_grad():
        x = methods[name]()
    return Run(x, 0, time.perf_counter() - start)


def tune(trial: Trial) -> Tuned:
    """The number of steps, and the basis and strength, that foretell most of what is hidden."""

    def best(values: Sequence[Settings], make: Callable[[Settings], torch.Tensor]) -> Settings:
        return min(values, key=lambda value: misfit(trial, make(value))["held_out"])

    steps = [{"num_steps": n} for n in SENSE_STEPS]
    shrinkages = [{"wavelet": w, "strength": s} for w in WAVELETS for s in STRENGTHS]
    with torch.no_grad():
        return {
            "cg-sense": best(steps, lambda found: sense(trial.given, **found)),
            "wavelet-tuned": best(shrinkages, lambda found: wavelet(trial.given, found)),
        }


def magnitude(case: Case, x: torch.Tensor) -> Array:
    """(h w), in the scan's units."""
    image: Array = case.problem.to_source(x.float())[0, 0].numpy()
    return image


def agreement(reference: Array, image: Array) -> float:
    """PSNR of one magnitude against another, in dB."""
    top = float(np.percentile(reference, 99.9))
    return psnr(np.clip(reference / top, 0, 1), np.clip(image / top, 0, 1))


def run(scan: Measurement, model: Model, rows: Rows, shares: Sequence[float], draws: int) -> None:
    """Every method on every draw; a row each."""
    name = scan.record.source_digest[:12]
    for share in shares:
        tuned = tune(hide(scan, share, 0))
        whole = hide(scan, 0.0, 0)
        references = {
            f"psnr_{short}": magnitude(whole.given, restore(whole.given, m, tuned, model).x)
            for short, m in (("l1", "wavelet-tuned"), ("covprox", "covprox"))
        }
        for draw in range(1, draws):
            trial = hide(scan, share, draw)
            sampled = trial.given.measurement.arrays["mask"]
            for method in METHODS:
                done = restore(trial.given, method, tuned, model)
                image = magnitude(trial.given, done.x)
                row: Row = {
                    "scan": name,
                    "hidden": share,
                    "draw": draw,
                    "method": method,
                    "acceleration": round(1 / float(sampled.mean()), 2),
                    "nfe": done.nfe,
                    "seconds": round(done.seconds, 2),
                    **{key: round(value, 4) for key, value in misfit(trial, done.x).items()},
                    **{key: round(agreement(r, image), 3) for key, r in references.items()},
                    **({"tuned": tuned[method]} if method in tuned else {}),
                }
                rows.put(row)
                click.echo(f"{share} {draw} {method}: {row['held_out']:.3f}, {row['nrmse']:.4f}")


def table(rows: Rows) -> str:
    """Means over the draws, in Markdown."""
    figures = ("held_out", "nrmse", "fitted", "psnr_l1", "psnr_covprox", "seconds")
    lines = ["| hidden | method | " + " | ".join(figures) + " |", "|---" * 8 + "|"]
    return "\n".join([*lines, *_lines(list(rows), figures)])


def _lines(rows: Sequence[Row], figures: Sequence[str]) -> Iterator[str]:
    for share in sorted({row["hidden"] for row in rows}):
        for method in METHODS:
            part = [r for r in rows if (r["hidden"], r["method"]) == (share, method)]
            if part:
                means = " | ".join(f"{np.mean([r[f] for r in part]):.4g}" for f in figures)
                yield f"| {share} | {method} | {means} |"


def draw_picture(scan: Measurement, model: Model, tuned: Tuned, path: Path) -> None:
    """Zero-filled SENSE, L1-ESPIRiT and CovProx of all samples, side by side."""
    from PIL import Image

    whole = hide(scan, 0.0, 0).given
    names = ("zero-filled", "wavelet-tuned", "covprox")
    images = [magnitude(whole, restore(whole, name, tuned, model).x) for name in names]
    shades = [np.clip(i / np.percentile(i, 99.5), 0, 1) ** 0.8 for i in images]
    strip = np.concatenate(shades, axis=1)
    picture = Image.fromarray(np.round(255 * strip).astype(np.uint8))
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.LANCZOS).save(path)


@click.command()
@click.option("--scan", "path", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--model", type=click.Path(path_type=Path), help="[default: the starter]")
@click.option("--draws", default=NUM_DRAWS, show_default=True, help="Draw 0 tunes the baselines.")
@click.option("--picture", type=click.Path(path_type=Path), help="Of all samples, as PNG.")
def main(path: Path, model: Path | None, draws: int, picture: Path | None) -> None:
    """Measure how well methods foretell the hidden samples of a real scan."""
    scan = MRI().measured(path).slices(0, 1)
    loaded = Model.load(model or config_path("models", "starter"), dtype=torch.float32)
    rows = Rows(RESULTS, KEY)
    run(scan, loaded, rows, HIDDEN, draws)
    if picture is not None:
        draw_picture(scan, loaded, tune(hide(scan, HIDDEN[0], 0)), picture)
    click.echo(table(rows))


if __name__ == "__main__":
    main()
