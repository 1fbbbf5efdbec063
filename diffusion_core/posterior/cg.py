"""Preconditioned conjugate gradients on a batch, with scalars of its own for each element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class CGResult:
    """The solution and how good it is.

    Attributes:
        x: solution, shaped like the right-hand side.
        num_steps: steps taken (products with the matrix).
        relative_residual: |b - A x| / |b| by recursion, the worst of the batch.
    """

    x: Tensor
    num_steps: int
    relative_residual: float


def conjugate_gradient(
    matrix: Map,
    b: Tensor,
    precondition: Map | None = None,
    *,
    tolerance: float,
    max_steps: int,
    start: Tensor | None = None,
    scalar_dims: int = 1,
) -> CGResult:
    """Solve matrix(x) = b for symmetric positive (semi-)definite matrices, one per batch element.

    An element that has converged is frozen, so that its result does not depend on the others of
    its batch. Complex data are treated as real vectors, <u, v> = Re sum conj(u) v.

    Args:
        matrix: the product; acts on each element alone.
        b: right-hand sides (b *m).
        precondition: approximate inverse, symmetric positive definite; acts on each element alone.
        tolerance: stop at |b - A x| <= tolerance |b|.
        max_steps: products with the matrix at most.
        start: first guess; default 0.
        scalar_dims: leading axes that count elements: 1, or 2 if channels are systems of their own.

    Returns:
        The solution with the residual reached; no error is raised if that is above the tolerance,
        or not a number because the right-hand side was not.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, Algorithm 11.5.1.
    """
    axes = tuple(range(scalar_dims, b.ndim))

    def inner(u: Tensor, v: Tensor) -> Tensor:
        product = (u.conj() * v).real if u.is_complex() else u * v
        return product.sum(dim=axes, keepdim=True)

    goal = tolerance**2 * inner(b, b)

    def unsolved(squared: Tensor) -> Tensor:
        # NaN and infinity are no solution, though they compare as if they were.
        return ~((squared <= goal) & (squared < torch.inf))

    x = torch.zeros_like(b) if start is None else start.clone()
    r = b.clone() if start is None else b - matrix(x)
    squared = inner(r, r)
    active = unsolved(squared)
    z = r if precondition is None else precondition(r)
    p = z.clone()
    rho = inner(r, z)
    num_steps = 0
    while num_steps < max_steps and bool(active.any()):
        Ap = matrix(p)
        curvature = inner(p, Ap)
        # A breakdown (no curvature left to descend) freezes the element as convergence does.
        active = active & (curvature > 0)
        alpha = torch.where(active, rho / curvature, 0.0)
        x = x + alpha * p
        r = r - alpha * Ap
        squared = torch.where(active, inner(r, r), squared)
        active = active & unsolved(squared)
        z = r if precondition is None else precondition(r)
        rho_next = inner(r, z)
        p = z + torch.where(active, rho_next / rho, 0.0) * p
        rho = rho_next
        num_steps += 1
    scale = inner(b, b).clamp_min(torch.finfo(squared.dtype).tiny)
    return CGResult(x, num_steps, float((squared / scale).max().sqrt()))
