"""Images that lack pixels, made whole by a model that learned from them: the E-step of EM.

    first part    learns from the measured pixels alone (`corruption`)
    filling       its posterior mean, given the measured pixels, stands for the others
    second part   learns from the whole images (`corruption.filled_by`), and may fill for a third

Only in the second part the network meets images of which nothing is missing, as it will be asked
to restore. Source: expectation maximisation with a diffusion prior is that of Rozet et al. 2024
(arXiv:2405.13712), which draws samples; a mean makes no grain that is not there.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.base import Array, BadInputError

if TYPE_CHECKING:
    from diffusion_core.model import Model
    from flows.config import TrainSettings

_LEVELS = 6, 0.5, 0.02, 3.0
"""How many, the highest and the lowest, rho."""
_SOLVER: dict[str, Any] = {"tolerance": 5e-3, "max_steps": 40}


class Filler:
    """Restores what images lack.

    Args:
        model: with covariance tables.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.digest = model.digest

    def fill(self, view: Array, condition: str, source_digest: str) -> Array:
        """A view (c z h w) in network units with its NaN restored, slice by slice.

        Args:
            view: NaN where nothing was measured.
            condition: of the model.
            source_digest: of the image, which keys the noise.

        Raises:
            BadInputError: if the model does not know the condition.
        """
        import torch

        from diffusion_core.model import BadModelError
        from diffusion_core.noise.draws import KeyedDraws
        from diffusion_core.noise.likelihood import GaussianNoise
        from diffusion_core.noise.schedules import power_sigmas
        from diffusion_core.operators import Mask
        from diffusion_core.posterior import make_solver

        if not np.isnan(view).any():
            return view
        try:
            solver = make_solver("covprox", self._model.prior(condition), _SOLVER)
        except BadModelError as error:
            raise BadInputError(f"the setting 'corruption.filled_by': {error}") from error
        denoise, whole = self._model.denoiser(condition), np.array(view, np.float32)
        for z in range(view.shape[1]):
            y = torch.from_numpy(np.ascontiguousarray(view[:, z], np.float32))[None]
            known = y.isfinite()
            if known.all():
                continue
            if torch.equal(known, known[:, :1].expand_as(known)):
                known = known[:, :1]  # channels that lack the same pixels are solved apart
            draws = KeyedDraws(0, source_digest, (z, 0, 0))
            with torch.no_grad():
                found = solver(
                    denoise, Mask(known), y.nan_to_num(0.0), GaussianNoise(0.0),
                    power_sigmas(*_LEVELS), draws,
                )  # fmt: skip
            whole[:, z] = torch.where(known, y, found.x)[0].numpy()
        return whole


def filler_of(settings: TrainSettings) -> Filler | None:
    """What fills a training's images; None if nothing does.

    Raises:
        BadInputError: if the model that is named is none.
    """
    by = settings.corruption and settings.corruption.filled_by
    return _open(by) if by else None


@lru_cache(maxsize=2)
def _open(path: Path) -> Filler:
    """The filler of a model directory.

    Raises:
        BadInputError: if it is none.
    """
    from diffusion_core.model import BadModelError, Model

    try:
        return Filler(Model.load(path))
    except BadModelError as error:
        raise BadInputError(
            f"the setting 'corruption.filled_by' names no model: {error}"
        ) from error
