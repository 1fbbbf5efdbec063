"""Projectors in mm: parallel beam, folded by its symmetries, and fan beam."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from diffusion_core.operators import Projector, Sparse
from diffusion_core.operators.projector import Side
from domains.ct.fold import fold_of
from domains.ct.geometry import FanGeometry, Geometry
from domains.ct.matrices import matrix_pair


@final
class ParallelBeam(Projector):
    """scale times the line integrals of an image: y is (b, c, views, bins), mm times x's unit.

    Attributes:
        geometry: of pixels and detector.
        fold: which views are stored, and how the others follow from them.
        stored: the matrix of the stored views.
    """

    kind: ClassVar[str] = "parallel-beam"

    def __init__(self, geometry: Geometry, scale: float = 1.0) -> None:
        """Takes the matrix from the cache, or builds it (seconds) and leaves it there."""
        self.geometry = geometry
        self.fold = fold_of(geometry)
        self.image_shape = (geometry.height, geometry.width)
        self.data_shape = (geometry.num_views, geometry.num_bins)
        self.scale = scale
        rows = (len(self.fold.stored), geometry.num_bins)
        self.stored = Sparse(*matrix_pair(geometry, self.fold.stored), self.image_shape, rows)

    @property
    def num_bytes(self) -> int:
        """Of both matrices, on disk and in the page cache; shared by the processes of a node."""
        sides = self.stored.matrix, self.stored.transpose
        return sum(s.data.nbytes + s.indices.nbytes + s.indptr.nbytes for s in sides)

    def product(self, side: Side, rows: Tensor) -> Tensor:
        """See Projector: the copies of one image at a time, whose rounding no batch can change."""
        one = self._project if side == 0 else self._backproject
        return torch.stack([one(row) for row in rows])

    def _project(self, image: Tensor) -> Tensor:
        copies = self.fold.copies(image.reshape(1, *self.image_shape))[0]
        seen = self._multiply(0, copies.flatten(1))
        views = seen.reshape(self.fold.num_copies, *self.stored.data_shape)
        return views[list(self.fold.copy), list(self.fold.place)].flatten()

    def _backproject(self, data: Tensor) -> Tensor:
        views = data.new_zeros(self.fold.num_copies, *self.stored.data_shape)
        views[list(self.fold.copy), list(self.fold.place)] = data.reshape(self.data_shape)
        copies = self._multiply(1, views.flatten(1))
        return self.fold.back(copies.reshape(1, self.fold.num_copies, *self.image_shape)).flatten()

    def _multiply(self, side: Side, rows: Tensor) -> Tensor:
        multiply = self.stored.product if self.fold.num_copies == 1 else self.stored.together
        return multiply(side, rows)


@final
class FanBeam(Sparse):
    """scale times the line integrals of an image along a fan of rays onto a flat detector.

    Attributes:
        geometry: of pixels, source and detector.
    """

    kind: ClassVar[str] = "fan-beam"

    def __init__(self, geometry: FanGeometry, scale: float = 1.0) -> None:
        """Takes the matrix from the cache, or builds it (seconds) and leaves it there."""
        matrix, transpose = matrix_pair(geometry, range(geometry.num_views))
        shape = (geometry.height, geometry.width)
        data_shape = (geometry.num_views, geometry.num_bins)
        super().__init__(matrix, transpose, shape, data_shape, scale)
        self.geometry = geometry


def beam_of(geometry: Geometry, scale: float = 1.0) -> ParallelBeam | FanBeam:
    """The projector of a geometry."""
    if isinstance(geometry, FanGeometry):
        return FanBeam(geometry, scale)
    return ParallelBeam(geometry, scale)
