"""CT as training material: views of volumes, and scans of patches for distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import Item
from domains.patches import Measured, chosen, drawn
from domains.views import orientations

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, Any]

_PER_MM = 0.03
"""Line integral of one network unit over one mm: mu = .03 (x + 1) per mm."""


def training_windows(item: Item) -> Mapping[str, Sequence[Array]]:
    """{"ct": views (1 z h w)}: HU -1000..2000 to [-1, 1], not clipped above, air padding at -1024.

    Scanners pad outside the field of view with -2000 or so: that is no anatomy.
    """
    hu = np.maximum(item.pixels.astype(np.float32), -1024)
    return {"ct": orientations((hu + 1000) / 1500 - 1, item.record.spacing_mm)}


def scan_patch(x0: Tensor, params: Mapping[str, Any], rng: np.random.Generator) -> Measured:
    """Scan a patch by parallel rays over 180 degrees, as if nothing were around it.

    As many views cover a patch of 96 pixels as densely as 2.7 times as many cover 256. Rays are
    shorter in a patch than in a body, so that counts_per_ray stands for what the body around it
    leaves of them.

    Args:
        x0: (1 1 h w) in network units.
        params: num_views (one or a list), pixel_mm, counts_per_ray (numbers or pairs).
        rng: of the draw and the noise.

    Returns:
        A, y and the likelihood, as CT.problem has them.

    Raises:
        BadInputError: if a parameter cannot be used.
    """
    import torch

    from diffusion_core.noise.likelihood import PoissonTransmission
    from domains.ct.geometry import ParallelGeometry
    from domains.ct.operators import ParallelBeam

    h, w = x0.shape[2:]
    num_views = chosen(params, "num_views", rng)
    pixel_mm = drawn(params, "pixel_mm", rng)
    counts = drawn(params, "counts_per_ray", rng)
    geometry = ParallelGeometry.covering(h, w, (1.0, 1.0), num_views, 180.0)
    # One matrix serves all pixel sizes: lengths scale with them.
    operator = ParallelBeam(geometry, _PER_MM * pixel_mm)
    clean = operator.A(x0)
    noise = PoissonTransmission(counts, operator.A(torch.ones_like(x0)))
    n = torch.from_numpy(rng.standard_normal(tuple(clean.shape)).astype(np.float32))
    return operator, clean + noise.variance(clean).sqrt() * n, noise
