"""Data steps of masks and mosaics, in image space, where missing pixels cost nothing.

The canvas may be padded. The dual form converges badly here: a random mask aliases every frequency
into every other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_core.operators import Identity, Mask, MaskWithMeans, Mosaic
from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.posterior.linear.base import (
    Accuracy,
    DataStep,
    Update,
    is_exact,
    positive,
    solve,
    uniform_level,
)
from diffusion_core.posterior.spectra import radial_frequency
from diffusion_core.protocols import Data

_PADDING = 32
"""Margin of missing pixels, so that opposite borders of a photograph do not touch."""
_DENSITY_STD = 2.0
"""Pixels over which the density of the data is averaged for a preconditioner."""
_LEAST_MEAN_VARIANCE = 1e-6
"""Of guided means: a mean that counted as exact could not be reconciled with its neighbours."""
_LEAST_DENSITY = 1e-3
"""Density that counts as none, of the largest."""


@dataclass(frozen=True, eq=False)
class _Canvas:
    """Circulant products on the padded canvas, in opponent (`rotated`) or plain channels."""

    covariance: Covariance
    rotated: bool

    def grow(self, x: Tensor) -> Tensor:
        """Pad an image by zeros to the canvas."""
        (H, W), (h, w) = self.covariance.canvas, x.shape[-2:]
        return F.pad(x, (0, W - w, 0, H - h))

    def filter(self, x: Tensor, spectrum: Tensor) -> Tensor:
        """Multiply by a spectrum; x is on the canvas."""
        if not self.rotated:
            return self.covariance.filter(x, spectrum)
        return torch.fft.irfft2(torch.fft.rfft2(x) * spectrum, s=self.covariance.canvas)


@dataclass(frozen=True, eq=False)
class _Means:
    """What the guided means add to the system: S P' W P S, P the means and W one over R of them."""

    operator: MaskWithMeans
    std: Tensor
    weight: Tensor
    residual: Tensor
    canvas: _Canvas

    def normal(self, u: Tensor) -> Tensor:
        """S P' W P S u on the canvas."""
        h, w = self.std.shape[-2:]
        means = self.operator.means(self.std * u[..., :h, :w])
        return self.canvas.grow(self.std * self.operator.means_adjoint(self.weight * means))

    def right(self) -> Tensor:
        """S P' W r on the canvas."""
        return self.canvas.grow(self.std * self.operator.means_adjoint(self.weight * self.residual))

    def power(self) -> Tensor:
        """Eigenvalues of a circulant like S P' W P S where squares are guided, (b 1 H W_half).

        A square's mean keeps a wave's energy by the squared sinc of its frequency, over the area.
        """
        factor = self.operator.factor
        height, width = self.canvas.covariance.canvas
        rows = torch.sinc(factor * torch.fft.fftfreq(height, dtype=torch.float64))
        columns = torch.sinc(factor * torch.fft.rfftfreq(width, dtype=torch.float64))
        passed = (rows.square()[:, None] * columns.square()).to(self.std)
        guided = (self.weight > 0).to(self.std)
        axes = (1, 2, 3)
        count = guided.sum(dim=axes, keepdim=True).clamp_min(1.0)
        mean = (self.weight * guided).sum(dim=axes, keepdim=True) / count
        square = self.std.square().mean(dim=axes, keepdim=True)
        return mean * square * passed / factor**2


class MaskStep(DataStep):
    """Noisy pixels: CG on (C^-1 + S M S / R) u; exact pixels: CG on the hole's block of C^-1.

    Batch elements are of one kind or the other; exact pixels beside noisy ones of the same element
    are given half a step of an 8-bit image as noise.
    """

    padding = _PADDING

    def __init__(self, operator: Mask | MaskWithMeans | Identity) -> None:
        self.mask = None if isinstance(operator, Identity) else operator.mask
        self.guided = operator if isinstance(operator, MaskWithMeans) else None

    def __call__(
        self, covariance: Covariance, variance: Tensor, residual: Data, accuracy: Accuracy
    ) -> Update:
        """See DataStep."""
        of_means = variance_of_means = None
        if self.guided is not None:
            residual, of_means = self.guided.split(residual)
            variance, variance_of_means = self.guided.split(variance)
            level = uniform_level(variance)
            variance = variance if level is None else level
        mask = torch.ones_like(residual[:1, :1]) if self.mask is None else self.mask.to(residual)
        residual = torch.where(mask > 0, residual, 0)  # missing ones may be anything, NaN too
        if covariance.is_white and self.guided is None:
            white = covariance.spectrum.flatten()[0]
            return Update(mask * residual * (white / (white + variance)))
        # Where the channels share M and R they are, in the opponent basis, systems of their own.
        apart = mask.shape[1] == 1 and (variance.ndim < 4 or variance.shape[1] == 1)
        canvas = _Canvas(covariance, rotated=apart)
        std = torch.ones_like(mask[:, :1]) if covariance.std is None else covariance.std
        r = covariance.to_opponent(residual) if apart else residual
        means = None
        if self.guided is not None and of_means is not None and variance_of_means is not None:
            weight = self.guided.cells / variance_of_means.clamp_min(_LEAST_MEAN_VARIANCE)
            weight = weight[:, :1] if apart else weight
            of_means = covariance.to_opponent(of_means) if apart else of_means
            means = _Means(self.guided, std, weight, of_means, canvas)
        scalar_dims = 2 if apart else 1
        exact = is_exact(variance)
        if bool(exact.all()):
            solved = _hole(canvas, std, mask, r, accuracy, scalar_dims, means)
        else:
            weight = torch.where(mask > 0, mask / positive(variance), 0)
            solved = _noisy(canvas, std, weight, r, accuracy, scalar_dims, means)
            if bool(exact.any()):
                hole = _hole(canvas, std, mask, r, accuracy, scalar_dims, means)
                solved = _chosen(exact, hole, solved)
        delta = std * solved.delta
        delta = covariance.from_opponent(delta) if apart else delta
        return Update(delta, solved.num_steps, solved.relative_residual)


def _chosen(which: Tensor, a: Update, b: Update) -> Update:
    """Batch elements of the one or of the other."""
    left = max(a.relative_residual, b.relative_residual)
    return Update(torch.where(which, a.delta, b.delta), max(a.num_steps, b.num_steps), left)


class MosaicStep(DataStep):
    """One colour a pixel: to the solve, a mask for each channel."""

    padding = _PADDING

    def __init__(self, operator: Mosaic) -> None:
        self.operator = operator

    def __call__(
        self, covariance: Covariance, variance: Tensor, residual: Data, accuracy: Accuracy
    ) -> Update:
        """See DataStep."""
        h, w = residual.shape[-2:]
        masks = MaskStep(Mask(self.operator.mask(h, w, residual.device)))
        return masks(covariance, variance, self.operator.A_adjoint(residual), accuracy)


def _noisy(
    canvas: _Canvas,
    std: Tensor,
    weight: Tensor,
    residual: Tensor,
    accuracy: Accuracy,
    scalar_dims: int,
    means: _Means | None,
) -> Update:
    """CG on (C^-1 + S W S) u = S W r with W = M / R, preconditioned by circulants.

    One at mean W serves a few steps. A solve that is to converge (C^-1 ends somewhere) has slow
    modes in the wide margin and in clusters of missing pixels, where W is 0: it takes several.
    """
    h, w = residual.shape[-2:]
    spectrum = canvas.covariance.spectrum
    inverse = 1.0 / spectrum
    diagonal = canvas.grow((std**2 * weight).expand(len(residual), -1, -1, -1))
    if canvas.covariance.reach is None and means is None:
        mean = diagonal.mean(dim=(1, 2, 3), keepdim=True)
        parts: list[tuple[Tensor | None, Tensor]] = [(None, mean)]
    else:
        parts = _levels_of_density(diagonal)
    prior = spectrum if means is None else spectrum / (1.0 + means.power() * spectrum)
    circulants = [(share, prior / (1.0 + level * prior)) for share, level in parts]

    def precondition(u: Tensor) -> Tensor:
        terms = (
            canvas.filter(u, gain) if share is None else share * canvas.filter(share * u, gain)
            for share, gain in circulants
        )
        return torch.stack(list(terms)).sum(dim=0)

    def matrix(u: Tensor) -> Tensor:
        product = canvas.filter(u, inverse) + diagonal * u
        return product if means is None else product + means.normal(u)

    right = canvas.grow(std * weight * residual)
    solved = solve(
        matrix,
        right if means is None else right + means.right(),
        precondition,
        accuracy,
        scalar_dims,
    )
    return Update(solved.delta[..., :h, :w], solved.num_steps, solved.relative_residual)


def _levels_of_density(diagonal: Tensor) -> list[tuple[Tensor | None, Tensor]]:
    """Low, middle and high levels of the local mean of S W S, and each pixel's share of them.

    Returns:
        (root of the share (b 1 H W), level (b 1 1 1)) of each; the shares sum to 1.
    """
    size = diagonal.shape[-2:]
    squared = radial_frequency(*size).to(diagonal).square()
    blur = torch.exp(-2.0 * (math.pi * _DENSITY_STD) ** 2 * squared)
    local = torch.fft.irfft2(torch.fft.rfft2(diagonal.mean(dim=1, keepdim=True)) * blur, s=size)
    most = local.amax(dim=(1, 2, 3), keepdim=True)
    depth = (local / most.clamp_min(torch.finfo(most.dtype).tiny)).clamp(
        _LEAST_DENSITY, 1.0
    ).log() / math.log(_LEAST_DENSITY)
    place = 2.0 * depth  # 0 where it is densest, 2 where nothing was measured
    return [
        ((1.0 - (place - i).abs()).clamp_min(0.0).sqrt(), most * _LEAST_DENSITY ** (i / 2.0))
        for i in range(3)
    ]


def _hole(
    canvas: _Canvas,
    std: Tensor,
    mask: Tensor,
    residual: Tensor,
    accuracy: Accuracy,
    scalar_dims: int,
    means: _Means | None,
) -> Update:
    """Exact data: u = r / S on the mask M, and on its complement H, H C^-1 H u = -H C^-1 M r / S.

    Preconditioned by H C H, the inverse but for the Schur complement of the border.
    """
    h, w = residual.shape[-2:]
    spectrum = canvas.covariance.spectrum
    inverse = 1.0 / spectrum
    hole = 1.0 - canvas.grow(mask)
    known = canvas.grow(mask * residual / std)
    prior = spectrum if means is None else spectrum / (1.0 + means.power() * spectrum)

    def matrix(u: Tensor) -> Tensor:
        product = canvas.filter(u, inverse)
        return hole * (product if means is None else product + means.normal(u))

    right = -canvas.filter(known, inverse)
    if means is not None:  # of squares within the hole: no known pixel is in them
        right = right + means.right()
    solved = solve(
        matrix,
        hole * right,
        lambda u: hole * canvas.filter(u, prior),
        accuracy,
        scalar_dims,
    )
    u = known + solved.delta
    return Update(u[..., :h, :w], solved.num_steps, solved.relative_residual)
