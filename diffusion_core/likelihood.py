"""The variational bound on -log p(x0) of a denoiser, in nats and in bits a dimension.

    -log p(x0) <= KL(q(x | x0; sigma_max) || prior)                      prior
                + 1/2 E int |x0 - D(x; sigma)|^2 d(1 / sigma^2)          diffusion
                + E[-log p(x0 | x; sigma_min)]                           reconstruction

with x = x0 + sigma eps. In l = ln sigma the middle term is int E|x0 - D|^2 / sigma^2 dl: its
integrand is about 1 a dimension where noise hides nothing, and falls as the image stands out.
The prior is N(mean, variance + sigma_max^2) on every value. The reconstruction is a normal
distribution about D(x; sigma_min), integrated over the bin that the value was rounded to: with a
bin width (in network units) the bound is on the probability of the *integers* of the source, with
None on a density. Nothing is dequantised by added noise.

Source: Kingma et al. 2021 (arXiv:2107.00630), Equations 11-18.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_core.noise.densities import Histogram, LevelDensity
from diffusion_core.noise.learned import LearnedProcess
from diffusion_core.protocols import Denoiser, NormalDraws, Signal

PerImage = Float[Tensor, " b"]

_STATE, _LEVEL = 0, 1  # streams of the keyed noise


@dataclass(frozen=True)
class Ends:
    """What stands at the two ends of the noise levels.

    Attributes:
        mean: of the prior, network units.
        variance: of the prior at sigma = 0.
        decoder_std: of x0 about D(x; sigma_min); None: that of a normal x0 of this variance.
        bin_width: of the source's integers in network units; None for a density.
    """

    mean: float = 0.0
    variance: float = 0.25
    decoder_std: float | None = None
    bin_width: float | None = None

    def std_at(self, sigma_min: float) -> float:
        """The decoder's standard deviation."""
        if self.decoder_std is not None:
            return self.decoder_std
        return math.sqrt(self.variance * sigma_min**2 / (self.variance + sigma_min**2))


@dataclass(frozen=True)
class Bound:
    """A bound on -log p(x0), image by image, in nats.

    Attributes:
        prior: KL at the greatest level.
        diffusion: the integral over the levels.
        reconstruction: at the least level.
        error: of `diffusion`: of its quadrature (bound_on_levels), which leaves out most of the
            noise of the draws (take several and see how they spread), or one standard error
            (bound_by_sampling).
        diffusion_in_steps: the same term of the model that takes these very levels as its steps:
            an upper bound on its own, above `diffusion` by what discrete time costs; None if the
            levels were drawn.
        num_values: dimensions of one image.
    """

    prior: PerImage
    diffusion: PerImage
    reconstruction: PerImage
    error: PerImage
    diffusion_in_steps: PerImage | None
    num_values: int

    @property
    def nats(self) -> PerImage:
        """The whole bound."""
        return self.prior + self.diffusion + self.reconstruction

    @property
    def bits_per_dim(self) -> PerImage:
        """The whole bound in bits a dimension."""
        return self.in_bits(self.nats)

    def in_bits(self, nats: PerImage) -> PerImage:
        """Nats an image to bits a dimension."""
        return nats / (math.log(2.0) * self.num_values)


def bound_on_levels(
    denoise: Denoiser,
    x0: Signal,
    sigmas: Float[Tensor, " levels"],
    ends: Ends,
    draws: NormalDraws,
) -> Bound:
    """The bound by the trapezoidal rule in ln sigma, one evaluation a level.

    Args:
        denoise: D(x; sigma).
        x0: clean images, in network units.
        sigmas: at least 3 levels, strictly decreasing, the last above 0.
        ends: prior and reconstruction.
        draws: level i of stream 0 is the noise of sigmas[i].

    Returns:
        The bound; `error` compares with every other level left out, as the rule's order 2 has it
        (Richardson); of the noise of the draws it sees a small part only.

    Raises:
        ValueError: if the levels are not as asked.
    """
    levels = [float(s) for s in sigmas]
    if len(levels) < 3 or sorted(set(levels), reverse=True) != levels or levels[-1] <= 0:
        raise ValueError(f"a bound needs 3 levels or more, strictly decreasing, above 0: {levels}")
    squared, D_x = [], x0
    for i, sigma in enumerate(levels):
        D_x = _denoised(denoise, x0, sigma, draws.normal(i, x0, _STATE))
        squared.append(_squared(x0 - D_x))
    errors = torch.stack(squared)
    s = torch.tensor(levels, dtype=torch.float64, device=x0.device)
    fine = _integral(s, errors)
    # Every other level, both ends kept.
    coarse_of = sorted({*range(0, len(levels), 2), len(levels) - 1})
    steps = 0.5 * (s[1:] ** -2 - s[:-1] ** -2)
    return Bound(
        prior=prior_nats(x0, levels[0], ends),
        diffusion=fine,
        reconstruction=reconstruction_nats(x0, D_x, levels[-1], ends),
        error=(fine - _integral(s[coarse_of], errors[coarse_of])).abs() / 3.0,
        diffusion_in_steps=(steps[:, None] * errors[:-1]).sum(dim=0),
        num_values=x0[0].numel(),
    )


def bound_by_sampling(
    denoise: Denoiser,
    x0: Signal,
    density: LevelDensity,
    num_draws: int,
    ends: Ends,
    draws: NormalDraws,
) -> Bound:
    """The bound by Monte Carlo over levels: unbiased in continuous time, whatever the density.

    Args:
        denoise: D(x; sigma).
        x0: clean images, in network units.
        density: of ln sigma; its range gives the endpoints.
        num_draws: evaluations an image, >= 2; one more is spent on the reconstruction.
        ends: prior and reconstruction.
        draws: level i is draw i; stream 0 its noise, stream 1 its level.

    Raises:
        ValueError: if there are fewer than 2 draws.
    """
    if num_draws < 2:
        raise ValueError(f"a standard error needs 2 draws or more, not {num_draws}")
    terms = torch.stack(
        [_one_term(denoise, x0, density, draws, i) for i in range(1, num_draws + 1)]
    )
    sigma_min, sigma_max = (math.exp(end) for end in density.ln_range)
    D_x = _denoised(denoise, x0, sigma_min, draws.normal(0, x0, _STATE))
    return Bound(
        prior=prior_nats(x0, sigma_max, ends),
        diffusion=terms.mean(dim=0),
        reconstruction=reconstruction_nats(x0, D_x, sigma_min, ends),
        error=terms.std(dim=0) / math.sqrt(num_draws),
        diffusion_in_steps=None,
        num_values=x0[0].numel(),
    )


def prior_nats(x0: Signal, sigma_max: float, ends: Ends) -> PerImage:
    """KL(N(x0, sigma_max^2) || N(mean, variance + sigma_max^2)), summed over an image."""
    noise, total = sigma_max**2, sigma_max**2 + ends.variance
    misfit = (x0.double() - ends.mean) ** 2
    nats = 0.5 * ((noise + misfit) / total - 1.0 + math.log(total / noise))
    return nats.flatten(1).sum(dim=1)


def reconstruction_nats(x0: Signal, D_x: Signal, sigma_min: float, ends: Ends) -> PerImage:
    """-log p(x0 | x; sigma_min), summed over an image: see the module's head."""
    std = ends.std_at(sigma_min)
    # By symmetry the bin below the mean: there log_ndtr keeps its precision in the tail.
    away = -(x0.double() - D_x.double()).abs() / std
    if ends.bin_width is None:
        nats = 0.5 * away**2 + math.log(std * math.sqrt(2.0 * math.pi))
    else:
        half = 0.5 * ends.bin_width / std
        upper, lower = torch.special.log_ndtr(away + half), torch.special.log_ndtr(away - half)
        nats = -(upper + torch.log1p(-torch.exp(lower - upper)))
    return nats.flatten(1).sum(dim=1)


@dataclass(frozen=True, eq=False)
class LevelTable:
    """The three terms of the bound a dimension, for some images, at every level of a grid.

    Attributes:
        ln_sigmas: (L,) increasing.
        integrand: (images, L) |x0 - D|^2 / sigma^2 a dimension.
        prior: (images, L) KL, if the level were the greatest.
        reconstruction: (images, L) nats, if the level were the least, with decoder_std.
        decoder_std: (L,) root mean square of x0 - D over the images.
    """

    ln_sigmas: Float[Tensor, " L"]
    integrand: Float[Tensor, "images L"]
    prior: Float[Tensor, "images L"]
    reconstruction: Float[Tensor, "images L"]
    decoder_std: Float[Tensor, " L"]

    def endpoints(self, tolerance: float = 0.005) -> tuple[int, int]:
        """Numbers of the least and the greatest level that make the mean bound least.

        Where the bound does not depend on an end (an exact denoiser), the range goes on.

        Args:
            tolerance: nats a dimension by which the pair may miss the least bound.
        """
        h = self.integrand.mean(dim=0)
        steps = 0.5 * (h[1:] + h[:-1]) * self.ln_sigmas.diff()
        below = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
        low_cost = self.reconstruction.mean(dim=0) - below
        high_cost = self.prior.mean(dim=0) + below
        bound = low_cost[:, None] + high_cost
        bound[torch.ones_like(bound).tril().bool()] = math.inf  # the ends in this order only
        lowest, highest = (bound <= bound.min() + tolerance).nonzero().T
        first = int(lowest.min())
        return first, int(highest[lowest == first].max())

    def learned_process(self, num_bins: int = 32) -> LearnedProcess:
        """The process of these endpoints whose bound has the least Monte-Carlo variance."""
        lowest, highest = self.endpoints()
        ln_range = float(self.ln_sigmas[lowest]), float(self.ln_sigmas[highest])
        return LearnedProcess(self.learned_density(ln_range, num_bins))

    def learned_density(self, ln_range: tuple[float, float], num_bins: int = 32) -> Histogram:
        """The same for given endpoints."""
        where = self.ln_sigmas.expand_as(self.integrand).flatten()
        return Histogram.of_integrand(where, self.integrand.flatten(), ln_range, num_bins)

    def variance(self, density: LevelDensity) -> float:
        """Var[h / q] of one draw of the level from q, nats^2 a dimension^2, mean over the images.

        The trapezoidal rule on the levels of the table that lie in the density's range. Between
        images h differs too, but no choice of levels helps there.
        """
        low, high = density.ln_range
        inside = (self.ln_sigmas >= low - 1e-9) & (self.ln_sigmas <= high + 1e-9)
        ln_sigma, h = self.ln_sigmas[inside], self.integrand[:, inside]
        q = density.log_density(ln_sigma.clamp(low, high)).exp()
        second = torch.trapezoid(h**2 / q, ln_sigma, dim=1)
        return float((second - torch.trapezoid(h, ln_sigma, dim=1) ** 2).mean())


def level_table(
    denoise: Denoiser,
    images: Sequence[Signal],
    sigmas: Float[Tensor, " levels"],
    ends: Ends,
    draws: NormalDraws,
) -> LevelTable:
    """Measure the terms of the bound on every level of a grid.

    Args:
        denoise: D(x; sigma).
        images: clean (1 c h w) each, in network units; validation images, if what is learned is
            to be reported on others.
        sigmas: strictly increasing levels.
        ends: prior and bin width; its decoder_std is not used, but measured.
        draws: level i + levels * image is the noise.
    """
    levels = [float(s) for s in sigmas]
    errors = torch.zeros(len(images), len(levels), dtype=torch.float64)
    prior, reconstruction = torch.zeros_like(errors), torch.zeros_like(errors)
    kept: list[list[Tensor]] = []
    for n, x0 in enumerate(images):
        row = [
            _denoised(denoise, x0, sigma, draws.normal(i + len(levels) * n, x0, _STATE))
            for i, sigma in enumerate(levels)
        ]
        errors[n] = torch.stack([_squared(x0 - D_x)[0] for D_x in row]) / x0.numel()
        prior[n] = torch.stack([prior_nats(x0, s, ends)[0] for s in levels]) / x0.numel()
        kept.append(row)
    std = errors.mean(dim=0).sqrt().clamp_min(1e-9)
    for n, x0 in enumerate(images):
        for i, D_x in enumerate(kept[n]):
            at = Ends(decoder_std=float(std[i]), bin_width=ends.bin_width)
            reconstruction[n, i] = reconstruction_nats(x0, D_x, levels[i], at)[0] / x0.numel()
    grid = torch.tensor(levels, dtype=torch.float64)
    return LevelTable(grid.log(), errors / grid**2, prior, reconstruction, std)


def _one_term(
    denoise: Denoiser, x0: Signal, density: LevelDensity, draws: NormalDraws, i: int
) -> PerImage:
    """h(l) / q(l) at a level of its own for every image."""
    flat = torch.zeros(len(x0), 1, 1, 1, dtype=torch.float64, device=x0.device)
    u = torch.special.ndtr(draws.normal(i, flat, _LEVEL)).flatten()
    ln_sigma = density.quantile(u)
    sigma = ln_sigma.exp().to(x0.dtype)
    x = x0 + sigma[:, None, None, None] * draws.normal(i, x0, _STATE)
    integrand = _squared(x0 - denoise(x, sigma)) / ln_sigma.exp() ** 2
    return integrand / density.log_density(ln_sigma).exp()


def _denoised(denoise: Denoiser, x0: Signal, sigma: float, eps: Tensor) -> Signal:
    level = torch.full((len(x0),), sigma, dtype=x0.dtype, device=x0.device)
    return denoise(x0 + sigma * eps, level)


def _squared(difference: Signal) -> PerImage:
    return difference.double().square().flatten(1).sum(dim=1)


def _integral(sigmas: Tensor, errors: Float[Tensor, "levels b"]) -> PerImage:
    """Int e / sigma^2 dln(sigma) over decreasing levels, by the trapezoidal rule."""
    return -torch.trapezoid(errors / sigmas[:, None] ** 2, sigmas.log(), dim=0)
