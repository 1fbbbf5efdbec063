"""Phase retrieval: the modulus of an oversampled Fourier transform. Nonlinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from diffusion_core.operators.base import Unmoved
from diffusion_core.protocols import Data, Reach, Signal


@dataclass(frozen=True)
class PhaseRetrieval(Unmoved):
    """A(x) = |F (x + offset)|, the image amid a dark field (protocols.NonlinearOperator).

    F is the unitary transform (norm "ortho") of every channel, padded by zeros: with an
    oversampling of 2 the modulus tells an image from all but its shifts and its half turn, which
    have the same.

    Attributes:
        shape: (h, w) of the image.
        oversampling: sides of the field, of the image's sides, >= 1.
        offset: added so that darkness is 0: 1 for images in [-1, 1].
    """

    kind: ClassVar[str] = "phase-retrieval"
    reach: ClassVar[Reach] = "plane"

    shape: tuple[int, int]
    oversampling: int = 2
    offset: float = 1.0

    def __post_init__(self) -> None:
        if self.oversampling < 1:
            raise ValueError(f"oversampling must be >= 1, not {self.oversampling}")

    def A(self, x: Signal) -> Data:
        """The modulus: (b, c, H, W) real, >= 0. Raises ValueError for another size."""
        h, w = self.shape
        if tuple(x.shape[-2:]) != self.shape:
            raise ValueError(f"phase retrieval of {self.shape} applied to {tuple(x.shape)}")
        more = self.oversampling - 1
        field = F.pad(x + self.offset, (0, more * w, 0, more * h))
        return torch.fft.fft2(field, norm="ortho").abs()

    def initial(self, y: Data) -> Signal:
        """An even image of the right mean: the zero frequency is the sum of the pixels."""
        h, w = self.shape
        field = y.shape[-2] * y.shape[-1]
        level = y[..., :1, :1] * field**0.5 / (h * w) - self.offset
        return level.expand(*y.shape[:2], h, w).clone()
