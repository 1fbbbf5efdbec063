"""Exponential moving average of the weights: what is shipped, and what restores best."""

from __future__ import annotations

import copy

import torch
from torch import nn

from diffusion_core.networks.precond import Preconditioned


class Ema:
    """A shadow of a module whose decay grows from 0, so that early steps are soon forgotten.

    Args:
        module: the network in training.
        decay: final decay a step.
    """

    def __init__(self, module: Preconditioned, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(requires_grad=False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after `step` steps (from 1)."""
        decay = min(self.decay, step / (step + 10))
        shadows = self.module.state_dict()
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                shadows[name].lerp_(value, 1 - decay)
            else:
                shadows[name].copy_(value)
