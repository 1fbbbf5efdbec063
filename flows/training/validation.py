"""Validation images: what checkpoints, covariance tables and figures in the card come from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flows.config import TrainSettings
from flows.training.filling import ByModel, filler_of
from flows.training.sources import open_sources

_CALIBRATION_SLICES = 4
_LEAST_SIDE_PX = 32
_MOST_LEARNED = 3
"""Training items of a kind that stand in for validation items: each may have to be restored."""
_FILL_SIGMA = 0.02
_SEED = 0
"""Of the phases and bands drawn for validation: not the run's, or no two runs could be compared."""

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from diffusion_core.networks.precond import Preconditioned


def validation_images(
    settings: TrainSettings, num_images: int, side: int, *, learned: bool = False
) -> dict[str, list[Tensor]]:
    """Centre crops (1 c h w) in network units of the validation split, per condition.

    Slices are spread over each item and taken in turn from every item, so that a few images
    already show them all. A condition without images of its own is drawn from its source's by
    the domain's augmentation, keyed by the image's number.

    Args:
        settings: names the datasets and conditions.
        num_images: for each condition, where there are as many.
        side: of the crop in pixels; smaller images are taken whole.
        learned: take the first training items instead.
    """
    pairs = _pairs(_training_json(settings), num_images, side, learned=learned)
    return {condition: [image for image, _ in chosen] for condition, chosen in pairs.items()}


def validation_guides(
    settings: TrainSettings, num_images: int, side: int
) -> dict[str, list[Tensor]]:
    """The guides (1 g h w) of `validation_images`, as the network takes them; g may be 0."""
    pairs = _pairs(_training_json(settings), num_images, side)
    return {condition: [guide for _, guide in chosen] for condition, chosen in pairs.items()}


def _training_json(settings: TrainSettings) -> str:
    """The settings of a training, without those that a kind of its own adds."""
    return settings.model_dump_json(include=set(TrainSettings.model_fields))


@lru_cache(maxsize=4)
def _pairs(
    settings_json: str, num_images: int, side: int, *, learned: bool = False
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(image, its guides) of each condition."""
    import numpy as np
    import torch

    from flows.training.data import (
        condition_channels,
        condition_domains,
        load_windows,
        num_guides,
    )

    settings = TrainSettings.model_validate_json(settings_json)
    channels = condition_channels(settings)
    domains = condition_domains()
    volumes: dict[str, list[Sequence[np.ndarray[Any, Any]]]] = {}
    filler = filler_of(settings)
    split, most = ("train", _MOST_LEARNED) if learned else ("validation", None)
    for condition, views in load_windows(settings, split, filled=False, most=most):
        volumes.setdefault(condition, []).append(views)
    images: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for condition in channels:
        source = domains[condition].drawn_from.get(condition, condition)
        found = volumes.get(condition, []) or volumes.get(source, [])
        chosen: list[tuple[Tensor, Tensor]] = []
        for number in range(num_images if found else 0):
            turn, turns = number // len(found), -(-num_images // len(found))
            views = found[number % len(found)]
            # Every other image at the coarsest scale: cameras blur single pixels, and what was
            # made smaller is sharper than what a camera gave.
            volume = _coarsest(views) if number % 2 else views[0]
            depth = volume.shape[1]
            z = min(depth - 1, int(depth * (turn + 1) / (turns + 1)))
            joined = _centre(volume[:, z], side)
            patch, guide = np.split(joined, [len(joined) - num_guides(settings)])
            if isinstance(filler, ByModel):  # of the crop alone: photographs are large
                at = condition if condition in volumes else source
                patch = filler.fill(patch[:, None], at, f"{condition}-{number}")[:, 0]
            rng = np.random.Generator(np.random.Philox(key=[_SEED, number]))
            if condition in domains[condition].drawn_from:
                patch = domains[condition].augment(condition, patch, rng)
            parts = (np.ascontiguousarray(part, np.float32) for part in (patch, guide))
            image, shown = (torch.from_numpy(part)[None] for part in parts)
            chosen.append((image, shown))
        images[condition] = chosen
    return images


def calibration_images(settings: TrainSettings) -> dict[str, list[Tensor]]:
    """Whole slices (1 c h w) of the settings' calibration items, spread over each, per condition.

    Where there are `few` slices all items are such. They are training items: their residuals
    flatter the network a little, but a table measured at another resolution misleads the solver
    more (infra/decisions/0002).
    """
    import numpy as np
    import torch

    images: dict[str, list[Tensor]] = {}
    filler = filler_of(settings)
    for source in open_sources(settings, filled=False):
        for record in source.items():
            named = record.item_id in settings.calibration_items
            if not named and (settings.few is None or record.split != "train"):
                continue
            windows = source.windows(record)
            for condition, views in windows.items():
                depth = views[0].shape[1]
                for turn in range(_CALIBRATION_SLICES):
                    z = (2 * turn + 1) * depth // (2 * _CALIBRATION_SLICES)
                    image = np.ascontiguousarray(views[0][:, z], np.float32)
                    if isinstance(filler, ByModel):
                        image = filler.fill(image[:, None], condition, record.source_digest)[:, 0]
                    images.setdefault(condition, []).append(torch.from_numpy(image)[None])
    return {c: chosen for c, chosen in images.items() if c in settings.conditions}


def without_holes(
    module: Preconditioned, images: dict[str, list[Tensor]]
) -> dict[str, list[Tensor]]:
    """The images (1 c h w) with what was never measured (NaN) as the network estimates it.

    Nobody knows the truth there: figures taken on them flatter the network, by the share that
    is filled. Whole images stay as they are.

    Args:
        module: told of missing pixels in training, where there are any.
        images: by condition, in the order of the network's index.
    """
    return {
        condition: [_whole(module, index, image) for image in found]
        for index, (condition, found) in enumerate(images.items())
    }


def _whole(module: Preconditioned, index: int, image: Tensor) -> Tensor:
    """D's estimate at the least noise, wherever an image (1 c h w) holds NaN."""
    import torch
    import torch.nn.functional as F

    from diffusion_core.networks.local_unet import NUM_CHANNELS
    from diffusion_core.noise.streams import training_noise

    lacking = image.isnan()
    if not lacking.any():
        return image
    _, c, h, w = image.shape
    # The canvas is padded to the network's stride by pixels that are missing too.
    pad = (0, -w % module.network.stride, 0, -h % module.network.stride)
    noisy = image.nan_to_num(0.0) + _FILL_SIGMA * training_noise(_SEED, 0, image)
    x = F.pad(noisy, (*pad, 0, NUM_CHANNELS - c))
    missing = F.pad(F.pad(lacking.float(), pad, value=1.0), (0, 0, 0, 0, 0, NUM_CHANNELS - c))
    sigma, condition = torch.full((1,), _FILL_SIGMA), torch.full((1,), index)
    with torch.no_grad():
        D_x = module(x * (1 - missing), sigma, condition, missing=missing)
    return torch.where(lacking, D_x[:, :c, :h, :w], image)


def denoising_psnr(
    module: Preconditioned, images: dict[str, list[Tensor]], sigmas: tuple[float, ...]
) -> dict[str, float]:
    """PSNR in dB of D at each level, mean over images: {"ct/sigma-0.2": 34.1, ...}.

    Network units span 2, so the peak is 2; nothing is clipped.
    """
    import torch

    from diffusion_core.networks.precond import ConditionedDenoiser
    from diffusion_core.noise.streams import training_noise

    figures: dict[str, float] = {}
    for index, (condition, chosen) in enumerate(images.items()):
        for sigma in sigmas:
            total = 0.0
            for number, x0 in enumerate(chosen):
                denoise = ConditionedDenoiser(module, index, x0.shape[1])
                with torch.no_grad():
                    D_x = denoise(
                        x0 + sigma * training_noise(1, number, x0), torch.full((1,), sigma)
                    )
                total += float(10 * torch.log10(4 / (D_x - x0).square().mean()))
            if chosen:
                figures[f"{condition}/sigma-{sigma:g}"] = total / len(chosen)
    return figures


def _coarsest(views: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The last view that is no sliver: a volume of few slices, seen from the side, is one."""
    least = min(_LEAST_SIDE_PX, *views[0].shape[-2:])
    return [view for view in views if min(view.shape[-2:]) >= least][-1]


def _centre(image, side: int):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The centre side x side of (c h w), or all of a smaller one."""
    h, w = image.shape[-2:]
    top, left = max(0, (h - side) // 2), max(0, (w - side) // 2)
    return image[:, top : top + side, left : left + side]
