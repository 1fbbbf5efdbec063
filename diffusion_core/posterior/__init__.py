"""Posterior solvers, one a file, all with the signature of protocols.Solver.

name            what it is                                            operators   NFE a level
covprox         ours: mean or sample by the measured covariance       any         1
diffpir, dds    an isotropic weight; a few CG steps                   linear      1
kriging         the Gaussian prior alone                              linear      0 in all
ddrm, ddnm      exact along singular directions                       spectral    1
pigdm           a Gaussian likelihood of x, through the network       linear      3
dps             the yardstick of many levels                          any         3
red-diff        one image, descended by Adam                          any         1
daps            ODE, draw by the data, fresh noise                    any         5
split-gibbs     exact conditionals in turn: the reference             any         10
repaint         known pixels pasted, levels repeated                  masks       5
distilled       a student in one to four passes (its own models)      linear      1
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_core.posterior.covariance import CovarianceTable
    from diffusion_core.protocols import Solver

STANDARD = ("covprox", "diffpir", "dds", "kriging")
"""What an evaluation compares unless it is told otherwise: solvers of every linear task."""

SOLVERS = (
    *STANDARD,
    *("ddrm", "ddnm", "pigdm", "dps", "red-diff", "daps", "split-gibbs", "repaint"),
)
"""Solvers that work with any denoiser."""

DISTILLED = "distilled"
"""The solver of distilled models (`sashiko distill`), which have no other but kriging."""

METHODS = (*SOLVERS, DISTILLED)
"""Names that `make_solver` knows."""

_NEED_TABLE = {"covprox", "kriging", DISTILLED}


def make_solver(name: str, prior: CovarianceTable | None, options: Mapping[str, Any]) -> Solver:
    """A solver by name.

    Args:
        name: one of METHODS.
        prior: the covariance table of the condition; covprox, kriging and distilled need one.
        options: attributes of the solver's class, by name; the others keep their defaults.

    Raises:
        ValueError: if the name or an option is unknown, or a table is needed and missing.
    """
    from dataclasses import fields

    classes = _classes()
    if name not in classes:
        raise ValueError(f"unknown solver '{name}': choose one of {', '.join(METHODS)}")
    solver = classes[name]
    known = [f.name for f in fields(solver) if f.name != "prior"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"solver {name} has no option '{unknown[0]}': it takes {', '.join(known)}")
    if prior is None and name in _NEED_TABLE:
        raise ValueError(
            f"solver {name} needs a covariance table and the model has none for this condition: "
            "train it with validation data, or choose diffpir or dds"
        )
    made: Solver = solver(prior=prior, **options)
    return made


def _classes() -> dict[str, Any]:
    """Every solver's class, by name; imported late, that the command answers at once."""
    from diffusion_core.posterior.covprox import CovProx
    from diffusion_core.posterior.daps import DAPS
    from diffusion_core.posterior.ddnm import DDNM
    from diffusion_core.posterior.ddrm import DDRM
    from diffusion_core.posterior.dds import DDS
    from diffusion_core.posterior.diffpir import DiffPIR
    from diffusion_core.posterior.distilled import Distilled
    from diffusion_core.posterior.dps import DPS
    from diffusion_core.posterior.kriging import Kriging
    from diffusion_core.posterior.pigdm import PiGDM
    from diffusion_core.posterior.red_diff import REDDiff
    from diffusion_core.posterior.repaint import RePaint
    from diffusion_core.posterior.split_gibbs import SplitGibbs

    standard = dict(zip(STANDARD, (CovProx, DiffPIR, DDS, Kriging), strict=True))
    spectral = {"ddrm": DDRM, "ddnm": DDNM}
    guided = {"pigdm": PiGDM, "dps": DPS, "red-diff": REDDiff}
    sampled = {"daps": DAPS, "split-gibbs": SplitGibbs, "repaint": RePaint, DISTILLED: Distilled}
    return {**standard, **spectral, **guided, **sampled}
