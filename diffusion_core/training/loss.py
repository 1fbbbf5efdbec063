"""The denoising loss with learned uncertainty, and the noise levels it is taken at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.networks.local_unet import effective_sigma
from diffusion_core.networks.precond import Preconditioned
from diffusion_core.noise.densities import Histogram
from diffusion_core.training.patches import GOLDEN, Batch

Objective = Callable[[Preconditioned, Batch, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(model, batch, sigma (b,), eps) -> the loss, and the weighted error of each sample (b,)."""


@dataclass(frozen=True)
class SigmaDensity:
    """ln sigma ~ N(mean, std^2), mixed with a log-uniform share over a range.

    The normal part puts the effort where the loss can still fall, the uniform part keeps every
    level that a solver may ask for in training.
    """

    mean: float = -1.5
    std: float = 1.3
    uniform_share: float = 0.25
    low: float = 0.01
    high: float = 4.0

    def quantile(self, u: Float[Tensor, " n"], pick: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """sigma at u in (0, 1); `pick` in [0, 1) chooses the part of the mixture."""
        z = math.sqrt(2.0) * torch.erfinv(2 * u.clamp(1e-4, 1 - 1e-4) - 1)
        normal = (self.mean + self.std * z).exp()
        uniform = self.low * (self.high / self.low) ** u
        return torch.where(pick < self.uniform_share, uniform, normal).clamp(
            self.low / 2, self.high * 2
        )


def levels_of(first: int, count: int, density: SigmaDensity | Histogram) -> Float[Tensor, " count"]:
    """Noise levels of samples first .. first + count - 1: spread evenly over the density.

    Golden-ratio sequences fill the unit square evenly, so a small batch covers every level; the
    irrational offsets keep the level from locking on to the condition's own sequence.
    """
    n = torch.arange(first, first + count, dtype=torch.float64)
    u = (n * 0.7548776662466927 + 0.5) % 1.0
    if isinstance(density, Histogram):  # learned: see noise/densities.py
        return density.quantile(u).exp().float()
    pick = (n * 0.5698402909980532 + GOLDEN) % 1.0
    return density.quantile(u, pick).float()


def denoising_loss(
    model: Preconditioned, batch: Batch, sigma: Float[Tensor, " b"], eps: Float[Tensor, "b 3 h w"]
) -> tuple[Tensor, Float[Tensor, " b"]]:
    """Mean of lambda(sigma) |D - x0|^2 e^{-u} + u, and the weighted error of each sample.

    Args:
        model: D and its uncertainty head.
        batch: patches; the loss looks at channels in use only, and of images that lack pixels at
            all measured ones, of which the network is shown a part. So it cannot know which of the
            pixels it lacks will be asked for, and what is best is E[x0 | shown pixels of x].
        sigma: noise level of each sample.
        eps: standard normal noise.
    Source: Karras et al. 2024 (arXiv:2312.02696), equation 14; lambda = 1 / c_out^2. For missing
    pixels Daras et al. 2023 (arXiv:2305.19256), equation 3.2.
    """
    in_use = batch.channels[:, :, None, None]
    x = (batch.x0 + sigma[:, None, None, None] * eps) * in_use
    if batch.measured is None or batch.shown is None:
        D_x = model(x, sigma, batch.condition, guide=batch.guide)
        squared = ((D_x - batch.x0) * in_use).square().mean(dim=(2, 3)).sum(dim=1)
        weighted = _weight(sigma, model.sigma_data) * squared / batch.channels.sum(dim=1)
    else:
        missing = (1 - batch.shown) * in_use
        D_x = model(x * batch.shown, sigma, batch.condition, guide=batch.guide, missing=missing)
        asked = batch.measured * in_use
        weight = _weight(effective_sigma(sigma, missing), model.sigma_data)
        squared = (weight * ((D_x - batch.x0) * asked).square()).sum(dim=(1, 2, 3))
        weighted = squared / asked.sum(dim=(1, 2, 3)).clamp(min=1)
    u = model.uncertainty(sigma, batch.condition)
    return (weighted * (-u).exp() + u).mean(), weighted.detach()


def _weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = 1 / c_out^2; shape of sigma."""
    weight: Tensor = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight
