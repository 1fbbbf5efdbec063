"""What a domain is: the plug-in that knows one field's files, units, physics and baselines.

A domain turns files into Items, Items into Measurements (simulated, or found damaged), and a
Measurement into a Problem: the linear inverse problem in network units that the diffusion core
solves. It turns the solution back into the field's units and files. It knows no orchestration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:  # torch takes seconds to import; the command line and the planner need none of it
    from torch import Tensor

    from diffusion_core.protocols import Data, LinearOperator, NoiseModel, Reach

Split = Literal["train", "validation", "test", "unassigned"]
Array = np.ndarray[Any, Any]


class BadInputError(ValueError):
    """A user's input that cannot be used. The message is one sentence: file, reason, next step."""


@dataclass(frozen=True)
class ItemRecord:
    """Everything about an item but its pixels; JSON-able, free of patient data.

    Attributes:
        item_id: [a-z0-9][a-z0-9-]*; a public label, or a keyed hash for a user's own file.
        domain: name of the domain.
        shape: (c, z, h, w).
        dtype: numpy name of the source values as stored.
        units: of the pixel values: "HU", "intensity", "counts" ...
        spacing_mm: (z, y, x), or None where there is no physical size.
        affine: 4x4 voxel-to-world (RAS, mm) of array axes (x, y, z) as NIfTI has it, or None.
        source_digest: sha256 of the source file's bytes; of several files, as files_digest has it.
        source_format: "nrrd", "nifti", "png", "jpeg", "tiff", "video" ...
        group: patient or scene; splits never divide one.
        split: which part of a study it serves.
        licence: as stated by the source, "" for a user's own.
        meta: further JSON-able facts the writer needs (dtype range, orientation codes ...).
    """

    item_id: str
    domain: str
    shape: tuple[int, int, int, int]
    dtype: str
    units: str
    source_digest: str
    source_format: str
    spacing_mm: tuple[float, float, float] | None = None
    affine: tuple[tuple[float, ...], ...] | None = None
    group: str = ""
    split: Split = "unassigned"
    licence: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def slices(self, start: int, stop: int) -> ItemRecord:
        """The record of slices start..stop; `meta["slices"]` names them as the source counts."""
        c, z, h, w = self.shape
        if (start, stop) == (0, z):
            return self
        numbers = list(self.meta.get("slices") or range(z))[start:stop]
        affine = self.affine and tuple((*row[:3], row[3] + start * row[2]) for row in self.affine)
        meta = {**self.meta, "slices": numbers}
        return replace(self, shape=(c, stop - start, h, w), affine=affine, meta=meta)


@dataclass(frozen=True)
class Item:
    """One image, volume or frame sequence, and what is known of it besides.

    Attributes:
        pixels: (c z h w) in source units.
        record: of the item.
        guides: name -> another image of the same thing on the same grid, (1 z h w) on [-1, 1],
            NaN where it says nothing; see guides.py.
    """

    pixels: Array
    record: ItemRecord
    guides: Mapping[str, Array] = field(default_factory=dict)

    def slices(self, start: int, stop: int) -> Item:
        """The item cut to slices (or frames) start..stop; shares memory."""
        return self.cut(self.record.slices(start, stop), slice(start, stop))

    def cut(
        self,
        record: ItemRecord,
        z: slice | Sequence[int],
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> Item:
        """A part of the pixels, and the same of the guides, under the record that it has."""

        def part(pixels: Array) -> Array:
            return pixels[:, z][..., rows, columns]

        return Item(part(self.pixels), record, {k: part(v) for k, v in self.guides.items()})


@dataclass(frozen=True)
class Task:
    """A protocol: how measurements are made or read. Values come from configs/tasks/NAME.yaml.

    Attributes:
        name: "ct-sparse60", "inpaint-random70" ...
        operator: kind of operator: "parallel-beam", "fourier", "mask", "blur", "pool", "identity".
        operator_params: of the operator (num_views, acceleration, missing_share, factor ...).
        noise: {"kind": "gaussian", "sigma_y": .05} | {"kind": "poisson", "counts_per_ray": 1e5}
            | {"kind": "snr", "snr_db": 30} | {"kind": "speckle", "num_looks": 4}.
        baselines: names of the classical methods that go with the task.
        region: "image", or "hole" where PSNR counts missing pixels only.
    """

    name: str
    domain: str
    operator: str
    operator_params: Mapping[str, Any]
    noise: Mapping[str, Any]
    baselines: Sequence[str] = ()
    region: Literal["image", "hole"] = "image"


@dataclass(frozen=True)
class Measurement:
    """What we are given for an item; never holds the truth.

    Attributes:
        record: of the item that is measured (shape and units of the image to be restored).
        task: name of the task, or "given" for a user's damaged image.
        operator: kind of operator, as in Task.
        params: JSON-able operator parameters, complete: with `arrays` they rebuild the operator.
        noise: JSON-able noise model.
        y: the data; the first axis is z (slice or frame): (z, *m). Units: see the domain.
        arrays: further arrays of the operator (mask, kernel ...); first axis z, or shared by all
            slices if the name is listed in params["shared_arrays"].
        truth_digest: sha256 of the true pixels if the measurement is simulated, else None.
        seed: of the simulation.
    """

    record: ItemRecord
    task: str
    operator: str
    params: Mapping[str, Any]
    noise: Mapping[str, Any]
    y: Array
    arrays: Mapping[str, Array] = field(default_factory=dict)
    truth_digest: str | None = None
    seed: int = 0

    def slices(self, start: int, stop: int) -> Measurement:
        """The measurement of slices start..stop alone."""
        shared = set(self.params.get("shared_arrays", ()))
        arrays = {k: v if k in shared else v[start:stop] for k, v in self.arrays.items()}
        record = self.record.slices(start, stop)
        return replace(self, record=record, y=self.y[start:stop], arrays=arrays)


@dataclass(frozen=True)
class Problem:
    """A measurement as a linear inverse problem in network units, ready for a Solver.

    Attributes:
        operator: A, on batches (b c h w), b = slices of the measurement.
        y: data in the operator's range, with the affine offset of the units moved into it.
        noise: likelihood for y.
        shape: (b, c, h, w) of the unknown, which may be a larger canvas than the image's.
        reach: "plane" if every datum sees the whole plane, else a radius in pixels.
        condition: name of the network's condition: "ct", "mri", "mri-complex", "city", "city-grey",
            "city-log".
        to_source: network units -> source units, as an image (b c' h w) (magnitude for complex;
            of a larger canvas the image's part).
        known: (b, 1|c, h, w) boolean, where pixels are measured exactly or directly; None if the
            operator is not a mask.
        facts: "num_bands" that were folded into the batch; "measured", a picture laid out as y that
            shows what was measured where y does not (a hazy one, a dark one).
        guides: name -> (b, 1, h, w) what the prior may look at besides, NaN where it is not given;
            no part of the data. See guides.posed.
    """

    operator: LinearOperator
    y: Tensor
    noise: NoiseModel
    shape: tuple[int, int, int, int]
    reach: Reach
    condition: str
    to_source: Callable[[Tensor], Tensor]
    known: Tensor | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    guides: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Generated:
    """Images that a model made up, on a scale of the field.

    Attributes:
        pixels: (n c h w) float32, c = 1 or 3.
        units: of the pixels.
        low: shown black.
        high: shown white.
    """

    pixels: Array
    units: str
    low: float
    high: float


Baseline = Callable[[Measurement, Problem, Mapping[str, Any]], "Tensor"]
"""(measurement, its problem, frozen parameters) -> restored batch (b c h w) in network units."""


ReadBox = Callable[[slice, slice, slice], Array]
"""(z, y, x) -> restored pixels (c z h w) float32 of that box, in source units."""


class Domain(ABC):
    """One field. Subclass it, name the subclass in the entry-point group `sashiko.domains`."""

    name: str
    suffixes: tuple[str, ...]
    conditions: Mapping[str, int]
    """Network conditions of the domain and the channels of each: {"mri": 1, "mri-complex": 2}."""
    drawn_from: Mapping[str, str] = {}
    """Conditions whose training patches are made from another's: {"mri-complex": "mri"}."""
    configs: Path | None = None
    """A guest's own tasks/NAME.yaml and baselines/NAME.yaml, as those in configs/."""
    raw_suffixes: tuple[str, ...] = ()
    """Those of `suffixes` whose files hold measurements and no image: k-space, sinograms."""

    restores_slices: bool = False
    """Whether a slice that is missing as a whole is restored from those before and behind it."""

    def is_raw(self, path: Path) -> bool:
        """Whether a file holds a measurement itself, as far as its name tells."""
        return path.name.lower().endswith(self.raw_suffixes)

    def companions(self, path: Path) -> Sequence[Path]:
        """Further files that are read with a file: their content counts as its own."""
        return ()

    def awaited(self, path: Path) -> Sequence[Path]:
        """The files that must lie still before a file is read, besides it: those it is read with.

        A domain whose files gather in series names what may still become one of them.
        """
        return self.companions(path)

    def measured(self, path: Path) -> Measurement:
        """Read the measurement that a file of `raw_suffixes` holds; task "given", no truth.

        Raises:
            BadInputError: with a clear sentence; never another exception.
        """
        raise BadInputError(f"{path}: the domain '{self.name}' reads no raw measurements")

    def accepts(self, path: Path) -> bool:
        """Whether a file is of a kind that the domain reads, as far as a glance tells."""
        return path.name.lower().endswith(self.suffixes)

    def gather(self, files: Sequence[Path]) -> list[Path]:
        """Of files the ones that stand for an item: all, but the further files of a series."""
        return list(files)

    @abstractmethod
    def read(self, path: Path) -> Item:
        """Read one file. Raises BadInputError with a clear sentence; never another exception."""

    @abstractmethod
    def write(self, item: Item, stem: Path) -> Path:
        """Write an item in its source's format at `stem` + suffix; returns the path written."""

    def write_large(self, record: ItemRecord, read: ReadBox, stem: Path) -> Path | None:
        """Write an item that is too large to be held, part by part; None if that cannot be.

        Args:
            record: of the item.
            read: gives a box of its pixels.
            stem: as in write.
        """
        return None

    def write_back(
        self, record: ItemRecord, read: ReadBox, stem: Path, source: Path, facts: Mapping[str, Any]
    ) -> Path | None:
        """Write a restored item beside the source that it was read from, as the field wants it.

        Args:
            record: of the item.
            read: gives a box of its pixels.
            stem: as in write; of a folder where the source has several files.
            source: that `read` was given.
            facts: of the result: "method", "model_digest" ...

        Returns:
            What was written; None where `write` does as well.

        Raises:
            BadInputError: if the source is gone or was changed.
        """
        return None

    @abstractmethod
    def simulate(self, item: Item, task: Task, seed: int) -> Measurement:
        """Measure a clean item as the task says, noise keyed by (seed, source digest)."""

    @abstractmethod
    def given(
        self,
        item: Item,
        *,
        mask: Array | None,
        kernel: Array | None,
        scale: int | None,
        sigma_y: float,
    ) -> Measurement:
        """Take a damaged image as a measurement: mask (True = missing), kernel or scale."""

    def given_noisy(self, item: Item, *, noise: str, sigma_y: float) -> Measurement:
        """Take an image with noise of another kind than Gaussian, and no other damage.

        Args:
            item: the noisy pixels.
            noise: "rician" ...
            sigma_y: its strength, as in `given`.

        Raises:
            BadInputError: if the domain's images have no such noise.
        """
        raise BadInputError(
            f"{item.record.item_id}: images of '{self.name}' have no {noise} noise; leave out "
            "--noise"
        )

    def given_thick(self, item: Item, *, scale_z: int, sigma_y: float) -> Measurement:
        """Take a volume of thick slices as the measurement of one with `scale_z` times as many.

        Raises:
            BadInputError: if the domain's images have no slices.
        """
        raise BadInputError(
            f"images of '{self.name}' have no slices that could be thick; leave out --scale-z"
        )

    def given_spoilt(
        self, item: Item, source: Path, *, damage: str, exposure: float | None
    ) -> Measurement:
        """Take an image that was spoilt as a whole, in a way that the field knows by a name.

        Args:
            item: the spoilt pixels.
            source: the file that they were read from.
            damage: "jpeg", "haze", "low-light" ...
            exposure: of "low-light", if it is known.

        Raises:
            BadInputError: if the domain's images are not spoilt so.
        """
        del source, exposure
        raise BadInputError(
            f"{item.record.item_id}: images of '{self.name}' know no damage '{damage}'; leave out "
            "--damage"
        )

    def as_measured(self, item: Item, record: ItemRecord) -> Item:
        """A clean item laid out as the record of its measurement: a volume may be cut otherwise."""
        return item

    @abstractmethod
    def problem(self, measurement: Measurement) -> Problem:
        """Build the linear inverse problem in network units."""

    @abstractmethod
    def baselines(self) -> Mapping[str, Baseline]:
        """The classical methods by name."""

    @abstractmethod
    def unit_scale(self, truth: Array, record: ItemRecord) -> tuple[float, float]:
        """(offset, gain) with (value - offset) * gain in [0, 1], for metrics alone."""

    def moved_slices(self, item: Item) -> Sequence[int]:
        """Slices, from 0, that look as if they moved while they were measured; by default none."""
        return ()

    @abstractmethod
    def training_windows(self, item: Item) -> Mapping[str, Sequence[Array]]:
        """{condition: views (c z h w) float32 in network units} from which patches are drawn.

        Views are the same item seen otherwise: along another axis, at half the resolution.
        """

    def measure_patch(
        self, x0: Tensor, kind: str, params: Mapping[str, Any], rng: np.random.Generator
    ) -> tuple[LinearOperator, Data, NoiseModel]:
        """Measure a training patch, for distillation; by default as domains/patches.py does.

        A domain with physics of its own adds its kinds of operators here.

        Args:
            x0: (1 c h w) in network units.
            kind: of the operator.
            params: of it, or where they are drawn from.
            rng: of the draw, the operator and the noise.

        Returns:
            A, y = A x0 + n, and the likelihood of n.

        Raises:
            BadInputError: if the kind is unknown or a parameter cannot be used.
        """
        from domains.patches import measure_patch

        return measure_patch(x0, kind, params, rng)

    def guide_views(self, record: ItemRecord, guide: Array) -> Sequence[Array]:
        """A guide (1 z h w) seen as `training_windows` sees its item, view by view.

        Raises:
            BadInputError: if the domain learns with no guides.
        """
        raise BadInputError(
            f"{record.item_id}: the domain '{self.name}' learns with no guides; leave out `guides`"
        )

    def body_mask(self, truth: Array, record: ItemRecord) -> Array | None:
        """Where the body is (z h w), for metrics inside it; None where that has no meaning."""
        return None

    def generated(self, condition: str, x: Array) -> Generated:
        """Images (n c h w) in network units that have no source, as people of the field read them.

        The scale is a usual one of the condition; as they are by default.
        """
        return Generated(x, "network units", -1.0, 1.0)

    def augment(self, condition: str, patch: Array, rng: np.random.Generator) -> Array:
        """Vary a training patch (c h w) as real images of the condition vary; the same by default.

        A condition listed in `drawn_from` makes its patch here from the other's.
        """
        return patch
