"""What every sampler asks of its noise levels."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def checked_levels(sigmas: Tensor) -> list[float]:
    """The levels as numbers.

    Raises:
        ValueError: if there are fewer than two, or they do not strictly decrease, or go below 0.
    """
    levels = [float(s) for s in sigmas]
    decreasing = all(a > b for a, b in itertools.pairwise(levels))
    if len(levels) < 2 or not decreasing or levels[-1] < 0:
        raise ValueError(f"noise levels must strictly decrease, none below 0: {levels}")
    return levels


def per_sample(sigma: float, x: Tensor) -> Tensor:
    """One level for the whole batch, as the denoiser wants it: (b,)."""
    return torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device)
