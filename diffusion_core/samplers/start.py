"""Where a sampler of the prior starts: p(x; sigma_max), with the images under the noise."""

from __future__ import annotations

import torch

from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.protocols import NormalDraws, Signal

_IMAGE, _NOISE = 1, 0  # streams of the keyed noise


def gaussian_start(
    prior: CovarianceTable | None, like: Signal, sigma_max: float, draws: NormalDraws
) -> Signal:
    """A draw of N(mean, C + sigma_max^2), the Gaussian that p(x; sigma_max) comes near to.

    Noise alone is not enough: the mean level of a large image stands out of any noise that a
    network is trained with (its standard error is sigma_max over the image's side), and pure noise
    would say that it is 0 to a network that believes it.

    Args:
        prior: whose prior mean and spectrum describe images without noise; None: noise alone.
        like: (b c h w), of the shape, dtype and device wanted.
        sigma_max: noise level to start from.
        draws: level 0, streams 0 and 1.
    """
    noise = sigma_max * draws.normal(0, like, _NOISE)
    if prior is None:
        return noise
    mean = prior.mean_like(like)
    # A canvas twice as large: what is drawn must not wrap round.
    covariance = prior.prior().on(mean, padding=max(like.shape[-2:]))
    xi = draws.normal(0, covariance.white_like(torch.empty_like(like)), _IMAGE)
    return mean + covariance.apply_root(xi, (like.shape[-2], like.shape[-1])) + noise
