"""Is the spread of posterior samples as large as their error, and in the same places?

    V/B = (1 + 1/M) mean unbiased sample variance / mean |x0 - sample mean|^2

is 1 for a calibrated sampler: x0 and M samples of p(x0 | y) are exchangeable, so that their mean
is (1 + 1/M) P away from x0. Only pixels count that the data leave open.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from diffusion_core.protocols import Signal

BLOCK_PX = 16


@dataclass(frozen=True)
class Spread:
    """Sums over pixels, so that items can be pooled: `a + b` holds the pixels of both.

    Attributes:
        variance: sum of (1 + 1/M) times the unbiased sample variance.
        error: sum of |x0 - sample mean|^2.
    """

    variance: float = 0.0
    error: float = 0.0

    def __add__(self, other: Spread) -> Spread:
        return Spread(self.variance + other.variance, self.error + other.error)

    @property
    def ratio(self) -> float:
        """V/B; infinite if the mean is exact; nan of no pixels, or samples that are all exact."""
        if self.error:
            return self.variance / self.error
        return float("inf") if self.variance else float("nan")


def spread(
    samples: Float[Tensor, "m b c h w"],
    truth: Signal,
    unknown: Bool[Tensor, "b c h w"] | None = None,
) -> Spread:
    """Spread and error of M samples of a batch.

    Args:
        samples: of the posterior, in any units.
        truth: x0 (b c h w).
        unknown: True where the data leave a pixel open; None: everywhere.

    Raises:
        ValueError: if there are fewer than two samples.
    """
    variance, error = _maps(samples, truth)
    if unknown is not None:
        variance, error = variance * unknown, error * unknown
    return Spread((1 + 1 / len(samples)) * float(variance.sum()), float(error.sum()))


def block_log_correlation(
    samples: Float[Tensor, "m b c h w"],
    truth: Signal,
    unknown: Bool[Tensor, "b c h w"] | None = None,
    side_px: int = BLOCK_PX,
) -> float:
    """Correlation of log sample variance with log squared error, over blocks of side_px^2.

    Args:
        samples: of the posterior.
        truth: x0 (b c h w).
        unknown: as for `spread`.
        side_px: of the blocks.

    Returns:
        As `correlation`.
    """
    return correlation(block_logs(samples, truth, unknown, side_px))


def block_logs(
    samples: Float[Tensor, "m b c h w"],
    truth: Signal,
    unknown: Bool[Tensor, "b c h w"] | None = None,
    side_px: int = BLOCK_PX,
) -> Float[Tensor, "2 blocks"]:
    """(log sample variance, log squared error) of blocks; those of several images can be joined.

    Blocks without an unknown pixel, and what is left at the right and below, do not count.
    """
    variance, error = _maps(samples, truth)
    weight = torch.ones_like(truth) if unknown is None else unknown.to(truth).expand_as(truth)
    sums = [avg_pool2d(part * weight, side_px).sum(dim=1).flatten() for part in (variance, error)]
    counted = avg_pool2d(weight, side_px).sum(dim=1).flatten() > 0
    return torch.stack([part[counted].clamp_min(1e-20).log() for part in sums])


def correlation(logs: Float[Tensor, "2 blocks"]) -> float:
    """Pearson's; nan for fewer than three blocks, or where one of the two does not vary."""
    if logs.shape[1] < 3 or bool((logs.std(dim=1) == 0).any()):
        return float("nan")
    return float(torch.corrcoef(logs)[0, 1])


def _maps(samples: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(unbiased sample variance, squared error of the mean), float64, (b c h w)."""
    if len(samples) < 2:
        raise ValueError(f"a spread needs two samples or more, not {len(samples)}")
    exact = samples.double()
    mean = exact.mean(dim=0)
    return exact.var(dim=0), (truth.double() - mean).square()
