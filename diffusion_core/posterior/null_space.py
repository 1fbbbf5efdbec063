"""What of a restored image the data do not determine: what the prior invented.

    n = (I - K A) (x - m),     K = P A' (P A A' + R)^-1

K is the gain of a white prior N(m, P I) of the image's own mean and variance, so that nothing is
taken for known but what was measured: no smoothness, no anatomy. Without noise I - K A is the
projector onto the null space of A; with noise R a direction of singular value s is left to the
prior by the share R / (P s^2 + R). With the mean and the spectrum of images for m and P (kriging's
K) n is what goes beyond the best linear estimate: missing pixels between known ones are all open to
the white prior, and mostly told by their neighbours to this one. K is the data step of the solvers
(linear/), so that every operator they take is taken here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.gaussian import white_covariance
from diffusion_core.posterior.linear import Accuracy, data_step
from diffusion_core.protocols import LinearOperator, NoiseModel, Signal, UnsuitedError

THOROUGH = Accuracy(tolerance=1e-4, max_steps=200)
"""Of the solve: the share is told to a hundredth."""


@dataclass(frozen=True, eq=False)
class Undetermined:
    """The part of an image that the data leave open.

    Pictures cut out of a larger canvas are judged by themselves: what was restored beyond their
    border is all invented, and not shown.

    Attributes:
        part: (b c h w) n, on the canvas of the image.
        share: |n|^2 over the energy of x about its own mean, over the whole batch; 1 at most with
            the white prior.
        amplitude: (h, w) of the picture: |n| a pixel in units of the image's standard deviation,
            root mean square over batch and channels; the mean of its square is `share`.
        std: the image's standard deviation about its mean, network units.
        num_steps: CG steps; 0 for a closed form.
        relative_residual: of the linear system solved.
    """

    part: Signal
    share: float
    amplitude: Float[Tensor, "h w"]
    std: float
    num_steps: int
    relative_residual: float


def undetermined(
    operator: LinearOperator,
    x: Signal,
    noise: NoiseModel,
    accuracy: Accuracy = THOROUGH,
    prior: CovarianceTable | None = None,
) -> Undetermined:
    """What of x comes from the prior and not from data that the operator took of it.

    Args:
        operator: A.
        x: (b c h w) restored batch, in network units.
        noise: R is taken at A x.
        accuracy: of an iterative solve.
        prior: mean and spectrum of images; None: white, of x's own mean and variance.

    Raises:
        UnsuitedError: if the operator is nonlinear: it has no one gain.
    """
    if not isinstance(operator, LinearOperator):
        raise UnsuitedError(
            f"{type(operator).__name__} is nonlinear: what its data leave open differs from image "
            "to image, and has no one gain"
        )
    mean = picture(operator, x).mean(dim=(-2, -1), keepdim=True)
    seen = picture(operator, x - mean)
    energy = seen.square().mean()
    if not float(energy) > 0:
        flat = torch.zeros_like(seen[0, 0])
        return Undetermined(torch.zeros_like(x), 0.0, flat, 0.0, 0, 0.0)
    step = data_step(operator)
    if prior is None:
        covariance = white_covariance(float(energy), x)
    else:
        mean = prior.mean_like(x)
        covariance = prior.prior().on(mean, padding=step.padding)
    R = noise.variance(operator.A(x))
    known = step(covariance, R, operator.A(x - mean), accuracy)
    part = x - mean - known.delta
    squared = picture(operator, part).square().mean(dim=(0, 1)) / energy
    return Undetermined(
        part=part,
        share=float(squared.mean()),
        amplitude=squared.sqrt(),
        std=float(energy.sqrt()),
        num_steps=known.num_steps,
        relative_residual=known.relative_residual,
    )


def picture(operator: object, x: Signal) -> Signal:
    """The part of a restored canvas that is the picture: all of it, but for cut-out scenes."""
    crop = getattr(operator, "crop", None)
    return x if crop is None else crop(x)
