"""The symmetries of a parallel scan: one stored view serves as many as four.

    A_(180 - theta) x = A_theta (x mirrored left to right)
    A_(90 - theta)  x = A_theta (x transposed)               square images of square pixels

so that of views that divide 180 degrees evenly a half, or a quarter (those up to 45 degrees), is
stored: a quarter of the memory, and of its traffic, since the copies share one reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from domains.ct.geometry import Geometry


@dataclass(frozen=True)
class Fold:
    """How each view of a scan is one of the stored views, of a mirrored or transposed image.

    Attributes:
        stored: numbers of the stored views, increasing.
        num_copies: of the image: 1, 2 (mirrored) or 4 (both, and transposed).
        place: (num_views,) each view's place among the stored ones.
        copy: (num_views,) the copy it sees: bit 0 mirrored, bit 1 then transposed.
    """

    stored: tuple[int, ...]
    num_copies: int
    place: tuple[int, ...]
    copy: tuple[int, ...]

    def copies(self, images: Tensor) -> Tensor:
        """(k h w) -> (k copies h w)."""
        turned = [images]
        if self.num_copies > 1:
            turned.append(images.flip(-1))
        if self.num_copies > 2:
            turned += [image.transpose(-2, -1) for image in tuple(turned)]
        return torch.stack(turned, dim=1)

    def back(self, copies: Tensor) -> Tensor:
        """(k copies h w) -> (k h w): the adjoint of `copies`."""
        total = copies[:, 0]
        if self.num_copies > 1:
            total = total + copies[:, 1].flip(-1)
        if self.num_copies > 2:
            total = total + copies[:, 2].transpose(-2, -1)
            total = total + copies[:, 3].transpose(-2, -1).flip(-1)
        return total


def fold_of(geometry: Geometry) -> Fold:
    """The symmetries that a parallel scan has."""
    half = _views_in(180.0, geometry)
    quarter = _views_in(90.0, geometry)
    square = geometry.height == geometry.width and geometry.pixel_mm[0] == geometry.pixel_mm[1]
    lopsided = geometry.offset_mm != 0 or geometry.angles_degrees is not None
    if half is None or geometry.arc_degrees > 180 or lopsided:
        everything = tuple(range(geometry.num_views))
        return Fold(everything, 1, everything, (0,) * geometry.num_views)
    seen = []
    for view in range(geometry.num_views):
        mirrored = 2 * view > half
        turned = half - view if mirrored else view
        transposed = square and quarter is not None and 2 * turned > quarter
        if transposed and quarter is not None:
            turned = quarter - turned
        seen.append((turned, int(mirrored) + 2 * int(transposed)))
    stored = tuple(sorted({view for view, _ in seen}))
    return Fold(
        stored,
        4 if square and quarter is not None else 2,
        tuple(stored.index(view) for view, _ in seen),
        tuple(copy for _, copy in seen),
    )


def _views_in(degrees: float, geometry: Geometry) -> int | None:
    """How many steps of a scan make an angle; None if that is no whole number."""
    steps = degrees * geometry.num_views / geometry.arc_degrees
    return round(steps) if abs(steps - round(steps)) < 1e-9 * geometry.num_views else None
