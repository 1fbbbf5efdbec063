"""What is left of a plan, and what that will take: told before anything is done.

Manifests and receipts are counted by their names, not looked at: a damaged one is found, and its
work done again, by the run. Bytes are those before compression, which saves about a tenth of pixels
and half of most files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flows import ome
from flows.engine.objects import open_objects
from flows.engine.plan import ItemPlan, Plan
from flows.engine.receipt import Objects

_RECEIPT = re.compile(r"\d+\.json")


@dataclass(frozen=True)
class Forecast:
    """What is done of a plan, and what the rest will take.

    Attributes:
        num_items: published already.
        num_blocks: done already, those of published items too.
        work_seconds: left, of all workers together.
        seconds: left, on the wall, all workers busy.
        pixel_bytes: of full resolution, to be written.
        pyramid_bytes: of the coarser levels.
        copy_bytes: of pixels that are copied to their place, since S3 knows no links.
        file_bytes: handed over in the formats of their sources.
        scratch_bytes: measurements made of the images, until these are restored.
    """

    num_items: int
    num_blocks: int
    work_seconds: float
    seconds: float
    pixel_bytes: int
    pyramid_bytes: int
    copy_bytes: int
    file_bytes: int
    scratch_bytes: int

    @property
    def num_bytes(self) -> int:
        """To be written, all together."""
        written = self.pixel_bytes + self.pyramid_bytes + self.copy_bytes
        return written + self.file_bytes + self.scratch_bytes


def foretell(plan: Plan, *, files: bool = True) -> Forecast:
    """Count what is done of a plan, and foretell the rest; quick, and nothing is changed.

    Args:
        plan: of make_plan.
        files: whether results are handed over as files too (never from S3).

    Raises:
        OSError: if the output cannot be listed.
    """
    standing = list(_standing(open_objects(plan.output), plan))
    left = [(item, item.num_blocks - done) for item, done, published in standing if not published]
    work = sum(item.cost.seconds * count for item, count in left)
    longest = max((item.cost.seconds for item, count in left if count), default=0.0)
    on_disk = isinstance(plan.output, Path)
    whole = [4 * math.prod(item.grid.shape) for item, _ in left]
    parts = [
        round(size * count / item.num_blocks)
        for size, (item, count) in zip(whole, left, strict=True)
    ]
    return Forecast(
        num_items=len(standing) - len(left),
        num_blocks=plan.num_blocks - sum(count for _, count in left),
        work_seconds=work,
        seconds=max(work / plan.num_workers, longest),
        pixel_bytes=sum(parts),
        pyramid_bytes=sum(pyramid_bytes(item) for item, _ in left),
        copy_bytes=0 if on_disk else sum(whole),
        file_bytes=sum(_file_bytes(item) for item, _ in left) if files and on_disk else 0,
        scratch_bytes=plan.scratch_bytes if left else 0,
    )


def pyramid_bytes(item: ItemPlan) -> int:
    """Of the coarser levels of an item, float32."""
    return sum(4 * math.prod(shape) for shape in ome.level_shapes(item.grid.shape)[1:])


def _standing(objects: Objects, plan: Plan) -> Iterator[tuple[ItemPlan, int, bool]]:
    """(item, blocks done, published) of every item."""
    published, begun = set(objects.names("manifests")), set(objects.names(".work"))
    for item in plan.items:
        if f"{item.key}.json" in published:
            yield item, item.num_blocks, True
        elif item.key in begun:
            names = objects.names(f"{item.work}/receipts")
            done = sum(1 for name in names if _RECEIPT.fullmatch(name))
            yield item, min(done, item.num_blocks), False
        else:
            yield item, 0, False


def _file_bytes(item: ItemPlan) -> int:
    """Of an item in the type of its source."""
    return math.prod(item.record.shape) * np.dtype(item.record.dtype).itemsize
