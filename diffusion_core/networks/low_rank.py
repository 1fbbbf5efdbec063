"""Low-rank fine-tuning: every convolution learns a small correction of its frozen weight.

The correction is a parametrisation of the weight: the network is called as ever, at no cost a
pixel, and `merged` leaves plain weights behind. What trains is few numbers, so that eight images
cannot bend it as far from what it knew as they bend all weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffusion_core.networks.local_unet import stem_of
from diffusion_core.networks.precond import STEM, Preconditioned


class LowRankUpdate(nn.Module):
    """weight -> weight + up down / sqrt(rank), of a weight flattened to (out, everything else).

    `up` begins at 0, so that the network begins as it was. The scale keeps the size of a step the
    same whatever the rank.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; Kalajdzievski 2023 (arXiv:2312.03732)
    for the root of the rank.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        rank = min(rank, rows, columns)
        self.down = nn.Parameter(torch.empty(rank, columns))
        self.up = nn.Parameter(torch.zeros(rows, rank))
        nn.init.normal_(self.down, std=columns**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """The corrected weight; float32 also under autocast, or merging would change it."""
        with torch.autocast(weight.device.type, enabled=False):
            update = self.up @ self.down / len(self.down) ** 0.5
        return weight + update.view_as(weight)


def add_low_rank(module: Preconditioned, rank: int) -> None:
    """Freeze the network, in place, but for a correction of `rank` of each convolution's weight.

    The uncertainty head learns on: it weighs the loss, whose level is another on other images.

    Args:
        module: D, on the CPU; call it where initial weights are seeded.
        rank: of the corrections, 1 or more; of narrow convolutions at most their width.
    """
    module.network.requires_grad_(requires_grad=False)
    for layer in _convolutions(module):
        parametrize.register_parametrization(layer, "weight", LowRankUpdate(layer.weight, rank))


def merged(module: Preconditioned) -> Preconditioned:
    """A network of plain weights, to which the corrections are added for good; in its mode.

    One without corrections is copied; one that is told of missing pixels forgets those inputs, and
    is the same where none is missing.
    """
    weights = {n: v for n, v in module.state_dict().items() if ".parametrizations." not in n}
    for name, layer in module.named_modules():
        if parametrize.is_parametrized(layer):
            weights[f"{name}.weight"] = layer.weight.detach()
    # A copy would share the class that carries the parametrisation, and lose it for both.
    config = {k: v for k, v in module.network.config.items() if k != "sees_missing"}
    plain = Preconditioned(type(module.network)(**config), module.sigma_data)
    if "sees_missing" in module.network.config:
        weights[STEM] = stem_of(weights[STEM], sees_missing=False)
    plain.load_state_dict(weights)
    plain.train(module.training).requires_grad_(requires_grad=False)
    return plain.to(next(module.parameters()).device)


def _convolutions(module: Preconditioned) -> list[nn.Conv2d]:
    return [layer for layer in module.network.modules() if isinstance(layer, nn.Conv2d)]
