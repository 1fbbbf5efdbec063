"""The identity: a noisy image is its own measurement."""

from __future__ import annotations

from typing import ClassVar, final

from diffusion_core.operators.base import Operator
from diffusion_core.protocols import Data, Reach, Signal


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
