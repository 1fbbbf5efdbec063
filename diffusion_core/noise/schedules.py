"""Schedules: decreasing sequences of noise levels."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def power_sigmas(
    num_levels: int, sigma_max: float, sigma_min: float, rho: float = 7.0
) -> Float[Tensor, " levels"]:
    """Noise levels evenly spaced in sigma^(1/rho), from sigma_max down to sigma_min, both included.

    Args:
        num_levels: >= 1; a single level is sigma_max.
        sigma_max: first level, in data units.
        sigma_min: last level, > 0 and <= sigma_max.
        rho: 1 spaces evenly in sigma; large values approach even spacing in log sigma.

    Returns:
        float64 levels, decreasing.

    Raises:
        ValueError: if an argument is out of range.

    Source: Karras et al. 2022 (arXiv:2206.00364), Equation 5, without the final 0.
    """
    if num_levels < 1 or rho <= 0 or not 0 < sigma_min <= sigma_max:
        raise ValueError(
            "levels need num_levels >= 1, rho > 0 and 0 < sigma_min <= sigma_max, not "
            f"{num_levels=}, {rho=}, {sigma_min=}, {sigma_max=}"
        )
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = torch.linspace(first, last, num_levels, dtype=torch.float64) ** rho
    sigmas[0] = sigma_max  # exactly, whatever the roots round to
    if num_levels > 1:
        sigmas[-1] = sigma_min
    return sigmas
