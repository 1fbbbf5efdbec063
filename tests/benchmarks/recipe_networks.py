"""Networks that differ from the product's in what they are shown first, for recipes.py.

Both keep LocalUNet's interface: `forward(x_scaled, x_detail, ln_sigma, condition)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.networks.blocks import ResidualBlock
from diffusion_core.networks.local_unet import NUM_CHANNELS, LocalUNet


class WithoutDetail(LocalUNet):
    """The product's network, shown x alone: the channels of local detail are 0."""

    def forward(
        self,
        x_scaled: Tensor,
        x_detail: Tensor,
        ln_sigma: Tensor,
        condition: Tensor,
        guide: Tensor | None = None,
        missing: Tensor | None = None,
    ) -> Tensor:
        """As LocalUNet's."""
        blank = torch.zeros_like(x_detail)
        return super().forward(x_scaled, blank, ln_sigma, condition, guide, missing)


class FullResolutionStem(LocalUNet):
    """A residual block at full resolution before the first halving, and one after the last growth.

    They have half the channels of the next resolution, so that a block costs a pixel what one of
    the next resolution does; the head sees full resolution. Give it one block a pass less at the
    first of `depths` for the operations of the product's network.
    """

    def __init__(
        self,
        num_conditions: int,
        widths: Sequence[int] = (64, 96, 192),
        depths: Sequence[int] = (3, 2, 2),
        num_features: int = 128,
    ) -> None:
        super().__init__(num_conditions, widths, depths, num_features)
        width = widths[0] // 2
        self.first = nn.Conv2d(2 * NUM_CHANNELS, width, 3, padding=1)
        self.before = ResidualBlock(width, num_features)
        self.stem = nn.Conv2d(width, widths[0], 2, stride=2)
        self.last = nn.Conv2d(widths[0], 4 * width, 1)
        self.after = ResidualBlock(width, num_features)
        self.head = nn.Conv2d(width, NUM_CHANNELS, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]  # Conv2d has one by default

    def forward(
        self,
        x_scaled: Tensor,
        x_detail: Tensor,
        ln_sigma: Tensor,
        condition: Tensor,
        guide: Tensor | None = None,
        missing: Tensor | None = None,
    ) -> Tensor:
        """As LocalUNet's, which is shown no guides and no missing pixels."""
        del guide, missing
        features = self.features(ln_sigma, condition)
        shown = torch.cat([x_scaled, x_detail], dim=1).contiguous(memory_format=torch.channels_last)
        fine = self.before(self.first(shown), features)
        h, skips = self.stem(fine), []
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, features)
            if level < len(self.shrink):
                skips.append(h)
                h = self.shrink[level](h)
        for level in reversed(range(len(self.up))):
            h = skips[level] + _grown(self.grow[level](h))
            for block in self.up[level]:  # type: ignore[attr-defined]
                h = block(h, features)
        out: Tensor = self.head(self.after(fine + _grown(self.last(h)), features))
        return out


def _grown(h: Tensor) -> Tensor:
    return F.pixel_shuffle(h, 2).contiguous(memory_format=torch.channels_last)


NETWORKS: dict[str, type[LocalUNet]] = {
    "local-unet": LocalUNet,
    "without-detail": WithoutDetail,
    "full-resolution-stem": FullResolutionStem,
}
