"""How far a restored image is from the truth, and from what was measured.

The image metrics compare on [0, 1]: both images are mapped by the domain's `unit_scale`, clipped,
and held against a data range of 1. The residual needs no truth: it compares with the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy import ndimage
from skimage.metrics import structural_similarity

from diffusion_core.protocols import LinearOperator, NoiseModel, Signal
from domains.base import Array, Domain, Item, Problem

SSIM_WINDOW_PX = 7
EXACT_VARIANCE = 1e-12
"""Data of less variance than this (network units squared) count as exact."""


def psnr(truth: Array, image: Array, where: Array | None = None) -> float:
    """Peak signal-to-noise ratio of an image on [0, 1], in dB; inf if equal, nan if not finite.

    Args:
        truth: (c h w) or (h w), on [0, 1].
        image: same shape.
        where: boolean, broadcastable to truth: the pixels that count; None: all.
    Raises:
        ValueError: if no pixel counts.
    """
    squared = _counted((truth.astype(np.float64) - image) ** 2, where)
    error = float(squared.mean())
    if error == 0:
        return math.inf
    return -10.0 * math.log10(error)  # log10(nan) is nan: a broken image is no perfect one


def ssim(truth: Array, image: Array, where: Array | None = None) -> float:
    """Structural similarity (Wang et al. 2004): 7x7 uniform window, data range 1, mean of channels.

    Images narrower than 7 px are compared with the largest odd window that fits; below 3 px there
    is no structure and the result is nan.

    Args:
        truth: (c h w) or (h w), on [0, 1].
        image: same shape.
        where: boolean, broadcastable to truth: average the SSIM map over these pixels; None: the
            mean of scikit-image, which leaves out a border of half a window.
    """
    truth = truth.reshape(-1, *truth.shape[-2:]).astype(np.float64)
    image = image.reshape(truth.shape).astype(np.float64)
    side = min(SSIM_WINDOW_PX, *truth.shape[-2:])
    window = side if side % 2 else side - 1
    if window < 3:
        return math.nan
    compare: Callable[..., tuple[float, Array]] = structural_similarity  # untyped library
    value, similarity = compare(
        truth, image, win_size=window, data_range=1.0, channel_axis=0, full=True
    )
    return float(value) if where is None else float(_counted(similarity, where).mean())


def edge_error(truth: Array, image: Array, where: Array | None = None) -> float:
    """Root mean square difference of the gradient magnitudes: 0 if all edges are equally sharp.

    The gradient is Sobel's, divided by 8 so that it is in units of intensity a pixel; images are
    mirrored at the border; channels count alike.

    Args:
        truth: (c h w) or (h w), on [0, 1].
        image: same shape.
        where: boolean, broadcastable to truth: the pixels that count; None: all.
    """
    squared = (_gradient_magnitude(truth) - _gradient_magnitude(image)) ** 2
    return math.sqrt(float(_counted(squared, where).mean()))


def z_gradient_error(truth: Array, image: Array) -> float:
    """Mean |d(image) - d(truth)|, d the difference from one slice or frame to the next.

    What flickers from frame to frame, or steps from slice to slice in a cut across them, stands
    here and nowhere in PSNR.

    Args:
        truth: (c z h w) on [0, 1], two slices or more.
        image: same shape.
    Raises:
        ValueError: if there is no second slice.
    """
    if truth.shape[1] < 2:
        raise ValueError("one slice has no difference to another")
    return float(np.abs(np.diff(image, axis=1) - np.diff(truth, axis=1)).mean())


def boundary_ratio(image: Array, hole: Array) -> float:
    """Gradient across the border of a hole, over that beside the border: 1 where none is seen.

    The mean absolute difference of the two pixels on either side of the border, over the mean of
    the same one pixel further out and one further in. A fill that meets its surroundings with a
    step has more; nothing needs the truth. nan if no border has such neighbours on both sides.

    Args:
        image: (c h w) or (h w), finite.
        hole: (h w) boolean, True inside.
    """
    image = np.asarray(image, dtype=np.float64).reshape(-1, *hole.shape)
    across, beside = [], []
    for pixels, inside in ((image, hole), (image.swapaxes(-1, -2), hole.T)):
        steps = np.abs(np.diff(pixels, axis=-1))
        same = inside[:, 1:] == inside[:, :-1]
        border = ~same[:, 1:-1] & same[:, :-2] & same[:, 2:]
        across.append(steps[..., 1:-1][:, border].ravel())
        beside.append((0.5 * (steps[..., :-2] + steps[..., 2:]))[:, border].ravel())
    step, usual = np.concatenate(across), np.concatenate(beside)
    if step.size == 0:
        return math.nan
    return float(step.mean() / usual.mean()) if usual.mean() > 0 else math.inf


def residual(
    operator: LinearOperator,
    y: torch.Tensor,
    x: Signal,
    noise: NoiseModel,
    measured: torch.Tensor | None = None,
) -> list[float]:
    """|R^{-1/2} (y - A x)|^2 / number of real measurements: about 1 if x explains the data.

    A complex datum counts as two real ones. Where the data are exact (variance 0) the ratio has no
    meaning and the result is the largest |y - A x| instead.

    Args:
        operator: A, on a batch.
        y: (b *m) data of the problem.
        x: (b c h w) restored batch in network units.
        noise: its `variance` gives the diagonal of R, of the real part where data are complex.
        measured: boolean, broadcastable to y: entries of y that were measured at all, where the
            operator fills the others with zeros; None: entries that A reaches.
    Returns:
        One figure a batch element.
    """
    Ax = operator.A(x)
    difference = (y - Ax).abs().double()
    if measured is None:
        measured = reached(operator, x)
    measured = measured.expand_as(difference)
    variance = noise.variance(Ax).to(difference).expand_as(difference)
    parts = 2 if y.is_complex() else 1
    return [
        _residual_of(difference[i][measured[i]], variance[i][measured[i]], parts)
        for i in range(len(difference))
    ]


def reached(operator: LinearOperator, like: Signal) -> torch.Tensor:
    """Entries of the data that depend on the image at all, found by measuring an irregular one.

    Mask and Fourier operators fill what they do not measure with exact zeros; an image of
    irrational values leaves no measured entry at 0 by chance. A datum that no pixel touches is not
    counted.
    """
    ramp = torch.arange(1, like[0].numel() + 1, device=like.device, dtype=torch.float64)
    probe = (torch.frac(ramp * math.sqrt(2)) + 0.1).reshape(1, *like.shape[1:])
    return operator.A(probe.to(like.dtype).expand_as(like).contiguous()) != 0


def score(
    domain: Domain, truth: Item, restored: Array, *, region: Array | None = None
) -> list[dict[str, float]]:
    """Hold a restored item against the truth, slice by slice.

    Args:
        domain: whose `unit_scale` (taken a slice at a time) and `body_mask` apply.
        truth: the item, pixels (c z h w) in source units.
        restored: (c z h w), in source units.
        region: (z h w) or (1|c z h w), True where PSNR is wanted beside the image's own: the hole.
    Returns:
        One dict a slice: psnr, ssim, edge_error; psnr_body, ssim_body where the domain knows a body
        and the slice shows some of it; psnr_hole where `region` is given and not empty there;
        z_gradient_error to the slice before, from the second on, on the scale of the later one.
    Raises:
        ValueError: if the shapes differ.
    """
    if restored.shape != truth.pixels.shape:
        raise ValueError(f"restored {restored.shape} is not of the truth's {truth.pixels.shape}")
    body = domain.body_mask(truth.pixels, truth.record)
    hole = region if region is None or region.ndim == 4 else region[None]
    rows = []
    for z in range(restored.shape[1]):
        part = truth.slices(z, z + 1)
        offset, gain = domain.unit_scale(part.pixels, part.record)
        clean = to_unit(truth.pixels[:, z], offset, gain)
        image = to_unit(restored[:, z], offset, gain)
        row = {
            "psnr": psnr(clean, image),
            "ssim": ssim(clean, image),
            "edge_error": edge_error(clean, image),
        }
        if body is not None and body[z].any():
            row["psnr_body"] = psnr(clean, image, body[z])
            row["ssim_body"] = ssim(clean, image, body[z])
        if hole is not None and hole[:, z].any():
            row["psnr_hole"] = psnr(clean, image, hole[:, z])
        if z:
            pair = slice(z - 1, z + 1)
            both = (to_unit(pixels[:, pair], offset, gain) for pixels in (truth.pixels, restored))
            row["z_gradient_error"] = z_gradient_error(*both)
        rows.append(row)
    return rows


def mean_score(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rows that have it (so dB are averaged, not errors)."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def hole_of(problem: Problem) -> Array | None:
    """The pixels (c|1 z h w) that a mask problem does not know, as `score` takes them, or None."""
    if problem.known is None:
        return None
    return np.asarray(~problem.known.cpu().numpy()).swapaxes(0, 1)


def to_unit(pixels: Array, offset: float, gain: float) -> Array:
    """Map source units to [0, 1], clipped, float64."""
    return np.clip((np.asarray(pixels, dtype=np.float64) - offset) * gain, 0.0, 1.0)


def _counted(values: Array, where: Array | None) -> Array:
    if where is None:
        return values
    chosen = values[np.broadcast_to(where, values.shape)]
    if chosen.size == 0:
        raise ValueError("no pixel counts: the region is empty")
    return chosen


def _gradient_magnitude(image: Array) -> Array:
    image = np.asarray(image, dtype=np.float64)
    rows, columns = (ndimage.sobel(image, axis=axis, mode="reflect") / 8 for axis in (-2, -1))
    return np.hypot(rows, columns)


def _residual_of(difference: torch.Tensor, variance: torch.Tensor, parts: int) -> float:
    if difference.numel() == 0:
        return 0.0
    if float(variance.max()) <= EXACT_VARIANCE:
        return float(difference.max())
    return float((difference**2 / variance).sum() / (parts * difference.numel()))
