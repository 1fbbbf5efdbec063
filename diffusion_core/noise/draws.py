"""Keyed noise: normal draws addressed by (seed, digest, stream, level, voxel), never by order.

A block of an image draws the very noise that the whole image would draw there, on any machine, in
any order, however often it is retried. Philox4x32-10 turns counters into integers that are equal to
the bit everywhere (integer arithmetic only); Box-Muller in float64 turns those into normals, equal
to about 1e-6 between devices.

This is the only module that may seed torch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_TAPS = 3.0
"""Reach of the average along z, in lengths: exp(-9) is left out."""
_LANES = 4  # one Philox block gives four words, hence four normals: neighbours along x

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def key_of(*parts: object) -> int:
    """A 64-bit key made of the parts' text: the first 8 bytes of its sha256."""
    text = "\x1f".join(str(part) for part in ("sashiko-draws-1", *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def seed_torch(seed: int, *parts: object) -> None:
    """Seed torch's global generator (training loops of others' making need it)."""
    torch.manual_seed(key_of(seed, *parts) >> 1)


def generator(seed: int, *parts: object, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator of its own, seeded by a key: for training, where order is fixed anyway."""
    return torch.Generator(device=device).manual_seed(key_of(seed, *parts) >> 1)


def philox4x32(counter: Words, key: tuple[int, int], rounds: int = _ROUNDS) -> Words:
    """The Philox4x32 block function, on vectors of counters.

    Args:
        counter: four broadcastable int64 tensors with values in [0, 2^32).
        key: two words in [0, 2^32).
        rounds: 10 for Philox4x32-10.

    Returns:
        Four int64 tensors with values in [0, 2^32).

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Random123.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, which keeps every bit of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & _WORD, (p1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _WORD, high0 ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def box_muller(words: Words) -> Tensor:
    """Four words a block to four standard normals a block: (..., 4) float64.

    The half-step offset keeps the logarithm finite; normals reach 6.7 standard deviations.
    """
    uniform = [(word.to(torch.float64) + 0.5) * 2.0**-32 for word in words]
    lanes = []
    for radial, angular in (uniform[:2], uniform[2:]):
        radius = radial.log().mul_(-2.0).sqrt_()
        angle = angular * (2.0 * math.pi)
        lanes += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(lanes, dim=-1)


@dataclass(frozen=True)
class KeyedDraws:
    """Normal noise of one image, addressed by level and global voxel (protocols.NormalDraws).

    Attributes:
        seed: of the campaign.
        digest: content digest of the source, so that two sites draw alike.
        origin_zyx: global coordinates of the first voxel of the tensors asked for.
        length_z: slices or frames over which the noise stays alike: those k apart have the
            correlation exp(-k^2 / (2 length_z^2)); 0: each has noise of its own, inf: all share
            one.
    """

    seed: int
    digest: str
    origin_zyx: tuple[int, int, int] = (0, 0, 0)
    length_z: float = 0.0

    def at(self, origin_zyx: tuple[int, int, int]) -> KeyedDraws:
        """The same noise seen from another origin."""
        return replace(self, origin_zyx=origin_zyx)

    def normal(self, level: int, like: Tensor, stream: int = 0) -> Tensor:
        """Standard normal noise for the voxels of `like`.

        Args:
            level: index of the noise level; each has noise of its own.
            like: (b *m); batch element i is slice origin z + i. The last two axes are y and x,
                those between are folded into the channel. Only shape, dtype and device count.
            stream: tells apart several draws within a level.

        Returns:
            Noise with the shape, dtype and device of `like`.

        Raises:
            TypeError: if `like` is not of a floating dtype.
        """
        if not like.is_floating_point():
            raise TypeError(f"noise is drawn in floating dtypes, not {like.dtype}")
        if self.length_z:
            return self._alike(level, like, stream)
        b, c, h, w = _as_voxels(like.shape)
        z0, y0, x0 = self.origin_zyx
        first, last = x0 // _LANES, (x0 + w - 1) // _LANES + 1
        key = key_of(self.seed, self.digest, stream, level)
        device = like.device
        words = philox4x32(
            (
                _axis(first, last - first, 3, device),
                _axis(y0, h, 2, device),
                _axis(z0, b, 0, device),
                _axis(0, c, 1, device),
            ),
            (key & _WORD, key >> 32),
        )
        row = box_muller(words).reshape(b, c, h, -1)
        skip = x0 - first * _LANES
        return row[..., skip : skip + w].to(like.dtype).reshape(like.shape)

    def _alike(self, level: int, like: Tensor, stream: int) -> Tensor:
        """Noise that is alike over neighbouring slices: a moving average of white noise.

        The average is that of the global slices about each: a part of a stack has the noise of the
        whole.
        """
        z0, y0, x0 = self.origin_zyx
        if math.isinf(self.length_z):
            one = replace(self, origin_zyx=(0, y0, x0), length_z=0.0)
            return one.normal(level, like[:1], stream).expand_as(like).clone()
        reach = math.ceil(_TAPS * self.length_z)
        white = replace(self, origin_zyx=(z0 - reach, y0, x0), length_z=0.0)
        padded = like.new_empty(len(like) + 2 * reach, *like.shape[1:], dtype=torch.float64)
        drawn = white.normal(level, padded, stream)
        places = torch.arange(-reach, reach + 1, dtype=torch.float64, device=like.device)
        # Its correlation with itself is a Gaussian sqrt(2) times as wide.
        taps = torch.exp(-((places / self.length_z) ** 2))
        windows = drawn.unfold(0, 2 * reach + 1, 1)
        return (windows @ (taps / taps.norm())).to(like.dtype)


def _as_voxels(shape: torch.Size) -> tuple[int, int, int, int]:
    """Read any shape (b *m) as (b c h w)."""
    b, rest = shape[0], tuple(shape[1:])
    h, w = (1, 1, *rest)[-2:]
    return b, math.prod(rest[:-2]), h, w


def _axis(start: int, length: int, dim: int, device: torch.device) -> Tensor:
    """Coordinates modulo 2^32 along axis `dim` of four."""
    coordinate = torch.arange(start, start + length, dtype=torch.int64, device=device) & _WORD
    return coordinate.reshape([-1 if axis == dim else 1 for axis in range(4)])
