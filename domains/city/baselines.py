"""Classical restoration of photographs: fills, interpolation, deconvolution, total variation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.operators import (
    Blur,
    CroppedBlur,
    Downsample,
    Identity,
    JPEGBlocks,
    Mask,
    Mosaic,
    Operator,
    Pool,
    VaryingBlur,
)
from diffusion_core.protocols import Signal
from domains.base import Array, BadInputError, Baseline, Measurement, Problem
from domains.between_slices import cubic_z, linear_z
from domains.city.brightening import anscombe_nlm, clahe, gamma, inversion
from domains.classical import TVSettings, restore_tv, settings_from
from domains.inpainting import biharmonic, smoothing_spline
from domains.nlm import nlm

Kinds = type[Operator] | tuple[type[Operator], ...]
Fill = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class BiharmonicSettings:
    """How a biharmonic fill treats the known pixels.

    Attributes:
        smoothing: 0 keeps them exactly; above, noise in them is smoothed (pixels^4).
    """

    smoothing: float = 0.0


@dataclass(frozen=True)
class MarchingSettings:
    """Fills that march inwards from the border of a hole.

    Attributes:
        radius_px: of the neighbourhood that a pixel is filled from.
    """

    radius_px: float = 3.0


@dataclass(frozen=True)
class WienerSettings:
    """Linear deconvolution.

    Attributes:
        balance: weight of the squared Laplacian against the data.
    """

    balance: float = 0.01


@dataclass(frozen=True)
class RichardsonLucySettings:
    """Multiplicative deconvolution.

    Attributes:
        num_iterations: early stopping keeps the noise down.
    """

    num_iterations: int = 20


def biharmonic_fill(
    measurement: Measurement, problem: Problem, params: Mapping[str, Any]
) -> Tensor:
    """The biharmonic equation in the holes: {smoothing}."""
    del measurement
    settings = settings_from(BiharmonicSettings, params, "biharmonic")

    def fill(image: Array, known: Array) -> Array:
        if settings.smoothing > 0:
            return smoothing_spline(image, known, settings.smoothing)
        return biharmonic(image, known)

    return _fill_holes(problem, fill)


def telea(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Fast marching (Telea 2004): {radius_px}."""
    del measurement
    settings = settings_from(MarchingSettings, params, "telea")
    return _fill_holes(problem, _marching_fill(cv2.INPAINT_TELEA, settings))


def navier_stokes(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Isophotes carried into the hole (Bertalmio et al. 2001): {radius_px}."""
    del measurement
    settings = settings_from(MarchingSettings, params, "navier-stokes")
    return _fill_holes(problem, _marching_fill(cv2.INPAINT_NS, settings))


def bicubic(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Bicubic interpolation of a coarser image. No parameters."""
    del measurement, params
    operator: Pool | Downsample = _operator(problem, (Pool, Downsample), "bicubic")
    return _enlarge(problem, operator.factor)


def bilinear(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Bilinear demosaicing: the mean of a colour's nearest neighbours. No parameters."""
    del measurement, params
    return _demosaic(problem)


def wiener(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Deconvolution with a squared Laplacian as prior (Hunt 1973): {balance}."""
    del measurement
    settings = settings_from(WienerSettings, params, "wiener")
    operator: Blur | CroppedBlur = _operator(problem, (Blur, CroppedBlur), "wiener")
    transfer = operator.blur.transfer if isinstance(operator, CroppedBlur) else operator.transfer
    h, w = problem.shape[-2:]
    fy, fx = torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w)[None]
    laplacian = 4 - 2 * torch.cos(2 * torch.pi * fy) - 2 * torch.cos(2 * torch.pi * fx)
    gain = transfer.conj() / (transfer.abs() ** 2 + settings.balance * laplacian**2)
    return torch.fft.irfft2(torch.fft.rfft2(_blurred(problem)) * gain, s=(h, w))


def richardson_lucy(
    measurement: Measurement, problem: Problem, params: Mapping[str, Any]
) -> Tensor:
    """Richardson-Lucy on intensities (x + 1) / 2, kept positive: {num_iterations}."""
    del measurement
    settings = settings_from(RichardsonLucySettings, params, "richardson-lucy")
    operator = _operator(problem, (Blur, CroppedBlur, VaryingBlur), "richardson-lucy")
    darkest = 1e-3
    data = ((problem.y + 1) / 2).clamp_min(darkest)
    shares = operator.A_adjoint(torch.ones_like(data)).clamp_min(darkest)
    estimate = ((_blurred(problem) + 1) / 2).clamp_min(darkest)
    for _ in range(settings.num_iterations):
        ratio = data / operator.A(estimate).clamp_min(darkest)
        estimate = (estimate * operator.A_adjoint(ratio) / shares).clamp_min(0.0)
    return 2 * estimate - 1


def tv(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Total variation: TVSettings. Holes start from their biharmonic fill."""
    del measurement
    settings = settings_from(TVSettings, params, "tv")
    return restore_tv(problem, _first_estimate(problem), settings)


def decoded(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """A JPEG file as a decoder shows it. No parameters."""
    del measurement, params
    operator: JPEGBlocks = _operator(problem, JPEGBlocks, "decoded")
    return operator.decoded(problem.y)


def decoded_nlm(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Non-local means of the decoded picture, its artefacts taken for noise: NLMSettings."""
    return nlm(measurement, _decoded_problem(measurement, problem, "decoded-nlm"), params)


def decoded_tv(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Total variation of the decoded picture, its artefacts taken for noise: TVSettings."""
    return tv(measurement, _decoded_problem(measurement, problem, "decoded-tv"), params)


BASELINES: Mapping[str, Baseline] = {
    "biharmonic": biharmonic_fill,
    "telea": telea,
    "navier-stokes": navier_stokes,
    "bicubic": bicubic,
    "bilinear": bilinear,
    "wiener": wiener,
    "richardson-lucy": richardson_lucy,
    "nlm": nlm,
    "tv": tv,
    "decoded": decoded,
    "decoded-nlm": decoded_nlm,
    "decoded-tv": decoded_tv,
    "inversion": inversion,
    "gamma": gamma,
    "clahe": clahe,
    "anscombe-nlm": anscombe_nlm,
    "linear-z": linear_z,
    "cubic-z": cubic_z,
}


def _first_estimate(problem: Problem) -> Signal:
    """Something smooth near the data, from which total variation starts."""
    if isinstance(problem.operator, Mask):
        return _fill_holes(problem, biharmonic)
    if isinstance(problem.operator, Mosaic):
        return _demosaic(problem)
    if isinstance(problem.operator, Pool | Downsample):
        return _enlarge(problem, problem.operator.factor)
    if isinstance(problem.operator, JPEGBlocks):
        return problem.operator.decoded(problem.y)
    return _blurred(problem)


def _decoded_problem(measurement: Measurement, problem: Problem, method: str) -> Problem:
    """Denoising of a decoded JPEG file, of noise as strong as its artefacts."""
    operator: JPEGBlocks = _operator(problem, JPEGBlocks, method)
    noise = GaussianNoise(float(measurement.noise["sigma_y"]))
    return replace(problem, operator=Identity(), y=operator.decoded(problem.y), noise=noise)


def _blurred(problem: Problem) -> Signal:
    """The data as an image of the unknown's size: a picture cut out of a scene is continued.

    Linearly from each border to the opposite one, round the canvas: no step is left to ring.
    """
    operator, image = problem.operator, problem.y
    if not isinstance(operator, CroppedBlur):
        return image
    for dim, first, size in zip((-2, -1), operator.margin, operator.blur.shape, strict=True):
        length = image.shape[dim]
        place = (torch.arange(size) - first) % size
        before = place.clamp_max(length - 1)
        after = torch.where(place < length, before, 0)
        share = ((place - length + 1) / (size - length + 1)).clamp_min(0.0).to(image)
        share = share[:, None] if dim == -2 else share
        image = torch.lerp(image.index_select(dim, before), image.index_select(dim, after), share)
    return image


def _enlarge(problem: Problem, factor: int) -> Signal:
    # `antialias` changes nothing when enlarging but the kernel: a = -1/2 (as Keys, PIL), not -3/4.
    return torch.nn.functional.interpolate(
        problem.y, scale_factor=factor, mode="bicubic", align_corners=False, antialias=True
    )


def _demosaic(problem: Problem) -> Signal:
    """Each colour's measured pixels, averaged by tents two pixels wide elsewhere."""
    operator = _operator(problem, Mosaic, "bilinear")
    h, w = problem.shape[-2:]
    tent = torch.tensor([0.5, 1.0, 0.5])
    weight = torch.outer(tent, tent).expand(3, 1, 3, 3)

    def spread(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, weight, padding=1, groups=3)

    known = operator.mask(h, w).to(problem.y.dtype)
    return spread(operator.A_adjoint(problem.y)) / spread(known)


def _fill_holes(problem: Problem, fill: Fill) -> Signal:
    """Apply a fill of (image (c h w), known (h w)) to every image; a mask a channel: to each."""
    operator = _operator(problem, Mask, "a fill")
    masks = operator.mask.expand(len(problem.y), *operator.mask.shape[1:]).numpy()
    images = problem.y.numpy()
    filled = []
    for image, mask in zip(images, masks, strict=True):
        if len(mask) == 1:
            filled.append(_filled(image, mask[0], fill))
        else:
            parts = [_filled(image[c : c + 1], mask[c], fill) for c in range(len(mask))]
            filled.append(np.concatenate(parts))
    return torch.from_numpy(np.stack(filled)).to(problem.y.dtype)


def _filled(image: Array, known: Array, fill: Fill) -> Array:
    """An image without any known pixel stays as it is: there is nothing to continue."""
    return fill(image, known) if known.any() else image


def _marching_fill(flags: int, settings: MarchingSettings) -> Fill:
    """OpenCV's fills, channel by channel, in 0..255: Telea's breaks on floats of another range."""

    def fill(image: Array, known: Array) -> Array:
        missing = (~known).astype(np.uint8)
        grey_levels = np.ascontiguousarray((image + 1) * 127.5, np.float32)
        filled = [cv2.inpaint(c, missing, settings.radius_px, flags) for c in grey_levels]
        out: Array = np.where(known, image, np.stack(filled) / 127.5 - 1)
        return out

    return fill


def _operator(problem: Problem, kinds: Kinds, method: str) -> Any:
    """The problem's operator, if it is of a kind that the method takes.

    Raises:
        BadInputError: if it is not.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(problem.operator, kinds):
        names = " or ".join(f"'{kind.kind}'" for kind in kinds)
        raise BadInputError(f"{method} needs a measurement of kind {names}; choose another method")
    return problem.operator
