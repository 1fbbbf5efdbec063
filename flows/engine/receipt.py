"""Blocks on their way to being published: staged chunks, and the receipts that vouch for them.

    OUTPUT/.work/KEY/                 one item's unpublished work
      stage/ATTEMPT.0.0.1.0           chunks of one attempt at one block; one writer, then nobody
      receipts/000012.json            block 12 is done: attempt, chunks, sizes, sha256
      receipts/000012.json.corrupt-0  was not true, kept for the record

A receipt is created only if absent, whole or not at all, after its chunks were read back; so the
first of several attempts wins, the others are never looked at, and receipts are all the memory that
a resumed run needs. Whoever reads one checks it: its own digest, its chunks' sizes at once, and
their sha256 before they are published.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from domains.base import Array
from flows import ome
from flows.engine.grid import Block
from flows.engine.many import each
from flows.engine.objects import StoreError, Usage, is_odd
from flows.engine.plan import ItemPlan

RECEIPT_FORMAT = 2
"""2: `environment`. What version 1 wrote is read, and says nothing of it."""


class Objects(Protocol):
    """The storage primitives that the engine needs; see objects.py, s3_objects.py.

    Attributes:
        at_once: calls that are worth making at the same time, where the way is long.
    """

    at_once: int

    def put(self, key: str, data: bytes) -> None:
        """Write an object under a key of the caller's own."""
        ...

    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        """Write an object if the key is free, whole or not at all; False if it was taken."""
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Write an object anew: readers find all of it, or all of the one before."""
        ...

    def get(self, key: str) -> bytes:
        """Read an object; FileNotFoundError if there is none."""
        ...

    def size(self, key: str) -> int | None:
        """Size in bytes, None if there is none."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is such an object or folder."""
        ...

    def names(self, prefix: str) -> list[str]:
        """Names directly under a prefix, sorted."""
        ...

    def hidden(self, prefix: str) -> list[str]:
        """Keys at any depth that `names` leaves out: drafts; a store may have none."""
        ...

    def now(self) -> float:
        """The clock that `usage` tells times by, in seconds."""
        ...

    def usage(self, key: str) -> Usage | None:
        """Number, bytes and youngest time of the objects under a key or prefix; None if none."""
        ...

    def rename(self, key: str, new_key: str) -> bool:
        """Move one object; False if it was gone."""
        ...

    def link(self, key: str, new_key: str) -> bool:
        """Give the same bytes a second key, one of the caller's own; False if by a copy."""
        ...

    def assembly(self, draft: str, path: str) -> str:
        """Where to put together what will be adopted as `path`: the draft, or `path` itself."""
        ...

    def adopt(self, prefix: str, new_prefix: str) -> None:
        """Let a finished folder, durable by then, appear under its final key at once."""
        ...

    def remove(self, key: str) -> None:
        """Remove an object or a folder; it may be gone already."""
        ...


class NewerFormatError(StoreError):
    """An object that a newer version of sashiko wrote: what it means is not known here."""


class ReadBackError(OSError):
    """What was read back after writing is not what was written."""


@dataclass(frozen=True)
class Chunk:
    """One stored chunk: key inside its array ("c/0/3/1/0"), size and sha256 of its bytes."""

    key: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Account:
    """How a block was computed.

    Attributes:
        seconds: on one worker, reading and writing included, waiting for a lane not.
        nfe: denoiser calls for one image.
        num_operator_calls: applications of A or A' for one image.
        peak_bytes: highest resident memory of the worker during the block.
        residual: for each batch element, |R^{-1/2}(y - A x)|^2 a real measurement.
        exact_data: the residual is the largest |y - A x| instead, because the data are exact.
        low: smallest pixel, in source units.
        high: largest pixel.
    """

    seconds: float
    nfe: int
    num_operator_calls: int
    peak_bytes: int
    residual: tuple[float, ...] = ()
    exact_data: bool = False
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Receipt:
    """One block of one item is staged.

    Attributes:
        key: of the item's plan.
        block: index of the block.
        attempt: name of the winning attempt, unique for all time.
        chunks: what was staged.
        account: how it was computed.
        environment: where, as far as that decides bits (environment.py); "" if it is not known.
    """

    key: str
    block: int
    attempt: str
    chunks: tuple[Chunk, ...]
    account: Account
    environment: str = ""

    def staged(self, item: ItemPlan, chunk: Chunk) -> str:
        """Object key of a staged chunk."""
        return staged_key(item.work, self.attempt, chunk)


def new_attempt(block: Block) -> str:
    """A name that no other attempt has or will have."""
    return f"{block.index:06d}-{uuid.uuid4().hex}"


def chunk_keys(item: ItemPlan, block: Block) -> list[str]:
    """Keys of a block's chunks inside its array, in the order in which they are staged."""
    write = block.write
    origin = (0, write.z0, write.y0, write.x0)
    shape = (item.grid.shape[0], *write.shape)
    return [ome.chunk_name(index) for index in ome.chunk_indices(shape, origin, item.grid.chunk)]


def stage_block(
    objects: Objects, item: ItemPlan, block: Block, attempt: str, pixels: Array
) -> tuple[Chunk, ...]:
    """Write a block's chunks under the attempt's own prefix, and read them back.

    Args:
        objects: the output.
        item: whose block it is.
        block: its write region fits `pixels`.
        attempt: of new_attempt.
        pixels: (c z h w), float32, source units.

    Raises:
        ReadBackError: if the store gives back other bytes.
    """
    origin = (0, block.write.z0, block.write.y0, block.write.x0)
    chunks = []
    for index, values in ome.cut_chunks(pixels, origin, item.grid.chunk):
        data = ome.encode_chunk(values, item.grid.chunk)
        name = ome.chunk_name(index)
        chunk = Chunk(name, len(data), hashlib.sha256(data).hexdigest())
        target = staged_key(item.work, attempt, chunk)
        objects.put(target, data)
        read_back(objects, target, chunk)
        chunks.append(chunk)
    return tuple(chunks)


def read_back(objects: Objects, key: str, chunk: Chunk) -> None:
    """Look at what was just written under a key.

    Raises:
        ReadBackError: if the store gives back other bytes.
    """
    if hashlib.sha256(objects.get(key)).hexdigest() != chunk.sha256:
        raise ReadBackError(f"{key}: the store gives back other bytes than were written")


def create_receipt(objects: Objects, item: ItemPlan, receipt: Receipt) -> Receipt:
    """Hand in a receipt; the one that was there first is returned and counts.

    A loser's chunks are removed: nobody will ever look at them.
    """
    body = {"format": RECEIPT_FORMAT, **asdict(receipt)}
    # Not flushed: the receipt and its chunks are checked by hash before anything is published.
    if objects.create(_receipt_key(item, receipt.block), seal(body), durable=False):
        return receipt
    first = load_receipt(objects, item, receipt.block)
    if first is None:  # it was invalid, and is out of the way now
        return create_receipt(objects, item, receipt)
    for chunk in receipt.chunks:
        objects.remove(receipt.staged(item, chunk))
    return first


def load_receipt(objects: Objects, item: ItemPlan, block: int) -> Receipt | None:
    """The valid receipt of a block, or None; an invalid one is moved out of the way.

    Checked are its seal, that it is of this block, that it names all of the block's chunks and no
    others, and that these are there with their sizes.

    Raises:
        NewerFormatError: if a newer version wrote it.
    """
    key = _receipt_key(item, block)
    data = get_sound(objects, key)
    if data is None and not objects.exists(key):
        return None
    receipt = None if data is None else parse_receipt(data, key)
    if receipt is None or (receipt.key, receipt.block) != (item.key, block):
        set_aside(objects, key, data)
        return None
    if [c.key for c in receipt.chunks] != chunk_keys(item, item.grid.block(block)) or any(
        objects.size(receipt.staged(item, c)) != c.size for c in receipt.chunks
    ):
        set_aside(objects, key, data)
        return None
    return receipt


def read_receipt(objects: Objects, key: str) -> Receipt | None:
    """The receipt under an object key, or None if it is gone or not true; nothing is moved.

    Raises:
        NewerFormatError: if a newer version wrote it.
    """
    data = get_sound(objects, key)
    return None if data is None else parse_receipt(data, key)


def get_sound(objects: Objects, key: str) -> bytes | None:
    """An object; None if there is none, or it cannot be read (a bad sector, a folder)."""
    try:
        return objects.get(key)
    except FileNotFoundError:
        return None
    except OSError as error:
        if not is_odd(error):
            raise
        return None


def load_receipts(objects: Objects, item: ItemPlan) -> dict[int, Receipt]:
    """All valid receipts of an item by block; see each_receipt."""
    return {receipt.block: receipt for receipt in each_receipt(objects, item)}


def each_receipt(objects: Objects, item: ItemPlan) -> Iterator[Receipt]:
    """The valid receipts of an item, one at a time; invalid ones are moved out of the way."""
    stems = (name.removesuffix(".json") for name in objects.names(f"{item.work}/receipts"))
    indices = (int(stem) for stem in stems if stem.isdigit() and int(stem) < item.num_blocks)
    found = each(objects, lambda index: load_receipt(objects, item, index), indices)
    return (receipt for receipt in found if receipt is not None)


def reject_receipt(objects: Objects, item: ItemPlan, receipt: Receipt) -> None:
    """Rename a receipt to .corrupt-N, so that the block is computed again; another's stays."""
    key = _receipt_key(item, receipt.block)
    data = get_sound(objects, key)
    if data is not None and parse_receipt(data, key) == receipt:
        set_aside(objects, key, data)


def set_aside(objects: Objects, key: str, judged: bytes | None) -> bool:
    """Rename an object that is not true to .corrupt-N, keeping it for whoever asks why.

    Another process may have done so, and put a true one in its place, since it was judged: what was
    moved is looked at, and goes back if it is another and nobody has made a third.

    Args:
        objects: the output.
        key: of the object.
        judged: what was found untrue; None if it could not be read.

    Returns:
        Whether it is out of the way.
    """
    if judged is not None and get_sound(objects, key) not in (judged, None):
        return False
    number = 0
    while objects.exists(f"{key}.corrupt-{number}"):
        number += 1
    place = f"{key}.corrupt-{number}"
    if not objects.rename(key, place):
        return False
    moved = get_sound(objects, place)
    if judged is None or moved in (judged, None):
        return True
    objects.create(key, moved)
    objects.remove(place)
    return False


def damaged_blocks(
    objects: Objects, item: ItemPlan, receipts: Mapping[int, Receipt]
) -> Sequence[int]:
    """Blocks whose staged chunks are not, byte for byte, what their receipts say."""

    def intact(receipt: Receipt) -> bool:
        return all(_intact(objects, receipt.staged(item, c), c) for c in receipt.chunks)

    found = each(objects, intact, receipts.values())
    return [index for index, whole in zip(receipts, found, strict=True) if not whole]


def seal(body: Mapping[str, Any]) -> bytes:
    """JSON that carries the sha256 of its own content."""
    text = json.dumps(body, sort_keys=True)
    check = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({"check": check, "body": json.loads(text)}, indent=1) + "\n").encode()


def unseal(data: bytes) -> dict[str, Any] | None:
    """The content of a sealed JSON object, or None if it is torn or altered."""
    try:
        sealed = json.loads(data)
        body = sealed["body"]
        text = json.dumps(body, sort_keys=True)
        if hashlib.sha256(text.encode()).hexdigest() != sealed["check"]:
            return None
    except (ValueError, KeyError, TypeError):
        return None
    return body if isinstance(body, dict) else None


def require_known(body: Mapping[str, Any], known: int, key: str) -> None:
    """Refuse an object of a newer format.

    Raises:
        NewerFormatError: if it is of one.
    """
    number = body.get("format")
    if isinstance(number, int) and number > known:
        raise NewerFormatError(
            f"{key}: a newer sashiko wrote it (format {number}, known here is {known}); update "
            "sashiko"
        )


def parse_receipt(data: bytes, key: str) -> Receipt | None:
    """A receipt out of the bytes of a key; None if it is not true, or of no version known here.

    Raises:
        NewerFormatError: if a newer version wrote it.
    """
    body = unseal(data)
    if body is None:
        return None
    require_known(body, RECEIPT_FORMAT, key)
    try:
        if body.pop("format") not in (1, RECEIPT_FORMAT):
            return None
        account = Account(**body.pop("account"))
        account = replace(account, residual=tuple(account.residual))
        chunks = tuple(Chunk(**chunk) for chunk in body.pop("chunks"))
        return Receipt(**body, chunks=chunks, account=account)
    except (KeyError, TypeError):
        return None


def _intact(objects: Objects, key: str, chunk: Chunk) -> bool:
    data = get_sound(objects, key)
    return data is not None and hashlib.sha256(data).hexdigest() == chunk.sha256


def _receipt_key(item: ItemPlan, block: int) -> str:
    return f"{item.work}/receipts/{block:06d}.json"


def staged_key(work: str, attempt: str, chunk: Chunk) -> str:
    """Key of a staged chunk: one flat folder, so that a block costs no folders to make."""
    return f"{work}/stage/{attempt}.{chunk.key.removeprefix('c/').replace('/', '.')}"
