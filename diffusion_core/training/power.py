"""Averages of the weights whose length is chosen after training.

    theta_g(t) = (g + 1) / t^(g + 1)  integral_0^t  s^g theta(s) ds

A power-function average has no time scale of its own: its length (the standard deviation of its
weights over time) is a fixed share of the training so far. Two of them are kept, and snapshots of
both at evenly spread steps; any other length is then a combination of the snapshots, the one whose
weights over time come nearest to those of the average wanted.

    SNAPSHOTS/step-000001000/average-0.safetensors  average-1.safetensors
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_core.networks.precond import Preconditioned
from diffusion_core.training.files import folders_by_step, publish, staging_for, step_folder

LENGTHS = (0.05, 0.10)
"""Of the two averages that are kept. Source: Karras et al. 2024, section 3.1."""
LONGEST = 1 / math.sqrt(12)
"""Of the mean of all weights since the start, g = 0."""


def length_of(exponent: float) -> float:
    """Standard deviation of an average's weights over time, as a share of the training.

    Source: Karras et al. 2024 (arXiv:2312.02696), equation 127 of appendix C.
    """
    g = exponent
    return math.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3)))


def exponent_of(length: float) -> float:
    """The exponent g of an average of this length.

    Raises:
        ValueError: if the length is not above 0 and at most LONGEST.
    """
    if not 0 < length <= LONGEST + 1e-12:
        raise ValueError(f"an average's length is above 0 and at most {LONGEST:.3f}, not {length}")
    inverse = 1 / length**2
    # (g + 2)^2 (g + 3) = (g + 1) / length^2 has one root above -1 of slope > 0: the largest.
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots.real.max()))


class PowerAverage:
    """A power-function average of a module's weights.

    Args:
        module: the network in training, before its first step.
        length: as a share of the training.
    """

    def __init__(self, module: Preconditioned, length: float) -> None:
        self.exponent = exponent_of(length)
        self.module = copy.deepcopy(module).eval().requires_grad_(requires_grad=False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after `step` steps (from 1). Source: ibid., equation 123."""
        share = 1 - (1 - 1 / step) ** (self.exponent + 1)
        shadows = self.module.state_dict()
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                shadows[name].lerp_(value, share)
            else:
                shadows[name].copy_(value)


def average_file(number: int) -> str:
    """Name of the file of an average in a folder of a step."""
    return f"average-{number}.safetensors"


def snapshot_steps(num_steps: int, num_snapshots: int) -> list[int]:
    """The steps after which snapshots are kept: evenly spread, the last step among them."""
    if not num_snapshots:
        return []
    return sorted(
        {max(1, round(k * num_steps / num_snapshots)) for k in range(1, num_snapshots + 1)}
    )


def save_snapshot(folder: Path, step: int, averages: Sequence[PowerAverage]) -> None:
    """Write folder/step-NNNNNNNNN by rename; one that is there already is replaced."""
    final = step_folder(folder, step)
    staging = staging_for(final)
    for number, average in enumerate(averages):
        tensors = {k: v.contiguous() for k, v in average.module.state_dict().items()}
        save_file(tensors, staging / average_file(number))
    publish(staging, final)


def reconstruct(
    folder: Path, length: float, step: int, lengths: Sequence[float] = LENGTHS
) -> dict[str, Tensor]:
    """The weights' average of any length after `step` steps, from snapshots up to then.

    One snapshot is in memory at a time.

    Args:
        folder: of the snapshots.
        length: wanted, as a share of the training.
        step: a snapshot of it must be there.
        lengths: of the averages that were kept.

    Raises:
        FileNotFoundError: if there is no snapshot of that step.
        ValueError: if there is no average of that length.

    Source: Karras et al. 2024, section 3.2, algorithm 3.
    """
    found = [(s, path) for s, path in folders_by_step(folder) if s <= step]
    if not found or found[-1][0] != step:
        raise FileNotFoundError(f"{folder} has no snapshot of step {step}")
    kept = [(s, exponent_of(one)) for s, _ in found for one in lengths]
    files = [path / average_file(n) for _, path in found for n in range(len(lengths))]
    factors = combination(kept, (step, exponent_of(length)))
    total: dict[str, Tensor] = {}
    for factor, file in zip(factors, files, strict=True):
        for name, value in load_file(file).items():
            if name not in total:
                total[name] = torch.zeros_like(value, dtype=torch.float64)
            total[name] += factor * value.double()
    return {name: value.float() for name, value in total.items()}


def combination(
    kept: Iterable[tuple[float, float]], wanted: tuple[float, float]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Factors of kept averages, given as (step, exponent), that come nearest to another one.

    Least squares between weights over time; least in size too, for neighbours are nearly alike
    and factors that cancel each other would magnify rounding.
    """
    kept = list(kept)
    gram = np.array([[_overlap(a, b) for b in kept] for a in kept])
    target = np.array([_overlap(a, wanted) for a in kept])
    # Each weighting scaled to norm 1: late ones are far flatter than early ones.
    scale = 1 / np.sqrt(np.diag(gram))
    values, vectors = np.linalg.eigh(gram * scale[:, None] * scale)
    usable = values > 1e-9 * values[-1]
    inverse = (vectors[:, usable] / values[usable]) @ vectors[:, usable].T
    factors: np.ndarray[tuple[int], np.dtype[np.float64]] = scale * (inverse @ (scale * target))
    return factors / factors.sum()


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Integral of the product of two averages' weights over time, given as (step, exponent)."""
    (t, g), (s, h) = one, other
    first = min(t, s)
    both = (g + 1) * (h + 1) / (g + h + 1)
    return both * (first / t) ** (g + 1) * (first / s) ** (h + 1) / first
