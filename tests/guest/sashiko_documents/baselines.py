"""Classical restoration of pages: a median filter, and total variation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from scipy import ndimage
from torch import Tensor

from domains.base import Measurement, Problem
from domains.classical import TVSettings, restore_tv, settings_from
from domains.inpainting import biharmonic


def first_estimate(problem: Problem) -> Tensor:
    """The data seen as an image, its holes filled smoothly."""
    start = problem.operator.A_adjoint(problem.y)
    if problem.known is None:
        return start
    known = problem.known[:, 0].numpy().repeat(len(start) // len(problem.known), axis=0)
    filled = [biharmonic(page.numpy(), where) for page, where in zip(start, known, strict=True)]
    return torch.stack([torch.from_numpy(page) for page in filled]).to(start.dtype)


def median(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """The median of size_px squares of the first estimate."""
    size = int(params.get("size_px", 3))
    pages = ndimage.median_filter(first_estimate(problem).numpy(), (1, 1, size, size))
    return torch.from_numpy(pages)


def tv(measurement: Measurement, problem: Problem, params: Mapping[str, Any]) -> Tensor:
    """Total variation: TVSettings."""
    return restore_tv(problem, first_estimate(problem), settings_from(TVSettings, params, "tv"))


BASELINES = {"median": median, "tv": tv}
