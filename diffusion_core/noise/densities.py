"""Densities of ln sigma on a range: where a Monte-Carlo estimate takes its noise levels.

An integral over ln sigma is estimated by h(ln sigma) / q(ln sigma), ln sigma ~ q. Any q > 0 is
unbiased; the variance is least for q proportional to the root mean square of h at each level, which
`Histogram.of_integrand` learns from the losses that training or evaluation meets anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

_LEAST_SHARE = 0.02  # of the mass, kept uniform: a level that was never seen may matter yet


class LevelDensity(Protocol):
    """A density of ln sigma between two levels."""

    @property
    def ln_range(self) -> tuple[float, float]:
        """ln of the least and of the greatest level."""
        ...

    def quantile(self, u: Tensor) -> Tensor:
        """ln sigma at u in [0, 1]."""
        ...

    def log_density(self, ln_sigma: Tensor) -> Tensor:
        """ln q(ln sigma), on the range."""
        ...


@dataclass(frozen=True)
class LogUniform:
    """Ln sigma even over a range.

    Attributes:
        low: least level.
        high: greatest level.
    """

    low: float
    high: float

    @property
    def ln_range(self) -> tuple[float, float]:
        """The whole range."""
        return math.log(self.low), math.log(self.high)

    def quantile(self, u: Tensor) -> Tensor:
        """Linear."""
        first, last = self.ln_range
        return first + (last - first) * u

    def log_density(self, ln_sigma: Tensor) -> Tensor:
        """Constant."""
        first, last = self.ln_range
        return torch.full_like(ln_sigma, -math.log(last - first))


@dataclass(frozen=True)
class LogNormal:
    """Ln sigma ~ N(mean, std^2), truncated to a range. Source: Karras et al. 2022, Table 1.

    Attributes:
        mean: of ln sigma before truncation.
        std: likewise.
        low: least level.
        high: greatest level.
    """

    mean: float
    std: float
    low: float
    high: float

    @property
    def ln_range(self) -> tuple[float, float]:
        """The whole range."""
        return math.log(self.low), math.log(self.high)

    def quantile(self, u: Tensor) -> Tensor:
        """By the inverse of the normal distribution function."""
        first, last = self._ends()
        z = torch.special.ndtri((first + (last - first) * u).double())
        return (self.mean + self.std * z).clamp(*self.ln_range).to(u.dtype)

    def log_density(self, ln_sigma: Tensor) -> Tensor:
        """Normal, over the mass inside the range."""
        first, last = self._ends()
        z = (ln_sigma - self.mean) / self.std
        return -0.5 * z**2 - math.log(math.sqrt(2 * math.pi) * self.std * (last - first))

    def _ends(self) -> tuple[float, float]:
        """Normal distribution function at the ends of the range."""
        ends = torch.tensor([(x - self.mean) / self.std for x in self.ln_range]).double()
        first, last = torch.special.ndtr(ends).tolist()
        return first, last


@dataclass(frozen=True, eq=False)
class Histogram:
    """A density that is constant in each bin of ln sigma.

    Attributes:
        edges: (bins + 1,) ln sigma, increasing, float64.
        mass: (bins,) > 0, of sum 1.
    """

    edges: Float[Tensor, " edges"]
    mass: Float[Tensor, " bins"]

    @classmethod
    def of_integrand(
        cls,
        ln_sigma: Float[Tensor, " n"],
        integrand: Float[Tensor, " n"],
        ln_range: tuple[float, float],
        num_bins: int = 32,
    ) -> Histogram:
        """The density of least variance for an integrand seen at some levels.

        Args:
            ln_sigma: where it was evaluated, however the levels were chosen.
            integrand: its values >= 0, one image and noise each.
            ln_range: of the density; values outside are left out.
            num_bins: of even width. A bin that saw no value takes its neighbours' mean.

        Raises:
            ValueError: if no value lies in the range, or all are 0.

        Source: optimal importance sampling, q ~ E[h^2]^(1/2) (Kahn & Marshall 1953); used for noise
            levels by Nichol & Dhariwal 2021 (arXiv:2102.09672), Equation 18, over the range of
            Kingma et al. 2021 (arXiv:2107.00630), section 5.1.
        """
        edges = torch.linspace(*ln_range, num_bins + 1, dtype=torch.float64)
        ln_sigma, integrand = ln_sigma.cpu(), integrand.cpu()
        inside = (ln_sigma >= edges[0]) & (ln_sigma <= edges[-1])
        where, squared = ln_sigma[inside].double(), integrand[inside].double() ** 2
        bins = (torch.bucketize(where, edges) - 1).clamp(0, num_bins - 1)
        count = torch.bincount(bins, minlength=num_bins)
        total = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, squared)
        if not float(total.sum()) > 0:
            raise ValueError("a density is learned from values of the integrand on its range")
        rms = _filled((total / count.clamp_min(1)).sqrt(), count > 0)
        mass = rms / rms.sum()
        return cls(edges, (1 - _LEAST_SHARE) * mass + _LEAST_SHARE / num_bins)

    @property
    def ln_range(self) -> tuple[float, float]:
        """The outer edges."""
        return float(self.edges[0]), float(self.edges[-1])

    def quantile(self, u: Tensor) -> Tensor:
        """Piecewise linear in u, and increasing."""
        below, index = self._bin_of(u.double(), self._cumulative())
        edges, mass = self.edges.to(u.device), self.mass.to(u.device)
        share = (u.double() - below) / mass[index]
        ln_sigma = torch.lerp(edges[index], edges[index + 1], share.clamp(0, 1))
        return ln_sigma.to(u.dtype)

    def log_density(self, ln_sigma: Tensor) -> Tensor:
        """Constant in each bin."""
        _, index = self._bin_of(ln_sigma.double(), self.edges)
        height = (self.mass / self.edges.diff()).to(ln_sigma.device)
        return height[index].log().to(ln_sigma.dtype)

    def _cumulative(self) -> Tensor:
        return torch.cat([self.mass.new_zeros(1), self.mass.cumsum(0)])

    def _bin_of(self, values: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """(lower edge, number) of the bin of each value."""
        edges = edges.to(values.device)
        index = (torch.bucketize(values, edges, right=True) - 1).clamp(0, len(self.mass) - 1)
        return edges[index], index


def _filled(values: Tensor, seen: Tensor) -> Tensor:
    """Bins that were not seen get the mean of the nearest ones that were, on either side."""
    places = torch.arange(len(values))
    known = places[seen]
    after = torch.searchsorted(known, places).clamp_max(len(known) - 1)
    before = (torch.searchsorted(known, places, right=True) - 1).clamp_min(0)
    return 0.5 * (values[known[before]] + values[known[after]])
