"""Filter and keep every n-th pixel: bicubic downsampling, as cameras and image software do it."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.operators.base import Operator
from diffusion_core.operators.blur import Blur
from diffusion_core.protocols import Data, Signal

BICUBIC_A = -0.5
"""Keys' parameter: third-order exact interpolation; PIL and torch's antialias take it too."""


def bicubic_kernel(factor: int) -> Float[Tensor, "k k"]:
    """Keys' cubic stretched by the factor (so that it filters what would alias), sum 1, float64.

    4 factor taps a side (one fewer where odd), centred between or on the pixels of a coarse one.

    Source: Keys 1981, doi:10.1109/TASSP.1981.1163711, equation 15, a = -1/2.
    """
    num_taps = 4 * factor - factor % 2
    taps = torch.arange(num_taps, dtype=torch.float64) - (num_taps - 1) / 2
    profile = keys_cubic(taps / factor)
    profile = profile / profile.sum()
    return torch.outer(profile, profile)


def keys_cubic(t: Tensor) -> Tensor:
    """The cubic convolution kernel: 1 at 0, 0 at the other whole numbers and beyond 2."""
    a, t = BICUBIC_A, t.abs()
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return torch.where(t < 1, near, torch.where(t < 2, far, 0.0))


@final
class Downsample(Operator):
    """A x = (k * x) at every factor-th pixel, circular convolution; a kernel centred as below.

    Coarse pixel i covers fine pixels factor i to factor i + factor - 1; its centre is the kernel's:
    an even number of taps for even factors, an odd one for odd. So coarse and fine image share
    their corners, as for Pool, which is the case of a box kernel.

    Attributes:
        blur: k * x.
        factor: fine pixels a coarse pixel, along either axis.
    """

    kind: ClassVar[str] = "downsample"

    def __init__(self, kernel: Float[Tensor, "kh kw"], factor: int, shape: tuple[int, int]) -> None:
        """Raises ValueError if coarse pixels do not tile the image, or the kernel sits askew."""
        if factor < 1 or any(n % factor for n in shape):
            raise ValueError(f"{shape[0]} x {shape[1]} pixels do not divide by {factor}")
        if any((taps - factor) % 2 for taps in kernel.shape):
            raise ValueError(
                f"a kernel of {tuple(kernel.shape)} has no centre at a coarse pixel's, which "
                f"covers {factor} fine ones; give {'odd' if factor % 2 else 'even'} sides"
            )
        self.blur = Blur(kernel, shape)
        self.factor = factor

    @classmethod
    def bicubic(cls, factor: int, shape: tuple[int, int]) -> Downsample:
        """Antialiased bicubic downsampling; away from the border as PIL's BICUBIC resize."""
        return cls(bicubic_kernel(factor), factor, shape)

    def A(self, x: Signal) -> Data:
        """Filter, and keep the coarse pixels."""
        first = (self.factor - 1) // 2
        return self.blur.A(x)[..., first :: self.factor, first :: self.factor]

    def A_adjoint(self, y: Data) -> Signal:
        """Put zeros between the coarse pixels, and correlate."""
        first = (self.factor - 1) // 2
        spread = y.new_zeros(*y.shape[:-2], *self.blur.shape)
        spread[..., first :: self.factor, first :: self.factor] = y
        return self.blur.A_adjoint(spread)
