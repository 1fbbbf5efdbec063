"""The identity: a noisy image is its own measurement."""

from __future__ import annotations

from typing import ClassVar, final

import torch

from diffusion_core.operators.base import Operator
from diffusion_core.protocols import Data, Reach, Signal, SpectralForm


@final
class Identity(Operator):
    """A x = x: plain denoising."""

    kind: ClassVar[str] = "identity"
    reach: Reach = 0

    def A(self, x: Signal) -> Data:
        """Return x itself (no copy)."""
        return x

    def A_adjoint(self, y: Data) -> Signal:
        """Return y itself (no copy)."""
        return y

    def spectral_form(self, like: Signal) -> SpectralForm:
        """U = S = V = I."""
        ones = torch.ones_like(like[:1, :1, :1, :1])
        return SpectralForm(ones, lambda x: x, lambda z: z, lambda y: y)
