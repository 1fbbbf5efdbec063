"""Posterior solvers, one a file, all with the signature of protocols.Solver."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_core.posterior.covariance import CovarianceTable
    from diffusion_core.protocols import Solver

SOLVERS = ("covprox", "diffpir", "dds", "kriging")
"""Names that `make_solver` knows."""


def make_solver(name: str, prior: CovarianceTable | None, options: Mapping[str, Any]) -> Solver:
    """A solver by name.

    Args:
        name: one of SOLVERS.
        prior: the covariance table of the condition; covprox and kriging need one.
        options: attributes of the solver's class, by name; the others keep their defaults.

    Raises:
        ValueError: if the name or an option is unknown, or a table is needed and missing.
    """
    from dataclasses import fields

    from diffusion_core.posterior.covprox import CovProx
    from diffusion_core.posterior.dds import DDS
    from diffusion_core.posterior.diffpir import DiffPIR
    from diffusion_core.posterior.kriging import Kriging

    classes: dict[str, Any] = {"covprox": CovProx, "diffpir": DiffPIR, "dds": DDS}
    classes["kriging"] = Kriging
    if name not in classes:
        raise ValueError(f"unknown solver '{name}': choose one of {', '.join(SOLVERS)}")
    solver = classes[name]
    known = [f.name for f in fields(solver) if f.name != "prior"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"solver {name} has no option '{unknown[0]}': it takes {', '.join(known)}")
    if prior is None and name in {"covprox", "kriging"}:
        raise ValueError(
            f"solver {name} needs a covariance table and the model has none for this condition: "
            "train it with validation data, or choose diffpir or dds"
        )
    made: Solver = solver(prior=prior, **options)
    return made
