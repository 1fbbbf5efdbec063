"""The receipts of one item in the driver's memory: a quarter of what they take as objects.

A campaign of a million blocks would hold more than a gigabyte of receipts. Packed they are some 300
bytes each: what follows from the item and the block is left out, and hashes are bytes.

    seconds nfe calls peak exact low high | environment | attempt | size, sha256 of each chunk |
    residual

Environments are the same for most, and kept once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import astuple

from flows.engine.plan import ItemPlan
from flows.engine.receipt import Account, Chunk, Receipt, chunk_keys

_HEAD = struct.Struct("<dqqq?ddIHI")
_CHUNK = struct.Struct("<Q32s")


class ReceiptBook(MutableMapping[int, Receipt]):
    """Block -> its receipt, packed. Iterates in the order of blocks."""

    def __init__(self, item: ItemPlan) -> None:
        self._item = item
        self._packed: list[bytes | None] = []
        self._environments: list[str] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self._find(block) is not None

    def __iter__(self) -> Iterator[int]:
        return (block for block, packed in enumerate(self._packed) if packed is not None)

    def __getitem__(self, block: int) -> Receipt:
        packed = self._find(block)
        if packed is None:
            raise KeyError(block)
        return _unpack(self._item, block, packed, self._environments)

    def __setitem__(self, block: int, receipt: Receipt) -> None:
        if not self._packed:
            self._packed = [None] * self._item.num_blocks
        self._count += self._packed[block] is None
        if receipt.environment not in self._environments:
            self._environments.append(receipt.environment)
        where = self._environments.index(receipt.environment)
        self._packed[block] = _pack(self._item, receipt, where)

    def __delitem__(self, block: int) -> None:
        if self._find(block) is None:
            raise KeyError(block)
        self._packed[block] = None
        self._count -= 1

    def clear(self) -> None:
        """Forget them all."""
        self._packed, self._count = [], 0

    def _find(self, block: int) -> bytes | None:
        return self._packed[block] if 0 <= block < len(self._packed) else None


def _pack(item: ItemPlan, receipt: Receipt, where: int) -> bytes:
    if [chunk.key for chunk in receipt.chunks] != chunk_keys(item, item.grid.block(receipt.block)):
        raise ValueError(f"block {receipt.block}: its receipt is of another grid")
    *figures, residual, exact, low, high = astuple(receipt.account)  # in the order of Account
    attempt = receipt.attempt.encode()
    return b"".join(
        [
            _HEAD.pack(*figures, exact, low, high, where, len(attempt), len(receipt.chunks)),
            attempt,
            *(_CHUNK.pack(chunk.size, bytes.fromhex(chunk.sha256)) for chunk in receipt.chunks),
            struct.pack(f"<{len(residual)}d", *residual),
        ]
    )


def _unpack(item: ItemPlan, index: int, packed: bytes, environments: Sequence[str]) -> Receipt:
    head = _HEAD.unpack_from(packed)
    seconds, nfe, calls, peak, exact, low, high, where, length, count = head
    start = _HEAD.size + length
    end = start + count * _CHUNK.size
    keys = chunk_keys(item, item.grid.block(index))
    found = zip(keys, _CHUNK.iter_unpack(packed[start:end]), strict=True)
    residual = struct.unpack(f"<{(len(packed) - end) // 8}d", packed[end:])
    return Receipt(
        key=item.key,
        block=index,
        attempt=packed[_HEAD.size : start].decode(),
        chunks=tuple(Chunk(key, size, sha.hex()) for key, (size, sha) in found),
        account=Account(seconds, nfe, calls, peak, residual, exact, low, high),
        environment=environments[where],
    )
