"""Muon: momentum whose update is orthogonalised, for convolution weights.

torch.optim.Muon takes matrices only; a convolution's weight is one after flattening, and here
almost every parameter is a convolution's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor


def orthogonalise(matrix: Tensor, num_steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: all singular values pushed into about [.7, 1.2].

    A quintic Newton-Schulz iteration; its coefficients trade exactness for speed.

    Args:
        matrix: (rows, columns), any scale.
        num_steps: iterations.
    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled so that the step's RMS is that of AdamW.

    Args:
        params: weights of two or more axes; flattened to (out, everything else).
        lr: learning rate, on AdamW's scale.
        momentum: decay of the running gradient.
        weight_decay: decoupled decay.
    Source: Liu et al. 2025 (arXiv:2502.16982) for the scale .2 sqrt(max(rows, columns)).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; gradients must be there."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        return loss

    def _update(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
        nesterov = torch.lerp(grad, momentum, group["momentum"])
        matrix = nesterov.flatten(1)
        update = orthogonalise(matrix).view_as(weight)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)
