"""Denoising where the noise varies over the image: each pixel at its own level.

    y = x0 + n,  n_i ~ N(0, s_i^2)         x_i = D(y; s)_i at s = s_i

Where s varies little over what the network sees, y is an image of the training's own kind around
every pixel, and D(y; s_i) the posterior mean there: nothing is heard twice (compare
infra/decisions/0007). A few levels are evaluated, and each pixel is interpolated between the two
about its own, linearly in log s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from diffusion_core.posterior.run import Counted
from diffusion_core.protocols import Signal


def denoise_graded(calls: Counted, y: Signal, variance: Tensor, levels: Sequence[float]) -> Signal:
    """E[x0 | y] of an image whose noise varies slowly over it.

    Args:
        calls: of the denoiser.
        y: (b c h w), noisy image in network units.
        variance: of its noise, broadcastable to y; channels count by their mean.
        levels: decreasing, > 0; noise beyond either end counts as that end's.
    """
    variance = variance.expand(y.shape)
    log_std = variance.mean(dim=1, keepdim=True).clamp_min(1e-20).log() / 2
    rising = sorted(levels)
    x = calls.denoise(y, rising[0])
    for low, high in pairwise(rising):
        share = ((log_std - math.log(low)) / math.log(high / low)).clamp(0.0, 1.0)
        if bool(share.any()):
            x = x.lerp(calls.denoise(y, high), share)
    return x
