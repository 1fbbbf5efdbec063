"""Bits a dimension of a model on real images: the bound of diffusion_core.likelihood on a dataset.

What is fitted (prior mean and variance, endpoints, the decoder's standard deviation, the density of
levels) is fitted on validation images of the condition; the bound holds whatever they are, but is
tighter for it. The probability is that of the source's whole numbers: 8-bit grey levels, whole HU,
the scanner's integers. Images stored as fractions have no bin, hence no bits, and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffusion_core.likelihood import Bound, Ends, LevelTable, bound_on_levels, level_table
from diffusion_core.model import Model
from diffusion_core.noise.densities import Histogram, LogNormal, LogUniform
from diffusion_core.noise.draws import KeyedDraws
from domains.base import BadInputError, Item
from domains.registry import load_domain

LEAST, GREATEST = 0.005, 4.0
"""Levels among which the endpoints are looked for: those of the training and half of its least."""


@dataclass(frozen=True)
class Crop:
    """A centre crop as the bound takes it.

    Attributes:
        x0: (1 c h w) float32, network units.
        condition: of the network.
        bin_width: one step of the source's whole numbers, network units.
        bin_name: the same in words.
    """

    x0: Tensor
    condition: str
    bin_width: float
    bin_name: str


@dataclass(frozen=True)
class Fitted:
    """What validation images gave for a condition.

    Attributes:
        ends: prior, and the decoder at the least level.
        density: of ln sigma between the endpoints, of the least Monte-Carlo variance.
    """

    ends: Ends
    density: Histogram

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The endpoints."""
        low, high = self.density.ln_range
        return math.exp(low), math.exp(high)


def crop_of(item: Item, slice_number: int, side: int) -> Crop:
    """The centre of one slice, at most side x side, in network units.

    Raises:
        BadInputError: if the item holds fractions, or no condition has its number of channels.
    """
    record, domain = item.record, load_domain(item.record.domain)
    if np.dtype(record.dtype).kind not in "iu":
        raise BadInputError(
            f"{record.item_id}: its values are fractions ({record.dtype}), without a bin width; "
            "choose an image of whole numbers"
        )
    c, _, h, w = record.shape
    fitting = [name for name, channels in domain.conditions.items() if channels == c]
    if not fitting:
        raise BadInputError(f"{record.item_id}: no condition of {domain.name} has {c} channels")
    offset, gain = domain.unit_scale(item.pixels, record)
    top, left = max(0, (h - side) // 2), max(0, (w - side) // 2)
    pixels = item.pixels[:, slice_number, top : top + side, left : left + side]
    x0 = 2.0 * (pixels.astype(np.float64) - offset) * gain - 1.0
    return Crop(
        x0=torch.from_numpy(x0).float()[None],
        condition=fitting[0],
        bin_width=2.0 * gain,
        bin_name=f"1 {record.units if record.units != 'intensity' else 'grey level'} of "
        f"{record.dtype}, {2.0 * gain:.2e} network units",
    )


def fit(model: Model, crops: Sequence[Crop], num_levels: int = 25, seed: int = 0) -> Fitted:
    """Fit prior, endpoints, decoder and density on validation crops of one condition."""
    values = torch.cat([crop.x0.flatten() for crop in crops]).double()
    ends = Ends(float(values.mean()), float(values.var()), None, crops[0].bin_width)
    table = measure(model, crops, ends, num_levels, seed)
    lowest, highest = table.endpoints()
    ln_range = float(table.ln_sigmas[lowest]), float(table.ln_sigmas[highest])
    std = float(table.decoder_std[lowest])
    return Fitted(replace(ends, decoder_std=std), table.learned_density(ln_range))


def measure(
    model: Model, crops: Sequence[Crop], ends: Ends, num_levels: int = 25, seed: int = 0
) -> LevelTable:
    """The terms of the bound on a grid of levels, num_levels evaluations a crop."""
    sigmas = torch.logspace(
        math.log10(LEAST), math.log10(GREATEST), num_levels, dtype=torch.float64
    )
    draws = KeyedDraws(seed, f"bits-fit-{crops[0].condition}")
    with torch.no_grad():
        return level_table(
            model.denoiser(crops[0].condition), [crop.x0 for crop in crops], sigmas, ends, draws
        )


def bits_per_dim(
    model: Model,
    crop: Crop,
    fitted: Fitted,
    num_levels: int = 33,
    seeds: Sequence[int] = (0,),
    name: str = "",
) -> list[Bound]:
    """The bound of one crop, once for each seed: their spread is that of the noise drawn.

    The levels are quantiles of the learned density: close where the integrand is large.

    Args:
        model: whose bound it is.
        crop: the image.
        fitted: ends and density of its condition.
        num_levels: evaluations a seed.
        seeds: of the noise.
        name: of the image: its noise is its own.
    """
    u = torch.linspace(1, 0, num_levels, dtype=torch.float64)
    ends = replace(fitted.ends, bin_width=crop.bin_width)
    denoise, sigmas = model.denoiser(crop.condition), fitted.density.quantile(u).exp()
    keys = [KeyedDraws(seed, f"bits-{crop.condition}-{name}") for seed in seeds]
    with torch.no_grad():
        return [bound_on_levels(denoise, crop.x0, sigmas, ends, draws) for draws in keys]


def variance_reduction(
    model: Model, crops: Sequence[Crop], fitted: Fitted, num_levels: int = 25, seed: int = 1
) -> dict[str, float]:
    """Variance of one draw of the bound, of the learned and of fixed densities, on other images.

    Returns:
        "learned", "log-uniform", "log-normal" (of training, without its uniform share), in
        (nats a dimension)^2, each the mean over the crops, all on
        the learned endpoints.
    """
    table = measure(model, crops, fitted.ends, num_levels, seed)
    low, high = fitted.sigma_range
    return {
        "learned": table.variance(fitted.density),
        "log-uniform": table.variance(LogUniform(low, high)),
        "log-normal": table.variance(LogNormal(-1.5, 1.3, low, high)),
    }
