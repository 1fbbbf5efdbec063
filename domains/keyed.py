"""Randomness by content: who asks, when, and in what order changes nothing.

Masks, phases and simulated noise depend on the digest of the source, the seed, the purpose and the
slice alone, so that two sites that simulate the same file compare the same measurement.
"""

from __future__ import annotations

import hashlib

import numpy as np

from domains.base import Array, ItemRecord


def keyed_rng(seed: int, digest: str, purpose: str, index: int) -> np.random.Generator:
    """A generator of its own for one purpose on one slice of one source.

    Args:
        seed: of the simulation.
        digest: sha256 of the source.
        purpose: "mask", "noise", "phase" ...: streams never share numbers.
        index: number of the slice, as its source counts.
    """
    code = hashlib.sha256(f"{seed}:{digest}:{purpose}:{index}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(code[:16], "little")))


def slice_numbers(record: ItemRecord) -> list[int]:
    """Number of each slice (or frame) as the source counts: a selection keeps its slices' noise."""
    chosen = record.meta.get("slices")
    return [int(n) for n in chosen] if chosen else list(range(record.shape[1]))


def slice_rngs(seed: int, record: ItemRecord, purpose: str) -> list[np.random.Generator]:
    """One generator a slice of an item."""
    digest = record.source_digest
    return [keyed_rng(seed, digest, purpose, n) for n in slice_numbers(record)]


def pixel_digest(pixels: Array) -> str:
    """Sha256 of pixels as they lie in memory, C order, with their dtype and shape."""
    header = f"{pixels.dtype.str}{pixels.shape}".encode()
    return hashlib.sha256(header + np.ascontiguousarray(pixels).tobytes()).hexdigest()
