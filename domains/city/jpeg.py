"""Pictures that JPEG spoilt, restored from what their file says: its coefficients and its steps.

A file tells of each coefficient in which interval of one step it lies (jpeg_file.py), of each
colour how many pixels share a sample, and no more; decoded pixels are one choice among many. `y` of
the measurement are the integers of the file, (z m) int16, or (z c m) of bands that are no colours;
`params` hold tables, sampling, size and orientation.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import Array, BadInputError, Item, Measurement, Problem, Task
from domains.city import exif
from domains.city.jpeg_file import Component, JPEGError, JPEGFile, read_coefficients
from domains.imaging import Units, slices_first
from domains.keyed import pixel_digest

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_core.operators import JPEGBlocks

KIND = "jpeg"
OPERATOR = "jpeg-blocks"
LEAST_STD = 0.29
"""Grey levels of 255: what rounding to steps of 1 leaves."""
_LOWEST = [0, 1, 8, 16, 9, 2, 3, 10, 17, 24]
"""Row * 8 + column of the ten lowest frequencies."""


def simulate(item: Item, units: Units, task: Task, seed: int) -> Measurement:
    """Code a clean image with libjpeg (through Pillow), in 8 bits; bands that are no colours alone.

    Operator parameters: quality, 1 to 95; subsampling, "4:4:4", "4:2:2" or "4:2:0".

    Raises:
        BadInputError: for another operator or quality.
    """
    params = dict(task.operator_params)
    quality, subsampling = int(params["quality"]), str(params["subsampling"])
    if task.operator != OPERATOR or not 1 <= quality <= 95:
        raise BadInputError(
            f"task '{task.name}': JPEG goes with the operator {OPERATOR} and a quality of 1 to 95, "
            f"not with {task.operator} and {quality}"
        )
    unit = (slices_first(units.to_network(item.pixels)) + 1) / 2
    levels = np.rint(255 * np.clip(unit, 0, 1)).astype(np.uint8)
    colours = levels.shape[1] in {1, 3}
    files = [
        [_coded(part, quality, subsampling) for part in ([image] if colours else image[:, None])]
        for image in levels
    ]
    y = np.stack([np.stack([_flat(file) for file in bands]) for bands in files])
    return Measurement(
        record=item.record,
        task=task.name,
        operator=OPERATOR,
        params={**params, **_params_of(files[0][0], 1)},
        noise=_noise_of(files[0][0]),
        y=y[:, 0] if colours else y,
        truth_digest=pixel_digest(item.pixels),
        seed=seed,
    )


def given(item: Item, source: Path) -> Measurement:
    """A user's JPEG file.

    Raises:
        BadInputError: if the picture was no JPEG file, or its coefficients cannot be read.
    """
    if item.record.source_format != "jpeg":
        raise BadInputError(
            f"{item.record.item_id}: it is no JPEG file: which steps it was coded with cannot be "
            "read; give the JPEG itself, or --sigma-y"
        )
    try:
        file = read_coefficients(source.read_bytes())
    except JPEGError as error:
        raise BadInputError(
            f"{source}: its JPEG coefficients cannot be read ({error}); save it as PNG and give "
            "--sigma-y"
        ) from error
    orientation = int(item.record.meta.get("orientation", 1))
    turned = orientation in _TRANSPOSING
    size = file.size[::-1] if turned else file.size
    if (len(file.components), *size) != (item.record.shape[0], *item.record.shape[2:]):
        raise BadInputError(
            f"{source}: its JPEG data are not of the picture's size; save it as PNG and give "
            "--sigma-y"
        )
    params = _params_of(file, orientation)
    return Measurement(
        record=item.record,
        task="given",
        operator=OPERATOR,
        params=params,
        noise=_noise_of(file),
        y=_flat(file)[None],
    )


def problem_of(measurement: Measurement, units: Units) -> Problem:
    """Linear data with rounding noise; bands that are no colours are folded into the batch."""
    import torch

    from diffusion_core.noise.likelihood import GaussianNoise
    from domains.city.domain import condition_of

    c, z, _, _ = measurement.record.shape
    condition, fold = condition_of(measurement.record)
    operator = operator_of(measurement.params)
    integers = torch.from_numpy(np.array(measurement.y, np.float32)).flatten(0, -2)
    y = operator.data_of(integers)
    orientation = int(measurement.params["orientation"])
    height, width = operator.shape

    def to_source(x: Tensor) -> Tensor:
        image = units.to_source(x).reshape(-1, c, *x.shape[-2:])
        if orientation == 1:
            return image
        turned = exif.upright(image.permute(2, 3, 0, 1).numpy(), orientation)
        return torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 3, 0, 1)

    return Problem(
        operator=operator,
        y=y,
        noise=GaussianNoise(operator.rounding_std(y)),
        shape=(z * c, 1, height, width) if fold else (z, c, height, width),
        reach="plane",
        condition=condition,
        to_source=to_source,
        facts={"num_bands": c if fold else 1},
    )


def operator_of(params: Mapping[str, Any]) -> JPEGBlocks:
    """The operator of a file, on its picture as it is stored (not turned)."""
    import torch

    from diffusion_core.operators import JPEGBlocks

    steps = [torch.tensor(table, dtype=torch.float64) for table in params["tables"]]
    factors = [(int(rows), int(columns)) for rows, columns in params["factors"]]
    height, width = params["size"]
    return JPEGBlocks(steps, factors, (int(height), int(width)), is_ycc=bool(params["is_ycc"]))


def artefact_std(file: JPEGFile) -> float:
    """How strong a file's artefacts are, grey levels of 255, by its table for brightness alone.

    Root mean square of the error within a step, over the lowest frequencies: higher ones are
    mostly 0 in picture and file alike. A decoded picture errs half as much where it is flat; the
    network, which is told white noise, does best at about this level (infra/decisions/0026).
    """
    first = file.components[0].table.reshape(64)[_LOWEST].astype(np.float64)
    return float(max(np.sqrt((first**2).mean() / 12), LEAST_STD))


def _coded(image: Array, quality: int, subsampling: str) -> JPEGFile:
    """An image (c h w) of 8 bits as a JPEG file holds it."""
    from PIL import Image

    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0).copy())
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return read_coefficients(buffer.getvalue())


def _flat(file: JPEGFile) -> Array:
    """All integers of a file (m), one component after the other."""
    return np.concatenate([component.coefficients.ravel() for component in file.components])


def _params_of(file: JPEGFile, orientation: int) -> dict[str, Any]:
    """What rebuilds the operator.

    Raises:
        BadInputError: if pixels do not share samples in whole numbers.
    """
    return {
        "tables": [component.table.tolist() for component in file.components],
        "factors": _factors(file.components),
        "size": list(file.size),
        "is_ycc": file.is_ycc,
        "orientation": orientation,
    }


def _factors(components: Sequence[Component]) -> list[list[int]]:
    across = max(component.sampling[0] for component in components)
    down = max(component.sampling[1] for component in components)
    if any(across % c.sampling[0] or down % c.sampling[1] for c in components):
        raise BadInputError(
            "its JPEG samples are not shared by whole numbers of pixels; save it as PNG and give "
            "--sigma-y"
        )
    return [[down // c.sampling[1], across // c.sampling[0]] for c in components]


def _noise_of(file: JPEGFile) -> dict[str, Any]:
    return {"kind": KIND, "sigma_y": artefact_std(file) / 127.5}


_TRANSPOSING = frozenset({5, 6, 7, 8})
"""Orientations whose upright picture is as wide as the file's is tall."""
