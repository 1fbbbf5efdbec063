"""Sigma = S C S bound to a canvas: what the linear solves multiply with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.protocols import Signal


@dataclass(frozen=True, eq=False)
class Covariance:
    """Sigma = S C S on one canvas, ready to be multiplied with.

    C is circulant on a canvas that may be larger than the image (to the right and below): then its
    restriction to the image is stationary, and does not wrap round.

    Attributes:
        spectrum: (c, H, W // 2 + 1) eigenvalues of C in the opponent basis, > 0.
        basis: (c, c) orthonormal; opponent = basis @ channels.
        std: (b, 1, h, w) S, or None for S = 1.
        canvas: (H, W), at least (h, w).
        reach: pixels at which C^-1 ends; None: it does not.
    """

    spectrum: Float[Tensor, "c H W_half"]
    basis: Float[Tensor, "c c"]
    std: Float[Tensor, "b 1 h w"] | None
    canvas: tuple[int, int]
    reach: int | None = None

    @property
    def is_white(self) -> bool:
        """Whether Sigma is a multiple of the identity."""
        return self.std is None and bool((self.spectrum == self.spectrum.flatten()[0]).all())

    def apply(self, x: Signal) -> Signal:
        """Sigma x."""
        return self._scaled(self.filter(self._scaled(x), self.spectrum))

    def apply_root(self, xi: Float[Tensor, "b c H W"], size: tuple[int, int]) -> Signal:
        """S C^(1/2) xi, xi white noise on the canvas: a draw of N(0, Sigma) on `size` (h, w)."""
        h, w = size
        return self._scaled(self.filter(xi, self.spectrum.sqrt())[..., :h, :w])

    def whiten(self, x: Signal) -> Signal:
        """C^(-1/2) S^(-1) x: white noise for a draw on a canvas of the image's size."""
        return self.filter(x if self.std is None else x / self.std, self.spectrum.rsqrt())

    def times(self, factor: Float[Tensor, "b 1 h w"]) -> Self:
        """Sigma with S^2 times a factor > 0 of each pixel."""
        root = factor.sqrt()
        return replace(self, std=root if self.std is None else self.std * root)

    def white_like(self, mu: Signal) -> Tensor:
        """An empty tensor of the shape of white noise on the canvas: (b c H W)."""
        return mu.new_empty(*mu.shape[:2], *self.canvas)

    def filter(self, x: Tensor, gain: Float[Tensor, "c H W_half"]) -> Tensor:
        """Multiply by `gain` in Fourier space on the canvas, per opponent channel; shape of x."""
        h, w = x.shape[-2:]
        opponent = torch.fft.rfft2(self.to_opponent(x), s=self.canvas)
        filtered = torch.fft.irfft2(opponent * gain, s=self.canvas)[..., :h, :w]
        return self.from_opponent(filtered)

    def to_opponent(self, x: Tensor) -> Tensor:
        """Channels to opponent channels."""
        return x if x.shape[1] == 1 else torch.einsum("kc,bchw->bkhw", self.basis, x)

    def from_opponent(self, x: Tensor) -> Tensor:
        """Opponent channels to channels."""
        return x if x.shape[1] == 1 else torch.einsum("kc,bkhw->bchw", self.basis, x)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.std is None else self.std * x


def white_covariance(variance: float, like: Signal) -> Covariance:
    """Sigma = variance I, as DiffPIR takes it."""
    c, h, w = like.shape[1:]
    spectrum = torch.full((c, h, w // 2 + 1), variance, dtype=like.dtype, device=like.device)
    return Covariance(spectrum, torch.eye(c, dtype=like.dtype, device=like.device), None, (h, w))
