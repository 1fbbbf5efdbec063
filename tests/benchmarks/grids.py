"""The same scene restored with blocks of 256, 512 and 1024 px: how far apart are they?

    python -m tests.benchmarks.grids [--levels 2] [--dtype float32]

The 1300^2 aerial image of the samples, 70% of it missing, starter model, through the engine's own
blocks (the limit under which a plane is done at once is lowered). Differences are the largest and
the rms, in units of the range, against the largest blocks; asked is 1e-3 in float32. Beside them
stand the seams of each. results/grids.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch

from flows.config import MethodSettings, config_path
from flows.engine import grid
from flows.engine.block import Restorer
from flows.engine.plan import ItemPlan, make_plan
from flows.engine.seams import measure_seams
from tests.benchmarks.large_scene import Array, sample
from tests.benchmarks.tiles import difference

RESULTS = Path(__file__).parent / "results" / "grids.json"
BLOCKS = (1024, 512, 256)
SPAN = 255.0


def restored(store: Path, block: int, levels: int, dtype: str) -> tuple[ItemPlan, Array]:
    """The one item of a store, block by block."""
    method = MethodSettings(num_levels=levels)
    model = config_path("models", "starter")
    with patch.object(grid, "MAX_CANVAS_PX", 256**2):
        plan = make_plan(store, store.parent / "out", method, model, dtype=dtype, block_size=block)
    [item] = plan.items
    pixels, worker = np.empty(item.grid.shape, np.float32), Restorer()
    for part in item.blocks():
        box = part.write
        values, _ = worker.compute(
            worker.read(store, item, part), item, part, worker.overview(store, item, part)
        )
        pixels[:, box.z0 : box.z1, box.y0 : box.y1, box.x0 : box.x1] = values
    return item, pixels


def seam_of(item: ItemPlan, pixels: Array) -> dict[str, Any]:
    """The seams of what was restored, as a run measures them."""

    def read(index: tuple[int, int, int, int]) -> Array:
        _, _, h, w = item.grid.chunk
        _, z, y, x = index
        return pixels[:, z : z + 1, y * h : (y + 1) * h, x * w : (x + 1) * w]

    found = measure_seams(item.grid, read)
    return {} if found is None else asdict(found)


@click.command(help=__doc__)
@click.option("--levels", default=2, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--side", default=1300, show_default=True)
@click.option("--source", type=click.Path(path_type=Path), help="[default: of the samples]")
def main(levels: int, dtype: str, side: int, source: Path | None) -> None:
    """Restore thrice, and compare."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        common = [sys.executable, "-m", "tests.benchmarks.large_scene", "--part", "make"]
        asked = ["--side", str(side), "--work", folder, "--source", str(source or sample())]
        subprocess.run([*common, *asked], check=True)
        found = {b: restored(Path(folder, "scene.zarr"), b, levels, dtype) for b in BLOCKS}
    first = found[BLOCKS[0]][1]
    rows = [
        {
            "block": block,
            "levels": levels,
            "dtype": dtype,
            "side": side,
            **difference(first, pixels, SPAN),
            "seam": seam_of(item, pixels),
        }
        for block, (item, pixels) in found.items()
    ]
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    known = [r for r in known if (r["levels"], r["dtype"], r["side"]) != (levels, dtype, side)]
    text = ",\n ".join(json.dumps(row) for row in [*known, *rows])
    RESULTS.write_text(f"[\n {text}\n]\n")
    sys.stdout.write("\n".join(json.dumps(row) for row in rows) + "\n")


if __name__ == "__main__":
    main()
