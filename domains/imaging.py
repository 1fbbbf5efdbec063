"""Measurements in image space, which every field has: noise, holes, blur, a coarser camera.

    y = A x + n,   A one of IMAGE_OPERATORS;   x in network units, so y is too

A Measurement of these kinds holds `y` (z c h' w') float32, and in `arrays`
    mask    (z 1|c h w) boolean, True where *measured* (users' masks mark what is missing)
    kernel  (kh kw) float32, shared by all slices; of a user's picture ("cropped-blur") it reaches
            beyond the border, where the scene goes on unseen: x then has the canvas of params
    kernels (gh gw kh kw) float32, of a blur that varies over the image, shared by all slices
Bands that are not one image to the network (a satellite's four, say) are folded into the batch:
b = z c, one channel each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import Array, BadInputError, Item, ItemRecord, Measurement, Problem, Task
from domains.keyed import pixel_digest, slice_rngs

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_core.operators import Operator

IMAGE_OPERATORS = ("identity", "mask", "blur", "varying-blur", "pool", "downsample", "mosaic")
"""What images are measured with in simulations."""

PICTURE_OPERATORS = (*IMAGE_OPERATORS, "cropped-blur", "pool-rows")
"""What makes measurements in image space: simulated, or pictures that a user gives."""

_CANVAS_STEP_PX = 8
"""Total stride of the network, which shall see the picture's own grid on a larger canvas."""


@dataclass(frozen=True)
class Units:
    """The affine map that takes low..high to [-1, 1]; nothing is clipped.

    Attributes:
        low: source value that becomes -1.
        high: source value that becomes 1.
    """

    low: float
    high: float

    def to_network(self, values: Array) -> Array:
        """Source units -> network units, float32."""
        half = (self.high - self.low) / 2
        return ((np.asarray(values, dtype=np.float64) - self.low) / half - 1).astype(np.float32)

    def to_source(self, x: Tensor) -> Tensor:
        """Network units -> source units, in the precision of x."""
        return (x + 1) * ((self.high - self.low) / 2) + self.low


def slices_first(pixels: Array) -> Array:
    """(c z h w) -> (z c h w); its own inverse."""
    return np.moveaxis(pixels, 0, 1)


def operator_of(
    kind: str, params: Mapping[str, Any], arrays: Mapping[str, Array], shape: tuple[int, int]
) -> Operator:
    """The operator of an image-space measurement, of images of `shape` (h, w).

    Raises:
        BadInputError: for an unknown kind.
    """
    import torch

    from diffusion_core import operators

    def array(name: str, dtype: type) -> Tensor:
        return torch.from_numpy(np.array(arrays[name], dtype=dtype))

    makers: dict[str, Callable[[], Operator]] = {
        "identity": operators.Identity,
        "mask": lambda: operators.Mask(array("mask", bool)),
        "blur": lambda: operators.Blur(array("kernel", np.float32), shape),
        "cropped-blur": lambda: operators.CroppedBlur(
            array("kernel", np.float32), shape, _pair(params["margin"]), _pair(params["canvas"])
        ),
        "varying-blur": lambda: operators.VaryingBlur(array("kernels", np.float32), shape),
        "pool": lambda: operators.Pool(int(params["factor"])),
        "downsample": lambda: operators.Downsample.bicubic(int(params["factor"]), shape),
        "pool-rows": lambda: operators.PoolRows(int(params["factor"]), shape[0]),
        "mosaic": lambda: operators.Mosaic(str(params["pattern"])),
    }
    if kind in makers:
        return makers[kind]()
    known = ", ".join(PICTURE_OPERATORS)
    raise BadInputError(f"unknown operator '{kind}' of an image: choose one of {known}")


def measure(
    item: Item,
    units: Units,
    task: Task,
    seed: int,
    params: Mapping[str, Any],
    arrays: Mapping[str, Array],
) -> Measurement:
    """Simulate y = A x + n of a clean item, noise keyed by source, seed and slice.

    Args:
        item: clean pixels.
        units: of its network scale.
        task: operator and noise ("gaussian").
        seed: of the noise.
        params: complete parameters of the operator.
        arrays: its arrays.
    """
    import torch

    require_divisible(item.record, task.operator, params)
    if task.operator == "mosaic" and item.record.shape[0] != 3:
        raise BadInputError(
            f"{item.record.item_id}: {item.record.shape[0]} bands; a colour filter mosaic needs 3"
        )
    if task.noise["kind"] != "gaussian":
        raise BadInputError(
            f"task '{task.name}': noise '{task.noise['kind']}' is not for images; use 'gaussian'"
        )
    sigma_y = float(task.noise["sigma_y"])
    x = slices_first(units.to_network(item.pixels))
    A = operator_of(task.operator, params, arrays, (x.shape[2], x.shape[3])).A
    y = A(torch.from_numpy(x))
    if sigma_y > 0:
        rngs = slice_rngs(seed, item.record, "noise")
        noise = np.stack([rng.standard_normal(y.shape[1:], dtype=np.float32) for rng in rngs])
        if task.operator == "mask":
            noise *= arrays["mask"]
        y = y + sigma_y * torch.from_numpy(noise)
    return Measurement(
        record=item.record,
        task=task.name,
        operator=task.operator,
        params=params,
        noise={"kind": "gaussian", "sigma_y": sigma_y},
        y=y.numpy(),
        arrays=arrays,
        truth_digest=pixel_digest(item.pixels),
        seed=seed,
    )


def require_divisible(record: ItemRecord, operator: str, params: Mapping[str, Any]) -> None:
    """Refuse to make an image coarser by squares that do not tile it.

    Raises:
        BadInputError: saying to which size the image can be cropped.
    """
    if operator not in {"pool", "downsample"}:
        return
    factor, (_, _, h, w) = int(params["factor"]), record.shape
    if h % factor or w % factor or h < factor or w < factor:
        raise BadInputError(
            f"{record.item_id}: {h} x {w} pixels do not divide by {factor}; "
            f"crop it to {h // factor * factor} x {w // factor * factor}"
        )


def take_damaged(
    item: Item,
    units: Units,
    *,
    mask: Array | None,
    kernel: Array | None,
    scale: int | None,
    sigma_y: float,
    params: Mapping[str, Any] | None = None,
) -> Measurement:
    """A damaged image as the measurement that it is.

    Args:
        item: the damaged pixels.
        units: of its network scale.
        mask: (h w), (z h w) or (c z h w), True or non-zero where pixels are *missing*.
        kernel: (kh kw), what blurred the scene that the image is cut out of; it is scaled to sum
            1. The light from beyond the border is part of the unknown.
        scale: the image is `scale` times coarser than what is wanted; the record of the
            measurement has the enlarged shape, and the spacing, affine that go with it.
        sigma_y: standard deviation of the noise, network units.
        params: further parameters to be kept with the measurement.

    Raises:
        BadInputError: if more than one of mask, kernel and scale is given, or one does not fit.
    """
    if sum(part is not None for part in (mask, kernel, scale)) > 1:
        raise BadInputError(
            f"{item.record.item_id}: give one of mask, kernel and scale; for several damages "
            "restore one after the other"
        )
    if not np.isfinite(sigma_y) or sigma_y < 0:
        raise BadInputError(f"sigma_y must be 0 or more, not {sigma_y}")
    y = slices_first(units.to_network(item.pixels))
    kind, own, arrays, record = "identity", dict(params or {}), {}, item.record
    if mask is not None:
        kind, arrays = "mask", {"mask": measured_pixels(mask, item.record)}
        y = y * arrays["mask"]
    elif kernel is not None:
        kind, arrays = "cropped-blur", {"kernel": unit_kernel(kernel, item.record)}
        own |= {"shared_arrays": ["kernel"], **canvas_round(arrays["kernel"], item.record)}
    elif scale is not None:
        kind, record = "pool", enlarged(item.record, scale)
        own["factor"] = int(scale)
    return Measurement(
        record=record,
        task="given",
        operator=kind,
        params=own,
        noise={"kind": "gaussian", "sigma_y": float(sigma_y)},
        y=np.ascontiguousarray(y),
        arrays=arrays,
    )


def canvas_round(kernel: Array, record: ItemRecord) -> dict[str, list[int]]:
    """{"margin": (top, left), "canvas": (H, W)} of all that a kernel's light can come from.

    Half the kernel on every side, and what brings the picture's place and the canvas's size to
    multiples of the network's stride.
    """
    margin = [_stride_up(taps // 2) for taps in kernel.shape]
    canvas = [
        _stride_up(before + size + taps // 2)
        for before, size, taps in zip(margin, record.shape[2:], kernel.shape, strict=True)
    ]
    return {"margin": margin, "canvas": canvas}


def _stride_up(size: int) -> int:
    return -(-size // _CANVAS_STEP_PX) * _CANVAS_STEP_PX


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    rows, columns = sizes
    return int(rows), int(columns)


def measured_pixels(missing: Array, record: ItemRecord) -> Array:
    """A user's mask turned round: (z 1|c h w), True where measured.

    Raises:
        BadInputError: if it does not have the image's size, or leaves no pixel.
    """
    c, z, h, w = record.shape
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {
        (h, w): (1, 1, h, w),
        (1, h, w): (1, 1, h, w),
        (z, h, w): (z, 1, h, w),
        (1, z, h, w): (z, 1, h, w),
    }
    missing = np.asarray(missing) != 0
    if missing.shape in shapes:
        missing = np.broadcast_to(missing.reshape(shapes[missing.shape]), (z, 1, h, w))
    elif missing.shape == (c, z, h, w):
        missing = slices_first(missing)
    else:
        size = " x ".join(str(n) for n in missing.shape)
        own = " x ".join(str(n) for n in ((z, h, w) if z > 1 else (h, w)))
        raise BadInputError(
            f"{record.item_id}: its mask has {size} pixels, the image {own}; "
            "give a mask of the image's size"
        )
    if missing.all():
        raise BadInputError(
            f"{record.item_id}: its mask marks every pixel as missing; white means missing, "
            "black means keep"
        )
    return ~missing


def unit_kernel(kernel: Array, record: ItemRecord) -> Array:
    """A blur kernel as float32 of sum 1.

    Raises:
        BadInputError: if it is no kernel for this image.
    """
    fault = kernel_fault(kernel)
    if fault:
        raise BadInputError(fault)
    kernel = np.asarray(kernel, dtype=np.float64)
    h, w = record.shape[2:]
    if kernel.shape[0] > h or kernel.shape[1] > w:
        raise BadInputError(
            f"{record.item_id}: the kernel of {kernel.shape[0]} x {kernel.shape[1]} is larger than "
            f"the image of {h} x {w}; crop the kernel"
        )
    return (kernel / kernel.sum()).astype(np.float32)


def kernel_fault(kernel: Array) -> str:
    """Why an array can blur no image at all, in a sentence; "" if it can."""
    kernel = np.asarray(kernel)
    size = " x ".join(str(n) for n in kernel.shape)
    if kernel.dtype.kind not in "buif":
        return f"a blur kernel holds real numbers, not {kernel.dtype.name}; save it as such"
    if kernel.ndim != 2 or not kernel.size:
        return f"a blur kernel is 2-D and not empty, not {size or 'none'}"
    num_bad = int(kernel.size - np.count_nonzero(np.isfinite(kernel)))
    if num_bad:
        return f"{num_bad} numbers of the blur kernel are NaN or infinite; replace them first"
    total = kernel.sum(dtype=np.float64)
    if not 0 < total < np.inf:
        return (
            f"the blur kernel's sum is {total:g}, not above 0 and finite: it would leave no light"
        )
    return ""


def enlarged(record: ItemRecord, scale: int) -> ItemRecord:
    """The record of an image `scale` times finer: shape, spacing and affine follow.

    Raises:
        BadInputError: if scale is no whole number of 2 or more.
    """
    if scale != int(scale) or scale < 2:
        raise BadInputError(f"scale must be a whole number of 2 or more, not {scale}")
    c, z, h, w = record.shape
    spacing, affine = record.spacing_mm, record.affine
    if spacing is not None:
        spacing = (spacing[0], spacing[1] / scale, spacing[2] / scale)
    if affine is not None:
        # Pixel (x, y) of the fine grid has its centre at ((x + 1/2) / scale - 1/2, ...) of ours.
        fine = np.diag([1 / scale, 1 / scale, 1.0, 1.0])
        fine[:2, 3] = 0.5 / scale - 0.5
        affine = tuple(tuple(float(v) for v in row) for row in np.array(affine) @ fine)
    shape = (c, z, h * scale, w * scale)
    return replace(record, shape=shape, spacing_mm=spacing, affine=affine)


def problem_of(
    measurement: Measurement, units: Units, condition: str, *, fold_bands: bool = False
) -> Problem:
    """The linear inverse problem of an image-space measurement.

    Args:
        measurement: of one of IMAGE_OPERATORS.
        units: of its network scale.
        condition: of the network.
        fold_bands: one channel a batch element, b = z c (band runs fastest). `to_source` unfolds,
            and `known` is laid out as its images are; facts["num_bands"] says c.
    """
    import torch

    from diffusion_core.noise.likelihood import GaussianNoise
    from diffusion_core.operators import CroppedBlur

    c, z, h, w = measurement.record.shape
    arrays = dict(measurement.arrays)
    known = None
    if measurement.operator == "mask":
        known = torch.from_numpy(np.array(arrays["mask"], dtype=bool))
        if fold_bands:
            arrays["mask"] = np.broadcast_to(arrays["mask"], (z, c, h, w)).reshape(z * c, 1, h, w)
    y = torch.from_numpy(np.array(measurement.y, dtype=np.float32))
    if fold_bands:
        y = y.reshape(z * c, 1, *y.shape[2:])
    operator = operator_of(measurement.operator, measurement.params, arrays, (h, w))
    canvas = operator.blur.shape if isinstance(operator, CroppedBlur) else (h, w)

    def to_source(x: Tensor) -> Tensor:
        if isinstance(operator, CroppedBlur) and tuple(x.shape[-2:]) == canvas:
            x = operator.crop(x)  # data are a picture already
        image = units.to_source(x)
        return image.reshape(-1, c, h, w) if fold_bands else image

    return Problem(
        operator=operator,
        y=y,
        noise=GaussianNoise(float(measurement.noise["sigma_y"])),
        shape=(z * c, 1, *canvas) if fold_bands else (z, c, *canvas),
        reach=operator.reach,
        condition=condition,
        to_source=to_source,
        known=known,
        facts={"num_bands": c if fold_bands else 1},
    )


def require_task(task: Task, domain: str, operators: Sequence[str]) -> None:
    """Refuse a task of another domain or of an operator that the domain cannot measure with.

    Raises:
        BadInputError: naming the task.
    """
    if task.domain != domain:
        raise BadInputError(
            f"task '{task.name}' is for the domain '{task.domain}', not '{domain}'; "
            "choose another task or other images"
        )
    if task.operator not in operators:
        raise BadInputError(
            f"task '{task.name}': the domain '{domain}' has no operator '{task.operator}'; "
            f"choose one of {', '.join(operators)}"
        )
