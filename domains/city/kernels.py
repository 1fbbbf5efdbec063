"""Blur kernels: a Gaussian, the path of a shaken camera, a lens sharp in its middle only."""

from __future__ import annotations

import math

import numpy as np

from domains.base import Array, BadInputError

REACH_STD = 4
"""Half-width of a Gaussian kernel in standard deviations: 6e-5 of it lies outside."""
NUM_PATH_STEPS = 400
NUM_JERKS = 6


def gaussian_kernel(std_px: float) -> Array:
    """A Gaussian sampled at pixel centres out to 4 standard deviations, float32, sum 1."""
    _require_positive(std_px)
    reach = math.ceil(REACH_STD * std_px)
    profile = np.exp(-0.5 * (np.arange(-reach, reach + 1) / std_px) ** 2)
    kernel = np.outer(profile, profile)
    return (kernel / kernel.sum()).astype(np.float32)


def motion_kernel(size_px: int, intensity: float, rng: np.random.Generator) -> Array:
    """The path of a point while the camera shakes: (size size) float32, sum 1.

    The heading wanders as Brownian motion and jerks a few times, the more the higher `intensity`:
    0 is a straight line, 1 turns by half a circle on the way, and as much at a jerk. The path is
    half to all of the kernel's size long, its centre of mass in the middle; a path that would
    leave the kernel is shortened. Time is spent evenly along it.

    Args:
        size_px: odd side of the kernel.
        intensity: 0 to 1.
        rng: of the path.

    Raises:
        BadInputError: if the size is even or below 3, or the intensity is out of range.

    Source: after the random paths of L. Borodenko's motionblur (2020), as DPS and its successors
        use them with the same two parameters; the draws are our own.
    """
    if size_px < 3 or size_px % 2 == 0 or not 0 <= intensity <= 1:
        raise BadInputError(
            f"a motion kernel has an odd size of 3 or more and an intensity of 0 to 1, not "
            f"{size_px} and {intensity}"
        )
    wander = rng.standard_normal(NUM_PATH_STEPS) * math.pi / math.sqrt(NUM_PATH_STEPS)
    jerks = np.zeros(NUM_PATH_STEPS)
    at = rng.integers(0, NUM_PATH_STEPS, NUM_JERKS)
    jerks[at] = rng.standard_normal(NUM_JERKS) * math.pi * (rng.random(NUM_JERKS) < intensity)
    heading = rng.uniform(0, 2 * math.pi) + intensity * np.cumsum(wander + jerks)
    length = rng.uniform(0.5, 1.0) * size_px
    steps = np.stack([np.sin(heading), np.cos(heading)]) * (length / NUM_PATH_STEPS)
    path = np.cumsum(steps, axis=1)
    path -= path.mean(axis=1, keepdims=True)
    half = size_px // 2
    path *= min(1.0, (half - 1) / np.abs(path).max())
    return _splat(path + half, size_px)


def _splat(points: Array, size: int) -> Array:
    """Points (2 n) shared out bilinearly among the pixels round them."""
    kernel = np.zeros((size, size))
    low = np.floor(points).astype(int)
    share = points - low
    for row in (0, 1):
        for column in (0, 1):
            weight = np.abs(1 - row - share[0]) * np.abs(1 - column - share[1])
            np.add.at(kernel, (low[0] + row, low[1] + column), weight)
    return (kernel / kernel.sum()).astype(np.float32)


def lens_kernels(std_px: tuple[float, float], grid: tuple[int, int]) -> Array:
    """Kernels of a lens on a grid over the image: (gh gw k k) float32, sums 1.

    A Gaussian of the first standard deviation in the middle of the image; outwards it grows along
    the radius, in proportion to the distance, to the second in the corners.
    """
    for std in std_px:
        _require_positive(std)
    reach = math.ceil(REACH_STD * max(std_px))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(float)
    rows, columns = (np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in grid)
    kernels = np.empty((*grid, *y.shape), np.float32)
    for i, v in enumerate(rows):
        for j, u in enumerate(columns):
            distance = math.hypot(v, u) / math.sqrt(2)
            radial = std_px[0] + (std_px[1] - std_px[0]) * distance
            angle = math.atan2(v, u)
            along = x * math.cos(angle) + y * math.sin(angle)
            across = y * math.cos(angle) - x * math.sin(angle)
            kernel = np.exp(-0.5 * ((along / radial) ** 2 + (across / std_px[0]) ** 2))
            kernels[i, j] = kernel / kernel.sum()
    return kernels


def _require_positive(std_px: float) -> None:
    if not std_px > 0:
        raise BadInputError(f"std_px must be above 0, not {std_px}")
