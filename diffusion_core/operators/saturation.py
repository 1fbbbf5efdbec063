"""Clipping: a camera that runs out of range. Nonlinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion_core.operators.base import Unmoved
from diffusion_core.protocols import Data, Reach, Signal


@dataclass(frozen=True)
class Saturation(Unmoved):
    """A(x) = clip(gain x, low, high), pixel by pixel (protocols.NonlinearOperator).

    Noise comes before the clipping, y = clip(gain x + n): a clipped datum is the limit itself, and
    says no more than that x is beyond it.

    The gradient of a pixel beyond the limits is 0 but for a datum within them: then it is as if the
    pixel were on the limit, and leads back. With the derivative's 0 a chain that once strayed
    beyond a limit would not find back.

    Attributes:
        gain: > 0.
        low: darkest value of y, network units.
        high: brightest value of y, > low.
    """

    kind: ClassVar[str] = "saturation"
    reach: ClassVar[Reach] = 0

    gain: float = 2.0
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.gain <= 0 or self.low >= self.high:
            raise ValueError(
                f"saturation needs gain > 0 and low < high, not {self.gain}, {self.low} and "
                f"{self.high}"
            )

    def A(self, x: Signal) -> Data:
        """Amplify and clip."""
        return _clip(self.gain * x, self.low, self.high)

    def initial(self, y: Data) -> Signal:
        """y / gain: right wherever nothing was clipped."""
        return y / self.gain


class _Clip(torch.autograd.Function):
    """clamp, whose gradient passes beyond a limit too if descending it leads back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        """Clip to [low, high]."""
        ctx.save_for_backward(x)
        ctx.limits = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None, None]:
        """u, or 0 where x is beyond a limit and -u leads further away."""
        (x,) = ctx.saved_tensors
        low, high = ctx.limits
        away = ((x > high) & (u < 0)) | ((x < low) & (u > 0))
        return u.masked_fill(away, 0.0), None, None


def _clip(x: Tensor, low: float, high: float) -> Tensor:
    clipped: Tensor = _Clip.apply(x, low, high)  # type: ignore[no-untyped-call]
    return clipped
