"""Documents: pages of grey or coloured ink on paper, scanned or drawn by a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from domains.base import (
    Array,
    BadInputError,
    Baseline,
    Domain,
    Item,
    ItemRecord,
    Measurement,
    Problem,
    Task,
)
from domains.imaging import Units, measure, problem_of, require_task, slices_first, take_damaged
from domains.keyed import slice_rngs

UNITS = Units(0.0, 255.0)
OPERATORS = ("identity", "mask", "pool")


class Documents(Domain):
    """Network units: ink..paper (0..255) to [-1, 1]; every colour is a grey image of its own."""

    name = "documents"
    suffixes = (".png", ".tif", ".tiff")
    conditions = MappingProxyType({"document": 1})
    configs = Path(__file__).parent / "configs"

    def read(self, path: Path) -> Item:
        from sashiko_documents.files import read

        return read(path)

    def write(self, item: Item, stem: Path) -> Path:
        from sashiko_documents.files import write

        return write(item, stem)

    def simulate(self, item: Item, task: Task, seed: int) -> Measurement:
        require_task(task, self.name, OPERATORS)
        arrays = {}
        if task.operator == "mask":
            share = float(task.operator_params["missing_share"])
            rngs = slice_rngs(seed, item.record, "mask-stains")
            missing = [stains(item.record.shape[2:], share, rng) for rng in rngs]
            arrays["mask"] = ~np.stack(missing)[:, None]
        return measure(item, UNITS, task, seed, dict(task.operator_params), arrays)

    def given(
        self,
        item: Item,
        *,
        mask: Array | None,
        kernel: Array | None,
        scale: int | None,
        sigma_y: float,
    ) -> Measurement:
        return take_damaged(item, UNITS, mask=mask, kernel=kernel, scale=scale, sigma_y=sigma_y)

    def problem(self, measurement: Measurement) -> Problem:
        return problem_of(measurement, UNITS, "document", fold_bands=True)

    def truth_signal(self, item: Item, measurement: Measurement) -> Any:
        import torch

        x = slices_first(UNITS.to_network(item.pixels))
        return torch.from_numpy(x.reshape(-1, 1, *x.shape[2:]))

    def baselines(self) -> Mapping[str, Baseline]:
        from sashiko_documents.baselines import BASELINES

        return BASELINES

    def unit_scale(self, truth: Array, record: ItemRecord) -> tuple[float, float]:
        return 0.0, 1 / 255

    def training_windows(self, item: Item) -> Mapping[str, Sequence[Array]]:
        c, z, h, w = item.pixels.shape
        return {"document": [UNITS.to_network(item.pixels).reshape(1, c * z, h, w)]}


def stains(size: tuple[int, int], share: float, rng: np.random.Generator) -> Array:
    """Round stains, True where ink and paper are lost, until this share (0 to 1) is covered."""
    if not 0 < share < 1:
        raise BadInputError(f"missing_share must lie between 0 and 1, not {share}")
    missing = np.zeros(size, bool)
    rows, columns = np.ogrid[: size[0], : size[1]]
    while missing.mean() < share:
        y, x, radius = rng.uniform((0, 0, 2), (*size, 5))
        missing |= (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    return missing
