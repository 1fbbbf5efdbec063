"""Samplers of the prior, one algorithm a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_core.protocols import Denoiser, NormalDraws, Signal

    Sampler = Callable[[Denoiser, Signal, Tensor, NormalDraws], Signal]

SAMPLERS = ("ancestral", "ddim", "euler", "heun", "dpm-solver", "churn")
"""Names that `make_sampler` knows. As it comes ddim is deterministic, which is euler."""

_OPTIONS = {"ddim": {"eta"}, "churn": {"churn"}}


def make_sampler(name: str, options: Mapping[str, Any] | None = None) -> Sampler:
    """A sampler by name, as (denoise, x, sigmas, draws) -> samples.

    Args:
        name: one of SAMPLERS.
        options: `eta` of ddim; `churn` (a churn.Churn) of churn; the others have none.

    Raises:
        ValueError: if the name or an option is unknown.
    """
    from diffusion_core.samplers.ancestral import ancestral
    from diffusion_core.samplers.churn import churned_heun
    from diffusion_core.samplers.ddim import ddim
    from diffusion_core.samplers.dpm_solver import dpm_solver_2m
    from diffusion_core.samplers.euler import euler
    from diffusion_core.samplers.heun import heun

    samplers: dict[str, Sampler] = {
        "ancestral": ancestral,
        "ddim": ddim,
        "euler": lambda denoise, x, sigmas, _: euler(denoise, x, sigmas),
        "heun": lambda denoise, x, sigmas, _: heun(denoise, x, sigmas),
        "dpm-solver": lambda denoise, x, sigmas, _: dpm_solver_2m(denoise, x, sigmas),
        "churn": churned_heun,
    }
    if name not in samplers:
        raise ValueError(f"unknown sampler '{name}': choose one of {', '.join(SAMPLERS)}")
    options = dict(options or {})
    unknown = sorted(set(options) - _OPTIONS.get(name, set()))
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}")
    return partial(samplers[name], **options)
