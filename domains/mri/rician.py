"""Rician noise of magnitude images: stabilised, denoised as white noise, and led back unbiased.

    m = |A + n|,  n = n_1 + i n_2 of variance sigma^2 each      (A >= 0 the true magnitude)
    f(m) = int dm' / s(m'),   s(m') the standard deviation of m where its mean is m'
    g(A) = E[f(m) | A]

f makes the noise's variance 1 (sigma = 1) at every A, to a few hundredths; f(m) - m -> 0 where the
signal is strong, so that the stabilised image is still a magnitude image to the network. Where
there is no signal m is sigma's own size: g(0), not 0, is black, and the inverse of g (not of f)
takes the bias away.

Why stabilised: the posterior mean under white noise of one known level is one call of the network
(infra/decisions/0007); the Rician likelihood itself would need many, and is not of the forms that
its data steps solve.

Source: Foi 2011 (doi:10.1109/ISBI.2011.5872758), with the first-order stabiliser of
Koay and Basser 2006 (doi:10.1016/j.jmr.2006.01.016) for the moments.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage, special

from domains.base import Array, BadInputError, Item, Measurement, Problem, Task
from domains.imaging import Units, slices_first
from domains.keyed import pixel_digest, slice_rngs

if TYPE_CHECKING:
    from torch import Tensor

KIND = "rician"
TOP = 40.0
"""Amplitude, in standard deviations, from which the noise is taken for Gaussian."""
STEP = 0.01
NUM_NODES = 48
"""Of Gauss and Hermite, in each of the noise's two parts."""
PERCENTILE = 99.9
SMOOTHING_PX = 3
"""Side of the median that the scale is read from: single noisy pixels say nothing of it."""


def moments(amplitude: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of m at amplitudes A, sigma = 1."""
    a2 = np.asarray(amplitude, np.float64) ** 2
    half = a2 / 4
    mean = np.sqrt(np.pi / 2) * ((1 + 2 * half) * special.i0e(half) + 2 * half * special.i1e(half))
    return mean, np.sqrt(np.maximum(2 + a2 - mean**2, 0.0))


@cache
def _tables() -> tuple[Array, Array, Array, Array]:
    """Amplitudes, means of m, f at those means, and g."""
    amplitude = np.arange(0.0, TOP + STEP / 2, STEP)
    mean, spread = moments(amplitude)
    slope = 1 / spread
    area = np.concatenate([[0.0], np.cumsum(np.diff(mean) * (slope[1:] + slope[:-1]) / 2)])
    # int (1 + 1 / (4 m^2)) dm, the tail's expansion, ends at m - 1 / (4 m).
    stable = area - area[-1] + mean[-1] - 1 / (4 * mean[-1])
    nodes, weights = np.polynomial.hermite_e.hermegauss(NUM_NODES)
    weights = weights / weights.sum()
    expected = np.zeros_like(amplitude)
    for n1, w1 in zip(nodes, weights, strict=True):
        for n2, w2 in zip(nodes[NUM_NODES // 2 :], 2 * weights[NUM_NODES // 2 :], strict=True):
            seen = np.hypot(amplitude + n1, n2)
            expected += w1 * w2 * _stabilised(seen, mean, stable, slope[0])
    return amplitude, mean, stable, np.maximum.accumulate(expected)


def _stabilised(m: Array, mean: Array, stable: Array, slope: float) -> Array:
    """f by its table; below the mean of pure noise a straight line, above the table the tail."""
    inside = np.interp(m, mean, stable)
    below = stable[0] + (m - mean[0]) * slope
    above = m - 1 / (4 * np.maximum(m, mean[-1]))
    result: Array = np.where(m < mean[0], below, np.where(m > mean[-1], above, inside))
    return result


def stabilise(m: Array) -> Array:
    """f(m), sigma = 1."""
    _, mean, stable, _ = _tables()
    return _stabilised(np.asarray(m, np.float64), mean, stable, 1 / moments(np.zeros(1))[1][0])


def expected(amplitude: Array) -> Array:
    """g(A) = E[f(m) | A], sigma = 1."""
    grid, _, _, mean_of_f = _tables()
    a = np.asarray(amplitude, np.float64)
    tail = a + mean_of_f[-1] - grid[-1]
    result: Array = np.where(a > grid[-1], tail, np.interp(a, grid, mean_of_f))
    return result


def unbiased(value: Array) -> Array:
    """A of which g(A) is a value, sigma = 1; 0 for what is darker than noise alone."""
    grid, _, _, mean_of_f = _tables()
    v = np.asarray(value, np.float64)
    tail = v - mean_of_f[-1] + grid[-1]
    result: Array = np.where(v > mean_of_f[-1], tail, np.interp(v, mean_of_f, grid))
    return result


def simulate(item: Item, task: Task, seed: int) -> Measurement:
    """Add Rician noise to a clean magnitude image, keyed by source, seed and slice.

    The task's sigma_y is that of each part of the noise on a scale of 2 from black to the clean
    image's 99.9th percentile.

    Raises:
        BadInputError: for another operator, no noise, or an empty image.
    """
    from domains.mri.degradations import positive_scale

    share = float(task.noise["sigma_y"]) / 2
    if task.operator != "identity" or not share > 0:
        raise BadInputError(
            f"task '{task.name}': Rician noise goes with the operator identity and sigma_y above "
            f"0, not with {task.operator} and {2 * share:g}"
        )
    magnitude = slices_first(np.maximum(item.pixels, 0)).astype(np.float64)
    sigma = share * positive_scale(float(np.percentile(magnitude, PERCENTILE)))
    rngs = slice_rngs(seed, item.record, "noise")
    noise = sigma * np.stack([rng.standard_normal((2, *magnitude.shape[1:])) for rng in rngs])
    y = np.hypot(magnitude + noise[:, 0], noise[:, 1]).astype(np.float32)
    measurement = taken(item, y, sigma)
    return Measurement(
        record=item.record,
        task=task.name,
        operator="identity",
        params={**measurement.params, **task.operator_params},
        noise=measurement.noise,
        y=y,
        truth_digest=pixel_digest(item.pixels),
        seed=seed,
    )


def taken(item: Item, y: Array, sigma: float) -> Measurement:
    """A noisy magnitude image (z 1 h w), in the source's units, as a measurement; sigma in them.

    Raises:
        BadInputError: if nothing is brighter than the noise, or sigma is not above 0.
    """
    from domains.mri.degradations import positive_scale

    if not (np.isfinite(sigma) and sigma > 0):
        raise BadInputError(f"Rician noise has a standard deviation above 0, not {sigma:g}")
    smooth = ndimage.median_filter(
        unbiased(stabilise(y / sigma)) * sigma, (1, 1, SMOOTHING_PX, SMOOTHING_PX)
    )
    q = positive_scale(float(np.percentile(smooth, PERCENTILE)))
    return Measurement(
        record=item.record,
        task="given",
        operator="identity",
        params={"scale_q": q},
        noise={"kind": KIND, "sigma": sigma, "sigma_y": 2 * sigma / q},
        y=np.ascontiguousarray(y, np.float32),
    )


def is_rician(measurement: Measurement) -> bool:
    """Whether a measurement is of this kind."""
    return bool(measurement.noise["kind"] == KIND)


def to_network(measurement: Measurement, magnitude: Array) -> Array:
    """What the network is to find of a true magnitude: sigma g(A / sigma), float32."""
    sigma, units = _scales(measurement)
    return units.to_network(sigma * expected(np.maximum(magnitude, 0) / sigma))


def problem_of(measurement: Measurement) -> Problem:
    """Denoising of the stabilised image: white noise of one level."""
    import torch

    from diffusion_core.noise.likelihood import GaussianNoise
    from diffusion_core.operators import Identity

    _, z, h, w = measurement.record.shape
    sigma, units = _scales(measurement)
    y = units.to_network(sigma * stabilise(np.maximum(measurement.y, 0) / sigma))

    def to_source(x: Tensor) -> Tensor:
        stable = units.to_source(x.double()).numpy() / sigma
        return torch.from_numpy(sigma * unbiased(stable)).to(x.dtype)

    return Problem(
        operator=Identity(),
        y=torch.from_numpy(y),
        noise=GaussianNoise(float(measurement.noise["sigma_y"])),
        shape=(z, 1, h, w),
        reach=0,
        condition="mri",
        to_source=to_source,
    )


def _scales(measurement: Measurement) -> tuple[float, Units]:
    units = Units(0.0, float(measurement.params["scale_q"]))
    return float(measurement.noise["sigma"]), units
