"""Circular convolution: diagonal in the discrete Fourier transform."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from diffusion_core.operators.base import Operator
from diffusion_core.protocols import Data, Signal, SpectralForm


def transfer_function(
    kernel: Float[Tensor, "kh kw"], height: int, width: int
) -> Complex[Tensor, "h w_half"]:
    """Transfer function of a kernel on a periodic grid: rfft2 of the kernel, its centre at (0, 0).

    The centre is kernel[kh // 2, kw // 2]. A kernel larger than the grid wraps round it, as
    circular convolution demands. Computed in float64, returned complex in the kernel's precision.
    """
    num_rows, num_columns = kernel.shape
    rows = (torch.arange(num_rows) - num_rows // 2) % height
    columns = (torch.arange(num_columns) - num_columns // 2) % width
    wrapped = torch.zeros(height, width, dtype=torch.float64)
    index = (rows[:, None].expand(kernel.shape), columns[None, :].expand(kernel.shape))
    wrapped.index_put_(index, kernel.detach().cpu().double(), accumulate=True)
    return torch.fft.rfft2(wrapped).to(kernel.dtype.to_complex())


@final
class Blur(Operator):
    """A x = k * x, circular convolution of every channel with one kernel (true convolution).

    In Fourier space A is multiplication by `transfer`, A' by its conjugate.

    Attributes:
        kernel: (kh, kw).
        shape: (h, w) of the images.
        transfer: (h, w // 2 + 1) complex: rfft2 of the kernel, its centre at pixel (0, 0).
    """

    kind: ClassVar[str] = "blur"

    def __init__(self, kernel: Float[Tensor, "kh kw"], shape: tuple[int, int]) -> None:
        if kernel.ndim != 2 or not kernel.is_floating_point():
            raise ValueError(f"kernel must be real (kh kw), not {kernel.dtype} {kernel.shape}")
        self.kernel = kernel
        self.shape = shape
        self.transfer = transfer_function(kernel, *shape).to(kernel.device)

    def A(self, x: Signal) -> Data:
        """Convolve."""
        return self._multiply(x, self.transfer)

    def A_adjoint(self, y: Data) -> Signal:
        """Correlate."""
        return self._multiply(y, self.transfer.conj())

    def spectral_form(self, like: Signal) -> SpectralForm:
        """V' is the unitary Fourier transform, S = |transfer|, and U holds the phases."""
        transfer = self.transfer.to(like.dtype.to_complex())

        def coefficients(x: Signal) -> Tensor:
            return torch.fft.rfft2(x, norm="ortho")

        def image(z: Tensor) -> Signal:
            return torch.fft.irfft2(z, s=self.shape, norm="ortho")

        def data(y: Data) -> Tensor:
            return transfer.sgn().conj() * coefficients(y)

        return SpectralForm(transfer.abs(), coefficients, image, data)

    def _multiply(self, x: Tensor, transfer: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.shape:
            raise ValueError(f"blur built for {self.shape} applied to {tuple(x.shape)}")
        spectrum = torch.fft.rfft2(x)
        return torch.fft.irfft2(spectrum * transfer.to(spectrum.dtype), s=self.shape)
