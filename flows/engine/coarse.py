"""Large holes of a plane: its coarse scales, restored once, whatever the plane is cut into.

    blocks      read their windows one after the other --pool--> the plane at 1/4
    each worker restores that, once an item and slice: a pure function, the same on all of them
    each block  takes its window of the result as further data (diffusion_core/posterior/pyramid.py)

A plane that is not cut is pooled from its only block; the means are the same, and so the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import Mask
from diffusion_core.operators.base import Operator
from diffusion_core.posterior import make_solver
from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.pyramid import CoarseMeans, Pooled, coarse_means, pooled
from diffusion_core.protocols import Data, Denoiser, NoiseModel, Signal
from domains.base import Domain, Measurement, Problem
from flows.engine.cost import coarse_factor
from flows.engine.grid import MAX_CHUNK_PX, Region
from flows.engine.methods import LARGE_HOLES, solver_options
from flows.engine.plan import ItemPlan

KRIGING = {"tolerance": 1e-4, "max_steps": 1000}
"""Of the coarse scales: means of squares count as exact there, which takes a hundred steps."""


@dataclass(frozen=True)
class Found:
    """What the coarse scales of a plane say, and what they cost in evaluations at the finest."""

    means: CoarseMeans
    nfe: int


def fills_wide_holes(item: ItemPlan) -> bool:
    """Whether wide holes of an item are filled from coarse to fine."""
    return item.operator == "mask" and bool(item.method.options.get(LARGE_HOLES, False))


def pooled_problem(problem: Problem, factor: int) -> Pooled | None:
    """The data of a masked image pooled, or None if its operator is not a mask."""
    operator = problem.operator
    return pooled(problem.y, operator.mask, factor) if isinstance(operator, Mask) else None


def overview_of(
    item: ItemPlan,
    z: tuple[int, int],
    domain: Domain,
    read: Callable[[Region], Measurement],
) -> Pooled | None:
    """A plane pooled, read in windows no wider than a stored chunk's rows.

    Args:
        item: whose plane it is.
        z: first slice, and the one after the last.
        domain: makes problems of measurements.
        read: the measurement of a window.
    """
    factor, (_, _, h, w) = coarse_factor(item.grid), item.grid.shape
    rows: list[Pooled] = []
    for y0 in range(0, h, MAX_CHUNK_PX):
        region = Region(*z, y0, min(y0 + MAX_CHUNK_PX, h), 0, w)
        part = pooled_problem(domain.problem(read(region)), factor)
        if part is None:
            return None
        rows.append(part)
    mean = torch.cat([part.mean for part in rows], dim=-2)
    return Pooled(factor, mean, torch.cat([part.share for part in rows], dim=-2))


def coarse_scales(
    item: ItemPlan,
    overview: Pooled,
    noise: NoiseModel,
    prior: CovarianceTable,
    denoise: Denoiser,
    first: int,
) -> Found | None:
    """Restore the coarse scales of a plane; None if none of its holes is wide.

    For the mean by kriging, which no network betters there in the mean over images
    (infra/decisions/0029); samples are drawn by the item's own solver at
    every scale.

    Args:
        item: its method, and what its noise is keyed by.
        overview: the plane, pooled.
        noise: of its pixels.
        prior: the covariance table of the condition.
        denoise: of any canvas.
        first: global number of the first batch element.
    """
    method, prior = item.method, prior.far_sighted()
    if method.options.get("mode", "mean") == "sample":
        solver = make_solver(method.name, prior, solver_options(method.options))
    else:
        solver = make_solver("kriging", prior, KRIGING)
    sigmas = power_sigmas(method.num_levels, method.sigma_max, method.sigma_min, method.rho)
    evaluations = 0.0

    def restore(operator: Operator, y: Data, noise: NoiseModel, factor: int) -> Signal:
        nonlocal evaluations
        source = f"{item.record.source_digest}/{factor}"
        draws = KeyedDraws(item.seed, source, (first, 0, 0))
        result = solver(denoise, operator, y, noise, sigmas, draws)
        evaluations += result.num_denoiser_calls / factor**2
        return result.x

    made = coarse_means(overview, noise, restore)
    return None if made is None else Found(made, math.ceil(evaluations))
