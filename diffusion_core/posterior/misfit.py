"""How much larger the data's misfit is than Sigma foresees: of an image, or place by place.

y - A mu should look like A e + n, e ~ N(0, Sigma), n ~ N(0, R). What it has more, or less, says
without the truth that an image (or a part of it) is harder, or easier, than those that Sigma was
measured on.

Where a datum sees a few pixels the energies of y - A mu and of A e are compared in a window about
each, so that texture and sky differ, and so that a tile finds what the whole image finds.

Where it sees the plane (blur, k-space, projections) the energy would hear the few directions that
the data determine best, which say the least about those they leave open. Of all quadratic forms
that of the score tells a factor on Sigma with least variance:

    r' W A Sigma A' W r = |Sigma^(-1/2) K r|^2,   W = (A Sigma A' + R)^-1,   K = Sigma A' W

the energy of the data step's own update in units of Sigma: every direction counts by how well it is
determined. The factor is where the form of the data is that of A e times it, plus that of n; the
form itself depends on the factor, so it is done twice.

Source: the method of scoring for a variance component, Rao 1948, doi:10.1017/S0305004100023987.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.protocols import Data, Signal

WINDOW_RADIUS_PX = 32
_LEAST, _MOST = 0.1, 20.0
_DEVIATIONS = 2.0
_SPREAD = 0.2
"""Variance of ln c over images: what is believed before the data are heard."""
_NOTHING = 1e-6
"""Directions: fewer than that determined are none."""
_ROUNDS = 2


def misfit_by_place(
    residual: Data, foreseen: Data, R: Tensor, size: tuple[int, int]
) -> Float[Tensor, "b 1 h w"]:
    """Energy of the residual beyond noise over that of A e, about every pixel: 1 if Sigma is right.

    Energies count in variances of the noise in batch elements that have noise on every datum (else
    as they are), and where A e is not 0: masks and patterns leave zeros for what they did not
    measure. Two standard deviations of the noise's own energy are added to both, which draws the
    ratio to 1 where the data cannot tell.

    Args:
        residual: y - A mu, (b c h w), h and w perhaps fewer than the image's.
        foreseen: A e, of its shape, e a draw of N(0, Sigma).
        R: variance of the noise, broadcastable to `foreseen`; 0 means exact data.
        size: (h, w) of the image.

    Returns:
        Between .1 and 20.
    """
    energy = foreseen.abs().square()
    counted = (energy > 0).to(energy)
    R = R.reshape(*(1,) * (residual.ndim - R.ndim), *R.shape)
    noisy = (R > 0).flatten(1).all(dim=1)[:, None, None, None]  # of each element, or of all
    per_datum = 2.0 if residual.is_complex() else 1.0
    weight = counted / torch.where(noisy, R, 1.0)
    of_noise = torch.where(noisy, per_datum, 0.0) * counted
    parts = (weight * residual.abs().square() - of_noise, weight * energy, counted)
    beyond, expected, count = (_window_sums(part, size) for part in parts)
    # A sum of n squares of normal noise varies by (2 n)^(1/2), of complex noise by (4 n)^(1/2).
    floor = torch.where(noisy, per_datum, 0.0).to(count)
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


def misfit_of_image(
    update: Callable[[Tensor, Data], Signal],
    covariance: Covariance,
    residual: Data,
    foreseen: Data,
    noise: Data,
) -> Float[Tensor, "b 1 1 1"]:
    """The factor on Sigma that the score of the data tells of: 1 if Sigma is right.

    A form sums about as many squares as the data determine directions, so that the variance of
    ln c is 2 (of Sigma + of noise) / (of Sigma)^2; as much is added to what is found and to what is
    foreseen as weighs that against the spread of images, which draws the ratio to 1 where the data
    cannot tell.

    Args:
        update: K r for a factor on Sigma, as it is returned, and a residual r of the data.
        covariance: Sigma.
        residual: y - A mu, batch first.
        foreseen: A e, e a draw of N(0, Sigma).
        noise: a draw of N(0, R).

    Returns:
        Between .1 and 20.
    """
    ratio = covariance.spectrum.new_ones(residual.shape[0], 1, 1, 1)
    for _ in range(_ROUNDS):
        found, of_sigma, of_noise = (
            covariance.whiten(update(ratio, part)).square().sum(dim=(1, 2, 3), keepdim=True)
            for part in (residual, foreseen, noise)
        )
        told = of_sigma.clamp_min(_NOTHING)
        doubt = 2.0 * (told + of_noise) / (_SPREAD * told)
        ratio = ((found - of_noise + doubt) / (of_sigma + doubt)).clamp(_LEAST, _MOST)
    return ratio
