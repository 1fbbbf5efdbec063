"""Classical CT: filtered backprojection (and non-local means after it), SIRT, total variation.

All work on u = x + 1 = mu / (.03 per mm), which is 0 in air, so that the sinogram is that of the
body alone: line integrals p = A u = y + A 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from skimage.restoration import denoise_nl_means
from torch import Tensor

from diffusion_core.operators import Compose, Mask, Projector
from diffusion_core.protocols import Data, LinearOperator, Signal
from domains.base import BadInputError, Baseline, Measurement, Problem
from domains.between_slices import cubic_z, linear_z
from domains.classical import TVSettings, restore_tv, settings_from
from domains.ct.geometry import Geometry
from domains.ct.operators import ParallelBeam
from domains.ct.unmeasured import interpolated

Window = Literal["ramp", "hann", "cosine", "shepp-logan"]


@dataclass(frozen=True)
class FBPSettings:
    """The filter of filtered backprojection.

    Attributes:
        window: over the ramp.
        cutoff: where the window ends, as a share of the Nyquist frequency, 0 to 1.
    """

    window: Window = "hann"
    cutoff: float = 1.0


@dataclass(frozen=True)
class FBPThenNLMSettings:
    """Filtered backprojection, then non-local means.

    Attributes:
        window: over the ramp.
        cutoff: as a share of the Nyquist frequency.
        strength: cut-off of the patch distance, network units (1 is 1500 HU).
        patch_size: pixels.
        patch_distance: how far patches are looked for, pixels.
    """

    window: Window = "hann"
    cutoff: float = 1.0
    strength: float = 0.03
    patch_size: int = 5
    patch_distance: int = 6


@dataclass(frozen=True)
class SIRTSettings:
    """The effort of SIRT, which is its regularisation too.

    Attributes:
        num_iterations: early stopping keeps the noise down.
        nonnegative: no attenuation below 0.
        momentum: Nesterov's: k steps go about as far as k^2 / 4 plain ones.
    """

    num_iterations: int = 30
    nonnegative: bool = True
    momentum: bool = True


def fbp(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Filtered backprojection: {window, cutoff}."""
    del measurement
    settings = settings_from(FBPSettings, params, "fbp")
    operator = projector_of(problem)
    return filtered_backprojection(operator, filled_line_integrals(problem), settings) - 1


def fbp_nlm(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Filtered backprojection cleaned by non-local means: FBPThenNLMSettings.

    Source: Buades et al. 2005, doi:10.1109/CVPR.2005.38.
    """
    settings = settings_from(FBPThenNLMSettings, params, "fbp-nlm")
    image = fbp(measurement, problem, {"window": settings.window, "cutoff": settings.cutoff})
    cleaned = [
        denoise_nl_means(
            plane[0],
            patch_size=settings.patch_size,
            patch_distance=settings.patch_distance,
            h=settings.strength,
            fast_mode=True,
        )
        for plane in image.numpy()
    ]
    return torch.from_numpy(np.stack(cleaned))[:, None].to(image.dtype)


def sirt(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Simultaneous iterative reconstruction: {num_iterations, nonnegative, momentum}.

    u <- u + C A' R (p - A u) with R, C the inverse row and column sums of A, from u = 0.
    Source: Gregor & Benson 2008, doi:10.1109/TMI.2008.923696; momentum as in FISTA.
    """
    del measurement
    settings = settings_from(SIRTSettings, params, "sirt")
    any_projector_of(problem)
    operator, p = problem.operator, line_integrals(problem)
    like = torch.ones(1, *problem.shape[1:])
    row_weights = _inverse(operator.A(like))
    column_weights = _inverse(operator.A_adjoint(torch.ones_like(row_weights)))
    u = torch.zeros(problem.shape)
    ahead, momentum = u, 1.0
    for _ in range(settings.num_iterations):
        before = u
        u = ahead + column_weights * operator.A_adjoint(row_weights * (p - operator.A(ahead)))
        if settings.nonnegative:
            u = u.clamp_min(0.0)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        beta = (momentum - 1) / following if settings.momentum else 0.0
        ahead, momentum = u + beta * (u - before), following
    return u - 1


def tv(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Total variation, each ray weighted by its counts: TVSettings. From a soft backprojection."""
    del measurement
    settings = settings_from(TVSettings, params, "tv")
    operator = _unmasked(problem.operator)
    if isinstance(operator, ParallelBeam):
        soft = FBPSettings(window="hann", cutoff=0.7)
        start = filtered_backprojection(operator, filled_line_integrals(problem), soft) - 1
    else:
        start = problem.operator.A_adjoint(problem.y)
    return restore_tv(problem, start, settings)


BASELINES: Mapping[str, Baseline] = {
    "fbp": fbp,
    "fbp-nlm": fbp_nlm,
    "sirt": sirt,
    "tv": tv,
    "linear-z": linear_z,
    "cubic-z": cubic_z,
}


def any_projector_of(problem: Problem) -> Projector:
    """The projector of a sinogram problem, without the mask of what is known.

    Raises:
        BadInputError: if the measurement is no sinogram.
    """
    operator = _unmasked(problem.operator)
    if not isinstance(operator, Projector):
        raise BadInputError(
            "filtered backprojection and SIRT need a sinogram; for damaged slices choose tv"
        )
    return operator


def mask_of(problem: Problem) -> Mask | None:
    """What is known of the sinogram; None where all is."""
    operator = problem.operator
    if isinstance(operator, Compose) and isinstance(operator.outer, Mask):
        return operator.outer
    return None


def _unmasked(operator: LinearOperator) -> LinearOperator:
    return operator.inner if isinstance(operator, Compose) else operator


def projector_of(problem: Problem) -> ParallelBeam:
    """The parallel-beam projector of a sinogram problem.

    Raises:
        BadInputError: if the measurement is no sinogram, or a fan's.
    """
    operator = any_projector_of(problem)
    if not isinstance(operator, ParallelBeam):
        raise BadInputError(
            "filtered backprojection is of parallel beams; for a fan choose sirt or tv"
        )
    return operator


def line_integrals(problem: Problem) -> Data:
    """The measured line integrals of attenuation, (b 1 views bins): 0 through air, or unknown."""
    return problem.y + problem.operator.A(torch.ones(1, *problem.shape[1:]))


def filled_line_integrals(problem: Problem) -> Data:
    """Those, with straight lines over what is unknown: backprojection wants all of them."""
    p = line_integrals(problem)
    known = mask_of(problem)
    return p if known is None else torch.from_numpy(interpolated(p.numpy(), known.mask.numpy()))


def filtered_backprojection(operator: ParallelBeam, p: Data, settings: FBPSettings) -> Signal:
    """The image u whose line integrals are p = A u, by the inverse Radon transform.

        u(x, y) = (arc / views) sum over views of (p * h)(x cos theta + y sin theta)

    A' spreads a bin's value over the pixels it sees, times dx dy / bin width: the interpolation of
    the backprojection is by the pixels' footprints.

    Args:
        operator: A.
        p: (b c views bins).
        settings: of the filter.
    Returns:
        (b c h w), not clipped.
    Source: Kak & Slaney 1988, chapter 3.
    """
    geometry = operator.geometry
    filtered = apply_filter(p, geometry, settings)
    pixel_area = geometry.pixel_mm[0] * geometry.pixel_mm[1]
    view_angle = math.radians(geometry.arc_degrees) / geometry.num_views
    # A' and p carry the operator's scale once each.
    factor = view_angle * geometry.bin_mm / (pixel_area * operator.scale**2)
    if geometry.arc_degrees > 180:
        factor *= 180 / geometry.arc_degrees  # every line is seen more than once
    return operator.A_adjoint(filtered) * factor


def apply_filter(p: Data, geometry: Geometry, settings: FBPSettings) -> Data:
    """Convolve each view with the windowed ramp, per mm; views are padded to twice their length."""
    length = 2 ** math.ceil(math.log2(2 * geometry.num_bins))
    transfer = ramp_filter(length, geometry.bin_mm) * window_of(length, settings)
    spectrum = torch.fft.rfft(p, n=length) * torch.from_numpy(transfer).to(p.dtype)
    return torch.fft.irfft(spectrum, n=length)[..., : geometry.num_bins]


def ramp_filter(length: int, bin_mm: float) -> np.ndarray[Any, Any]:
    """|frequency| band-limited to the bins, as rfft of its samples in space (Kak & Slaney, eq. 61).

    Sampling |f| in frequency instead would set its value at 0 to 0, and darken the image.
    """
    n = np.minimum(np.arange(length), length - np.arange(length))
    kernel = np.zeros(length)
    kernel[0] = 1 / (4 * bin_mm**2)
    odd = n % 2 == 1
    kernel[odd] = -1 / (np.pi * n[odd] * bin_mm) ** 2
    return np.fft.rfft(kernel).real * bin_mm


def window_of(length: int, settings: FBPSettings) -> np.ndarray[Any, Any]:
    """The window on the frequencies of an rfft of `length`."""
    share = np.fft.rfftfreq(length) / 0.5 / settings.cutoff
    inside = np.minimum(share, 1.0)
    shapes = {
        "ramp": np.ones_like(inside),
        "hann": 0.5 + 0.5 * np.cos(np.pi * inside),
        "cosine": np.cos(np.pi / 2 * inside),
        "shepp-logan": np.sinc(inside / 2),
    }
    if settings.window not in shapes:
        raise BadInputError(
            f"unknown window '{settings.window}' of fbp: choose one of {', '.join(shapes)}"
        )
    return shapes[settings.window] * (share <= 1)


def _inverse(sums: Tensor) -> Tensor:
    """1 / sums; 0 where nothing is summed."""
    return torch.where(sums > 0, 1 / sums.clamp_min(torch.finfo(sums.dtype).tiny), 0.0)
