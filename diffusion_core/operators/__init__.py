"""Generic linear maps; the physics lives in domains/.

kind        operator  what solvers can use in closed form
identity    Identity  A = I
mask        Mask      mask: A is a projection
blur        Blur      transfer: diagonal in Fourier
pool        Pool      factor: A A' = I / factor^2
fourier     Fourier   mask, channels: diagonal in Fourier
sparse      Sparse    matrix, transpose
compose     Compose   outer, inner
stack       Stack     operators, split
"""

from diffusion_core.operators.base import Operator, inner
from diffusion_core.operators.blur import Blur, transfer_function
from diffusion_core.operators.compose import Compose, Stack
from diffusion_core.operators.fourier import Fourier, from_complex, to_complex
from diffusion_core.operators.identity import Identity
from diffusion_core.operators.mask import Mask
from diffusion_core.operators.pool import Pool
from diffusion_core.operators.sparse import Sparse

__all__ = [
    "Blur",
    "Compose",
    "Fourier",
    "Identity",
    "Mask",
    "Operator",
    "Pool",
    "Sparse",
    "Stack",
    "from_complex",
    "inner",
    "to_complex",
    "transfer_function",
]
