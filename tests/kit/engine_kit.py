"""What the tests of the engine share: small stores, plans of them, and what is in an output."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tiny_domain import tiny_item, tiny_measurement

from flows.config import ComputeSettings, MethodSettings, RestoreSettings
from flows.engine.objects import open_objects
from flows.engine.plan import Plan, make_plan
from flows.engine.restored import open_restored
from flows.roots import Root
from flows.store import MeasurementWriter

SHAPE = (2, 6, 33, 40)


def make_store(
    path: Path, *, items: int = 2, shape: tuple[int, int, int, int] = SHAPE, task: str = "given"
) -> Path:
    """A measurement store of the tiny domain: item-0, item-1 ..., random pixels, random holes."""
    rng = np.random.default_rng(3)
    with MeasurementWriter(path) as writer:
        for index in range(items):
            item = tiny_item(f"item-{index}", rng.standard_normal(shape))
            measured = rng.random((shape[1], 1, *shape[2:])) < 0.7
            writer.add(tiny_measurement(item, measured, task))
    return path


def method(name: str = "twice", **options: object) -> MethodSettings:
    """A method of the tiny domain."""
    return MethodSettings(name=name, kind="baseline", options=options)


def tiny_plan(store: Root, output: Root, *ways: MethodSettings, **settings: object) -> Plan:
    """A plan with one slice a block, unless told otherwise."""
    return make_plan(store, output, list(ways) or [method()], **settings)  # type: ignore[arg-type]


def put_images(folder: Path, count: int, *, seed: int = 1) -> Path:
    """A folder of images of the tiny domain: im0.npy, im1.npy ..."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        np.save(folder / f"im{index}.npy", rng.standard_normal((1, 1, 20, 24)).astype(np.float32))
    return folder


def image_settings(images: Path, output: Path, name: str = "twice") -> RestoreSettings:
    """A request to restore such a folder, computed in this process."""
    return RestoreSettings(
        input=images,
        output=output,
        domain="tiny",
        sigma_y=0.1,
        method=method(name),
        compute=ComputeSettings(executor="inline"),
    )


def content_free(folder: Path) -> bool:
    """Whether a folder holds no file, at any depth."""
    return not any(path.is_file() for path in folder.rglob("*"))


def published(output: Root) -> dict[tuple[str, str], np.ndarray]:
    """(item, method) -> pixels of all that readers can see."""
    if not open_objects(output).exists("manifests"):
        return {}
    restored = open_restored(output)
    return {(e.item_id, e.method): restored.read(e) for e in restored.items()}


def same(one: dict, other: dict) -> bool:
    """Equal to the bit."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and np.array_equal(one[key], other[key]) for key in one
    )


def lines(path: Path) -> int:
    """Blocks computed, by the log of the tiny domain."""
    return len(path.read_text().splitlines()) if path.exists() else 0


def kinds(events: Sequence) -> list[str]:
    """Kinds of events, blocks left out."""
    return [event.kind for event in events if event.kind != "block"]


def recorder() -> tuple[list, Callable]:
    """A list, and a handler that fills it."""
    events: list = []
    return events, events.append
