"""How much larger an image's Sigma is than the table's: told by the data, place by place.

y - A mu should look like A e + n, e ~ N(0, Sigma), n ~ N(0, R). What it has more, or less, says
without the truth that an image (or a part of it) is harder, or easier, than those that Sigma was
measured on. Of all quadratic forms of the data the one that tells a factor c on Sigma best is that
of its score,

    r' W A Sigma A' W r = |Sigma^(-1/2) K r|^2,   W = (A Sigma A' + R)^-1,   K = Sigma A' W

the energy of the data step's own update in units of Sigma: every direction counts by how well the
data determine it, where the plain energy of y - A mu hears low frequencies only. c is where the
form of the data is c times that of A e, plus that of n; the form itself depends on c, so it is done
twice. The update is an image whatever the data are: where a datum sees a few pixels c is taken over
a window, so that texture and sky differ, and so that a tile finds what the whole image finds.

Source: the method of scoring for a variance component, Rao 1948, doi:10.1017/S0305004100023987.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.protocols import Data, Signal

WINDOW_RADIUS_PX = 32
_LEAST, _MOST = 0.1, 20.0
_PRIOR = 0.2
"""Variance of ln c over images: what is believed before the data are heard."""
_NOTHING = 1e-6
"""Directions: fewer than that determined are none."""
_ROUNDS = 2


def misfit_ratio(
    update: Callable[[Tensor, Data], Signal],
    covariance: Covariance,
    residual: Data,
    foreseen: Data,
    noise: Data,
    *,
    is_local: bool,
) -> Float[Tensor, "b 1 _ _"]:
    """The factor on Sigma that the data tell of: 1 if Sigma is right.

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
        is_local: whether places differ; else one ratio an image.

    Returns:
        (b, 1, h, w), or (b, 1, 1, 1) where it is not local; between .1 and 20.
    """
    ratio = covariance.spectrum.new_ones(residual.shape[0], 1, 1, 1)
    for _ in range(_ROUNDS):
        found, of_sigma, of_noise = (
            _energy(covariance.whiten(update(ratio, part)), is_local=is_local)
            for part in (residual, foreseen, noise)
        )
        told = of_sigma.clamp_min(_NOTHING)
        doubt = 2.0 * (told + of_noise) / (_PRIOR * told)
        ratio = ((found - of_noise + doubt) / (of_sigma + doubt)).clamp(_LEAST, _MOST)
    return ratio


def _energy(white: Signal, *, is_local: bool) -> Float[Tensor, "b 1 _ _"]:
    """Sum of squares over all channels, and over the image or a square window about every pixel."""
    energy = white.square().sum(dim=1, keepdim=True)
    if not is_local:
        return energy.sum(dim=(2, 3), keepdim=True)
    side = 2 * WINDOW_RADIUS_PX + 1
    return avg_pool2d(energy, side, stride=1, padding=WINDOW_RADIUS_PX, divisor_override=1)
