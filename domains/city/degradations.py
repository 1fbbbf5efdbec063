"""Damage that city images suffer: missing pixels, strokes, boxes, blur."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from domains.base import Array, BadInputError, Item, Measurement, Task
from domains.city.kernels import gaussian_kernel, lens_kernels, motion_kernel
from domains.city.patterns import clouds, slc_off
from domains.imaging import Units, measure
from domains.keyed import keyed_rng, slice_numbers, slice_rngs

Missing = Callable[[int, int, float, np.random.Generator], Array]


def simulate(item: Item, units: Units, task: Task, seed: int) -> Measurement:
    """Degrade a clean image as the task says.

    Operator parameters:
        mask: pattern "random", "strokes", "moving-strokes" (of a clip), "box", "slc-off" or
            "clouds"; missing_share of the pixels (box: of the area; slc-off: about).
        blur: kernel "gaussian", std_px; or "motion", size_px, intensity: keyed, one an item.
        varying-blur: kernel "lens", std_px (in the middle, in the corners), grid (rows, columns).
        pool, downsample: factor.
        mosaic: pattern.

    Raises:
        BadInputError: if the task asks for what there is not, or the image does not suit it.
    """
    params, arrays = dict(task.operator_params), {}
    if task.operator == "mask":
        arrays["mask"] = ~missing_pixels(item, params, seed)
    elif task.operator == "blur":
        arrays["kernel"] = blur_kernel(item, params, seed)
        params["shared_arrays"] = ["kernel"]
    elif task.operator == "varying-blur":
        arrays["kernels"] = varying_kernels(params)
        params["shared_arrays"] = ["kernels"]
    return measure(item, units, task, seed, params, arrays)


def missing_pixels(item: Item, params: Mapping[str, Any], seed: int) -> Array:
    """(z 1 h w), True where pixels go missing in all channels; each frame has its own mask."""
    if params["pattern"] == "moving-strokes":
        return moving_strokes(item, float(params["missing_share"]), seed)
    pattern = _choose(PATTERNS, params["pattern"], "pattern of missing pixels")
    h, w = item.record.shape[2:]
    share = float(params["missing_share"])
    if not 0 < share < 1:
        raise BadInputError(f"missing_share must lie between 0 and 1, not {share}")
    rngs = slice_rngs(seed, item.record, f"mask-{params['pattern']}")
    return np.stack([pattern(h, w, share, rng) for rng in rngs])[:, None]


def random_pixels(height: int, width: int, share: float, rng: np.random.Generator) -> Array:
    """Exactly round(share h w) pixels, anywhere."""
    missing = np.zeros(height * width, bool)
    missing[rng.permutation(height * width)[: round(share * height * width)]] = True
    return missing.reshape(height, width)


def box(height: int, width: int, share: float, rng: np.random.Generator) -> Array:
    """The centre rectangle of the image's proportions that has this share of the area."""
    del rng  # nothing is random about it
    h, w = round(height * math.sqrt(share)), round(width * math.sqrt(share))
    missing = np.zeros((height, width), bool)
    top, left = (height - h) // 2, (width - w) // 2
    missing[top : top + h, left : left + w] = True
    return missing


def strokes(height: int, width: int, share: float, rng: np.random.Generator) -> Array:
    """Free-form strokes of a round brush until at least this share is covered.

    A stroke walks 4 to 10 segments, bending by up to 60 degrees a step; brush and steps are
    proportional to the shorter side (widths of 3 to 7% of it). Source: after the free-form masks of
    Yu et al. 2019 (arXiv:1806.03589), appendix.
    """
    side = min(height, width)
    missing = np.zeros((height, width), bool)
    while missing.mean() < share:
        point = np.array([rng.uniform(0, height), rng.uniform(0, width)])
        heading = rng.uniform(0, 2 * math.pi)
        radius = max(rng.uniform(0.015, 0.035) * side, 1.0)
        for _ in range(int(rng.integers(4, 11))):
            heading += rng.uniform(-math.pi / 3, math.pi / 3)
            step = rng.uniform(0.05, 0.15) * side
            end = point + step * np.array([math.sin(heading), math.cos(heading)])
            _draw_segment(missing, point, end, radius)
            point = end
            if missing.mean() >= share:
                break
    return missing


def moving_strokes(item: Item, share: float, seed: int) -> Array:
    """One mask of strokes that moves over the frames of a clip, round its borders: (z 1 h w).

    Each frame moves it on by the same few pixels, 1 to 4 either way, as its source counts frames:
    part of a clip has the masks of the whole.
    """
    if not 0 < share < 1:
        raise BadInputError(f"missing_share must lie between 0 and 1, not {share}")
    rng = keyed_rng(seed, item.record.source_digest, "mask-moving-strokes", 0)
    h, w = item.record.shape[2:]
    drawn = strokes(h, w, share, rng)
    step = rng.integers(1, 5, 2) * rng.choice([-1, 1], 2)
    frames = [np.roll(drawn, tuple(n * step), (0, 1)) for n in slice_numbers(item.record)]
    return np.stack(frames)[:, None]


def _draw_segment(missing: Array, start: Array, end: Array, radius: float) -> None:
    """Mark the pixels whose centres lie within radius of a segment, points as (row, column)."""
    low = np.maximum(np.floor(np.minimum(start, end) - radius), 0).astype(int)
    high = np.minimum(np.ceil(np.maximum(start, end) + radius) + 1, missing.shape).astype(int)
    if (low >= high).any():
        return  # wholly outside
    rows, columns = np.ogrid[low[0] : high[0], low[1] : high[1]]
    along = end - start
    length2 = max(float(along @ along), 1e-12)
    t = ((rows - start[0]) * along[0] + (columns - start[1]) * along[1]) / length2
    t = np.clip(t, 0, 1)
    distance2 = (rows - start[0] - t * along[0]) ** 2 + (columns - start[1] - t * along[1]) ** 2
    missing[low[0] : high[0], low[1] : high[1]] |= distance2 <= radius**2


def blur_kernel(item: Item, params: Mapping[str, Any], seed: int) -> Array:
    """The kernel that a task names, one for all frames: float32, sum 1."""

    def gaussian() -> Array:
        return gaussian_kernel(float(params["std_px"]))

    def motion() -> Array:
        rng = keyed_rng(seed, item.record.source_digest, "motion", 0)
        return motion_kernel(int(params["size_px"]), float(params["intensity"]), rng)

    make = _choose({"gaussian": gaussian, "motion": motion}, params["kernel"], "blur kernel")
    kernel: Array = make()
    return kernel


def varying_kernels(params: Mapping[str, Any]) -> Array:
    """The grid of kernels that a task names, (gh gw kh kw)."""
    _choose({"lens": lens_kernels}, params["kernel"], "varying blur")
    centre, corner = params["std_px"]
    rows, columns = params["grid"]
    return lens_kernels((float(centre), float(corner)), (int(rows), int(columns)))


def _choose(known: Mapping[str, Callable[..., Any]], name: str, what: str) -> Any:
    if name not in known:
        raise BadInputError(f"unknown {what} '{name}': choose one of {', '.join(known)}")
    return known[name]


PATTERNS: Mapping[str, Missing] = {
    "random": random_pixels,
    "strokes": strokes,
    "box": box,
    "slc-off": slc_off,
    "clouds": clouds,
}
