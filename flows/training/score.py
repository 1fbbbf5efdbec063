"""The restoration score: what a network is worth is seen in what it restores, not in its loss.

A few validation crops of every condition lose 70% of their pixels, or are pooled 4 x 4, get noise,
and are restored by CovProx in a few levels, with a covariance table of the network's own. The
score is the mean PSNR. Everything is keyed: two scores of one run differ by the network alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flows.config import TrainSettings
from flows.training.validation import validation_images

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffusion_core.networks.precond import Preconditioned
    from diffusion_core.protocols import Denoiser, LinearOperator

_SIGMA_Y = 0.05
_MISSING_SHARE = 0.7
_FACTOR = 4
_TABLE_SIGMAS = (0.05, 0.11, 0.25, 0.55)
_SIGMA_MAX, _SIGMA_MIN, _RHO = 0.7, 0.05, 3.0
_INFLATION = 2.0
"""Less than CovProx's 4, which suits twice the levels."""
_SEED = 4


@dataclass(frozen=True)
class Score:
    """What a network restores.

    Attributes:
        db: mean PSNR over conditions and operators.
        parts: PSNR by condition and operator: {"ct/random70": 30.1, "ct/pool4": ...}.
        images: PSNR of each image: {"ct/random70": [30.3, 29.9], ...}.
    """

    db: float
    parts: dict[str, float]
    images: dict[str, list[float]]


def restoration_score(settings: TrainSettings, module: Preconditioned) -> Score:
    """Restore validation crops with a network, on the device that it is on.

    Args:
        settings: `score` says how many crops, how large, and in how many levels.
        module: in evaluation mode.

    Raises:
        BadInputError: if no condition has a validation image.
    """
    import torch

    from domains.base import BadInputError

    asked = settings.score
    each: dict[str, list[float]] = {}
    device = next(module.parameters()).device
    images = validation_images(settings, asked.num_images, asked.side)
    with torch.no_grad():
        for index, (condition, found) in enumerate(images.items()):
            if found:
                x0 = _stacked(found).to(device)
                each |= {
                    f"{condition}/{name}": psnr
                    for name, psnr in _restored(settings, module, index, x0).items()
                }
    if not each:
        raise BadInputError(
            "no validation image to score the network by: give the data a validation split, or "
            "set score.every_steps=0 and ema_snapshots=0"
        )
    parts = {name: sum(found) / len(found) for name, found in each.items()}
    return Score(sum(parts.values()) / len(parts), parts, each)


def _restored(
    settings: TrainSettings, module: Preconditioned, index: int, x0: Tensor
) -> dict[str, list[float]]:
    """PSNR in dB of each of one condition's crops (b c h w), by operator."""
    import torch

    from diffusion_core.noise.draws import KeyedDraws
    from diffusion_core.noise.likelihood import GaussianNoise
    from diffusion_core.noise.schedules import power_sigmas
    from diffusion_core.posterior.covariance import fit_covariance
    from diffusion_core.posterior.covprox import CovProx

    denoise = _denoiser(settings, module, index, x0)
    images = list(x0.split(1))
    table = fit_covariance(denoise, images, sigmas=_TABLE_SIGMAS)
    solver = CovProx(table, inflation=_INFLATION)
    sigmas = power_sigmas(settings.score.num_levels, _SIGMA_MAX, _SIGMA_MIN, _RHO)
    psnr = {}
    for name, operator in _operators(x0).items():
        clean = operator.A(x0)
        y = clean + _SIGMA_Y * KeyedDraws(_SEED, f"{name}-noise").normal(0, clean)
        draws = KeyedDraws(_SEED, f"{name}-chain")
        x = solver(denoise, operator, y, GaussianNoise(_SIGMA_Y), sigmas.to(x0), draws).x
        errors = (x - x0).square().mean(dim=(1, 2, 3))
        psnr[name] = [float(db) for db in 10 * torch.log10(4 / errors)]
    return psnr


def _operators(x0: Tensor) -> dict[str, LinearOperator]:
    """What the crops are measured by; the mask is the same for all channels of a pixel."""
    from diffusion_core.noise.draws import KeyedDraws
    from diffusion_core.operators.mask import Mask
    from diffusion_core.operators.pool import Pool

    drawn = KeyedDraws(_SEED, "mask").normal(0, x0[:, :1])
    threshold = drawn.flatten().quantile(_MISSING_SHARE)
    return {"random70": Mask(drawn > threshold), "pool4": Pool(_FACTOR)}


def _denoiser(settings: TrainSettings, module: Preconditioned, index: int, x0: Tensor) -> Denoiser:
    """D of a condition in the precision that the settings train in."""
    import torch

    from diffusion_core.networks.precond import ConditionedDenoiser

    denoise = ConditionedDenoiser(module, index, x0.shape[1])
    lower = settings.dtype == "bfloat16"

    def in_its_precision(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=lower):
            return denoise(x, sigma)

    return in_its_precision


def _stacked(images: list[torch.Tensor]) -> Tensor:
    """(b c h w): the top left corners of the least size, in whole squares of the pooling."""
    import torch

    h, w = (min(x.shape[axis] for x in images) // _FACTOR * _FACTOR for axis in (-2, -1))
    return torch.cat([x[:, :, :h, :w] for x in images])
