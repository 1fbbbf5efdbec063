"""The local U-Net F: one network for all domains, whose output looks at a finite window only.

Design choices, and why:
- A 2x pixel-unshuffle stem: full-resolution channels would dominate the cost.
- No statistic across pixels (blocks.PixelNorm): tiles with a halo of `reach` equal the whole.
- Three input channels with the unused ones at zero; a condition index says which image this is
  (grey CT, complex MRI, colour ...), so that one network serves every domain.
- Besides x itself it is shown asinh((x - box5(x)) / sigma): detail in units of the noise, which
  keeps its scale when the image is dark and the noise small.
- Guides (a second contrast, a panchromatic band) come in by a convolution of their own beside the
  stem, zero at first and without a bias: a network that learned without them is the same with it,
  and where no guide is given (NaN, pixel by pixel) nothing is added. Beside a guide's value stands
  whether it is given: 0 is a grey like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_core.networks.blocks import Features, ResidualBlock

NUM_CHANNELS = 3
FILLED_STD = 0.05
"""By which the mean of its neighbours misses a pixel, network units, about."""
_LEAST_SHARE = 1e-3
"""Of a window, that counts as any of it."""


def _box_mean(x: Tensor, size: int) -> Tensor:
    """Mean over a size x size window; at the border over the part inside the canvas."""
    return F.avg_pool2d(x, size, stride=1, padding=size // 2, count_include_pad=False)


class LocalUNet(nn.Module):
    """A U-Net of residual blocks after a pixel-unshuffle stem; inputs must divide by `stride`.

    Args:
        num_conditions: how many kinds of image it knows.
        widths: channels at each resolution, the first at half the input's.
        depths: residual blocks at each resolution, on the way down and again on the way up
            (the last resolution is passed once).
        num_features: length of the modulation vector.
        num_guides: further images that it can be shown, one channel each.
        sees_missing: whether it is told which pixels hold nothing; for training on images that lack
            pixels (training/corrupted.py). Where none is missing these inputs are 0, and the
            network without them is the same one.
    """

    def __init__(
        self,
        num_conditions: int,
        widths: Sequence[int] = (64, 96, 192),
        depths: Sequence[int] = (3, 2, 2),
        num_features: int = 128,
        num_guides: int = 0,
        sees_missing: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "num_conditions": num_conditions,
            "widths": list(widths),
            "depths": list(depths),
            "num_features": num_features,
            **({"num_guides": num_guides} if num_guides else {}),
        }
        if sees_missing:
            self.config["sees_missing"] = True
        self.num_guides = num_guides
        self.stride = 2 ** len(widths)
        self.features = Features(num_conditions, num_features)
        num_inputs = (3 if sees_missing else 2) * NUM_CHANNELS
        self.stem = nn.Conv2d(num_inputs * 4, widths[0], 3, padding=1)

        def stage(width: int, depth: int) -> nn.ModuleList:
            return nn.ModuleList(ResidualBlock(width, num_features) for _ in range(depth))

        self.down = nn.ModuleList(stage(w, d) for w, d in zip(widths, depths, strict=True))
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.grow = nn.ModuleList(nn.Conv2d(b, 4 * a, 1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(stage(w, d) for w, d in zip(widths[:-1], depths[:-1], strict=True))
        self.head = nn.Conv2d(widths[0], NUM_CHANNELS * 4, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]  # Conv2d has one by default
        # Made last: what is drawn for the other layers stays what it is without guides.
        self.guide_stem: nn.Conv2d | None = None
        if num_guides:
            self.guide_stem = nn.Conv2d(2 * num_guides * 4, widths[0], 3, padding=1, bias=False)
            nn.init.zeros_(self.guide_stem.weight)

    @property
    def reach(self) -> int:
        """Radius in pixels of the window that an output pixel depends on (an upper bound)."""
        depths = self.config["depths"]
        scales = [2 ** (i + 1) for i in range(len(depths))]
        passes = [2] * (len(depths) - 1) + [1]
        blocks = sum(2 * d * p * s for d, p, s in zip(depths, passes, scales, strict=True))
        # Stem and head reach one half-resolution pixel each, the box mean 2, and a pixel's phase
        # in the coarsest cell adds one cell.
        return blocks + 2 * 2 + 2 + self.stride

    def forward(
        self,
        x_scaled: Float[Tensor, "b 3 h w"],
        x_detail: Float[Tensor, "b 3 h w"],
        ln_sigma: Float[Tensor, " b"],
        condition: Int[Tensor, " b"],
        guide: Float[Tensor, "b guides h w"] | None = None,
        missing: Float[Tensor, "b 3 h w"] | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """F(c_in x, detail; ln sigma, condition, guide); h and w must divide by `stride`.

        A guide is NaN where it is not given; None: nowhere. `missing` is 1 where x holds nothing; a
        network that is not told of it takes None.
        """
        features = self.features(ln_sigma, condition)
        inputs = [x_scaled, x_detail]
        if self.config.get("sees_missing"):
            inputs.append(torch.zeros_like(x_scaled) if missing is None else missing)
        h = F.pixel_unshuffle(torch.cat(inputs, dim=1), 2)
        h = self.stem(h.contiguous(memory_format=torch.channels_last))
        if guide is not None and self.guide_stem is not None:
            h = h + self.guide_stem(_shown(guide).contiguous(memory_format=torch.channels_last))
        skips: list[Tensor] = []
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, features)
            if level < len(self.shrink):
                skips.append(h)
                h = self.shrink[level](h)
        for level in reversed(range(len(self.up))):
            grown = F.pixel_shuffle(self.grow[level](h), 2)
            h = skips[level] + grown.contiguous(memory_format=torch.channels_last)
            for block in self.up[level]:  # type: ignore[attr-defined]
                h = block(h, features)
        return F.pixel_shuffle(self.head(h), 2)


def _shown(guide: Tensor) -> Tensor:
    """Guides (b g h w) as the network sees them: values and where they are given, unshuffled."""
    given = guide.isfinite()
    values = torch.where(given, guide, torch.zeros_like(guide))
    return F.pixel_unshuffle(torch.cat([values, given.to(guide.dtype)], dim=1), 2)


def stem_of(weight: Tensor, *, sees_missing: bool) -> Tensor:
    """The stem's weight for a network that is told of missing pixels, or for one that is not.

    The inputs that are added weigh nothing; those that are left out are 0 where none is missing.
    """
    plain = 2 * NUM_CHANNELS * 4
    weight = weight[:, :plain]
    return F.pad(weight, (0, 0, 0, 0, 0, plain // 2)) if sees_missing else weight.clone()


def filled(x: Tensor, missing: Tensor) -> Tensor:
    """x with the mean of the known neighbours where it is missing (b c h w).

    Of the eight around it; of a 5 x 5 window where none of them is known; 0, the middle of the
    range, where that has none.
    """
    known, mean = 1 - missing, torch.zeros_like(x)
    for size in (5, 3):
        share = _box_mean(known, size)
        around = _box_mean(x * known, size) / share.clamp(min=1e-6)
        mean = torch.where(share > _LEAST_SHARE, around, mean)
    return torch.where(missing > 0, mean, x)


def effective_sigma(sigma: Tensor, missing: Tensor) -> Float[Tensor, "b c h w"]:
    """The noise level of each pixel of `filled` (b c h w), what stands in for a pixel included.

    A missing one errs by about FILLED_STD however little noise there is. Preconditioned by sigma
    alone the network could move it by no more than sigma, and its errors, over sigma, would drown
    those of all others in the loss.

    Args:
        sigma: (b,) of the noise.
        missing: (b c h w), 1 where nothing is known.
    """
    return (sigma[:, None, None, None].square() + missing * FILLED_STD**2).sqrt()


def local_detail(x: Tensor, sigma: Tensor) -> Tensor:
    """asinh((x - box5(x)) / sigma): detail in units of the noise; shape of x."""
    return torch.asinh((x - _box_mean(x, 5)) / sigma[:, None, None, None])
