"""Where the pixels, the views and the detector are, in mm about the centre of rotation.

Pixel (row i, column j) has its centre at x = (j - (w - 1) / 2) dx, y = (i - (h - 1) / 2) dy.

    parallel   a ray of the view at angle theta is at s = x cos theta + y sin theta
    fan        the source stands source_mm from the centre, a flat detector detector_mm from the
               source; with s as above and r = y cos theta - x sin theta along the central ray, the
               pixel is seen at t = detector_mm s / (source_mm + r)

A fan whose source recedes becomes the parallel beam of the same angle.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field

import numpy as np

from domains.base import Array, BadInputError

_LATER = {"angles_degrees": None, "offset_mm": 0.0}

PROJECTOR_VERSION = 1
"""Part of the cache key: raise it when the entries of the matrix change."""


@dataclass(frozen=True)
class Geometry:
    """What parallel and fan beams share.

    Attributes:
        height: of the image, pixels.
        width: of the image, pixels.
        pixel_mm: (dy, dx).
        num_views: number of angles.
        arc_degrees: they divide this arc evenly, its end excluded: theta_i = i arc / num_views.
        num_bins: of the detector, centred about its middle.
        bin_mm: width of a bin.
        angles_degrees: of each view, where a real scan's do not divide an arc evenly from 0.
        offset_mm: of the detector's middle from the ray through the centre of rotation.
    """

    height: int
    width: int
    pixel_mm: tuple[float, float]
    num_views: int
    arc_degrees: float
    num_bins: int
    bin_mm: float
    angles_degrees: tuple[float, ...] | None = field(default=None, kw_only=True)
    offset_mm: float = field(default=0.0, kw_only=True)

    def angle(self, view: int) -> float:
        """Radians of a view, which may lie beyond the arc."""
        if self.angles_degrees is not None:
            return math.radians(self.angles_degrees[view])
        return math.radians(self.arc_degrees * view / self.num_views)

    @property
    def angles(self) -> Array:
        """Radians, (num_views,)."""
        return np.array([self.angle(view) for view in range(self.num_views)])

    @property
    def bin_centres_mm(self) -> Array:
        """Detector coordinate of each bin's centre, (num_bins,)."""
        return (np.arange(self.num_bins) - (self.num_bins - 1) / 2) * self.bin_mm + self.offset_mm

    @property
    def left_mm(self) -> float:
        """Detector coordinate of the first bin's outer edge."""
        return self.offset_mm - self.num_bins * self.bin_mm / 2

    @property
    def digest(self) -> str:
        """Names the matrix in the cache."""
        values = asdict(self)
        for name in _LATER:  # matrices made before there were such scans keep their names
            if values[name] == _LATER[name]:
                del values[name]
        text = json.dumps({"version": PROJECTOR_VERSION, **values}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class ParallelGeometry(Geometry):
    """Parallel rays; see Geometry."""

    @classmethod
    def covering(
        cls,
        height: int,
        width: int,
        pixel_mm: tuple[float, float],
        num_views: int,
        arc_degrees: float,
    ) -> ParallelGeometry:
        """The detector covers the image's diagonal with bins as wide as the (smaller) spacing."""
        bin_mm = min(pixel_mm)
        diagonal_mm = math.hypot(height * pixel_mm[0], width * pixel_mm[1])
        num_bins = math.ceil(diagonal_mm / bin_mm)
        return cls(height, width, pixel_mm, num_views, arc_degrees, num_bins, bin_mm)


@dataclass(frozen=True)
class FanGeometry(Geometry):
    """A point source and a flat detector, equal bins; see Geometry.

    Attributes:
        source_mm: from the source to the centre of rotation.
        detector_mm: from the source to the detector.
    """

    source_mm: float
    detector_mm: float

    @classmethod
    def covering(
        cls,
        height: int,
        width: int,
        pixel_mm: tuple[float, float],
        num_views: int,
        arc_degrees: float,
        source_mm: float,
        detector_mm: float,
    ) -> FanGeometry:
        """The detector covers the image's diagonal; a bin is as wide as a pixel's shadow.

        Raises:
            BadInputError: if the source or the detector would be inside the image.
        """
        radius = math.hypot(height * pixel_mm[0], width * pixel_mm[1]) / 2
        if source_mm <= radius or detector_mm < source_mm + radius:
            raise BadInputError(
                f"a source {source_mm:g} mm from the centre and a detector {detector_mm:g} mm from "
                f"the source do not clear an image of radius {radius:.1f} mm; move them out"
            )
        bin_mm = min(pixel_mm) * detector_mm / source_mm
        edge_mm = detector_mm * math.tan(math.asin(radius / source_mm))
        num_bins = math.ceil(2 * edge_mm / bin_mm)
        size = (height, width, pixel_mm, num_views, arc_degrees, num_bins, bin_mm)
        return cls(*size, source_mm, detector_mm)
