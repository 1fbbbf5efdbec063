"""Coarse to fine: holes wider than the network sees are first filled where they are narrow.

    y, mask --pool--> 1/4 --pool--> 1/8 ... --pool--> the scale at which the widest hole is narrow
                       |             |                    |
    restored <-means- restored <-means- restored <-means- restored

A photograph made smaller is a photograph: the network and its covariance serve every scale. A
scale's result says to the next finer one what the means of squares deep inside wide holes are, with
a variance: as data (MaskWithMeans), so that kriging, every level of the chain and every part of
a cut plane hear it, and the finer scale may still move it. What is restored at the coarse scales is
of a whole plane; what is made of it at the finest is local.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.operators import Mask, MaskWithMeans, MeansNoise
from diffusion_core.operators.base import Operator
from diffusion_core.protocols import Data, NoiseModel, Signal

WIDE_PX = 100.0
"""Width from which a hole is wide: the network's reach, about."""
NARROW_CELLS = 100.0
"""Width, in squares of the coarsest scale, that the widest hole has there at most: its reach."""
GUIDE_STD = 0.1
"""What a coarser scale's means are taken to be off by, network units."""
_KNOWN_SHARE = 0.5
"""Of a square's pixels measured, that its mean counts as measured."""
_EXACT_STD = 0.02
"""Noise of such a mean, network units, that is taken for none."""

Restore = Callable[[Operator, Data, NoiseModel, int], Signal]
"""(operator, data, noise, factor) -> the image of that scale."""


@dataclass(frozen=True, eq=False)
class Pooled:
    """A masked image at a coarser scale.

    Attributes:
        factor: side of its squares, fine pixels.
        mean: (b c H W) mean of the measured pixels of each square; 0 where there is none.
        share: (b|1 c|1 H W) of the square's pixels that were measured, 0 to 1.
    """

    factor: int
    mean: Signal
    share: Float[Tensor, "b c H W"]

    def coarser(self, times: int) -> Pooled:
        """The same with squares `times` as wide."""
        share = _pool(self.share, times)
        mean = _pool(self.mean * self.share, times)
        weight = share.clamp_min(torch.finfo(share.dtype).tiny)
        return Pooled(self.factor * times, mean / weight, share)

    def problem(self, noise: NoiseModel) -> tuple[Bool[Tensor, "b c H W"], GaussianNoise]:
        """Which squares count as measured, and the noise of their means.

        Where noise is averaged away they count as exact: then a solve takes a tenth of the steps,
        and its figures are the same (infra/decisions/0029).

        Args:
            noise: of the fine pixels.
        """
        known = self.share >= _KNOWN_SHARE
        count = (self.share * self.factor**2).clamp_min(1.0)
        std = (noise.variance(self.mean) / count).sqrt()
        least = std.expand_as(self.mean)[known.expand_as(self.mean)]
        exact = least.numel() == 0 or float(least.max()) <= _EXACT_STD
        return known, GaussianNoise(0.0 if exact else std)


def pooled(y: Data, mask: Bool[Tensor, "b c h w"], factor: int) -> Pooled:
    """Average the measured pixels over squares; of those cut by the border, what there is.

    Args:
        y: (b c h w), anything where nothing was measured.
        mask: (b|1, c|1, h, w), True where measured.
        factor: side of the squares.
    """
    y = torch.where(mask, y, 0)
    return Pooled(1, y, mask.to(y)).coarser(factor)


def wide_holes(coarse: Pooled, wide_px: float = WIDE_PX) -> tuple[Bool[Tensor, "b c H W"], float]:
    """The squares of holes that are wide somewhere, and the width of the widest in fine pixels.

    A hole's width is twice the distance from its deepest point to the nearest square of which
    anything was measured; holes that touch are one. One that nothing surrounds has no width.
    """
    missing = (coarse.share == 0).cpu().numpy()
    wide, widest = np.zeros_like(missing), 0.0
    for place in np.ndindex(*missing.shape[:2]):
        plane = missing[place]
        if not plane.any() or plane.all():
            continue
        width = 2.0 * coarse.factor * ndimage.distance_transform_edt(plane)
        labels, num_holes = ndimage.label(plane, np.ones((3, 3)))
        most = ndimage.maximum(width, labels, np.arange(1, num_holes + 1))
        widest = max(widest, float(most.max()))
        wide[place] = np.isin(labels, 1 + np.flatnonzero(most > wide_px))
    return torch.from_numpy(wide).to(coarse.mean.device), widest


@dataclass(frozen=True, eq=False)
class CoarseMeans:
    """What the coarse scales say of a plane.

    Attributes:
        factor: side of the squares, fine pixels.
        means: (b c H W), of every square.
        wide: (b|1 c|1 H W) whether it lies in a wide hole.
    """

    factor: int
    means: Signal
    wide: Bool[Tensor, "b c H W"]

    def window(self, y0: int, y1: int, x0: int, x1: int) -> CoarseMeans:
        """The part over fine pixels y0..y1, x0..x1; starts are multiples of the factor.

        Raises:
            ValueError: if they are not.
        """
        if y0 % self.factor or x0 % self.factor:
            raise ValueError(f"a window of squares of {self.factor} px cannot start at {y0}, {x0}")
        rows = slice(y0 // self.factor, -(-y1 // self.factor))
        columns = slice(x0 // self.factor, -(-x1 // self.factor))
        return CoarseMeans(
            self.factor, self.means[..., rows, columns], self.wide[..., rows, columns]
        )

    def applied(
        self, mask: Bool[Tensor, "b c h w"], y: Data, noise: NoiseModel, std: float = GUIDE_STD
    ) -> tuple[MaskWithMeans, Data, MeansNoise]:
        """The problem of a masked image with the means of the squares that are all missing."""
        rows, columns = (side // self.factor for side in mask.shape[-2:])
        squares = mask[..., : rows * self.factor, : columns * self.factor].float()
        cells = (max_pool2d(squares, self.factor) == 0) & self.wide[..., :rows, :columns]
        operator = MaskWithMeans(mask, cells, self.factor)
        means = torch.where(cells, self.means[..., :rows, :columns], 0)
        return (
            operator,
            operator.join(torch.where(mask, y, 0), means),
            MeansNoise(operator, noise, torch.full_like(means, std**2)),
        )


def scales(factor: int, widest_px: float) -> list[int]:
    """Factors to restore at, the coarsest first: halved down to `factor`, that of the means."""
    found = [factor]
    while widest_px / found[0] > NARROW_CELLS:
        found.insert(0, 2 * found[0])
    return found


def coarse_means(coarse: Pooled, noise: NoiseModel, restore: Restore) -> CoarseMeans | None:
    """Restore a plane from coarse to fine, up to the scale of `coarse`; None without a wide hole.

    Args:
        coarse: the measured plane, pooled.
        noise: of its pixels before they were pooled.
        restore: restores a scale.
    """
    wide, widest = wide_holes(coarse)
    if widest <= WIDE_PX:
        return None
    finer: CoarseMeans | None = None
    for factor in scales(coarse.factor, widest):
        scale = coarse.coarser(factor // coarse.factor)
        known, of_means = scale.problem(noise)
        if finer is None:
            x = restore(Mask(known), scale.mean, of_means, factor)
        else:
            x = restore(*finer.applied(known, scale.mean, of_means), factor)
        finer = CoarseMeans(2, x, torch.ones_like(known))
    return None if finer is None else CoarseMeans(coarse.factor, finer.means, wide)


def _pool(x: Tensor, factor: int) -> Tensor:
    """Means of factor x factor squares; what is beyond the border counts as 0."""
    more = [-side % factor for side in x.shape[-2:]]
    return avg_pool2d(pad(x, (0, more[1], 0, more[0])), factor)
