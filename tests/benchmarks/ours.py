"""Our solvers on a case, timed as the product runs them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusion_core.model import Model, solver_settings
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.posterior import make_solver
from flows.config import config_path, load_method
from flows.engine.methods import calibrated_method
from tests.benchmarks.cases import Case

PUBLISHED_LEVELS = 100
FEW_LEVELS: Mapping[str, int] = {"ct-sparse20": 12}
"""Evaluations of CovProx by task; 8 for the others."""


@dataclass(frozen=True)
class Method:
    """A solver with all that its pixels depend on.

    Attributes:
        name: in the results.
        solver: of diffusion_core.posterior.
        sigmas: noise levels, decreasing.
        options: of the solver.
    """

    name: str
    solver: str
    sigmas: torch.Tensor
    options: Mapping[str, Any] = field(default_factory=dict)


def few_levels(task: str) -> int:
    """Evaluations that CovProx is granted on a task."""
    return FEW_LEVELS.get(task, 8)


def covprox(task: str, num_levels: int | None = None, model: Path | None = None) -> Method:
    """CovProx as the product runs it with so many levels: the model's fit, else the task's file.

    Args:
        task: its name.
        num_levels: default as `few_levels` grants.
        model: directory of the model; default the starter.
    """
    levels = num_levels or few_levels(task)
    path = model or config_path("models", "starter")
    fits = solver_settings(path).get("tasks", {}).get(task, {})
    own = calibrated_method(load_method(task), fits, "mean", levels)
    sigmas = power_sigmas(levels, own.sigma_max, own.sigma_min, own.rho)
    return Method("covprox", "covprox", sigmas, own.options)


def accuracy(task: str) -> dict[str, Any]:
    """The accuracy of the linear solves, the same for CovProx and DiffPIR."""
    options = covprox(task).options
    return {name: options[name] for name in ("tolerance", "max_steps") if name in options}


def diffpir_published(task: str, lam: float, zeta: float) -> Method:
    """DiffPIR at 100 levels of its published schedule, from the adjoint in noise of sigma 157."""
    options = {"lam": lam, "zeta": zeta, "start": "adjoint", **accuracy(task)}
    return Method("diffpir", "diffpir", published_sigmas(), options)


def at_our_levels(task: str, solver: str, options: Mapping[str, Any]) -> Method:
    """Another solver from our start, on our levels, with as many evaluations."""
    solves = accuracy(task) if solver == "diffpir" else {}
    name, sigmas = f"{solver}-our-start", covprox(task).sigmas
    return Method(name, solver, sigmas, {"start": "kriging", **solves, **options})


def published_sigmas(num_levels: int = PUBLISHED_LEVELS) -> torch.Tensor:
    """DiffPIR's levels: DDPM's linear beta, time steps spaced as the square root of a ramp.

    Source: Zhu et al. 2023 (arXiv:2305.08995), section 3 ("quad" steps), and its code.
    """
    alphas = torch.cumprod(1.0 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
    sigmas = ((1.0 - alphas) / alphas).sqrt().flip(0)
    steps = torch.linspace(0.0, 1000.0**2, num_levels, dtype=torch.float64).sqrt().long()
    steps[-1] = 999
    return sigmas[steps]


@dataclass(frozen=True)
class Run:
    """A restored image in network units, and what it took."""

    x: torch.Tensor
    nfe: int
    seconds: float


def run(method: Method, case: Case, model: Model) -> Run:
    """Restore a case."""
    problem = case.problem
    solver = make_solver(method.solver, model.prior(problem.condition), method.options)
    draws = KeyedDraws(0, case.truth.record.source_digest, (0, 0, 0))
    denoise = model.denoiser(problem.condition)
    start = time.perf_counter()
    with torch.no_grad():
        result = solver(denoise, problem.operator, problem.y, problem.noise, method.sigmas, draws)
    seconds = time.perf_counter() - start
    return Run(result.x, result.num_denoiser_calls, seconds)
