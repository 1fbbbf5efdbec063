"""Blur whose kernel changes over the image: lenses, turbulence, a turning camera."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from diffusion_core.operators.base import Operator
from diffusion_core.operators.blur import transfer_function
from diffusion_core.protocols import Data, Signal


def bilinear_weights(grid: tuple[int, int], shape: tuple[int, int]) -> Float[Tensor, "gh gw h w"]:
    """Weight of every node of a grid at every pixel, float64; they sum to 1 at each pixel.

    The outer nodes stand on the outermost pixels; a grid of one node along an axis is constant.
    """
    rows, columns = (_hats(nodes, pixels) for nodes, pixels in zip(grid, shape, strict=True))
    return torch.einsum("ah,bw->abhw", rows, columns)


def _hats(num_nodes: int, num_pixels: int) -> Float[Tensor, "nodes pixels"]:
    """Piecewise linear basis functions along one axis."""
    if num_nodes == 1:
        return torch.ones(1, num_pixels, dtype=torch.float64)
    place = torch.linspace(0, num_nodes - 1, num_pixels, dtype=torch.float64)
    return (1 - (place - torch.arange(num_nodes)[:, None]).abs()).clamp_min(0.0)


@final
class VaryingBlur(Operator):
    """y(p) = sum_q k_p(q) x(p - q), k_p interpolated bilinearly between a grid of kernels.

    So A x = sum_j w_j (k_j * x) with the weights w_j of the nodes, and A' y = sum_j k_j' * (w_j y).
    Convolutions are circular, as in Blur. Kernels of sum 1 keep a constant image.

    Attributes:
        kernels: (gh, gw, kh, kw), one each node of a grid spread over the image.
        shape: (h, w) of the images.
        weights: (gh gw, h, w) bilinear, sum 1 at each pixel.
        transfers: (gh gw, h, w // 2 + 1) complex.

    Source: Nagy and O'Leary 1998, doi:10.1137/S106482759528507X, section 2 (piecewise linear).
    """

    kind: ClassVar[str] = "varying-blur"

    def __init__(self, kernels: Float[Tensor, "gh gw kh kw"], shape: tuple[int, int]) -> None:
        """Raises ValueError unless kernels are real and of four axes."""
        if kernels.ndim != 4 or not kernels.is_floating_point():
            raise ValueError(
                f"kernels must be real (gh gw kh kw), not {kernels.dtype} {tuple(kernels.shape)}"
            )
        self.kernels = kernels
        self.shape = shape
        weights = bilinear_weights((kernels.shape[0], kernels.shape[1]), shape)
        self.weights = weights.flatten(0, 1).to(kernels)
        transfers = [transfer_function(kernel, *shape) for kernel in kernels.flatten(0, 1)]
        self.transfers: Complex[Tensor, "nodes h w_half"] = torch.stack(transfers).to(
            kernels.device
        )

    def A(self, x: Signal) -> Data:
        """Convolve with every node's kernel, and mix pixel by pixel."""
        self._check(x)
        spectrum = torch.fft.rfft2(x)
        out = torch.zeros_like(x)
        for weight, transfer in zip(self.weights, self.transfers, strict=True):
            out += weight.to(x.dtype) * self._image(spectrum * transfer.to(spectrum.dtype))
        return out

    def A_adjoint(self, y: Data) -> Signal:
        """Weight with every node's share, and correlate."""
        self._check(y)
        total: Tensor | float = 0.0
        for weight, transfer in zip(self.weights, self.transfers, strict=True):
            spectrum = torch.fft.rfft2(weight.to(y.dtype) * y)
            total = total + spectrum * transfer.conj().to(spectrum.dtype)
        return self._image(torch.as_tensor(total))

    def _image(self, spectrum: Tensor) -> Tensor:
        return torch.fft.irfft2(spectrum, s=self.shape)

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[-2:]) != self.shape:
            raise ValueError(f"blur built for {self.shape} applied to {tuple(x.shape)}")
