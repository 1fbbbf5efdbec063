"""How much larger the data's misfit is than Sigma foresees: of an image, or place by place.

y - A mu should have the energy of noise and of A e, e ~ N(0, Sigma). What it has more, or less,
says without the truth that an image (or a part of it) is harder, or easier, than those that Sigma
was measured on. Where a datum sees a few pixels the ratio is taken over a window, so that texture
and sky differ, and so that a tile finds what the whole image finds; where it sees the plane, over
all data.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from diffusion_core.protocols import Data, Reach

WINDOW_RADIUS_PX = 32
_LEAST, _MOST = 0.1, 20.0
_DEVIATIONS = 2.0


def misfit_ratio(
    residual: Data,
    foreseen: Data,
    R: Tensor,
    reach: Reach,
    size: tuple[int, int],
) -> Float[Tensor, "b 1 _ _"]:
    """Energy of the residual beyond noise over that of A e: 1 if Sigma is right.

    Energies count in variances of the noise in batch elements that have noise on every datum (else
    as they are), and where A e is not 0: masks and sampling patterns leave zeros for what they did
    not measure. Two standard deviations of the noise's own energy are added to both, which draws
    the ratio to 1 where the data cannot tell.

    Args:
        residual: y - A mu, batch first.
        foreseen: A e, of its shape.
        R: variance of the noise, broadcastable to `foreseen`; 0 means exact data.
        reach: of the operator; with a radius, data have the axes (b c h w), h and w perhaps fewer
            than the image's.
        size: (h, w) of the image.

    Returns:
        (b, 1, h, w), or (b, 1, 1, 1) where the reach is the plane; between .1 and 20.
    """
    energy = foreseen.abs().square()
    counted = (energy > 0).to(energy)
    R = R.reshape(*(1,) * (residual.ndim - R.ndim), *R.shape)
    noisy = (R > 0).flatten(1).all(dim=1)  # of each element, or of all
    on_data, on_image = (noisy.reshape(-1, *(1,) * (n - 1)) for n in (residual.ndim, 4))
    per_datum = 2.0 if residual.is_complex() else 1.0
    weight = counted / torch.where(on_data, R, 1.0)
    of_noise = torch.where(on_data, per_datum, 0.0) * counted
    parts = (weight * residual.abs().square() - of_noise, weight * energy, counted)
    if reach == "plane" or residual.ndim != 4:
        beyond, expected, count = (
            part.flatten(1).sum(dim=1)[:, None, None, None] for part in parts
        )
    else:
        beyond, expected, count = (_window_sums(part, size) for part in parts)
    # A sum of n squares of normal noise varies by (2 n)^(1/2), of complex noise by (4 n)^(1/2).
    floor = torch.where(on_image, per_datum, 0.0).to(count)
    doubt = _DEVIATIONS * (2 * floor * count).sqrt() + torch.finfo(count.dtype).tiny
    return ((beyond + doubt) / (expected + doubt)).clamp(_LEAST, _MOST)


def _window_sums(data: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Tensor:
    """Sums over all channels and a square window about every pixel of the image."""
    step = max(1, round(math.sqrt(size[0] * size[1] / (data.shape[-2] * data.shape[-1]))))
    radius = WINDOW_RADIUS_PX // step
    side = 2 * radius + 1
    sums = avg_pool2d(
        data.sum(dim=1, keepdim=True), side, stride=1, padding=radius, divisor_override=1
    )
    same = tuple(sums.shape[-2:]) == tuple(size)
    return sums if same else interpolate(sums, size=size, mode="bilinear")
