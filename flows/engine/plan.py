"""The plan: what will be computed, named by its content, decided before anything is computed.

    campaign -> item -> block -> (patches, inside the denoiser)

Each item of a campaign has a key: the sha256 of everything that can change one of its pixels, and
of nothing else. The campaign's id is the sha256 of its items' keys. Workers, batches, retries,
paths and the version of the code are recorded beside it and not hashed, so that a hotfix or a
smaller machine resumes; change what is computed, and ALGORITHM_VERSION must be raised.

A plan is a pure function of the store's manifest and the settings, and quick: nothing here imports
torch, Ray or Prefect, and blocks are index arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_core.model import known_guides, solver_settings
from domains.base import BadInputError, ItemRecord
from domains.guides import guide_names
from domains.registry import domain_names, load_domain
from flows.config import MethodSettings
from flows.engine.cost import Cost, driver_bytes, predict
from flows.engine.grid import DEVICE_BATCH_PX, Block, Grid, make_grid
from flows.engine.methods import COUPLING, converged, resolve_method
from flows.roots import Root, absolute_root

if TYPE_CHECKING:
    from flows.store import MeasurementEntry

ALGORITHM_VERSION = 1
"""Part of every key: raise it when the same settings come to make other pixels."""

PLAN_FORMAT = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")


class PlanRefusedError(BadInputError):
    """A plan that would need more memory than the stated limit."""


@dataclass(frozen=True)
class ModelRef:
    """A model, resolved once for the whole campaign.

    Attributes:
        path: its directory.
        digest: of the directory; a worker that finds another refuses.
        name: registered name, or the directory's.
        version: registered version, "" if none.
    """

    path: str
    digest: str
    name: str = ""
    version: str = ""


@dataclass(frozen=True)
class ItemPlan:
    """One item, restored one way.

    Attributes:
        key: sha256 of all that changes its pixels.
        item_id: of the item.
        task: of the measurement.
        operator: kind of operator.
        record: of the item.
        input_digest: content digest of the measurement.
        method: solver or baseline, with every option resolved.
        model: None for classical baselines.
        seed: of the noise.
        dtype: of the network.
        device_class: "cpu" or "cuda"; results differ in the last bits between them.
        grid: of the blocks.
        cost: predicted, of one block.
        batch_px: pixels in a batch of the denoiser that is filled from all lanes of a worker; 0:
            batches are a block's own.
    """

    key: str
    item_id: str
    task: str
    operator: str
    record: ItemRecord
    input_digest: str
    method: MethodSettings
    model: ModelRef | None
    seed: int
    dtype: str
    device_class: str
    grid: Grid
    cost: Cost
    batch_px: int = 0

    @property
    def work(self) -> str:
        """Key prefix of the item's unpublished work."""
        return f".work/{self.key}"

    @property
    def num_blocks(self) -> int:
        """Blocks of the item."""
        return self.grid.num_blocks

    def blocks(self) -> Iterator[Block]:
        """All blocks, in order of their index."""
        return iter(self.grid)


@dataclass(frozen=True)
class Plan:
    """What a run will do. Immutable; `campaign` names its content.

    Attributes:
        campaign: sha256 of the items' keys.
        measurements: path of the measurement store.
        output: root of what is written.
        items: sorted so that the heaviest blocks come first.
        num_workers: recorded, not hashed.
        num_lanes: blocks that each worker computes at the same time; likewise.
        scratch_bytes: of the measurements, if they are made for this run alone; likewise.
    """

    campaign: str
    measurements: Root
    output: Root
    items: tuple[ItemPlan, ...]
    num_workers: int = 1
    num_lanes: int = 1
    scratch_bytes: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of all items."""
        return sum(item.num_blocks for item in self.items)

    @property
    def predicted_peak_bytes(self) -> int:
        """Resident memory of the driver and all workers at the worst moment."""
        return self.driver_peak_bytes + self.num_workers * self.worker_peak_bytes

    @property
    def worker_peak_bytes(self) -> int:
        """Resident memory of one worker at its worst block."""
        return max((item.cost.peak_bytes for item in self.items), default=0)

    @property
    def driver_peak_bytes(self) -> int:
        """Resident memory of the driver; the domain writes large items part by part."""
        return driver_bytes(
            len(self.items),
            self.num_blocks,
            max((item.num_blocks for item in self.items), default=0),
            max((4 * math.prod(item.grid.shape) for item in self.items), default=0),
        )

    @property
    def predicted_work_seconds(self) -> float:
        """Seconds of work, of all workers together."""
        return sum(item.cost.seconds * item.num_blocks for item in self.items)

    @property
    def predicted_seconds(self) -> float:
        """Wall seconds, all workers busy; start-up not counted."""
        longest = max((item.cost.seconds for item in self.items), default=0.0)
        return max(self.predicted_work_seconds / self.num_workers, longest)

    @property
    def predicted_bytes(self) -> int:
        """Bytes written at full resolution, before compression (which saves about a tenth)."""
        return sum(item.cost.output_bytes * item.num_blocks for item in self.items)

    def windows(self, num_items: int) -> list[Plan]:
        """The plan in parts of at most `num_items` items, each of which can be run by itself.

        The parts keep the campaign's id: they are one campaign.
        """
        starts = range(0, len(self.items), num_items)
        return [replace(self, items=self.items[i : i + num_items]) for i in starts]

    def to_json(self) -> dict[str, Any]:
        """The plan as it is recorded: contents by which it is named, and the predictions."""
        return {
            "format": PLAN_FORMAT,
            "campaign": self.campaign,
            "num_blocks": self.num_blocks,
            "predicted": {
                "peak_bytes": self.predicted_peak_bytes,
                "worker_peak_bytes": self.worker_peak_bytes,
                "driver_peak_bytes": self.driver_peak_bytes,
                "seconds": self.predicted_seconds,
                "work_seconds": self.predicted_work_seconds,
                "bytes": self.predicted_bytes,
                "num_workers": self.num_workers,
                "num_lanes": self.num_lanes,
            },
            "items": [{"key": item.key, **content_of(item)} for item in self.items],
        }


def make_plan(
    measurements: Root,
    output: Root,
    method: MethodSettings | Sequence[MethodSettings] | None = None,
    model: ModelRef | Path | None = None,
    *,
    items: Iterable[str] | None = None,
    tasks: Iterable[str] | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    device_class: str = "cpu",
    block_size: int = 512,
    slices_per_block: int = 4,
    batch_px: int | None = None,
    num_workers: int = 1,
    num_lanes: int = 1,
    memory_limit_bytes: int | None = None,
    methods_for: Callable[[MeasurementEntry], Sequence[MethodSettings]] | None = None,
    along_z: bool | None = None,
) -> Plan:
    """Plan the restoration of a measurement store.

    Args:
        measurements: the store.
        output: root of the results; nothing is written now.
        method: one or several ways to restore every item; None: each task's own. What a method
            leaves open comes from the model and the task's file (methods.py).
        model: the diffusion model; None if every method is a classical baseline.
        items: ids of the items to restore; None: all.
        tasks: names of the tasks to restore; None: all.
        seed: of the noise.
        dtype: "float32" or "bfloat16", of the network.
        device_class: "cpu" or "cuda".
        block_size: side of a tile's write region, where planes are cut.
        slices_per_block: depth of a block, where planes are seen whole.
        batch_px: pixels in a batch of the denoiser that is filled from all lanes of a worker; 0:
            batches are a block's own; None: that on a CPU, DEVICE_BATCH_PX on a GPU.
        num_workers: that will share the work.
        num_lanes: blocks that each worker computes at the same time.
        memory_limit_bytes: of driver and workers together; None: no limit.
        methods_for: chooses the methods of each measurement; overrides `method`.
        along_z: whether the slices or frames of an item are restored jointly; None: where that
            was measured to help (methods.coupled).

    Raises:
        BadInputError: if nothing is left to restore, a name is unusable, or a solver has no model.
        PlanRefusedError: if the predicted peak memory is over the limit.
    """
    chosen = _chosen(measurements, items, tasks)
    _require_domains(chosen)
    reference = _model_ref(model)
    model_bytes = _model_bytes(reference)
    calibrated = solver_settings(Path(reference.path)) if reference else {}
    asked = [method] if method is None or isinstance(method, MethodSettings) else list(method)
    if batch_px is None:
        batch_px = 0 if device_class == "cpu" else DEVICE_BATCH_PX
    planned: dict[str, ItemPlan] = {}
    for entry in chosen:
        for way in methods_for(entry) if methods_for else asked:
            full = resolve_method(way, entry, calibrated, along_z=along_z)
            if reference and full.kind == "solver":
                _require_known_guides(entry, reference)
            grid = make_grid(
                entry.record.shape,
                entry.operator,
                slices_per_block=slices_per_block,
                block_size=block_size,
                jointly=full.options.get(COUPLING, 0.0) > 0,
            )
            full = converged(full, way) if grid.tiled else full
            item = _plan_item(
                entry, full, reference, grid, seed, dtype, device_class, batch_px,
                model_bytes=model_bytes, num_lanes=num_lanes,
            )  # fmt: skip
            planned[item.key] = item
    # Longest blocks first: what is left at the end is small, and no worker waits long for another.
    ordered = tuple(sorted(planned.values(), key=lambda item: -item.cost.seconds))
    keys = sorted(item.key for item in ordered)
    places = absolute_root(measurements), absolute_root(output)  # workers may be elsewhere
    plan = Plan(_digest(keys), *places, ordered, num_workers, num_lanes)
    if memory_limit_bytes is not None:
        require_memory(plan, memory_limit_bytes)
    return plan


def require_memory(
    plan: Plan,
    limit_bytes: int,
    whose: str = "the limit is",
    more: str = "allow more (--memory-limit-gb)",
) -> None:
    """Refuse a plan that needs too much memory.

    Args:
        plan: with its predictions.
        limit_bytes: of driver and workers together.
        whose: words before the limit, in the refusal.
        more: what helps beside fewer workers.

    Raises:
        PlanRefusedError: with both figures.
    """
    if plan.predicted_peak_bytes > limit_bytes:
        fewer = f"take fewer than {plan.num_workers} workers (--workers), or "
        workers = "1 worker" if plan.num_workers == 1 else f"{plan.num_workers} workers"
        raise PlanRefusedError(
            f"the plan needs about {_gigabytes(plan.predicted_peak_bytes)} of memory with "
            f"{workers} and {whose} {_gigabytes(limit_bytes)}: "
            f"{fewer if plan.num_workers > 1 else ''}{more}"
        )


def content_of(item: ItemPlan) -> dict[str, Any]:
    """Everything about an item that can change its pixels, JSON-able; its key hashes this."""
    solver = item.method.kind == "solver"
    return {
        "algorithm_version": ALGORITHM_VERSION,
        "item_id": item.item_id,
        "task": item.task,
        "domain": item.record.domain,
        "input_digest": item.input_digest,
        "source_digest": item.record.source_digest,
        "method": _method_content(item.method),
        "model_digest": item.model.digest if item.model else None,
        "seed": item.seed if solver else None,
        "dtype": item.dtype if solver else None,
        "device_class": item.device_class,
        "grid": item.grid.content,
        # Rounding goes by a batch's shape; without shared batches it is the grid's.
        **({"batch_px": item.batch_px} if item.batch_px else {}),
    }


def _plan_item(
    entry: MeasurementEntry,
    method: MethodSettings,
    model: ModelRef | None,
    grid: Grid,
    seed: int,
    dtype: str,
    device_class: str,
    batch_px: int,
    *,
    model_bytes: int,
    num_lanes: int,
) -> ItemPlan:
    for name in (entry.item_id, entry.task, method.name):
        if not _NAME.fullmatch(name):
            raise BadInputError(f"'{name}' cannot name an output: use a-z, 0-9 and dashes only")
    needs_model = method.kind == "solver"
    if needs_model and model is None:
        raise BadInputError(f"the solver '{method.name}' needs a model: name one with --model")
    batch_px = batch_px if needs_model else 0
    cost = predict(
        grid,
        entry.operator,
        entry.params,
        method,
        dtype,
        input_bytes=entry.num_bytes,
        model_bytes=model_bytes,
        batch_px=batch_px,
        num_lanes=num_lanes,
        exact=entry.noise.get("sigma_y") == 0.0,
    )
    item = ItemPlan(
        key="",
        item_id=entry.item_id,
        task=entry.task,
        operator=entry.operator,
        record=entry.record,
        input_digest=entry.digest,
        method=method,
        model=model if needs_model else None,
        seed=seed,
        dtype=dtype,
        device_class=device_class,
        grid=grid,
        cost=cost,
        batch_px=batch_px,
    )
    return replace(item, key=_digest(content_of(item)))


def _chosen(
    measurements: Root, items: Iterable[str] | None, tasks: Iterable[str] | None
) -> list[MeasurementEntry]:
    from flows.store import Measurements

    entries = Measurements(measurements).entries()
    wanted_items = None if items is None else set(items)
    wanted_tasks = None if tasks is None else set(tasks)
    chosen = [
        entry
        for entry in entries
        if (wanted_items is None or entry.item_id in wanted_items)
        and (wanted_tasks is None or entry.task in wanted_tasks)
    ]
    if not chosen:
        known = ", ".join(sorted({f"{e.item_id} ({e.task})" for e in entries})[:8]) or "nothing"
        raise BadInputError(f"{measurements}: no measurement as asked for; it holds {known}")
    return chosen


def _require_domains(entries: Sequence[MeasurementEntry]) -> None:
    """Refuse a store whose domain is not installed here: no worker could do any of it."""
    known = domain_names()
    missing = sorted({entry.record.domain for entry in entries} - set(known))
    if missing:
        raise BadInputError(
            f"the measurements are of the domain '{missing[0]}', which is not installed; "
            f"known are {', '.join(known)}"
        )


def _require_known_guides(entry: MeasurementEntry, model: ModelRef) -> None:
    """Refuse guides that a model was never shown: they would change nothing, or no one knows what.

    Raises:
        BadInputError: naming one.
    """
    names = guide_names(entry.record)
    if not names:
        return
    known = known_guides(Path(model.path))
    of_domain = {n for c in load_domain(entry.record.domain).conditions for n in known.get(c, [])}
    unknown = [name for name in names if name not in of_domain]
    if unknown:
        raise BadInputError(
            f"the model '{model.name or model.path}' was not trained with the guide '{unknown[0]}' "
            f"(it knows {', '.join(sorted(of_domain)) or 'none'}): leave out --guide, or choose "
            "another --model"
        )


def _model_ref(model: ModelRef | Path | None) -> ModelRef | None:
    if model is None:
        return None
    if isinstance(model, ModelRef):
        return replace(model, path=str(Path(model.path).absolute()))
    from diffusion_core.model import model_digest

    return ModelRef(str(Path(model).absolute()), model_digest(Path(model)), Path(model).name)


def _model_bytes(model: ModelRef | None) -> int:
    if model is None:
        return 0
    return sum(p.stat().st_size for p in Path(model.path).glob("*.safetensors"))


def _method_content(method: MethodSettings) -> dict[str, Any]:
    """A baseline has no noise levels: they must not make it another campaign."""
    if method.kind == "baseline":
        return {"name": method.name, "kind": method.kind, "options": method.options}
    return method.model_dump(mode="json")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 5e7 else f"{num_bytes / 1e9:.2g} GB"
