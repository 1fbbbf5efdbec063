"""Tiles against the whole: how far apart they are, on real test images and the starter model.

    python -m tests.benchmarks.tiles --data DATASET denoiser     D(x; sigma) in tiles, four halos
    python -m tests.benchmarks.tiles --data DATASET restoration  through the engine, mean mode

An error is the largest and the rms difference in units of the image's range. `restoration` does
each task at once, and as the product would cut a canvas too large for one block:

    blocks     masks and plain denoising: blocks of `tile` pixels with the planned halo, their data
               step on the block alone; solves converged and C^-1 tapered, at once as in blocks
    denoiser   all others: the data step on the whole canvas, the denoiser called on tiles of it

For blocks `plain_max` and `plain_rms` are the distance to what the product makes of a small canvas,
by its usual tolerance and without a taper; `psnr` and `plain_psnr` tell what either is worth. The
limits on canvases are lowered for it, since no sample is beyond them. Rows land in
tests/benchmarks/results/tiles.json; what differs by settings or code is made anew by asking again.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch

from diffusion_core.model import Model
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.tiles import tiled_denoiser
from domains.base import Array, Measurement
from domains.files import select
from domains.registry import load_domain
from flows.config import MethodSettings, config_path, load_task
from flows.engine import block as engine
from flows.engine import grid
from flows.engine.block import Restorer
from flows.engine.methods import CONVERGED
from flows.engine.plan import make_plan
from flows.store import Dataset, MeasurementWriter

RESULTS = Path(__file__).parent / "results" / "tiles.json"
ITEMS = ("china", "pan2")
SIGMAS = (0.05, 0.2, 0.5)
HALOS = (16, 32, 64, 96)
DTYPES = ("float32", "bfloat16")
TASKS = (
    "inpaint-random70",
    "inpaint-strokes",
    "denoise-25",
    "sr-x4",
    "deblur-gauss",
    "demosaic",
    "sr-x4-bicubic",
    "deblur-motion",
)
MODEL = config_path("models", "starter")


def difference(one: Array, other: Array, span: float) -> dict[str, float]:
    """Largest and rms difference, in units of the range."""
    apart = np.abs(one.astype(np.float64) - other) / span
    return {"max": float(apart.max()), "rms": float(np.sqrt(np.square(apart).mean()))}


def measured(data: Path, item_id: str, task: str) -> tuple[Array, Measurement]:
    """The pixels of a sample, and it measured as a task says, with seed 0; sides divide by 4."""
    protocol = load_task(task)
    item = Dataset(data).read(item_id)
    h, w = item.pixels.shape[-2:]
    item = select(item, crop=(0, 0, h // 4 * 4, w // 4 * 4))
    measurement = load_domain(protocol.domain).simulate(item, protocol, 0)
    return item.pixels.astype(np.float32), measurement


@contextmanager
def limits(tile: int) -> Iterator[None]:
    """The engine's limits lowered, so that it cuts every canvas larger than a tile."""
    with ExitStack() as changed:
        for module, name, value in (
            (grid, "MAX_CANVAS_PX", tile**2),
            (engine, "DENOISER_PLANE_PX", (tile + 2 * grid.HALO_PX) ** 2),
            (engine, "DENOISER_TILE_PX", tile),
        ):
            changed.enter_context(patch.object(module, name, value))
        yield


def restored(store: Path, dtype: str, tile: int, options: Mapping[str, Any]) -> tuple[Array, str]:
    """The one item of a store, restored block by block; and what of it was cut."""
    method = MethodSettings(options=dict(options)) if options else None
    plan = make_plan(store, store.parent / "out", method, MODEL, dtype=dtype, block_size=tile)
    (item,) = plan.items
    pixels = np.empty(item.grid.shape, np.float32)
    restorer = Restorer()
    for part in item.blocks():
        z, y, x = (
            slice(part.write.z0, part.write.z1),
            slice(part.write.y0, part.write.y1),
            slice(part.write.x0, part.write.x1),
        )
        measured, overview = restorer.read(store, item, part), restorer.overview(store, item, part)
        pixels[:, z, y, x] = restorer.compute(measured, item, part, overview)[0]
    return pixels, "blocks" if item.grid.tiled else "denoiser"


def restoration_row(data: Path, item_id: str, task: str, dtype: str, tile: int) -> dict[str, Any]:
    """A task restored at once and cut."""
    truth, measurement = measured(data, item_id, task)
    problem = load_domain(load_task(task).domain).problem(measurement)
    ends = [problem.to_source(torch.full(problem.shape, end)) for end in (-1.0, 1.0)]
    span = float((ends[1] - ends[0]).max())
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "measured.zarr"
        with MeasurementWriter(store) as writer:
            writer.add(measurement)
        plain, _ = restored(store, dtype, tile, {})
        with limits(tile):
            tiles, cut = restored(store, dtype, tile, {})
        row = {"cut": cut, "halo": grid.HALO_PX}
        if cut == "denoiser":
            return {**row, **difference(plain, tiles, span)}
        with patch.object(grid.Grid, "reach", grid.HALO_PX):
            whole, _ = restored(store, dtype, tile, CONVERGED)
    row |= difference(whole, tiles, span)
    row |= {f"plain_{name}": value for name, value in difference(plain, tiles, span).items()}
    errors = {
        name: difference(pixels, truth, span)["rms"]
        for name, pixels in (("psnr", tiles), ("plain_psnr", plain))
    }
    return {**row, **{name: round(-20 * math.log10(rms), 3) for name, rms in errors.items()}}


def denoiser_rows(data: Path, item_id: str, dtype: str, tile: int) -> Iterator[dict[str, Any]]:
    """D in tiles of each halo against D at once, at each level."""
    problem = load_domain("city").problem(measured(data, item_id, "denoise-25")[1])
    model = Model.load(MODEL, dtype=getattr(torch, dtype))
    denoise = model.denoiser(problem.condition)
    clean = load_domain("city").training_windows(Dataset(data).read(item_id))[problem.condition][0]
    x0 = torch.from_numpy(np.ascontiguousarray(clean[:, 0], np.float32))[None]
    for level, sigma in enumerate(SIGMAS):
        x = x0 + sigma * KeyedDraws(0, item_id).normal(level, x0)
        levels = torch.full((1,), sigma)
        whole = denoise(x, levels).numpy()
        for halo in HALOS:
            tiled = tiled_denoiser(denoise, tile, halo, grid.STRIDE, max_batch=1)
            yield {"sigma": sigma, "halo": halo, **difference(whole, tiled(x, levels).numpy(), 2.0)}


def keep(part: str, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Put a row into the results, in the place of that of before."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = [r for r in known.get(part, []) if any(r.get(k) != v for k, v in key.items())]
    row = {
        **key,
        **{k: float(f"{v:.3g}") if k.endswith(("max", "rms")) else v for k, v in values.items()},
    }
    known[part] = sorted([*rows, row], key=lambda r: [str(r.get(k)) for k in key])
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n  ".join
    parts = (f' "{p}": [\n  {text(json.dumps(r) for r in rs)}\n ]' for p, rs in known.items())
    RESULTS.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    sys.stdout.write(json.dumps({part: row}) + "\n")
    sys.stdout.flush()


@click.group(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--item", "items", multiple=True, default=ITEMS)
@click.option("--dtype", "dtypes", multiple=True, default=DTYPES)
@click.option("--tile", default=128, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.pass_context
def main(
    ctx: click.Context,
    data: Path,
    items: tuple[str, ...],
    dtypes: tuple[str, ...],
    tile: int,
    threads: int,
) -> None:
    """See the module."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    ctx.obj = data, items, dtypes, tile


@main.command("denoiser")
@click.pass_obj
def denoiser_command(asked: tuple[Path, tuple[str, ...], tuple[str, ...], int]) -> None:
    """The denoiser in tiles, at three noise levels."""
    data, items, dtypes, tile = asked
    for item_id in items:
        for dtype in dtypes:
            for row in denoiser_rows(data, item_id, dtype, tile):
                key = {"item": item_id, "dtype": dtype, "tile": tile}
                key |= {"sigma": row.pop("sigma"), "halo": row.pop("halo")}
                keep("denoiser", key, row)


@main.command("restoration")
@click.option("--task", "tasks", multiple=True, default=TASKS)
@click.pass_obj
def restoration_command(
    asked: tuple[Path, tuple[str, ...], tuple[str, ...], int], tasks: tuple[str, ...]
) -> None:
    """CovProx in blocks, by the settings that the product takes."""
    data, items, dtypes, tile = asked
    for dtype in dtypes:
        for task in tasks:
            for item_id in items:
                key = {"task": task, "item": item_id, "dtype": dtype, "tile": tile}
                keep("restoration", key, restoration_row(data, item_id, task, dtype, tile))


if __name__ == "__main__":
    main()
