"""Measurements of training patches: what a student is distilled on (domains.base.measure_patch).

    kind        parameters
    mask        missing_share, sigma_y: pixels missing at random, in all channels
    fourier     acceleration, centre_share, sigma_y: k-space lines along w, as the domain MRI draws
                them; sigma_y of the real and of the imaginary part
    pool        factor, sigma_y: means of squares
    blur        std_px, sigma_y: a Gaussian, circular

A parameter is a number, or a pair (low, high) that it is drawn from, evenly in its logarithm.
Whole numbers are drawn evenly from a list. All is in network units, as x0 is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import BadInputError

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_core.protocols import LinearOperator, NoiseModel

Params = Mapping[str, Any]
Measured = tuple["LinearOperator", "Tensor", "NoiseModel"]


def measure_patch(x0: Tensor, kind: str, params: Params, rng: np.random.Generator) -> Measured:
    """Measure a patch by an operator that any domain may have.

    Args:
        x0: (1 c h w) in network units.
        kind: see above.
        params: its parameters, or where they are drawn from.
        rng: of the draw, the operator and the noise.

    Returns:
        A, y = A x0 + n, and the likelihood of n.

    Raises:
        BadInputError: if the kind is unknown, or a parameter missing or out of range.
    """
    import torch

    from diffusion_core.noise.likelihood import GaussianNoise

    if kind not in _MAKERS:
        raise BadInputError(
            f"no operator '{kind}' is known for patches here: choose one of {', '.join(_MAKERS)}"
        )
    try:
        operator = _MAKERS[kind](x0, params, rng)
        sigma_y = drawn(params, "sigma_y", rng)
    except ValueError as error:
        if isinstance(error, BadInputError):
            raise
        raise BadInputError(
            f"the operator '{kind}' cannot be made of {dict(params)}: {error}"
        ) from error
    clean = operator.A(x0)
    noise = torch.from_numpy(rng.standard_normal((2, *clean.shape)).astype(np.float32))
    n = torch.complex(noise[0], noise[1]) if clean.is_complex() else noise[0]
    y = clean + sigma_y * n
    measured = getattr(operator, "measured", None)
    return operator, y if measured is None else measured(y), GaussianNoise(sigma_y)


def drawn(params: Params, name: str, rng: np.random.Generator) -> float:
    """A parameter: itself, or drawn from (low, high), evenly in its logarithm.

    Raises:
        BadInputError: if it is missing, or no number or pair of numbers 0 < low <= high.
    """
    value = params.get(name)
    match value:
        case int() | float() if math.isfinite(value) and value >= 0:
            return float(value)
        case [int() | float() as low, int() | float() as high] if 0 < low <= high < math.inf:
            return float(math.exp(rng.uniform(math.log(low), math.log(high))))
    raise BadInputError(
        f"the operator's '{name}' must be a number, or a pair of them to draw from, not {value!r}"
    )


def chosen(params: Params, name: str, rng: np.random.Generator) -> int:
    """A whole number: itself, or one of a list.

    Raises:
        BadInputError: if it is missing, or not positive whole numbers.
    """
    value = params.get(name)
    numbers: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    if not numbers or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise BadInputError(
            f"the operator's '{name}' must be a whole number above 0, or a list of such, not "
            f"{value!r}"
        )
    return int(numbers[int(rng.integers(len(numbers)))])


def _mask(x0: Tensor, params: Params, rng: np.random.Generator) -> LinearOperator:
    import torch

    from diffusion_core.operators import Mask

    known = rng.random((1, 1, *x0.shape[2:])) >= drawn(params, "missing_share", rng)
    return Mask(torch.from_numpy(known))


def _fourier(x0: Tensor, params: Params, rng: np.random.Generator) -> LinearOperator:
    import torch

    from diffusion_core.operators import Fourier

    width, c = x0.shape[3], x0.shape[1]
    num_measured = round(width / drawn(params, "acceleration", rng))
    num_centre = min(max(round(drawn(params, "centre_share", rng) * width), 1), num_measured)
    frequencies = np.abs(np.fft.fftfreq(width))
    order = np.argsort(frequencies, kind="stable")
    others = rng.permutation(order[num_centre:])[: num_measured - num_centre]
    lines = np.zeros(width, bool)
    lines[order[:num_centre]] = True
    lines[others] = True
    mask = torch.from_numpy(lines)[None, None, None].expand(1, 1, *x0.shape[2:]).contiguous()
    return Fourier(mask, 1 if c == 1 else 2)


def _pool(x0: Tensor, params: Params, rng: np.random.Generator) -> LinearOperator:
    from diffusion_core.operators import Pool

    factor = chosen(params, "factor", rng)
    if any(side % factor for side in x0.shape[2:]):
        raise BadInputError(
            f"patches of {x0.shape[3]} pixels do not divide by the factor {factor} of 'pool'"
        )
    return Pool(factor)


def _blur(x0: Tensor, params: Params, rng: np.random.Generator) -> LinearOperator:
    import torch

    from diffusion_core.operators import Blur

    std_px = drawn(params, "std_px", rng)
    reach = min(math.ceil(4 * std_px), (min(x0.shape[2:]) - 1) // 2)
    profile = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / std_px) ** 2)
    kernel = torch.outer(profile, profile)
    return Blur(kernel / kernel.sum(), (x0.shape[2], x0.shape[3]))


_MAKERS: Mapping[str, Callable[[Any, Params, np.random.Generator], LinearOperator]] = {
    "mask": _mask,
    "fourier": _fourier,
    "pool": _pool,
    "blur": _blur,
}
