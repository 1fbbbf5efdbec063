"""How far generated images are from held-out ones, beside how far training images are from them.

    python -m tests.benchmarks.generation --data DATASET
    python -m tests.benchmarks.generation --data DATASET --picture infra/pictures/generated.png

DATASET holds the sample items (`sashiko samples`). For every condition as many crops are drawn from
test items, from training items, and from the model. Two distances to the test crops:

    spectrum_db    root mean square, over spatial frequency, of the difference of the mean radial
                   power spectra in dB
    histogram      Wasserstein-1 distance of the pixel values, in network units (which span 2)

With --picture nothing is measured: a sheet is drawn, for every condition a row of test crops above
a row of generated images, none of them chosen.

The training crops are the yardstick: other people and places, no model. A generated set that is
nearer than they are is not better than real; two sets of real images differ that much.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from diffusion_core.posterior.spectra import opponent_basis, radial_spectrum
from domains.base import Array
from domains.registry import load_domain
from flows.api_generate import generate
from flows.config import GenerateSettings
from flows.store import Dataset

RESULTS = Path(__file__).parent / "results" / "generation.json"
NUM_SHOWN = 4
CONDITIONS = {"ct": "ct", "mri": "mri", "city": "city"}


def real_crops(dataset: Dataset, condition: str, split: str, num: int, side: int) -> Tensor:
    """Crops (n c h w) in network units, spread evenly over items, slices and places."""
    items = []
    for record in dataset.items():
        if record.domain == CONDITIONS[condition] and record.split == split:
            view = load_domain(record.domain).training_windows(dataset.read(record.item_id))
            if condition in view and min(view[condition][0].shape[-2:]) >= side:
                items.append(view[condition][0])
    rng = np.random.Generator(np.random.Philox(key=7))
    crops = [_crop(items[n % len(items)], side, rng) for n in range(num)]
    return torch.from_numpy(np.stack(crops))


def _crop(volume: Array, side: int, rng: np.random.Generator) -> Array:
    _, depth, h, w = volume.shape
    # Bodies lie in the middle: the outer eighths of a volume are mostly air.
    z = int(rng.integers(depth // 8, max(depth // 8 + 1, depth - depth // 8)))
    y, x = int(rng.integers(h - side + 1)), int(rng.integers(w - side + 1))
    crop: Array = np.ascontiguousarray(volume[:, z, y : y + side, x : x + side], np.float32)
    return crop


def to_network(condition: str, pixels: Array) -> Tensor:
    """What `sashiko generate` wrote, back in network units: its scale is affine."""
    domain = load_domain(CONDITIONS[condition])
    ends = [
        float(domain.generated(condition, np.full((1, 1, 1, 1), v)).pixels.ravel()[0])
        for v in (-1.0, 1.0)
    ]
    return torch.from_numpy(2 * (pixels - ends[0]) / (ends[1] - ends[0]) - 1)


def spectrum_db(images: Tensor) -> Tensor:
    """Mean radial power spectrum of each opponent channel, in dB, at 12 frequencies."""
    frequencies = torch.logspace(-1.7, -0.35, 12, dtype=torch.float64).log()
    basis = opponent_basis(images.shape[1])
    centred = (x[None].double() - x.double().mean() for x in images)
    return 10 * radial_spectrum(centred, basis, frequencies).log10()


def distances(images: Tensor, held_out: Tensor) -> dict[str, float]:
    """The two distances of the module's head."""
    difference = spectrum_db(images) - spectrum_db(held_out)
    return {
        "spectrum_db": round(float(difference.square().mean().sqrt()), 3),
        "histogram": round(
            float(wasserstein_distance(images.flatten().numpy(), held_out.flatten().numpy())), 4
        ),
    }


def generated(condition: str, ref: str, sampler: str, levels: int, num: int, side: int) -> Tensor:
    """Images of the model, through the command's own function."""
    with tempfile.TemporaryDirectory() as folder:
        result = generate(
            GenerateSettings(
                domain=CONDITIONS[condition],
                condition=condition,
                output=Path(folder) / "out",
                num=num,
                size=side,
                model=ref,
                sampler=sampler,  # type: ignore[arg-type]  # pydantic checks the name
                num_levels=levels,
            )
        )
        with np.load(result.output / "samples.npz") as file:
            return to_network(condition, file["pixels"])


def sheet(rows: list[Tensor], gap: int = 2) -> Array:
    """Rows of images (n c h w) in network units as one 8-bit colour picture (h w 3)."""
    lines = []
    for row in rows:
        grey_levels = ((row.clamp(-1, 1) + 1) * 127.5).round().byte()
        colour = grey_levels.expand(-1, 3, -1, -1)
        framed = torch.nn.functional.pad(colour, (gap, gap, gap, gap), value=255)
        lines.append(torch.cat(list(framed), dim=2))
    return np.asarray(torch.cat(lines, dim=1).permute(1, 2, 0))


def draw(path: Path, dataset: Dataset, ref: str, sampler: str, levels: int, side: int) -> None:
    """Write the sheet as PNG."""
    from PIL import Image

    rows, num = [], NUM_SHOWN
    for condition in CONDITIONS:
        rows += [
            real_crops(dataset, condition, "test", num, side),
            generated(condition, ref, sampler, levels, num, side),
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    # A palette of 256 colours: a third of the bytes, and nothing to be seen of it.
    Image.fromarray(sheet(rows)).quantize(256).save(path, optimize=True)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--model", "ref", default="starter", show_default=True)
@click.option("--num", default=12, show_default=True, help="Images of each kind.")
@click.option("--side", default=128, show_default=True)
@click.option("--sampler", "samplers", multiple=True, default=("dpm-solver", "churn"))
@click.option("--levels", default=20, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--picture", type=click.Path(path_type=Path), help="Draw a sheet here instead.")
def main(
    data: Path,
    ref: str,
    num: int,
    side: int,
    samplers: tuple[str, ...],
    levels: int,
    output: Path,
    picture: Path | None,
) -> None:
    """Measure and write."""
    dataset, rows = Dataset(data), []
    if picture is not None:
        draw(picture, dataset, ref, samplers[-1], levels, side)
        return
    for condition in CONDITIONS:
        held_out = real_crops(dataset, condition, "test", num, side)
        kinds = {"train": real_crops(dataset, condition, "train", num, side)}
        for sampler in samplers:
            kinds[sampler] = generated(condition, ref, sampler, levels, num, side)
        for kind, images in kinds.items():
            row: dict[str, Any] = {"condition": condition, "images": kind, "num": num, "side": side}
            row |= distances(images, held_out)
            rows.append(row)
            click.echo(row)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
