"""Publishing: an item becomes visible whole, once, and is never written to again.

    all receipts -> their chunks verified, byte for byte
                 -> linked into a new folder beside the work, pyramid, metadata, provenance
                 -> flushed to the disk, renamed to a path that only this attempt has
                    (on S3 copied to that path at once: whoever looks, looks in the manifests)
                 -> the attempt's fence taken (fencing.py), against a gc that took us for dead
                 -> manifests/KEY.json, created only if absent: from here on the item exists

Two drivers that publish the same item make two folders and one manifest; the loser removes its own.
The staged chunks stay until the manifest is there, so a driver killed at any point leaves receipts
that are still true. Readers find items only through manifests.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from domains.base import Array
from flows import ome
from flows.engine.environment import library_version
from flows.engine.fencing import Attempt, holder_of, take_fence
from flows.engine.many import each
from flows.engine.plan import ItemPlan, Plan, content_of
from flows.engine.receipt import (
    Chunk,
    Objects,
    Receipt,
    damaged_blocks,
    get_sound,
    read_back,
    require_known,
    seal,
    set_aside,
    unseal,
)
from flows.engine.seams import measure_seams

MANIFEST_FORMAT = 1
LEDGER = "ledger.json"
LIBRARIES = ("sashiko", "torch", "numpy", "scipy")

_FACTS = {
    "item_id", "task", "campaign", "path", "ledger_sha256", "seconds", "nfe", "num_operator_calls",
    "peak_bytes", "model_digest", "residual", "exact_data",
}  # fmt: skip
"""What readers of a manifest ask for, beside the record and the method's name."""


class DamagedBlocksError(Exception):
    """Staged chunks that are not what their receipts say; `blocks` must be computed again."""

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__(f"{len(blocks)} staged blocks are damaged")
        self.blocks = tuple(blocks)


@dataclass(frozen=True)
class Published:
    """An item that readers can see.

    Attributes:
        manifest: its content.
        won: whether this call published it, or another driver had done so.
    """

    manifest: Mapping[str, Any]
    won: bool


def manifest_key(key: str) -> str:
    """Object key of the manifest of an item's key."""
    return f"manifests/{key}.json"


def load_manifest(objects: Objects, key: str) -> dict[str, Any] | None:
    """The manifest of an item, or None if there is none that is true: the item is not visible.

    Raises:
        NewerFormatError: if a newer version wrote it.
    """
    data = get_sound(objects, manifest_key(key))
    return None if data is None else parse_manifest(data, key)


def parse_manifest(data: bytes, key: str) -> dict[str, Any] | None:
    """The manifest of an item's key out of its bytes; None if they are not that.

    Raises:
        NewerFormatError: if a newer version wrote it.
    """
    manifest = unseal(data)
    if manifest is None:
        return None
    require_known(manifest, MANIFEST_FORMAT, manifest_key(key))
    return manifest if manifest.get("key") == key and _is_complete(manifest) else None


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    """Whether it tells all that readers ask a manifest of this version for."""
    from flows.store import record_from_json

    try:
        record_from_json(manifest["record"])
        return manifest.keys() >= _FACTS and "name" in manifest["method"]
    except (KeyError, TypeError):
        return False


def reject_manifest(objects: Objects, key: str) -> bool:
    """Move a damaged manifest aside to .corrupt-N; returns whether there was one."""
    name = manifest_key(key)
    data = get_sound(objects, name)
    if data is None and not objects.exists(name):
        return False
    if data is not None and parse_manifest(data, key) is not None:
        return False
    return set_aside(objects, name, data)


def reject_hollow(objects: Objects, manifest: Mapping[str, Any]) -> bool:
    """Move a manifest aside whose item is gone: the ledger of it is not there, or another.

    Returns:
        Whether it was so. What else is damaged, `verify` finds.
    """
    ledger = get_sound(objects, f"{manifest['path']}/{LEDGER}")
    if ledger is not None and hashlib.sha256(ledger).hexdigest() == manifest["ledger_sha256"]:
        return False
    name = manifest_key(manifest["key"])
    judged = get_sound(objects, name)
    if judged is not None and unseal(judged) == json.loads(json.dumps(manifest)):
        set_aside(objects, name, judged)
    return True


def publish(
    objects: Objects,
    plan: Plan,
    item: ItemPlan,
    receipts: Mapping[int, Receipt],
    facts: Mapping[str, Any],
) -> Published:
    """Make an item visible.

    Args:
        objects: the output.
        plan: whose campaign is named in the manifest.
        item: with a receipt for every block.
        receipts: by block.
        facts: JSON-able, recorded in the manifest beside what is known of the item (attempts ...).

    Raises:
        DamagedBlocksError: if a staged chunk fails its hash; nothing is published then.
    """
    damaged = damaged_blocks(objects, item, receipts)
    if damaged:
        raise DamagedBlocksError(damaged)
    attempt = Attempt.new(item.key)
    provenance = {**_provenance(plan, item, receipts), "seams": _seams(objects, item, receipts)}
    path = f"items/{item.item_id}/{item.task}/{item.method.name}-{attempt}.ome.zarr"
    draft = objects.assembly(attempt.draft, path)
    try:
        ledger = _assemble(objects, item, receipts, draft, provenance)
        objects.adopt(draft, path)
    except OSError:
        for place in (draft, path):
            objects.remove(place)
        if holder_of(objects, attempt) == "gc":  # it took us for dead: we were stopped for long
            return publish(objects, plan, item, receipts, facts)
        raise
    if not take_fence(objects, attempt, "publisher"):
        objects.remove(path)
        return publish(objects, plan, item, receipts, facts)
    manifest = {
        "format": MANIFEST_FORMAT,
        **provenance,
        **facts,
        "path": path,
        "ledger_sha256": hashlib.sha256(ledger).hexdigest(),
        "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    created = objects.create(manifest_key(item.key), seal(manifest))
    winner = manifest if created else load_manifest(objects, item.key)
    won = winner is not None and winner["path"] == path  # also where a store's answer was lost
    if not won:
        objects.remove(path)
    objects.remove(attempt.fence)  # from here on the manifest decides
    if winner is None:
        reject_manifest(objects, item.key)
        return publish(objects, plan, item, receipts, facts)
    # Stopped for long after the fence, we may have found the item published and gone again.
    if won and reject_hollow(objects, winner):
        return publish(objects, plan, item, receipts, facts)
    return Published(winner, won)


def _seams(
    objects: Objects, item: ItemPlan, receipts: Mapping[int, Receipt]
) -> dict[str, Any] | None:
    """The seams between the item's blocks, out of the staged chunks; None if it was not cut."""
    if not item.grid.tiled:
        return None

    def read(index: tuple[int, int, int, int]) -> Array:
        name = ome.chunk_name(index)
        receipt = receipts[item.grid.block_of_chunk(index)]
        chunk = next(c for c in receipt.chunks if c.key == name)
        return ome.decode_chunk(objects.get(receipt.staged(item, chunk)), item.grid.chunk)

    seams = measure_seams(item.grid, read)
    return None if seams is None else asdict(seams)


def _assemble(
    objects: Objects,
    item: ItemPlan,
    receipts: Mapping[int, Receipt],
    draft: str,
    provenance: Mapping[str, Any],
) -> bytes:
    """Put the folder of an item together; returns its ledger: size and sha256 of every object."""

    def link(staged: tuple[Receipt, Chunk]) -> Chunk:
        receipt, chunk = staged
        place = f"{draft}/0/{chunk.key}"
        if not objects.link(receipt.staged(item, chunk), place):
            read_back(objects, place, chunk)
        return chunk

    staged = ((receipt, chunk) for receipt in receipts.values() for chunk in receipt.chunks)
    ledger = {f"0/{chunk.key}": chunk for chunk in each(objects, link, staged)}
    shapes = ome.level_shapes(item.grid.shape)
    for level, shape in enumerate(shapes):
        grid = _level_chunk(item, shape)
        name = f"{level}/zarr.json"
        ledger[name] = _put(objects, draft, name, ome.array_metadata(shape, grid))
        if level:
            made = _reduce(objects, draft, level, shapes, item)
            ledger |= {chunk.key: chunk for chunk in made}
    accounts = [receipt.account for receipt in receipts.values()]
    window = (min(a.low for a in accounts), max(a.high for a in accounts))
    group = ome.group_metadata(item.record, shapes, window, provenance)
    ledger["zarr.json"] = _put(objects, draft, "zarr.json", group)
    sealed = seal({name: [c.size, c.sha256] for name, c in ledger.items()})
    _put(objects, draft, LEDGER, sealed)
    return sealed


def _put(objects: Objects, prefix: str, name: str, data: bytes) -> Chunk:
    """Write an object of a folder, and look at it; returns what the ledger says of it."""
    made = Chunk(name, len(data), hashlib.sha256(data).hexdigest())
    objects.put(f"{prefix}/{name}", data)
    read_back(objects, f"{prefix}/{name}", made)
    return made


def _reduce(
    objects: Objects, draft: str, level: int, shapes: Sequence[ome.Shape4], item: ItemPlan
) -> list[Chunk]:
    """Write one level of the pyramid, chunk by chunk, from the level before."""
    shape, finer = shapes[level], shapes[level - 1]
    chunk, source_chunk = _level_chunk(item, shape), _level_chunk(item, finer)
    counts = [-(-n // size) for n, size in zip(shape, chunk, strict=True)]
    made = []
    for index in np.ndindex(*counts):
        box = [
            (i * n, min((i + 1) * n, stop)) for i, n, stop in zip(index, chunk, shape, strict=True)
        ]
        plane = zip(box[2:], finer[2:], strict=True)
        wide = [*box[:2], *((2 * a, min(2 * b, n)) for (a, b), n in plane)]
        fine = _read_box(objects, f"{draft}/{level - 1}", wide, source_chunk)
        data = ome.encode_chunk(ome.halve(fine), chunk)
        made.append(_put(objects, draft, f"{level}/{ome.chunk_name(index)}", data))
    return made


def _read_box(
    objects: Objects, prefix: str, box: Sequence[tuple[int, int]], chunk: ome.Shape4
) -> Array:
    """Read a box of an array out of its chunks."""
    out = np.empty([b - a for a, b in box], ome.DTYPE)
    spans = [range(a // n, -(-b // n)) for (a, b), n in zip(box, chunk, strict=True)]
    for index in itertools.product(*spans):
        values = ome.decode_chunk(objects.get(f"{prefix}/{ome.chunk_name(index)}"), chunk)
        source, target = [], []
        for i, n, (a, b) in zip(index, chunk, box, strict=True):
            low, high = max(a, i * n), min(b, (i + 1) * n)
            source.append(slice(low - i * n, high - i * n))
            target.append(slice(low - a, high - a))
        out[tuple(target)] = values[tuple(source)]
    return out


def _level_chunk(item: ItemPlan, shape: ome.Shape4) -> ome.Shape4:
    """Chunks of a level: those of the item, or the level's own size where that is less."""
    c, z, h, w = item.grid.chunk
    if shape == item.grid.shape:
        return c, z, h, w
    return c, z, min(h, shape[2]), min(w, shape[3])


def _provenance(plan: Plan, item: ItemPlan, receipts: Mapping[int, Receipt]) -> dict[str, Any]:
    """Where these pixels come from: enough to make them again, and nothing about a patient."""
    from flows.store import record_to_json

    accounts = [receipts[index].account for index in sorted(receipts)]
    residual = [value for account in accounts for value in account.residual]
    content = content_of(item)
    content.pop("source_digest")
    return {
        "key": item.key,
        "campaign": plan.campaign,
        **content,
        "record": record_to_json(item.record),
        "model": {"name": item.model.name, "version": item.model.version} if item.model else None,
        "seconds": sum(a.seconds for a in accounts),
        "nfe": max(a.nfe for a in accounts),
        "num_operator_calls": max(a.num_operator_calls for a in accounts),
        "peak_bytes": max(a.peak_bytes for a in accounts),
        "residual": float(np.mean(residual)) if residual else None,
        "residuals": residual,
        "exact_data": any(a.exact_data for a in accounts),
        "value_range": [min(a.low for a in accounts), max(a.high for a in accounts)],
        "num_blocks": item.num_blocks,
        "versions": {name: library_version(name) for name in LIBRARIES},
        "environments": Counter(receipts[index].environment for index in sorted(receipts)),
        "python": platform.python_version(),
        "restored_not_measured": "These pixels are an estimate, not a measurement.",
    }
