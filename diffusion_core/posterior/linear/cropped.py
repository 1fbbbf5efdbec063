"""Data step of a blurred picture cut out of its scene: dual CG, preconditioned by the whole canvas.

Were the blurred scene known on all of the canvas, its inverse would be (|k|^2 C + R)^-1 in Fourier.
The part of that inverse that belongs to the picture exceeds the wanted one by what the unseen
margin would tell: in the strip along the border alone, so that CG has a few large eigenvalues to
find. The image-space form stops too early where a kernel has zeros (infra/decisions/0012).
"""

from __future__ import annotations

from torch import Tensor

from diffusion_core.operators import CroppedBlur
from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.posterior.linear.base import (
    LEAST_BLUR_VARIANCE,
    Accuracy,
    DualStep,
    Update,
    mean_square,
)
from diffusion_core.protocols import Data, LinearOperator

_CAUTION = 3.0
"""Factor on R in the preconditioner: with 1, what the margin would tell weighs too much (99 steps
where this takes 66, and 30 takes 79; infra/decisions/0012)."""


class CroppedBlurStep(DualStep):
    """CG on the picture's pixels; exact data are given half a step of an 8-bit image as noise.

    It takes more steps than a periodic blur (50 to 100 to a residual of 1e-2, at a first level):
    settings should allow them, since a dual solve that is cut short is no estimate.
    """

    def __init__(self, operator: LinearOperator, cropped: CroppedBlur) -> None:
        super().__init__(operator)
        self.cropped = cropped
        self.power = cropped.blur.transfer.abs().square()

    def __call__(
        self, covariance: Covariance, variance: Tensor, residual: Data, accuracy: Accuracy
    ) -> Update:
        """See DataStep."""
        level = variance.clamp_min(LEAST_BLUR_VARIANCE)
        mean_level = level.expand(residual.shape).mean(dim=(1, 2, 3), keepdim=True)
        blurred = self.power.to(covariance.spectrum) * covariance.spectrum
        inverse = 1.0 / (mean_square(covariance) * blurred + _CAUTION * mean_level)

        def precondition(v: Data) -> Data:
            return self.cropped.crop(covariance.filter(self.cropped.grow(v), inverse))

        return self.solve(covariance, level, residual, accuracy, precondition)
