"""The linear algebra of data steps: K r = Sigma A' (A Sigma A' + R)^-1 r for every operator.

operators                form                                   module
mask, identity, mosaic   in image space, on a padded canvas     mask.py
blur, pool, downsample,
MRI                      exact for S = 1, else dual CG          spectral.py
varying blur             CG in image space                      varying.py
cropped blur             dual CG                                cropped.py
multi-coil MRI           CG in image space                      multi_coil.py
projector                CG in image space                      projector.py
anything else            dual CG                                base.py
"""

from __future__ import annotations

from diffusion_core.operators import (
    Blur,
    CroppedBlur,
    Downsample,
    Fourier,
    Identity,
    Mask,
    MaskWithMeans,
    Mosaic,
    MultiCoil,
    Pool,
    Projector,
    VaryingBlur,
)
from diffusion_core.posterior.linear.base import Accuracy, DataStep, DualStep, Update
from diffusion_core.posterior.linear.cropped import CroppedBlurStep
from diffusion_core.posterior.linear.mask import MaskStep, MosaicStep
from diffusion_core.posterior.linear.multi_coil import MultiCoilStep
from diffusion_core.posterior.linear.projector import ProjectorStep
from diffusion_core.posterior.linear.spectral import BlurStep, FourierStep, PoolStep
from diffusion_core.posterior.linear.varying import VaryingBlurStep
from diffusion_core.protocols import LinearOperator

__all__ = ["Accuracy", "DataStep", "Update", "data_step"]


def data_step(operator: LinearOperator, through: LinearOperator | None = None) -> DataStep:
    """The data step in the form that suits an operator.

    Args:
        operator: decides the form.
        through: the same operator as it shall be called, say by a counter; default `operator`.
    """
    through = operator if through is None else through
    match operator:
        case Mask() | MaskWithMeans() | Identity():
            return MaskStep(operator)
        case Mosaic():
            return MosaicStep(operator)
        case Blur():
            return BlurStep(through, operator)
        case CroppedBlur():
            return CroppedBlurStep(through, operator)
        case VaryingBlur():
            return VaryingBlurStep(through, operator)
        case MultiCoil():
            return MultiCoilStep(through, operator)
        case Pool() | Downsample():
            return PoolStep(through, operator)
        case Fourier():
            return FourierStep(through, operator)
        case Projector() if len(operator.data_shape) == 2:
            return ProjectorStep(through, operator)
        case _:
            return DualStep(through)
