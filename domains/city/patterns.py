"""Missing pixels as satellites have them: Landsat-7's wedges, and clouds.

Each is a function (height, width, share, rng) -> (h w), True where pixels are missing.
"""

from __future__ import annotations

import math

import numpy as np

from domains.base import Array

PERIOD_PX = 33.0
"""Lines from one wedge to the next at one edge: two scans of 16 detectors, which ran forth and
back."""

WHOLE = 22.0 / 183.0
"""Share of the swath about its middle where scans still touch: 22 of 183 km."""

HEADING_DEGREES = (6.0, 14.0)
"""Of the scan lines against the rows of a picture whose north is up."""

CLOUD_SLOPE = 8.0 / 3.0
"""Power of a field falls with the frequency to this: 5/3 along any line."""


def slc_off(height: int, width: int, share: float, rng: np.random.Generator) -> Array:
    """What Landsat-7 misses since its scan line corrector failed: wedges from the middle outwards.

    Without the corrector the scans zigzag over the ground: forth and back they part at one edge of
    the swath and overlap at the other, so that gaps lie at either edge in turn and close towards
    the middle. The picture is taken for a whole swath; direction and phase are drawn.

    Source: Storey, Scaramuzza, Schmidt & Barsi 2005, "Landsat 7 scan line corrector-off gap-filled
        product development" (22% of a scene; gaps of 14 pixels at its edges).
    """
    angle = math.radians(rng.uniform(*HEADING_DEGREES)) * rng.choice([-1, 1])
    phase = rng.uniform(0, PERIOD_PX)
    rows, columns = np.mgrid[:height, :width] + 0.5
    rows, columns = rows - height / 2, columns - width / 2
    along = (columns * math.cos(angle) + rows * math.sin(angle)) / (width / 2)
    across = rows * math.cos(angle) - columns * math.sin(angle) + phase
    # Of the half-swath WHOLE is whole, so that the gaps' mean is half their most of the rest.
    most = 2 * share * PERIOD_PX / (1 - WHOLE)
    gap = most * np.clip((np.abs(along) - WHOLE) / (1 - WHOLE), 0, 1)
    place = np.where(along < 0, across, across + PERIOD_PX / 2) % PERIOD_PX
    missing: Array = np.abs(place - PERIOD_PX / 2) < gap / 2
    return missing


def clouds(height: int, width: int, share: float, rng: np.random.Generator) -> Array:
    """Clouds over exactly this share: where a fractal field is highest.

    Large, irregular, frayed at the border.
    """
    # Drawn on twice the picture: what is cut out is not periodic.
    field = fractal_field((2 * height, 2 * width), rng)[:height, :width]
    missing = np.zeros(height * width, bool)
    missing[np.argsort(field, axis=None)[::-1][: round(share * height * width)]] = True
    return missing.reshape(height, width)


def fractal_field(size: tuple[int, int], rng: np.random.Generator) -> Array:
    """A periodic Gaussian field (h w) whose power falls as frequency^-CLOUD_SLOPE; mean 0.

    Source: spectral synthesis of fractal fields (Voss 1985); 5/3 as Davis, Marshak, Cahalan &
        Wiscombe 1997 (J. Atmos. Sci. 54, 241) find along clouds seen by Landsat.
    """
    fy, fx = np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal(size)) * frequency ** (-CLOUD_SLOPE / 2)
    spectrum[0, 0] = 0
    return np.asarray(np.fft.irfft2(spectrum, s=size))
