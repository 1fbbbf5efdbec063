"""Generic linear maps; the physics lives in domains/.

kind          operator     what solvers can use in closed form
identity      Identity     A = I
mask          Mask         mask: A is a projection
mosaic        Mosaic       A A' = I, A' A a mask for each channel
blur          Blur         transfer: diagonal in Fourier
cropped-blur  CroppedBlur  blur, margin: diagonal in Fourier but for the crop
varying-blur  VaryingBlur  transfers, weights: nearly diagonal in Fourier near every node
pool          Pool         factor: A A' = I / factor^2
pool-rows     PoolRows     A A' is diagonal
downsample    Downsample   blur, factor: A C A' is circulant for a circulant C
fourier       Fourier      mask, channels: diagonal in Fourier
multi-coil    MultiCoil    mask, sensitivities
jpeg-coefficients  JPEGCoefficients  (its noise is rounding: ROUNDING_STD)
jpeg-blocks   JPEGBlocks   the same of any file: its tables, subsampling, size
sparse        Sparse       matrix, transpose; a Projector, as those of domains/ct
compose       Compose      outer, inner
stack         Stack        operators, split

Nonlinear, with A and initial(y) only (protocols.NonlinearOperator; covprox, daps, split-gibbs,
red-diff, dps take them): Saturation, PhaseRetrieval, JPEG.
"""

from diffusion_core.operators.base import Operator, inner
from diffusion_core.operators.blur import Blur, transfer_function
from diffusion_core.operators.compose import Compose, Stack
from diffusion_core.operators.cropped_blur import CroppedBlur
from diffusion_core.operators.downsample import Downsample, bicubic_kernel
from diffusion_core.operators.fourier import Fourier, from_complex, to_complex
from diffusion_core.operators.identity import Identity
from diffusion_core.operators.jpeg import JPEG
from diffusion_core.operators.jpeg_blocks import JPEGBlocks
from diffusion_core.operators.jpeg_coefficients import ROUNDING_STD, JPEGCoefficients
from diffusion_core.operators.mask import Mask
from diffusion_core.operators.mask_with_means import MaskWithMeans, MeansNoise
from diffusion_core.operators.mosaic import Mosaic
from diffusion_core.operators.multi_coil import MultiCoil
from diffusion_core.operators.phase_retrieval import PhaseRetrieval
from diffusion_core.operators.pool import Pool
from diffusion_core.operators.pool_rows import PoolRows
from diffusion_core.operators.projector import Projector
from diffusion_core.operators.saturation import Saturation
from diffusion_core.operators.sparse import Sparse
from diffusion_core.operators.varying_blur import VaryingBlur

__all__ = [
    "JPEG",
    "ROUNDING_STD",
    "Blur",
    "Compose",
    "CroppedBlur",
    "Downsample",
    "Fourier",
    "Identity",
    "JPEGBlocks",
    "JPEGCoefficients",
    "Mask",
    "MaskWithMeans",
    "MeansNoise",
    "Mosaic",
    "MultiCoil",
    "Operator",
    "PhaseRetrieval",
    "Pool",
    "PoolRows",
    "Projector",
    "Saturation",
    "Sparse",
    "Stack",
    "VaryingBlur",
    "bicubic_kernel",
    "from_complex",
    "inner",
    "to_complex",
    "transfer_function",
]
