"""City photographs, aerial scenes and film frames: intensities of 1, 3 or any number of bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from domains.base import (
    Array,
    Baseline,
    Domain,
    Generated,
    Item,
    ItemRecord,
    Measurement,
    Problem,
    ReadBox,
    Task,
)
from domains.imaging import (
    IMAGE_OPERATORS,
    Units,
    problem_of,
    require_task,
    slices_first,
    take_damaged,
)
from domains.validity import stand_in

if TYPE_CHECKING:
    from torch import Tensor


class City(Domain):
    """Network units: black..white of the values (the record's value_range) to [-1, 1].

    Three bands are a colour image ("city"), one a grey image ("city-grey"); of any other number
    each band is a grey image of its own. Speckled images are restored as logarithms, band by band
    ("city-log", see speckle.py).
    """

    name = "city"
    suffixes = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".mp4", ".avi")
    conditions = MappingProxyType({"city": 3, "city-grey": 1, "city-log": 1})
    drawn_from = MappingProxyType({"city-grey": "city", "city-log": "city"})

    def read(self, path: Path) -> Item:
        """Read a photograph, a TIFF of any bands, or the frames of a video."""
        from domains.city.reader import read

        return read(path)

    def write(self, item: Item, stem: Path) -> Path:
        """Write PNG, TIFF or a clip, in the source's dtype."""
        from domains.between_slices import unturned
        from domains.city.writer import write

        if item.record.meta.get("turned"):
            item = unturned(item)
        return write(item, stem)

    def write_large(self, record: ItemRecord, read: ReadBox, stem: Path) -> Path | None:
        """Write as `write` does, tile by tile."""
        from domains.city.writer import write_large

        if record.meta.get("turned"):
            return None
        return write_large(record, read, stem)

    def simulate(self, item: Item, task: Task, seed: int) -> Measurement:
        """Damage a clean image; y is in network units, (z c h' w'), or speckled intensities.

        A clip from which frames are taken is measured cut along y (see between_slices.py).
        """
        from domains import between_slices
        from domains.city import haze, jpeg, low_light, speckle
        from domains.city.degradations import simulate

        require_task(task, self.name, (*IMAGE_OPERATORS, jpeg.OPERATOR))
        if task.operator == "mask" and task.operator_params.get("pattern") == "frames":
            return between_slices.simulate(item, task, seed, units_of(item.record))
        of_noise = {
            "speckle": speckle.simulate,
            haze.KIND: haze.simulate,
            low_light.KIND: low_light.simulate,
            jpeg.KIND: jpeg.simulate,
        }
        measure = of_noise.get(task.noise["kind"], simulate)
        return measure(item, units_of(item.record), task, seed)

    def given(
        self,
        item: Item,
        *,
        mask: Array | None,
        kernel: Array | None,
        scale: int | None,
        sigma_y: float,
    ) -> Measurement:
        """Take a damaged image as a measurement; for `scale` the record has the enlarged shape.

        Pixels without data that no mask asks for stay without: see stand_in. Where a mask takes
        whole frames, the measurement is of the clip cut along y.
        """
        from domains.between_slices import lacks_slices, turned, turned_mask

        item = stand_in(item, mask)
        if (
            mask is not None
            and item.record.source_format == "video"
            and lacks_slices(mask, item.record)
        ):
            item, mask = turned(item), turned_mask(mask, item.record)
        units = units_of(item.record)
        return take_damaged(item, units, mask=mask, kernel=kernel, scale=scale, sigma_y=sigma_y)

    def given_spoilt(
        self, item: Item, source: Path, *, damage: str, exposure: float | None
    ) -> Measurement:
        """Take a picture that JPEG, haze or too little light spoilt."""
        from domains.city import haze, jpeg, low_light

        units = units_of(item.record)
        match damage:
            case haze.KIND:
                return haze.given(stand_in(item, None), units)
            case low_light.KIND:
                return low_light.given(stand_in(item, None), exposure)
            case jpeg.KIND:
                return jpeg.given(item, source)
        return super().given_spoilt(item, source, damage=damage, exposure=exposure)

    def problem(self, measurement: Measurement) -> Problem:
        """Build the inverse problem; bands that are neither 1 nor 3 go into the batch."""
        from domains.city import haze, jpeg, low_light, speckle

        of_noise = {
            "speckle": speckle.problem_of,
            haze.KIND: haze.problem_of,
            low_light.KIND: low_light.problem_of,
            jpeg.KIND: jpeg.problem_of,
        }
        build = of_noise.get(measurement.noise["kind"])
        if build is not None:
            return build(measurement, units_of(measurement.record))
        condition, fold = condition_of(measurement.record)
        return problem_of(measurement, units_of(measurement.record), condition, fold_bands=fold)

    def truth_signal(self, item: Item, measurement: Measurement) -> Tensor:
        """The clean item in the network units of a measurement of it, (b c h w)."""
        import torch

        from domains.city import speckle

        item = self.as_measured(item, measurement.record)
        units: Units | speckle.LogUnits = units_of(measurement.record)
        _, fold = condition_of(measurement.record)
        if speckle.is_speckled(measurement):
            units, fold = speckle.log_units(measurement.record, units_of(measurement.record)), True
        x = torch.from_numpy(slices_first(units.to_network(item.pixels)))
        return x.reshape(-1, 1, *x.shape[2:]) if fold else x

    def as_measured(self, item: Item, record: ItemRecord) -> Item:
        """Cut along y where frames are missing."""
        from domains.between_slices import as_measured

        return as_measured(item, record)

    def baselines(self) -> Mapping[str, Baseline]:
        """Classical methods for photographs."""
        from domains.city.baselines import BASELINES

        return BASELINES

    def unit_scale(self, truth: Array, record: ItemRecord) -> tuple[float, float]:
        """Black to 0, white to 1."""
        del truth  # the scale is the sensor's, not the picture's
        units = units_of(record)
        return units.low, 1 / (units.high - units.low)

    def training_windows(self, item: Item) -> Mapping[str, Sequence[Array]]:
        """Colour or grey views at several scales, and the logarithms of grey ones."""
        from domains.city.training import training_windows

        return training_windows(item)

    def guide_views(self, record: ItemRecord, guide: Array) -> Sequence[Array]:
        """At several scales; of single bands, which are images of their own, once for each."""
        from domains.city.training import guide_views

        return guide_views(guide, record.shape[0])

    def generated(self, condition: str, x: Array) -> Generated:
        """Grey levels of 8 bits, not rounded."""
        from domains.city import speckle

        relative = (x + 1) / 2
        if condition == speckle.CONDITION:
            relative = np.exp((x - 1) * speckle.NATS_PER_UNIT)
        return Generated((255 * relative).astype(np.float32), "grey levels of 8 bits", 0.0, 255.0)

    def augment(self, condition: str, patch: Array, rng: np.random.Generator) -> Array:
        """Vary exposure; grey from colour; logarithms of either."""
        from domains.city.training import augment

        return augment(condition, patch, rng)


def units_of(record: ItemRecord) -> Units:
    """Black and white as the reader found them, else the dtype's whole range (floats: 0..1)."""
    if "value_range" in record.meta:
        low, high = record.meta["value_range"]
        return Units(float(low), float(high))
    dtype = np.dtype(record.dtype)
    return Units(0.0, float(np.iinfo(dtype).max) if dtype.kind in "iu" else 1.0)


def condition_of(record: ItemRecord) -> tuple[str, bool]:
    """Name of the network's condition, and whether bands are folded into the batch."""
    num_bands = record.shape[0]
    return ("city" if num_bands == 3 else "city-grey"), num_bands not in {1, 3}
