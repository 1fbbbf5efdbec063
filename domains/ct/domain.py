"""CT: volumes in Hounsfield units, and the parallel-beam sinograms they are measured in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import (
    Array,
    BadInputError,
    Baseline,
    Generated,
    Item,
    ItemRecord,
    Measurement,
    Problem,
    ReadBox,
    Task,
)
from domains.imaging import (
    PICTURE_OPERATORS,
    Units,
    problem_of,
    require_task,
    slices_first,
    take_damaged,
)
from domains.medical_domain import MedicalDomain

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_core.operators import Operator
    from diffusion_core.protocols import Data, LinearOperator, NoiseModel
    from domains.ct.geometry import Geometry

UNITS = Units(-1000.0, 2000.0)
BODY_ABOVE_HU = -500.0
SCANS = ("parallel-beam", "fan-beam")
BETWEEN = ("mask", "pool-rows")
"""Slices missing, or thick."""
RAW_SUFFIXES = (".npy", ".h5", ".hdf5")
"""Of sinograms, which have their geometry beside them."""


class CT(MedicalDomain):
    """Network units: HU -1000..2000 to [-1, 1]; A x in line integrals of mu, no dimension."""

    name = "ct"
    suffixes = (".nii", ".nii.gz", ".img", ".nrrd", ".nhdr", ".dcm", *RAW_SUFFIXES)
    raw_suffixes = RAW_SUFFIXES
    conditions = MappingProxyType({"ct": 1})

    def read(self, path: Path) -> Item:
        """Read a NIfTI or NRRD volume or a DICOM series in HU."""
        from domains.ct.reader import read

        if self.is_raw(path):
            raise BadInputError(
                f"{path}: a sinogram is a measurement and no image; restore it with `sashiko "
                "restore --domain ct`, or give DICOM, NIfTI or NRRD"
            )
        return read(path)

    def companions(self, path: Path) -> Sequence[Path]:
        """The geometry beside a sinogram, the other files of a DICOM series."""
        if not self.is_raw(path):
            return super().companions(path)
        from domains.ct.sinograms import companions

        return companions(path)

    def measured(self, path: Path) -> Measurement:
        """Read a sinogram with its geometry."""
        from domains.ct.sinograms import measured

        return measured(path)

    def write(self, item: Item, stem: Path) -> Path:
        """Write NIfTI in whole HU."""
        from domains.ct.writer import write

        return write(item, stem)

    def write_large(self, record: ItemRecord, read: ReadBox, stem: Path) -> Path | None:
        """Write as `write` does, slice by slice."""
        from domains.ct.writer import write_large

        return write_large(record, read, stem)

    def simulate(self, item: Item, task: Task, seed: int) -> Measurement:
        """Scan a clean volume, or take slices from it (see between_slices.py).

        Returns:
            y (z 1 views bins) float32: measured line integrals -log(max(n, 1/2) / I0), from a finer
            projector than reconstructs; Poisson counts n, with Gaussian read-out noise if the task
            states `electronic_counts`, keyed by source, seed and slice. Metal and lying elements
            are as unmeasured.py says: arrays["mask"] (z 1 views bins) then tells what is known.
        """
        if task.operator in BETWEEN:
            from domains.between_slices import simulate

            require_task(task, self.name, BETWEEN)
            require_one_channel(item.record)
            return simulate(item, task, seed, UNITS)
        from domains.ct.degradations import attenuation, log_transform, photon_counts, scan
        from domains.ct.unmeasured import spoil
        from domains.keyed import pixel_digest, slice_rngs

        require_task(task, self.name, (*SCANS, *BETWEEN))
        if task.noise["kind"] != "poisson":
            raise BadInputError(
                f"task '{task.name}': noise '{task.noise['kind']}' is not for CT; use 'poisson'"
            )
        counts_per_ray = float(task.noise["counts_per_ray"])
        electronic_counts = float(task.noise.get("electronic_counts", 0.0))
        params: dict[str, Any] = dict(task.operator_params)
        geometry = geometry_of(item.record, params)
        line_integrals = scan(attenuation(item.pixels[0]), geometry)
        rngs = slice_rngs(seed, item.record, "noise")
        counts = photon_counts(line_integrals, counts_per_ray, rngs, electronic_counts)
        params |= {"num_bins": geometry.num_bins, "bin_mm": geometry.bin_mm}
        data = log_transform(counts, counts_per_ray)
        data, known = spoil(data, item, geometry, params, seed)
        return Measurement(
            record=item.record,
            task=task.name,
            operator=task.operator,
            params=params,
            noise={
                "kind": "poisson",
                "counts_per_ray": counts_per_ray,
                "electronic_counts": electronic_counts,
            },
            y=data[:, None],
            arrays={} if known is None else {"mask": known},
            truth_digest=pixel_digest(item.pixels),
            seed=seed,
        )

    def given(
        self,
        item: Item,
        *,
        mask: Array | None,
        kernel: Array | None,
        scale: int | None,
        sigma_y: float,
    ) -> Measurement:
        """Take a damaged volume as a measurement in image space, y in network units.

        Where a mask takes whole slices, the measurement is of the volume cut along y.
        """
        from domains.between_slices import lacks_slices, turned, turned_mask

        require_one_channel(item.record)
        if mask is not None and lacks_slices(mask, item.record):
            item, mask = turned(item), turned_mask(mask, item.record)
        return take_damaged(item, UNITS, mask=mask, kernel=kernel, scale=scale, sigma_y=sigma_y)

    def given_thick(self, item: Item, *, scale_z: int, sigma_y: float) -> Measurement:
        """Take a volume of thick slices as a measurement of the volume cut along y."""
        from domains.between_slices import taken_thick

        require_one_channel(item.record)
        return taken_thick(item, UNITS, scale_z, sigma_y, {})

    def problem(self, measurement: Measurement) -> Problem:
        """Build the inverse problem of a sinogram, or of a damaged image."""
        if measurement.operator in PICTURE_OPERATORS:
            return problem_of(measurement, UNITS, "ct")
        return sinogram_problem(measurement)

    def truth_signal(self, item: Item, measurement: Measurement) -> Tensor:
        """The clean item in network units, (b 1 h w)."""
        import torch

        clean = self.as_measured(item, measurement.record)
        return torch.from_numpy(slices_first(UNITS.to_network(clean.pixels)))

    def baselines(self) -> Mapping[str, Baseline]:
        """Classical methods for sinograms."""
        from domains.ct.baselines import BASELINES

        return BASELINES

    def unit_scale(self, truth: Array, record: ItemRecord) -> tuple[float, float]:
        """-1000 HU to 0, 2000 HU to 1."""
        del truth, record  # the scale of CT is absolute
        return UNITS.low, 1 / (UNITS.high - UNITS.low)

    def training_windows(self, item: Item) -> Mapping[str, Sequence[Array]]:
        """Views along every axis that is sampled finely enough."""
        from domains.ct.training import training_windows

        return training_windows(item)

    def measure_patch(
        self, x0: Tensor, kind: str, params: Mapping[str, Any], rng: np.random.Generator
    ) -> tuple[LinearOperator, Data, NoiseModel]:
        """Scan a patch ("parallel-beam": see training.py), or measure it as any domain may."""
        if kind != "parallel-beam":
            return super().measure_patch(x0, kind, params, rng)
        from domains.ct.training import scan_patch

        return scan_patch(x0, params, rng)

    def generated(self, condition: str, x: Array) -> Generated:
        """HU, shown from air to dense bone."""
        del condition
        hu = (x + 1) * ((UNITS.high - UNITS.low) / 2) + UNITS.low
        return Generated(hu.astype(np.float32), "HU", -1000.0, 1000.0)

    def body_mask(self, truth: Array, record: ItemRecord) -> Array | None:
        """Above -500 HU, the largest piece of each slice, lungs filled."""
        from domains.body import largest_piece

        del record
        return largest_piece(truth[0] > BODY_ABOVE_HU)


def geometry_of(record: ItemRecord, params: Mapping[str, Any]) -> Geometry:
    """The scanner of a task for an item: a fan if it says where its source is.

    Raises:
        BadInputError: if the item has several channels or no pixel size, or there is no such scan.
    """
    from domains.ct.geometry import FanGeometry, ParallelGeometry

    require_one_channel(record)
    if record.spacing_mm is None:
        raise BadInputError(
            f"{record.item_id}: no pixel spacing, and line integrals are in mm; "
            "give a file that states it"
        )
    _, dy, dx = record.spacing_mm
    _, _, h, w = record.shape
    num_views, arc = int(params["num_views"]), float(params["arc_degrees"])
    if num_views < 1 or not 0 < arc <= 360:
        raise BadInputError(f"no scan has {num_views} views over {arc} degrees; use 1 or more")
    geometry: Geometry
    if "source_mm" in params:
        distances = float(params["source_mm"]), float(params["detector_mm"])
        geometry = FanGeometry.covering(h, w, (dy, dx), num_views, arc, *distances)
    else:
        geometry = ParallelGeometry.covering(h, w, (dy, dx), num_views, arc)
    # A measurement says its detector itself; a task leaves it to cover the image.
    own = ("num_bins", "bin_mm", "offset_mm")
    detector = {name: params[name] for name in own if name in params}
    if "angles_degrees" in params:
        detector["angles_degrees"] = tuple(params["angles_degrees"])
    return replace(geometry, **detector)


def sinogram_problem(measurement: Measurement) -> Problem:
    """Line integrals as a linear inverse problem in network units.

    mu = .02 (1 + HU / 1000) = .03 (x + 1) per mm, so that with P the projector in mm
    y - .03 P 1 = .03 P x + n: the operator is .03 P, and .03 P 1 is the likelihood's offset. A
    scan may state another attenuation of water than .02 per mm (`water_per_mm`).
    """
    import torch

    from diffusion_core.noise.likelihood import PoissonTransmission
    from diffusion_core.operators import Compose, Mask
    from domains.ct.degradations import MU_WATER_PER_MM
    from domains.ct.operators import beam_of

    _, z, h, w = measurement.record.shape
    water = float(measurement.params.get("water_per_mm", MU_WATER_PER_MM))
    slope = water * (UNITS.high - UNITS.low) / 2 / 1000  # of mu against x, per mm
    constant = water * (1 + (UNITS.high + UNITS.low) / 2 / 1000)  # mu at x = 0
    beam = beam_of(geometry_of(measurement.record, measurement.params), slope)
    offset = beam.A(torch.ones(1, 1, h, w)) * (constant / slope)
    y = torch.from_numpy(np.array(measurement.y, dtype=np.float32)) - offset
    operator: Operator = beam
    if "mask" in measurement.arrays:
        known = Mask(torch.from_numpy(np.array(measurement.arrays["mask"], dtype=bool)))
        operator, y = Compose(known, beam), known.measured(y)
    return Problem(
        operator=operator,
        y=y,
        noise=PoissonTransmission(
            float(measurement.noise["counts_per_ray"]),
            offset,
            float(measurement.noise.get("electronic_counts", 0.0)),
        ),
        shape=(z, 1, h, w),
        reach="plane",
        condition="ct",
        to_source=UNITS.to_source,
    )


def require_one_channel(record: ItemRecord) -> None:
    """Refuse what is no CT volume.

    Raises:
        BadInputError: naming the item.
    """
    if record.shape[0] != 1:
        raise BadInputError(f"{record.item_id}: {record.shape[0]} channels; a CT volume has one")
