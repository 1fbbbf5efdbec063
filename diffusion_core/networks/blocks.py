"""Building blocks that keep a network local: nothing here mixes statistics across pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelNorm(nn.Module):
    """LayerNorm over the channels of each pixel alone, with a learned gain.

    A norm over space (GroupNorm, InstanceNorm) would let every pixel see every other, and a tile
    would no longer give the result of the whole image.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (b c h w) over c."""
        # In channels_last memory the permuted view is contiguous: no copy is made.
        pixels = x.permute(0, 2, 3, 1)
        normed = F.layer_norm(pixels, (pixels.shape[-1],), self.gain.to(x.dtype))
        return normed.permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(modulated norm of x))): two 3x3 convolutions, so a reach of 2 pixels.

    The modulation (FiLM: per-channel scale and shift) carries the noise level and the condition.
    """

    def __init__(self, num_channels: int, num_features: int) -> None:
        super().__init__()
        self.norm = PixelNorm(num_channels)
        self.film = nn.Linear(num_features, 2 * num_channels)
        self.conv_in = nn.Conv2d(num_channels, num_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(num_channels, num_channels, 3, padding=1)
        # Every block starts as the identity.
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Refine (b c h w), modulated by features (b f)."""
        scale, shift = self.film(features)[:, :, None, None].chunk(2, dim=1)
        hidden = torch.addcmul(shift, self.norm(x), 1 + scale)
        return x + self.conv_out(F.silu(self.conv_in(hidden)))


class Features(nn.Module):
    """Noise level and condition to a feature vector that modulates every block."""

    frequencies: Tensor

    def __init__(self, num_conditions: int, num_features: int, num_frequencies: int = 16) -> None:
        super().__init__()
        self.num_conditions = num_conditions
        # ln(sigma) runs over about [-5, 2]; half-octave frequencies from one period in 16.
        frequencies = 2.0 ** (torch.arange(num_frequencies) / 2) * (2 * torch.pi / 16)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.hidden = nn.Linear(2 * num_frequencies + num_conditions, num_features)
        self.out = nn.Linear(num_features, num_features)

    def forward(self, ln_sigma: Tensor, condition: Tensor) -> Tensor:
        """(b,) and the condition's index (b,) to (b f)."""
        phase = ln_sigma[:, None] * self.frequencies.to(ln_sigma.dtype)
        one_hot = F.one_hot(condition, self.num_conditions).to(ln_sigma.dtype)
        raw = torch.cat([phase.cos(), phase.sin(), one_hot], dim=1)
        return F.silu(self.out(F.silu(self.hidden(raw))))
