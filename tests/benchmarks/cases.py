"""What the benchmark restores: images of 256^2 cut from the samples, and their measurements.

Test items come from the test split alone. CT slices of 512^2 are resampled to 256^2 by the mean of
2 x 2 pixels, their pixel spacing doubled; MRI slices have 256^2; photographs and aerial scenes are
cut, at most three windows an image, none overlapping another. A case is one slice or window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from domains.base import Array, Domain, Item, Measurement, Problem, Task
from domains.files import select
from domains.metrics import score
from domains.registry import load_domain
from flows.api_data import ingest_samples
from flows.config import load_task
from flows.store import Dataset

SIDE_PX = 256

TASKS = (
    "inpaint-random70",
    "sr-x4",
    "deblur-gauss",
    "ct-sparse60",
    "ct-sparse20",
    "kspace-x4-real",
)


@dataclass(frozen=True)
class Part:
    """A 256^2 image in a sample.

    Attributes:
        label: of the sample.
        z: slice or frame, as the sample counts.
        corner: (top, left) of the window, after shrinking.
        shrink: squares of so many pixels a side are averaged first.
    """

    label: str
    z: int = 0
    corner: tuple[int, int] = (0, 0)
    shrink: int = 1

    @property
    def name(self) -> str:
        """Of the case in the results."""
        top, left = self.corner
        return f"{self.label}/{self.z}/{top},{left}"


TEST: Mapping[str, Sequence[Part]] = {
    # lung2 has 61 slices, brain2 23: the middles of eight equal parts, as in the demo.
    "ct": [Part("lung2", z, shrink=2) for z in (3, 11, 19, 26, 34, 41, 49, 57)],
    "mri": [Part("brain2", z) for z in (1, 4, 7, 10, 12, 15, 18, 21)],
    "city": [
        Part("china", corner=(85, 64)),
        Part("china", corner=(85, 320)),
        Part("sample-geotiff", corner=(194, 194)),
        Part("sample-geotiff", corner=(194, 450)),
        Part("sample-geotiff", corner=(450, 322)),
        Part("pan2", corner=(73, 172)),
        Part("bikes-3", 13, (8, 64)),
        Part("bikes-3", 13, (8, 320)),
        Part("bikes-3", 45, (8, 192)),
    ],
}

VALIDATION: Mapping[str, Sequence[Part]] = {
    # lung1 and brain1 are training items with the sizes of the test's; the validation scans of CT
    # (101 x 122) and MRI (160 x 124) are smaller than 256^2. What is tuned here is one number.
    "ct": [Part("lung1", 12, shrink=2), Part("lung1", 36, shrink=2)],
    "mri": [Part("brain1", 8), Part("brain1", 16)],
    "city": [
        Part("berlin-01", corner=(178, 280), shrink=4),
        Part("pan3", corner=(53, 172)),
        Part("bikes-2", 25, (8, 192)),
    ],
}


@dataclass(frozen=True)
class Case:
    """One image, measured.

    Attributes:
        task: protocol.
        name: of the image.
        truth: the clean item of one slice.
        measurement: of it.
        problem: in network units.
    """

    task: Task
    name: str
    domain: Domain
    truth: Item
    measurement: Measurement
    problem: Problem

    def figures(self, x: torch.Tensor) -> dict[str, float]:
        """PSNR in dB and SSIM of a restored batch (1 c h w) in network units."""
        restored = self.problem.to_source(x.float()).numpy().swapaxes(0, 1)
        (row,) = score(self.domain, self.truth, restored)
        return {name: float(row[name]) for name in ("psnr", "ssim")}


def test_dataset(folder: Path) -> Dataset:
    """The test samples, fetched (SASHIKO_CACHE) and ingested once into `folder`."""
    path = folder / "test.zarr"
    if not path.exists():
        ingest_samples(path, splits=["test"])
    return Dataset(path)


def cases(dataset: Dataset, task: str, parts: Sequence[Part]) -> Iterator[Case]:
    """Measure parts of a dataset as a task says, with seed 0."""
    protocol = load_task(task)
    domain = load_domain(protocol.domain)
    for part in parts:
        item = cut(dataset, part)
        measurement = domain.simulate(item, protocol, 0)
        yield Case(protocol, part.name, domain, item, measurement, domain.problem(measurement))


def cut(dataset: Dataset, part: Part) -> Item:
    """One slice, shrunk and cut to 256^2, or to what it has where that is less."""
    item = dataset.read(part.label, slice(part.z, part.z + 1))
    if part.shrink > 1:
        item = shrunk(item, part.shrink)
    h, w = item.pixels.shape[2:]
    return select(item, crop=(*part.corner, min(SIDE_PX, h), min(SIDE_PX, w)))


def shrunk(item: Item, factor: int) -> Item:
    """Means of factor x factor squares, rounded where the source holds integers."""
    pixels: Array = item.pixels
    c, z, h, w = pixels.shape
    h, w = h // factor, w // factor
    squares = pixels[..., : h * factor, : w * factor].reshape(c, z, h, factor, w, factor)
    means = squares.mean(axis=(3, 5), dtype=np.float64)
    if np.issubdtype(pixels.dtype, np.integer):
        means = np.rint(means)
    spacing = item.record.spacing_mm
    if spacing is not None:
        spacing = (spacing[0], spacing[1] * factor, spacing[2] * factor)
    record = replace(item.record, shape=means.shape, spacing_mm=spacing, affine=None)
    return Item(means.astype(pixels.dtype), record)
