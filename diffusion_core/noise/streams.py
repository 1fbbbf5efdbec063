"""Noise for training: one stream a sample number, so that a resumed run sees what it would have.

Restoration uses draws.KeyedDraws instead, which addresses noise by voxel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_STREAM = 0x5A51C0  # keeps the noise apart from the patches, which are keyed by the same seed


def training_noise(seed: int, sample: int, like: Tensor) -> Tensor:
    """Standard normal noise of sample number `sample`: float32, shape of `like`, on the CPU."""
    rng = np.random.Generator(np.random.Philox(key=[seed ^ (_STREAM << 32), sample]))
    return torch.from_numpy(rng.standard_normal(tuple(like.shape), dtype=np.float32))


@contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Torch's global generator seeded for the block, and as it was after it.

    For the initial weights of a network: torch's layers draw them from the global generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
