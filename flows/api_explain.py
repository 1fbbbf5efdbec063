"""Explain: how restorations came about, what of them the prior invented, how steady they are.

    OUTPUT/index.html      the page, which needs nothing beside it
    OUTPUT/explain.json    the same as numbers, one entry a slice
    OUTPUT/pictures/       film strips and maps

It takes what `restore` takes, and computes in this process: one item unless more are asked for.
Nothing is published, and nothing that was restored before is read. Items are told by their ids:
names of files may tell of people.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from domains.base import BadInputError
from flows.config import EvaluateSettings, ExplainSettings
from flows.engine.events import Event, EventHandler, ignore

if TYPE_CHECKING:
    from flows.engine.plan import ItemPlan, ModelRef, Plan
    from flows.explaining import Explained
    from flows.store import Dataset, Measurements

_HELD = ("record", "scale", "restored", "film")
"""Of Explained, what is for pictures alone."""
_HELD_OF_INVENTED = ("amplitude", "determined", "beyond_amplitude")


@dataclass(frozen=True)
class ExplainResult:
    """What was explained.

    Attributes:
        explained: one entry a slice.
        output: folder.
        page: index.html.
        json_path: the numbers.
    """

    explained: tuple[Explained, ...]
    output: Path
    page: Path
    json_path: Path

    def to_json(self) -> list[dict[str, Any]]:
        """The numbers."""
        return [as_json(one) for one in self.explained]

    def text(self) -> str:
        """The numbers in words."""
        from flows.report.explained import in_words

        return "\n\n".join(in_words(one) for one in self.explained)


def explain(settings: ExplainSettings, on_event: EventHandler | None = None) -> ExplainResult:
    """Explain the restorations of some items.

    Args:
        settings: as of `restore`; which items and slices, how many seeds.
        on_event: told of progress.

    Raises:
        BadInputError: if the input, an item or a slice cannot be used, or the method is classical
            or a student's.
    """
    from diffusion_core.posterior import DISTILLED
    from flows.api_restore import prepare
    from flows.report.explained import write_explained

    on_event = on_event or ignore
    with TemporaryDirectory(prefix="sashiko-explain-") as scratch:
        plan = prepare(settings, on_event, work=Path(scratch)).plan
        items = _chosen(plan, settings)
        if any(item.method.name == DISTILLED for item in items):
            raise BadInputError(
                "a distilled model's few passes have no film to be explained: name the model that "
                "it was distilled from"
            )
        explained = tuple(
            _each(plan, items, settings.slices, settings.num_seeds, on_event, truth=None)
        )
    page = write_explained(explained, settings.output)
    json_path = settings.output / "explain.json"
    _write(json_path, explained)
    return ExplainResult(explained, settings.output, page, json_path)


def explain_first(
    settings: EvaluateSettings,
    measurements: Measurements,
    dataset: Dataset,
    model: ModelRef | None,
    on_event: EventHandler,
) -> list[Explained]:
    """Explain our solver's restorations of the first items of every task of an evaluation.

    The network is taken in float32, whatever the evaluation took: bfloat16 rounds more than the
    changes that are tried.
    """
    from pathlib import Path

    from diffusion_core.model import solver_settings
    from flows.config import MethodSettings
    from flows.engine.methods import resolve_method
    from flows.engine.plan import make_plan

    calibrated = solver_settings(Path(model.path)) if model else {}
    plan = make_plan(
        measurements.path,
        settings.output,
        model=model,
        items=settings.items,
        tasks=settings.tasks,
        seed=settings.seed,
        device_class="cuda" if settings.compute.num_gpus_per_worker > 0 else "cpu",
        dtype="float32",
        slices_per_block=1,
        along_z=False,
        batch_px=0,
        methods_for=lambda entry: [
            resolve_method(MethodSettings(name="covprox"), entry, calibrated)
        ],
    )
    order = [record.item_id for record in dataset.items()]
    ranked = sorted(plan.items, key=lambda item: order.index(item.item_id))
    first = [
        item
        for task in settings.tasks
        for item in [i for i in ranked if i.task == task][: settings.explain]
    ]
    explained = list(_each(plan, first, None, 4, on_event, truth=dataset))
    _write(settings.output / "explain.json", explained)
    return explained


def as_json(one: Explained) -> dict[str, Any]:
    """The numbers of one slice, without its pictures."""
    values = {k: v for k, v in vars(one).items() if k not in _HELD}
    values |= {"window": list(one.window), "left_out": list(one.left_out)}
    values["levels"] = [asdict(level) for level in one.levels]
    values["steadiness"] = asdict(one.steadiness)
    if one.invented is not None:
        told: Mapping[str, Any] = vars(one.invented)
        values["invented"] = {k: v for k, v in told.items() if k not in _HELD_OF_INVENTED}
    return values


def _each(
    plan: Plan,
    items: Sequence[ItemPlan],
    slices: Sequence[int] | None,
    num_seeds: int,
    on_event: EventHandler,
    truth: Dataset | None,
) -> Iterator[Explained]:
    """Explain the slices of some items, one after the other."""
    from flows.engine.block import Restorer
    from flows.explaining import explain_slice

    restorer = Restorer()
    work = [(i, z) for i in items for z in (slices or [i.grid.shape[1] // 2])]
    each = num_seeds + 2
    for done, (item, z) in enumerate(work):
        words = f"explaining {item.item_id}, slice {z} ({item.task})"

        def tell(count: int, done: int = done, words: str = words) -> None:
            said = f"{words}: {count} of {each} restorations"
            on_event(Event("step", done * each + count, len(work) * each, said))

        tell(0)
        clean = None if truth is None else truth.read(item.item_id)
        yield explain_slice(
            restorer,
            plan.measurements,
            item,
            z,
            num_seeds=num_seeds,
            truth=clean,
            on_restored=tell,
        )


def _chosen(plan: Plan, settings: ExplainSettings) -> list[ItemPlan]:
    """The items that were asked for.

    Raises:
        BadInputError: if one is not there.
    """
    items = sorted(plan.items, key=lambda item: (item.item_id, item.task))
    if settings.items is None:
        return items[: settings.num]
    known = {item.item_id for item in items}
    for name in settings.items:
        if name not in known:
            raise BadInputError(
                f"{settings.input}: holds no item '{name}': it has {', '.join(sorted(known)[:8])}"
            )
    return [item for item in items if item.item_id in settings.items]


def _write(path: Path, explained: Sequence[Explained]) -> None:
    from flows.report.write import write_whole

    text = json.dumps([as_json(one) for one in explained], indent=1)
    write_whole(path, f"{text}\n".encode())
