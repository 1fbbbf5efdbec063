"""What a block will take: seconds, memory, bytes. Predictions, stated before anything is computed.

The constants were measured on one core of the reference machine (AMD EPYC with AVX512-BF16) with
the starter model; they steer the progress bar and the refusal of plans that do not fit, and never
touch a pixel. Memory is rounded up on purpose: a plan may refuse early, not late.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.config import MethodSettings
from flows.engine.grid import (
    DENOISER_BATCH_PX,
    DENOISER_PLANE_PX,
    DENOISER_TILE_PX,
    HALO_PX,
    MAX_BATCH,
    MAX_CANVAS_PX,
    Grid,
)

PROCESS_BYTES = 400 * 2**20
"""A worker that has imported torch and the domains, before its first block."""

DENOISER_BYTES_PX = {"float32": 1000, "bfloat16": 600}
"""Activations of the network for one pixel of a call."""

SOLVER_BYTES_PX = 180
"""Vectors of the data step for one pixel and channel of the canvas."""

BASELINE_BYTES_PX = 640
"""The hungriest classical method (the sparse factors of a biharmonic fill), likewise."""

MATRIX_BYTES_PX = 37
"""A projector's matrix and its transpose, mapped into memory: a pixel and stored view."""

DENOISER_SECONDS_PX = {"float32": 2.4e-6, "bfloat16": 1.4e-6}
"""One denoiser call on one core, a pixel."""

EVALUATIONS_A_LEVEL = {"pigdm": 3, "dps": 3, "daps": 5, "split-gibbs": 5, "repaint": 5}
"""Denoiser calls a level where it is not one, by the solvers' own settings; a VJP counts two."""

VJP_FACTOR = 4
"""Activations that a vector-Jacobian product keeps, against those of a call alone."""

VIEW_SECONDS_PX = 5e-8
"""One level's data step of a projector on one core: a pixel and view."""

LOOSE, TIGHT = 1e-2, 3e-5
"""Relative residuals at which the linear solves were timed: the default, and that of cut planes."""

SOLVE_SECONDS_PX = {
    "noisy mask": (1.8e-7, 1.11e-6),
    "exact mask": (4.0e-7, 8.2e-7),
    "identity": (8e-8, 8e-8),
    "pool": (1.4e-7, 5e-7),
    "fourier": (6.6e-7, 6.6e-7),
    "multi-coil": (3.6e-6, 3.6e-6),
    "cropped-blur": (2.6e-6, 2.6e-6),
}
"""One level's solve at either residual on one core, a pixel and channel (decisions/0016); it grows
by a power of the residual. Pictures cut out of their scenes take some 80 steps (0012)."""

OTHER_SOLVE_SECONDS_PX = (3.0e-7, 1.0e-6)
"""The same of operators that have no line of their own: blurs, coarser sensors, mosaics."""

START_SOLVES = 2
"""What the kriging that a chain starts from takes, in solves of a level."""

WRITE_SECONDS_PX = 5.5e-8
"""A pixel and channel read, written, read back, published, its pyramid made."""

BASELINE_SECONDS_PX = 5e-6
"""An iterative classical method on one core: a pixel and channel; a projector's: 3.5e-7 a view."""

CLOSED_FORM = frozenset({"fbp", "zero-filled", "bicubic", "telea", "navier-stokes", "wiener"})
"""Classical methods that do not iterate: a tenth of the others."""


LARGE_ITEM_BYTES = 32 * 2**20
"""Pixels of a float32 item that are handed over part by part; less is written at once."""

DRIVER_BYTES = 560 * 2**20
"""A driver with Ray, Prefect, torch and a domain imported, 540 MB; without Prefect it is 410."""

ITEM_BYTES = 12 * 2**10
"""What the driver keeps of an item: its plan, its manifest."""

RECEIPT_BYTES = 400
"""What the driver keeps of a block that is done."""

CHUNK_BYTES = 2500
"""What the driver holds of each block of the item being published: the ledger, thrice as JSON."""


def driver_bytes(num_items: int, num_blocks: int, most_blocks: int, largest_bytes: int) -> int:
    """Predict the resident memory of a driver.

    Args:
        num_items: of the plan.
        num_blocks: of the plan.
        most_blocks: of one item.
        largest_bytes: float32 pixels of the largest item. Written at once, it is held thrice.
    """
    whole = 3 * min(largest_bytes, LARGE_ITEM_BYTES)
    kept = ITEM_BYTES * num_items + RECEIPT_BYTES * num_blocks
    return DRIVER_BYTES + kept + CHUNK_BYTES * most_blocks + whole


COARSE_FACTORS = (4, 8)
"""Squares of the scale that guides large holes: the wider where the plane is larger than that scale
may be. Blocks start at multiples of the wider."""


def coarse_factor(grid: Grid) -> int:
    """Side of the squares that a plane is pooled by, for its large holes."""
    _, _, h, w = grid.shape
    small = (f for f in COARSE_FACTORS if h * w <= f**2 * MAX_CANVAS_PX)
    return next(small, COARSE_FACTORS[-1])


Canvas = tuple[int, int, int]
"""(z, h, w)."""


@dataclass(frozen=True)
class Cost:
    """Predictions for one block.

    Attributes:
        seconds: of the average block on one worker; those at the edges have less to read.
        peak_bytes: of the worker's resident memory, with the block before and the one after.
        output_bytes: written before compression.
    """

    seconds: float
    peak_bytes: int
    output_bytes: int


def predict(
    grid: Grid,
    operator: str,
    params: Mapping[str, Any],
    method: MethodSettings,
    dtype: str,
    *,
    input_bytes: int,
    model_bytes: int,
    batch_px: int = 0,
    num_lanes: int = 1,
    exact: bool = False,
) -> Cost:
    """Predict the largest block of an item, and the seconds of the average one.

    While a worker computes, the input of the block after is in memory already, and the result of
    the one before still is, once as pixels and once as the chunks that are written.

    Args:
        grid: of the item.
        operator: kind of operator.
        params: of the operator.
        method: how it is restored.
        dtype: of the network.
        input_bytes: of the item's whole measurement.
        model_bytes: of the model's files; 0 without a model.
        batch_px: pixels in a batch of the denoiser that all lanes share; 0: each has its own.
        num_lanes: blocks that a worker computes at the same time.
        exact: the data have no noise.
    """
    channels = grid.shape[0]
    share = math.prod(grid.canvas) / math.prod(grid.shape[1:])
    canvas = _unknown(grid, params)
    pixels = math.prod(canvas)
    if operator == "mask" and grid.tiled and method.kind == "solver":
        pixels = max(pixels, _coarse_pixels(grid))
    views = int(params.get("num_views", 0)) if operator in ("parallel-beam", "fan-beam") else 0
    block_input = math.ceil(input_bytes * share)
    block_output = 4 * channels * math.prod((grid.slices, grid.tile_h, grid.tile_w))
    memory = PROCESS_BYTES + block_input + 2 * block_output
    memory += MATRIX_BYTES_PX * _stored(operator, params, grid) * math.prod(grid.shape[2:])
    if method.kind == "solver":
        # Weights are float16 in the file, float32 while they are loaded, and live on beside it.
        memory += 4 * model_bytes
        lane = SOLVER_BYTES_PX * channels * pixels
        guided = method.name in ("pigdm", "dps")
        call = DENOISER_BYTES_PX[dtype] * (VJP_FACTOR if guided else 1)
        if guided or not batch_px:  # gradients are a lane's own
            lane += call * _denoiser_pixels(canvas, DENOISER_BATCH_PX)
        else:
            memory += call * _denoiser_pixels((MAX_BATCH, *canvas[1:]), batch_px)
    else:
        lane = BASELINE_BYTES_PX * channels * pixels
    memory += num_lanes * (block_input + lane)
    each = _seconds(channels, canvas, views, method, dtype, _kind(operator, params, exact))
    written = WRITE_SECONDS_PX * math.prod(grid.shape) / grid.num_blocks
    return Cost(
        seconds=each * math.prod(canvas) * _average_read(grid) + written,
        peak_bytes=int(memory),
        output_bytes=block_output,
    )


def _stored(operator: str, params: Mapping[str, Any], grid: Grid) -> int:
    """Views of which a matrix is kept: even scans of 180 degrees are folded by symmetry."""
    views = int(params.get("num_views", 0))
    if operator == "fan-beam":
        return views
    if operator != "parallel-beam":
        return 0
    if float(params.get("arc_degrees", 0.0)) != 180.0:
        return views
    return views // (4 if grid.shape[2] == grid.shape[3] and views % 2 == 0 else 2) + 2


def _unknown(grid: Grid, params: Mapping[str, Any]) -> Canvas:
    """What a block solves for: its largest read region, or more where light comes from beyond."""
    slices, h, w = grid.canvas
    rows, columns = params.get("canvas", (h, w))
    return slices, int(rows), int(columns)


def _average_read(grid: Grid) -> float:
    """Pixels that the average block reads, as a share of those of the largest."""
    _, depth, height, width = grid.shape
    sides = ((depth, grid.slices, 0), (height, grid.tile_h, grid.halo))
    share = 1.0
    for length, step, halo in (*sides, (width, grid.tile_w, grid.halo)):
        starts = range(0, length, step)
        read = sum(min(a + step + halo, length) - max(a - halo, 0) for a in starts)
        share *= read / len(starts) / min(step + 2 * halo, length)
    return share


def _kind(operator: str, params: Mapping[str, Any], exact: bool) -> str:
    """The line of SOLVE_SECONDS_PX that an operator has, if it has one."""
    if operator == "mask":
        return "exact mask" if exact else "noisy mask"
    return "cropped-blur" if "canvas" in params else operator


def _solve_seconds(kind: str, method: MethodSettings) -> float:
    """One solve of a pixel and channel, to the method's accuracy."""
    loose, tight = SOLVE_SECONDS_PX.get(kind, OTHER_SOLVE_SECONDS_PX)
    tolerance = float(method.options.get("tolerance") or LOOSE)
    share = math.log(tolerance / LOOSE) / math.log(TIGHT / LOOSE)
    return float(loose * (tight / loose) ** min(max(share, 0.0), 1.2))


def _coarse_pixels(grid: Grid) -> int:
    """Of the scale that guides the large holes of a plane, which is restored in one piece."""
    factor, (_, _, h, w) = coarse_factor(grid), grid.shape
    return math.ceil(h / factor) * math.ceil(w / factor)


def _denoiser_pixels(canvas: Canvas, batch_px: int) -> int:
    """Pixels of the largest call of the denoiser: some windows of at most a batch's pixels."""
    slices, h, w = canvas
    if h * w > DENOISER_PLANE_PX:
        h, w = (min(side, DENOISER_TILE_PX + 2 * HALO_PX) for side in (h, w))
    return h * w * max(1, min(slices, batch_px // (h * w)))


def _seconds(
    channels: int,
    canvas: Canvas,
    views: int,
    method: MethodSettings,
    dtype: str,
    kind: str,
) -> float:
    """Seconds a pixel of the canvas."""
    if method.kind == "baseline":
        iterative = 3.5e-7 * views if views else BASELINE_SECONDS_PX * channels
        return iterative / 10 if method.name in CLOSED_FORM else iterative
    data_step = VIEW_SECONDS_PX * views if views else _solve_seconds(kind, method) * channels
    if method.name == "kriging":
        return START_SOLVES * data_step
    start = START_SOLVES if method.options.get("start", "kriging") == "kriging" else 0
    denoiser = DENOISER_SECONDS_PX[dtype]
    if math.prod(canvas[1:]) > DENOISER_PLANE_PX:
        denoiser *= ((DENOISER_TILE_PX + 2 * HALO_PX) / DENOISER_TILE_PX) ** 2
    calls = EVALUATIONS_A_LEVEL.get(method.name, 1)
    return method.num_levels * (calls * denoiser + data_step) + start * data_step
