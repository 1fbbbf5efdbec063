"""Training patches drawn by counter: sample number n is the same whoever draws it, and when.

A resumed run, or one split over several workers, sees the sequence of an undisturbed run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffusion_core.networks.local_unet import NUM_CHANNELS

Array = np.ndarray[Any, Any]
Augment = Callable[[str, Array, np.random.Generator], Array]

GOLDEN = 0.6180339887498949
_FLAT_STD = 0.03  # network units: air, sky; worth a look now and then only
_MAX_REDRAWS = 4
_FURTHER = 0x5A5B1C0
"""Parts what is hidden by chance from what is drawn."""
_SOFT_PX = (0.3, 1.3)
"""Standard deviation of a blur that a sharp picture could have had."""
_GUIDE_GAIN = (0.7, 1.4)
"""A guide's range is read from the guide itself, and differs with the part of a body in it."""


class View(Protocol):
    """An image or volume (c z h w) in network units: an array, or what reads like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, z, h, w)."""
        ...

    def __getitem__(self, where: Any, /) -> Array:
        """view[:, z, y0:y1, x0:x1]: a window (c h w) of one slice, float."""
        ...


@dataclass(frozen=True)
class Volumes:
    """One item to draw from.

    Attributes:
        views: one is picked at random.
        weight: how often the item is picked, against the others of its condition.
    """

    views: Sequence[View]
    weight: float = 1.0


@dataclass(frozen=True)
class Batch:
    """A batch of patches.

    Attributes:
        x0: (b 3 h w) in network units, unused channels at 0, and what was never measured too.
        condition: (b,) index of the condition.
        channels: (b 3) 1 where a channel is in use.
        guide: (b g h w) on [-1, 1], NaN where it is not given; None: no guides are learned.
        measured: (b 3 h w) 1 where x0 is known; None: everywhere.
        shown: (b 3 h w) 1 where the network may see it, no more than `measured`; None likewise.
    """

    x0: Tensor
    condition: Tensor
    channels: Tensor
    guide: Tensor | None = None
    measured: Tensor | None = None
    shown: Tensor | None = None

    def part(self, samples: slice) -> Batch:
        """Some of the samples; shares memory."""
        return self._each(lambda tensor: tensor[samples])

    def to(self, device: str) -> Batch:
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = (self.x0, self.condition, self.channels, self.guide, self.measured, self.shown)
        return Batch(*(None if t is None else change(t) for t in tensors))  # type: ignore[arg-type]


class PatchSource:
    """Draws patches from volumes, held in memory or not.

    Args:
        items: what to draw from, for each condition; views as large as a patch at least.
        shares: condition -> share of the samples; its order gives the condition's index.
        patch_size: side in pixels.
        seed: of the whole sequence.
        augment: (condition, patch (c h w), rng) -> patch, by the domain; its scale and phase
            changes must be ones that real images could have had.
        num_guides: last channels of every view that are guides, NaN where there is none. They are
            cut, turned and flipped with the image, and what else is varied of it is not of them.
        drop_share: of the samples, each guide by itself, that are shown without it.
        further: None for clean images. For images that lack pixels (NaN) the share of the measured
            ones that the network is not shown either, in the mean over samples.
    """

    def __init__(
        self,
        items: Mapping[str, Sequence[Volumes]],
        shares: Mapping[str, float],
        patch_size: int,
        seed: int,
        augment: Augment,
        num_guides: int = 0,
        drop_share: float = 0.0,
        further: float | None = None,
    ) -> None:
        missing = [name for name in shares if not items.get(name)]
        if missing:
            raise ValueError(f"no training image for {', '.join(missing)}: add data or drop it")
        self.conditions = list(shares)
        self._edges = np.cumsum(list(shares.values())) / sum(shares.values())
        self._items = items
        self._weights = {
            name: _normalised(np.array([item.weight for item in items[name]])) for name in shares
        }
        self._size = patch_size
        self._seed = seed
        self._augment = augment
        self._num_guides, self._drop_share = num_guides, drop_share
        self._further = further

    def batch(self, first: int, count: int) -> Batch:
        """Samples first .. first + count - 1 of the sequence."""
        drawn = [self._sample(n) for n in range(first, first + count)]
        x0 = torch.from_numpy(np.stack([patch for _, patch, _, _ in drawn]))
        measured = shown = None
        if self._further is not None:
            measured = x0.isfinite().float()
            x0 = x0.nan_to_num(0.0)
            numbers = range(first, first + count)
            kept = [further_mask(self._seed, n, self._further, x0.shape[-2:]) for n in numbers]
            shown = measured * torch.from_numpy(np.stack(kept))
        return Batch(
            x0=x0,
            condition=torch.tensor([index for index, _, _, _ in drawn]),
            channels=torch.tensor(
                [[float(i < used) for i in range(NUM_CHANNELS)] for _, _, used, _ in drawn]
            ),
            guide=torch.from_numpy(np.stack([guide for _, _, _, guide in drawn]))
            if self._num_guides
            else None,
            measured=measured,
            shown=shown,
        )

    def _sample(self, n: int) -> tuple[int, Array, int, Array]:
        # A low-discrepancy walk over the shares: any stretch of samples holds its due mix.
        index = int(np.searchsorted(self._edges, (n * GOLDEN) % 1.0, side="right"))
        name = self.conditions[min(index, len(self.conditions) - 1)]
        rng = np.random.Generator(np.random.Philox(key=[self._seed, n]))
        for _ in range(_MAX_REDRAWS):
            crop = self._crop(name, rng)
            patch, guide = np.split(crop, [len(crop) - self._num_guides])
            if _std(patch) > _FLAT_STD:
                break
        patch = self._augment(name, patch, rng)
        used = patch.shape[0]
        turned = _dihedral(np.concatenate([patch, guide]) if self._num_guides else patch, rng)
        padded = np.zeros((NUM_CHANNELS, *turned.shape[1:]), np.float32)
        padded[:used] = turned[:used]
        return index, padded, used, self._shown(turned[used:], rng)

    def _shown(self, guide: Array, rng: np.random.Generator) -> Array:
        """Guides (g h w) as a sample has them: some dropped, the others of a varied gain."""
        shown = np.array(guide, np.float32)
        for channel in shown:
            dropped, gain = rng.uniform() < self._drop_share, rng.uniform(*_GUIDE_GAIN)
            channel[:] = np.nan if dropped else (channel + 1) * gain - 1
        return shown

    def _crop(self, name: str, rng: np.random.Generator) -> Array:
        item = self._items[name][rng.choice(len(self._items[name]), p=self._weights[name])]
        volume = item.views[int(rng.integers(len(item.views)))]
        z = rng.integers(volume.shape[1])
        y = rng.integers(volume.shape[2] - self._size + 1)
        x = rng.integers(volume.shape[3] - self._size + 1)
        crop: Array = volume[:, z, y : y + self._size, x : x + self._size]
        # In one order of memory: sums of a crop come out alike wherever it was read from.
        return crop.astype(np.float32, order="C")


def further_mask(seed: int, number: int, share: float, size: Sequence[int]) -> Array:
    """(1 h w) float32, 0 where sample `number` is corrupted further: pixels by chance.

    Their share is drawn too, from 0 to twice `share`: a network that learns how its estimate gains
    as fewer pixels are missing will be asked what it is where none is.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed ^ _FURTHER, number]))
    own_share = rng.uniform(0, 2 * share)
    return (rng.random((1, *size)) >= own_share).astype(np.float32)


def _std(patch: Array) -> float:
    """Standard deviation of what is measured of a patch; 0 of nothing."""
    if not np.isnan(patch).any():
        return float(patch.std())
    known = patch[np.isfinite(patch)]
    return float(known.std()) if known.size else 0.0


def _normalised(weights: Array) -> Array:
    total: Array = weights / weights.sum()
    return total


def _dihedral(patch: Array, rng: np.random.Generator) -> Array:
    """One of the eight turns and flips of the square, on (c h w)."""
    turned = np.rot90(patch, int(rng.integers(4)), axes=(1, 2))
    return turned[:, :, ::-1] if rng.integers(2) else turned


def soften(patch: Array, rng: np.random.Generator) -> Array:
    """Blur a patch (c h w) by a Gaussian of .3 to 1.3 px, the same for all channels.

    Scenes that were enlarged, taken through haze or by a worse lens are smooth from pixel to
    pixel; a network that never saw one leaves grain in them.
    """
    from scipy.ndimage import gaussian_filter

    std_px = rng.uniform(*_SOFT_PX)
    soft: Array = gaussian_filter(patch, (0.0, std_px, std_px), mode="nearest")
    return soft
