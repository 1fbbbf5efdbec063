"""MRI: magnitude volumes in arbitrary units, and the k-space they are measured in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

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
    measure,
    measured_pixels,
    problem_of,
    require_divisible,
    require_task,
    slices_first,
    take_damaged,
)
from domains.medical_domain import MedicalDomain
from domains.mri.kspace import SUFFIXES as RAW_SUFFIXES
from domains.mri.kspace import companions

if TYPE_CHECKING:
    from torch import Tensor

KSPACE_OPERATORS = ("fourier", "multi-coil")
IMAGE_TASKS = ("identity", "pool", "mask", "pool-rows")
BODY_SHARE = 0.1
"""Of the 99.9th percentile: fainter is background."""


class MRI(MedicalDomain):
    """Network units: magnitude 0..q to [-1, 1], q estimated from the measurement.

    "mri": x = 2 m / q - 1, one channel, background -1, for images known to be real.
    "mri-complex": (re, im) of (m / q) e^{i phi}, two channels, background 0.
    """

    name = "mri"
    suffixes = (".nii", ".nii.gz", ".img", ".nrrd", ".nhdr", ".dcm", *RAW_SUFFIXES)
    raw_suffixes = RAW_SUFFIXES
    conditions = MappingProxyType({"mri": 1, "mri-complex": 2})
    drawn_from = MappingProxyType({"mri-complex": "mri"})

    def read(self, path: Path) -> Item:
        """Read a NIfTI or NRRD magnitude volume, or a DICOM series."""
        from domains.mri.reader import read

        if self.is_raw(path):
            raise BadInputError(
                f"{path}: raw k-space is a measurement and no image; restore it with `sashiko "
                "restore --domain mri`, give NIfTI or NRRD, or ingest it in a folder of its own"
            )
        return read(path)

    def companions(self, path: Path) -> Sequence[Path]:
        """The header beside BART's .cfl, the other files of a DICOM series."""
        return companions(path) if self.is_raw(path) else super().companions(path)

    def measured(self, path: Path) -> Measurement:
        """Read raw k-space: NumPy, BART, fastMRI or ISMRMRD."""
        from domains.mri.measured import measured

        return measured(path)

    def write(self, item: Item, stem: Path) -> Path:
        """Write NIfTI in the source's orientation; of raw k-space a folder of two, with phase."""
        from domains.mri.writer import write

        return write(item, stem)

    def write_large(self, record: ItemRecord, read: ReadBox, stem: Path) -> Path | None:
        """Write as `write` does, slice by slice."""
        from domains.mri.writer import write_large

        return write_large(record, read, stem)

    def simulate(self, item: Item, task: Task, seed: int) -> Measurement:
        """Undersampled k-space of a clean volume, Rician noise on it, a coarser one, slices moved.

        y in the source's intensity units; of a coarser one and of slices in network units.
        """
        from domains.mri import motion, rician
        from domains.mri.degradations import simulate

        require_task(task, self.name, (*KSPACE_OPERATORS, *IMAGE_TASKS))
        require_one_channel(item.record)
        if task.noise["kind"] == rician.KIND:
            return rician.simulate(item, task, seed)
        if task.operator == "pool":
            return simulate_coarser(item, task, seed)
        if task.operator == "mask":
            return motion.simulate(item, task, seed)
        if task.operator == "pool-rows":
            return simulate_thicker(item, task, seed)
        return simulate(item, task, seed)

    def given(
        self,
        item: Item,
        *,
        mask: Array | None,
        kernel: Array | None,
        scale: int | None,
        sigma_y: float,
    ) -> Measurement:
        """Take a damaged magnitude volume as a measurement in image space."""
        from domains.between_slices import lacks_slices, turned, turned_mask
        from domains.mri.degradations import SCALE_PERCENTILE, positive_scale

        require_one_channel(item.record)
        if mask is not None and lacks_slices(mask, item.record):
            item, mask = turned(item), turned_mask(mask, item.record)
        seen = item.pixels
        if mask is not None:
            seen = slices_first(item.pixels)[measured_pixels(mask, item.record)]
        q = positive_scale(float(np.percentile(seen, SCALE_PERCENTILE)))
        return take_damaged(
            item,
            Units(0.0, q),
            mask=mask,
            kernel=kernel,
            scale=scale,
            sigma_y=sigma_y,
            params={"scale_q": q},
        )

    def given_noisy(self, item: Item, *, noise: str, sigma_y: float) -> Measurement:
        """Take a magnitude volume with Rician noise; sigma_y on 2 / its 99.9th percentile."""
        from domains.mri import rician
        from domains.mri.degradations import SCALE_PERCENTILE, positive_scale

        if noise != rician.KIND:
            return super().given_noisy(item, noise=noise, sigma_y=sigma_y)
        require_one_channel(item.record)
        y = slices_first(np.maximum(item.pixels, 0)).astype(np.float32)
        q = positive_scale(float(np.percentile(y, SCALE_PERCENTILE)))
        return rician.taken(item, y, sigma_y * q / 2)

    def given_thick(self, item: Item, *, scale_z: int, sigma_y: float) -> Measurement:
        """Take a volume of thick slices as a measurement of the volume cut along y."""
        from domains.between_slices import taken_thick
        from domains.mri.degradations import SCALE_PERCENTILE, positive_scale

        require_one_channel(item.record)
        q = positive_scale(float(np.percentile(item.pixels, SCALE_PERCENTILE)))
        return taken_thick(item, Units(0.0, q), scale_z, sigma_y, {"scale_q": q})

    def problem(self, measurement: Measurement) -> Problem:
        """Build the inverse problem of k-space, or of a damaged image."""
        from domains.mri import rician

        if rician.is_rician(measurement):
            return rician.problem_of(measurement)
        if measurement.operator in PICTURE_OPERATORS:
            return problem_of(measurement, units_of(measurement), "mri")
        return kspace_problem(measurement)

    def truth_signal(self, item: Item, measurement: Measurement) -> Tensor:
        """The clean item in the network units of a measurement of it; its phase is simulated anew.

        Args:
            item: the clean item.
            measurement: of all of it.
        """
        import torch

        from domains.mri import rician
        from domains.mri.degradations import image_phase

        if rician.is_rician(measurement):
            return torch.from_numpy(rician.to_network(measurement, slices_first(item.pixels)))
        q = float(measurement.params["scale_q"])
        item = self.as_measured(item, measurement.record)
        magnitude = slices_first(item.pixels).astype(np.float32)
        if not is_complex(measurement):
            return torch.from_numpy(Units(0.0, q).to_network(magnitude))
        phase = image_phase(item, measurement.params["phase"], measurement.seed)
        if measurement.operator == "multi-coil":
            phase = phase + phase_of_maps(measurement, item.record)
        parts = magnitude * np.cos(phase), magnitude * np.sin(phase)
        return torch.from_numpy(np.concatenate(parts, axis=1) / np.float32(q))

    def baselines(self) -> Mapping[str, Baseline]:
        """Classical methods for k-space."""
        from domains.mri.baselines import BASELINES

        return BASELINES

    def unit_scale(self, truth: Array, record: ItemRecord) -> tuple[float, float]:
        """0 to 0, the 99.9th percentile of the true magnitudes to 1."""
        del record  # intensities are arbitrary: only the truth says how bright is bright
        top = float(np.percentile(truth[0], 99.9))  # a second channel is a phase
        return 0.0, 1.0 / top if top > 0 else 1.0

    def moved_slices(self, item: Item) -> Sequence[int]:
        """By their ghosts and by what their neighbours say."""
        from domains.mri.motion import moved_slices

        return moved_slices(item)

    def training_windows(self, item: Item) -> Mapping[str, Sequence[Array]]:
        """Magnitude views along every axis that is sampled finely enough."""
        from domains.mri.training import training_windows

        return training_windows(item)

    def augment(self, condition: str, patch: Array, rng: np.random.Generator) -> Array:
        """Vary the gain; complex patches by a smooth phase."""
        from domains.mri.training import augment

        return augment(condition, patch, rng)

    def generated(self, condition: str, x: Array) -> Generated:
        """Magnitudes as shares of q, the brightest tissue's."""
        if condition == "mri-complex":
            magnitude = np.linalg.norm(x, axis=1, keepdims=True)
        else:
            magnitude = np.maximum((x + 1) / 2, 0.0)
        return Generated(magnitude.astype(np.float32), "share of the brightest", 0.0, 1.0)

    def body_mask(self, truth: Array, record: ItemRecord) -> Array | None:
        """Where there is tissue: above 10% of the 99.9th percentile, the largest piece, filled."""
        from domains.body import largest_piece

        del record
        magnitude = truth[0].astype(np.float32)
        return largest_piece(magnitude > BODY_SHARE * np.percentile(magnitude, 99.9))


def kspace_problem(measurement: Measurement) -> Problem:
    """k-space as a linear inverse problem in network units.

    complex:     y / q           = M F u + n / q
    multi-coil:  y_j / q         = M F s_j u + n_j / q,  s_j estimated from the data themselves
    real:        (2 / q) y - M F 1 = M F x + (2 / q) n,  for m = q (x + 1) / 2
    """
    import torch

    from diffusion_core.noise.likelihood import GaussianNoise
    from diffusion_core.operators import Fourier, MultiCoil, Operator, to_complex

    _, z, h, w = measurement.record.shape
    q, complex_image = float(measurement.params["scale_q"]), is_complex(measurement)
    mask = torch.from_numpy(np.array(measurement.arrays["mask"], dtype=bool))
    operator: Operator = Fourier(mask, channels=2 if complex_image else 1)
    if measurement.operator == "multi-coil":
        operator = MultiCoil(mask, torch.from_numpy(maps_of(measurement)))
    gain = (1.0 if complex_image else 2.0) / q
    y = torch.from_numpy(np.array(measurement.y, dtype=np.complex64)) * gain
    if not complex_image:
        y = y - operator.A(torch.ones(1, 1, h, w))

    def to_source(x: Tensor) -> Tensor:
        if not complex_image:
            return Units(0.0, q).to_source(x)
        image = to_complex(x)
        if measurement.record.shape[0] == 2:  # magnitude and phase are wanted
            return torch.cat([image.abs() * q, image.angle()], dim=1)
        return image.abs() * q

    return Problem(
        operator=operator,
        y=y,
        noise=GaussianNoise(float(measurement.noise["sigma_y"]) * gain),
        shape=(z, 2 if complex_image else 1, h, w),
        reach="plane",
        condition="mri-complex" if complex_image else "mri",
        to_source=to_source,
    )


def simulate_coarser(item: Item, task: Task, seed: int) -> Measurement:
    """A clean volume as a scan of thicker pixels has it, y in network units.

    The scale is read from the coarse image itself: the mean of squares, as the operator takes it.
    """
    from domains.mri.degradations import SCALE_PERCENTILE, positive_scale

    require_divisible(item.record, task.operator, task.operator_params)
    factor = int(task.operator_params["factor"])
    z, _, h, w = slices_first(item.pixels).shape
    squares = item.pixels.reshape(z, h // factor, factor, w // factor, factor)
    coarse = squares.mean(axis=(2, 4), dtype=np.float64)
    q = positive_scale(float(np.percentile(coarse, SCALE_PERCENTILE)))
    params = {**task.operator_params, "scale_q": q}
    return measure(item, Units(0.0, q), task, seed, params, {})


def simulate_thicker(item: Item, task: Task, seed: int) -> Measurement:
    """A clean volume as a scan of thicker slices has it, y in network units; see between_slices."""
    from domains import between_slices
    from domains.mri.degradations import SCALE_PERCENTILE, positive_scale

    factor = int(task.operator_params["factor"])
    starts = range(0, item.record.shape[1], factor)
    thick = [item.pixels[:, s : s + factor].mean(axis=1, dtype=np.float64) for s in starts]
    q = positive_scale(float(np.percentile(thick, SCALE_PERCENTILE)))
    measurement = between_slices.simulate(item, task, seed, Units(0.0, q))
    return replace(measurement, params={**measurement.params, "scale_q": q})


def is_complex(measurement: Measurement) -> bool:
    """Whether the unknown has a phase; several coils always leave it one."""
    several = measurement.operator == "multi-coil"
    return several or bool(measurement.params.get("phase", "zero") != "zero")


def maps_of(measurement: Measurement) -> Array:
    """Sensitivities estimated from the measurement itself, (z coils h w)."""
    from domains.mri.coils import estimated_maps

    sigma_y = float(measurement.noise["sigma_y"])
    return estimated_maps(measurement.y, measurement.arrays["mask"], sigma_y)


def phase_of_maps(measurement: Measurement, record: ItemRecord) -> Array:
    """The phase that estimated sensitivities leave to the image, (z 1 h w), of true coils.

    Their common phase is free: where the estimate is t_j = s_j e^(-i p), the image is m e^(i p).
    """
    from domains.mri.coils import simulated_maps

    true = simulated_maps(record, int(measurement.params["num_coils"]), measurement.seed)
    estimate = maps_of(measurement)
    return np.angle((estimate.conj() * true).sum(axis=1, keepdims=True)).astype(np.float32)


def units_of(measurement: Measurement) -> Units:
    """0..q to [-1, 1], as the measurement says."""
    return Units(0.0, float(measurement.params["scale_q"]))


def require_one_channel(record: ItemRecord) -> None:
    """Refuse volumes of several contrasts in one.

    Raises:
        BadInputError: naming the item.
    """
    if record.shape[0] != 1:
        raise BadInputError(
            f"{record.item_id}: {record.shape[0]} channels; give one contrast per volume"
        )
