"""How fast a network trains, against what the device can do at most."""

from __future__ import annotations

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion_core.networks.local_unet import NUM_CHANNELS
from diffusion_core.networks.precond import Preconditioned

TRAINING_PASSES = 3
"""Of a forward's work: the forward, and the gradients of activations and of weights."""
_SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
_BUDGET_S = 0.25


def flop_per_pixel(model: Preconditioned, side: int = 64) -> float:
    """Floating-point operations of one evaluation, for a pixel; a multiply-add counts two.

    Convolutions are counted, in one evaluation of an empty image; the modulation, whose products
    are few and an image's, not a pixel's, is left out.

    Args:
        model: D, on any device.
        side: of the image counted on, a multiple of the network's stride.
    """
    stride = model.network.stride
    side = -(-side // stride) * stride
    device = next(model.parameters()).device
    x = torch.zeros(1, NUM_CHANNELS, side, side, device=device)
    sigma = torch.ones(1, device=device)
    condition = torch.zeros(1, dtype=torch.long, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, sigma, condition)
    convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    return float(convolutions) / side**2


def measured_peak(device: str, *, bfloat16: bool) -> float:
    """FLOP/s of the best square matrix product found in about a second, with torch's threads.

    A measured roof: what a vendor states is reached by nothing that one can run.
    """
    kind = torch.device(device).type
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    return max(_matmul_rate(side, dtype, device) for side in _SIDES.get(kind, _SIDES["cpu"]))


def _matmul_rate(side: int, dtype: torch.dtype, device: str) -> float:
    """Best of the products of one size that fit into the budget, in FLOP/s."""
    a = torch.full((side, side), 0.5, dtype=dtype, device=device)
    best = float("inf")
    begin = time.perf_counter()
    while True:
        _wait_for(device)
        start = time.perf_counter()
        a @ a
        _wait_for(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now - begin > _BUDGET_S:
            return 2 * side**3 / best


def _wait_for(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
