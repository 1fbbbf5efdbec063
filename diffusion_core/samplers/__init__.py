"""Samplers of the prior, one algorithm a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_core.protocols import Denoiser, NormalDraws, Signal

    Sampler = Callable[[Denoiser, Signal, Tensor, NormalDraws], Signal]

SAMPLERS = ("ancestral", "ddim", "euler", "heun", "dpm-solver", "churn")
"""Names that `make_sampler` knows; ddim is taken half-way, eta = 1/2."""


def make_sampler(name: str) -> Sampler:
    """A sampler by name, as (denoise, x, sigmas, draws) -> samples.

    Raises:
        ValueError: if the name is unknown.
    """
    from diffusion_core.samplers.ancestral import ancestral
    from diffusion_core.samplers.churn import churned_heun
    from diffusion_core.samplers.ddim import ddim
    from diffusion_core.samplers.dpm_solver import dpm_solver_2m
    from diffusion_core.samplers.euler import euler
    from diffusion_core.samplers.heun import heun

    samplers: dict[str, Sampler] = {
        "ancestral": ancestral,
        "ddim": lambda denoise, x, sigmas, draws: ddim(denoise, x, sigmas, draws, eta=0.5),
        "euler": lambda denoise, x, sigmas, _: euler(denoise, x, sigmas),
        "heun": lambda denoise, x, sigmas, _: heun(denoise, x, sigmas),
        "dpm-solver": lambda denoise, x, sigmas, _: dpm_solver_2m(denoise, x, sigmas),
        "churn": churned_heun,
    }
    if name not in samplers:
        raise ValueError(f"unknown sampler '{name}': choose one of {', '.join(SAMPLERS)}")
    return samplers[name]
