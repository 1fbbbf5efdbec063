"""Small photographs with holes, to be restored by the starter: for tests of how a run is shared."""

from pathlib import Path

import numpy as np

from domains.base import Item, ItemRecord
from domains.registry import load_domain
from flows.config import MethodSettings, config_path
from flows.engine.plan import Plan, make_plan
from flows.store import MeasurementWriter

SIZE = (24, 33)
WAYS = (MethodSettings(name="diffpir", num_levels=3), MethodSettings(name="dds", num_levels=2))
STARTER = config_path("models", "starter")


def make_photographs(path: Path, count: int = 5) -> Path:
    """A store of colour photographs, each with holes of its own."""
    rng = np.random.default_rng(5)
    city = load_domain("city")
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    with MeasurementWriter(path) as writer:
        for index in range(count):
            waves = [np.sin(rows / (3 + c) + index) * np.cos(columns / 5) for c in range(3)]
            record = ItemRecord(
                item_id=f"photo-{index}",
                domain="city",
                shape=(3, 1, *SIZE),
                dtype="uint8",
                units="intensity",
                source_digest=f"source-{index}",
                source_format="png",
            )
            pixels = np.round(128 + 90 * np.stack(waves)[:, None]).astype(np.uint8)
            missing = rng.random((1, *SIZE)) < 0.4
            measurement = city.given(
                Item(pixels, record), mask=missing, kernel=None, scale=None, sigma_y=0.05
            )
            writer.add(measurement)
    return path


def photograph_plan(store: Path, output: Path, *ways: MethodSettings, **settings: object) -> Plan:
    """A plan of the starter in float32, by two solvers or those given."""
    values = {"dtype": "float32", **settings}
    return make_plan(store, output, list(ways or WAYS), STARTER, **values)  # type: ignore[arg-type]
