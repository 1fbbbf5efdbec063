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
from flows.engine.grid import DENOISER_BATCH_PX, DENOISER_PLANE_PX, DENOISER_TILE_PX, HALO_PX, Grid

PROCESS_BYTES = 480 * 2**20
"""A worker that has imported torch and the domains, before its first block."""

DENOISER_BYTES_PX = 900
"""Activations of the network for one pixel of a call, float32."""

SOLVER_BYTES_PX = 260
"""Vectors of the data step for one pixel and channel of the canvas."""

DENOISER_SECONDS_PX = {"float32": 6e-6, "bfloat16": 3e-6}
"""One denoiser call on one core, a pixel."""

DATA_STEP_SECONDS_PX = {"parallel-beam": 9e-6, "fourier": 6e-6, "mask": 9e-6}
"""One level's data step on one core, a pixel and channel; other operators as "fourier"."""

BASELINE_SECONDS_PX = {"parallel-beam": 3e-5, "fourier": 2e-5, "mask": 4e-5}
"""One classical restoration on one core, a pixel and channel."""

MATRIX_BYTES_PX = 2 * 8 * 3
"""A projector's matrix and its transpose, mapped into memory: a pixel and view."""


@dataclass(frozen=True)
class Cost:
    """Predictions for one block.

    Attributes:
        seconds: on one worker.
        peak_bytes: of the worker's resident memory.
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
) -> Cost:
    """Predict the largest block of an item.

    Args:
        grid: of the item.
        operator: kind of operator.
        params: of the operator.
        method: how it is restored.
        dtype: of the network.
        input_bytes: of the item's whole measurement.
        model_bytes: of the model's files; 0 without a model.
    """
    channels = grid.shape[0]
    pixels = math.prod(grid.canvas)
    share = pixels / math.prod(grid.shape[1:])
    memory = PROCESS_BYTES + SOLVER_BYTES_PX * channels * pixels + math.ceil(input_bytes * share)
    if operator == "parallel-beam":
        views = int(params.get("num_views", 0))
        memory += MATRIX_BYTES_PX * views * grid.shape[2] * grid.shape[3]
    if model_bytes and method.kind == "solver":
        # Weights are float16 in the file, float32 while they are loaded, and live on beside it.
        memory += 4 * model_bytes + DENOISER_BYTES_PX * _denoiser_pixels(grid)
    return Cost(
        seconds=_seconds(operator, channels, method, dtype) * pixels,
        peak_bytes=int(memory),
        output_bytes=4 * channels * math.prod((grid.slices, grid.tile_h, grid.tile_w)),
    )


def _denoiser_pixels(grid: Grid) -> int:
    """Pixels of the largest call of the denoiser."""
    slices, h, w = grid.canvas
    if h * w > DENOISER_PLANE_PX:
        side = DENOISER_TILE_PX + 2 * HALO_PX
        return min(h, side) * min(w, side)
    return h * w * max(1, min(slices, DENOISER_BATCH_PX // (h * w)))


def _seconds(operator: str, channels: int, method: MethodSettings, dtype: str) -> float:
    """Seconds a pixel of the canvas."""
    if method.kind == "baseline":
        return BASELINE_SECONDS_PX.get(operator, BASELINE_SECONDS_PX["fourier"]) * channels
    data_step = DATA_STEP_SECONDS_PX.get(operator, DATA_STEP_SECONDS_PX["fourier"]) * channels
    if method.name == "kriging":
        return data_step
    return method.num_levels * (DENOISER_SECONDS_PX[dtype] + data_step)
