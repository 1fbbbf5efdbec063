"""The covariance of x0 given x at every noise level: Sigma = S C S, measured once per prior.

C is stationary: diagonal in Fourier, a radial spectrum for each opponent-colour channel, tabulated
over noise levels and interpolated in log sigma, so it serves any canvas size (frequencies are in
cycles a pixel). S is one standard deviation a pixel, read from a table of squared residual against
the blurred gradient energy of mu = D(x; sigma): a denoiser errs at edges and in texture, hardly in
air. Both are measured on a few validation images in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.posterior.gaussian import Covariance
from diffusion_core.posterior.spectra import (
    fast_size,
    gradient_energy,
    interpolate,
    opponent_basis,
    radial_frequency,
    radial_spectrum,
    short_sighted,
)
from diffusion_core.protocols import Denoiser, NormalDraws, Signal

DEFAULT_SIGMAS = tuple(float(s) for s in torch.logspace(-1.85, 0.3, 14, dtype=torch.float64))
"""Fourteen levels from .014 to 2."""
ENERGY_FLOOR = 1e-7
"""Added to the gradient energy (squared network units) before its logarithm."""
_FORMAT = "sashiko-covariance-1"
_NUM_FREQUENCIES = 28
_LOWEST_FREQUENCY, _HIGHEST_FREQUENCY = 1.0 / 256.0, math.sqrt(0.5)
_FAR_FREQUENCY = 1.0 / 2048.0
"""To which a prior is continued for wide holes: further, float32 would not resolve the rest."""
_NUM_ENERGIES = 20
_LEAST_VARIANCE = 1e-3
"""Smallest S^2, of the mean S^2: keeps the solves well-conditioned where nothing ever errs."""


@dataclass(frozen=True, eq=False)
class LevelCovariance:
    """Sigma at one noise level, for any canvas.

    Attributes:
        basis: (c, c) orthonormal opponent basis.
        log_frequencies: (F,) increasing; natural logarithm of cycles a pixel.
        log_spectrum: (c, F) log eigenvalues of C there.
        log_energy: (K,) increasing knots of the log gradient energy of mu; K = 0 for S = 1.
        log_variance: (K,) log S^2 there.
        reach: pixels at which C^-1 ends (spectra.short_sighted); None: it does not.
    """

    basis: Float[Tensor, "c c"]
    log_frequencies: Float[Tensor, " knots"]
    log_spectrum: Float[Tensor, "c knots"]
    log_energy: Float[Tensor, " energies"]
    log_variance: Float[Tensor, " energies"]
    reach: int | None = None

    def spectrum(self, height: int, width: int) -> Float[Tensor, "c h w_half"]:
        """Eigenvalues of C on a height x width canvas, in the layout of rfft2."""
        log_f = torch.log(radial_frequency(height, width).clamp_min(1e-9))
        C = torch.exp(interpolate(log_f, self.log_frequencies, self.log_spectrum))
        return C if self.reach is None else short_sighted(C, self.reach, width)

    def local_std(self, mu: Signal) -> Float[Tensor, "b 1 h w"]:
        """S, from the gradient energy of mu."""
        if self.log_energy.numel() == 0:
            return torch.ones_like(mu[:, :1])
        energy = gradient_energy(mu).add(ENERGY_FLOOR).log()
        knots, values = self.log_energy.to(mu), self.log_variance.to(mu)
        return torch.exp(0.5 * interpolate(energy, knots, values[None])[0])

    def on(
        self, mu: Signal, inflation: float = 1.0, padding: int = 0, *, local: bool = True
    ) -> Covariance:
        """Sigma on the canvas of mu.

        Args:
            mu: the denoiser's estimate, (b c h w).
            inflation: factor on Sigma.
            padding: pixels by which the circulant canvas exceeds the image at least.
            local: False sets S = 1.

        Raises:
            ValueError: if mu has other channels than the table.
        """
        _same_channels(self.basis, mu)
        h, w = mu.shape[-2:]
        if padding and self.reach is not None:
            # The margin's own unknown pixels would pass on what one border tells the opposite one.
            padding = max(padding, 2 * self.reach)
        canvas = (fast_size(h + padding), fast_size(w + padding)) if padding else (h, w)
        spectrum = (inflation * self.spectrum(*canvas)).to(mu)
        std = self.local_std(mu) if local and self.log_energy.numel() else None
        return Covariance(spectrum, self.basis.to(mu), std, canvas, self.reach)


@dataclass(frozen=True, eq=False)
class CovarianceTable:
    """Everything measured about a prior's covariance; float64 tensors, see LevelCovariance.

    Attributes:
        ln_sigmas: (L,) increasing.
        basis: (c, c).
        log_frequencies: (F,).
        log_spectrum: (L, c, F).
        log_energy: (L, K).
        log_variance: (L, K).
        prior_mean: (c,) mean level of images: the prior where nothing is known (sigma -> inf).
        prior_log_spectrum: (c, F) of images about that mean.
        reach: pixels at which C^-1 ends, for canvases cut into blocks; not saved.
    """

    ln_sigmas: Float[Tensor, " L"]
    basis: Float[Tensor, "c c"]
    log_frequencies: Float[Tensor, " knots"]
    log_spectrum: Float[Tensor, "L c knots"]
    log_energy: Float[Tensor, "L energies"]
    log_variance: Float[Tensor, "L energies"]
    prior_mean: Float[Tensor, " c"]
    prior_log_spectrum: Float[Tensor, "c knots"]
    reach: int | None = None

    def at(self, sigma: float) -> LevelCovariance:
        """Sigma at a noise level: linear in log sigma, constant beyond the measured levels."""
        level = torch.tensor([float(sigma)], dtype=torch.float64).log()

        def mixed(table: Tensor) -> Tensor:
            columns = table.reshape(table.shape[0], -1).T
            return interpolate(level, self.ln_sigmas, columns)[:, 0].reshape(table.shape[1:])

        return LevelCovariance(
            self.basis,
            self.log_frequencies,
            mixed(self.log_spectrum),
            mixed(self.log_energy),
            mixed(self.log_variance),
            self.reach,
        )

    def mean_like(self, image: Signal) -> Signal:
        """The mean level of images, shaped like one. Raises ValueError for other channels."""
        _same_channels(self.basis, image)
        return self.prior_mean.to(image)[:, None, None].expand_as(image)

    def prior(self) -> LevelCovariance:
        """The Gaussian prior of images about `prior_mean`, S = 1."""
        none = torch.zeros(0, dtype=torch.float64)
        return LevelCovariance(
            self.basis, self.log_frequencies, self.prior_log_spectrum, none, none, self.reach
        )

    def far_sighted(self) -> Self:
        """The same, the prior's spectrum going on below the lowest frequency as f^-2.

        As that of photographs does at all scales. Held constant there, the prior draws the middle
        of a wide hole to the mean of all images.
        """
        lowest = torch.tensor([math.log(_FAR_FREQUENCY)], dtype=self.log_frequencies.dtype)
        rise = 2.0 * (self.log_frequencies[:1] - lowest)
        prior = torch.cat([self.prior_log_spectrum[:, :1] + rise, self.prior_log_spectrum], dim=1)
        return replace(
            self,
            log_frequencies=torch.cat([lowest, self.log_frequencies]),
            log_spectrum=torch.cat([self.log_spectrum[..., :1], self.log_spectrum], dim=2),
            prior_log_spectrum=prior,
        )

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        tensors = {name: getattr(self, name).contiguous() for name in _tensors(self)}
        save_file(tensors, path, metadata={"format": _FORMAT})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is not a covariance table of this version.
        """
        with safe_open(path, framework="pt") as file:
            names = set(_tensors(cls))
            if (file.metadata() or {}).get("format") != _FORMAT or set(file.keys()) != names:
                raise ValueError(f"{path} is not a covariance table of this version: fit it again")
            return cls(**{name: file.get_tensor(name) for name in names})


def _tensors(table: CovarianceTable | type[CovarianceTable]) -> list[str]:
    """Names of the fields that were measured."""
    return [f.name for f in fields(table) if f.name != "reach"]


def fit_covariance(
    denoise: Denoiser | Sequence[Denoiser],
    images: Sequence[Signal],
    draws_for: Callable[[int], NormalDraws] | None = None,
    sigmas: Sequence[float] = DEFAULT_SIGMAS,
) -> CovarianceTable:
    """Measure Sigma = S C S from the residuals x0 - D(x0 + sigma eps; sigma).

    Args:
        denoise: D(x; sigma), or one for each image, where each has guides of its own.
        images: clean validation images (b c h w) in network units, each side >= 16 pixels; sizes
            may differ, channels may not.
        draws_for: keyed noise of each image by its index; default keyed by the index.
        sigmas: increasing noise levels to measure at.

    Returns:
        The table. S is normalised to mean S^2 = 1 over the images; C holds the units.

    Raises:
        ValueError: if there is no image, or the levels do not increase.
    """
    if not images or sorted(set(sigmas)) != list(sigmas):
        raise ValueError("a covariance needs at least one image, and increasing noise levels")
    draws_for = draws_for or _default_draws
    basis = opponent_basis(images[0].shape[1])
    ends = math.log(_LOWEST_FREQUENCY), math.log(_HIGHEST_FREQUENCY)
    log_frequencies = torch.linspace(*ends, _NUM_FREQUENCIES, dtype=torch.float64)
    mean = torch.stack([x0.cpu().double().mean(dim=(0, 2, 3)) for x0 in images]).mean(dim=0)

    denoisers = [denoise] * len(images) if callable(denoise) else list(denoise)

    def spectrum(residuals: Iterable[Tensor]) -> Tensor:
        return radial_spectrum(residuals, basis, log_frequencies).log()

    rows = []
    for level, sigma in enumerate(sigmas):
        pairs = [
            _residual(D, x0, sigma, draws_for(i).normal(level, x0))
            for i, (D, x0) in enumerate(zip(denoisers, images, strict=True))
        ]
        knots, log_variance = _local_variance(pairs)
        whitened = (r / _std(mu, knots, log_variance) for mu, r in pairs)
        rows.append((spectrum(whitened), knots, log_variance))
    log_spectrum, log_energy, log_variance = (torch.stack(part) for part in zip(*rows, strict=True))
    return CovarianceTable(
        ln_sigmas=torch.tensor(list(sigmas), dtype=torch.float64).log(),
        basis=basis,
        log_frequencies=log_frequencies,
        log_spectrum=log_spectrum,
        log_energy=log_energy,
        log_variance=log_variance,
        prior_mean=mean,
        prior_log_spectrum=spectrum(x0.cpu().double() - mean[:, None, None] for x0 in images),
    )


def _same_channels(basis: Tensor, image: Signal) -> None:
    if image.shape[1] != len(basis):
        raise ValueError(
            f"a covariance table of {len(basis)} channels does not fit images of {image.shape[1]}: "
            "take the table of their condition"
        )


def _default_draws(index: int) -> NormalDraws:
    return KeyedDraws(0, f"covariance-{index}")


def _residual(denoise: Denoiser, x0: Signal, sigma: float, eps: Signal) -> tuple[Tensor, Tensor]:
    """(mu, x0 - mu in float64), brought to the CPU, where all that is measured is added up."""
    levels = torch.full((x0.shape[0],), sigma, dtype=x0.dtype, device=x0.device)
    mu = denoise(x0 + sigma * eps, levels)
    return mu.cpu(), (x0 - mu).cpu().double()


def _local_variance(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Table of S^2 against log gradient energy: bins of equal count, mean squared residual each."""
    energy = torch.cat([_log_energy(mu).flatten() for mu, _ in pairs])
    squared = torch.cat([r.square().mean(dim=1).flatten() for _, r in pairs])
    order = energy.argsort()
    bins = [b for b in order.tensor_split(_NUM_ENERGIES) if len(b)]
    knots = torch.stack([energy[b].mean() for b in bins])
    # Flat images fill several bins with one energy; a table's knots must increase.
    knots = knots + 1e-6 * torch.arange(len(knots), dtype=knots.dtype)
    variance = torch.stack([squared[b].mean() for b in bins]) / squared.mean().clamp_min(1e-20)
    return knots, variance.clamp_min(_LEAST_VARIANCE).log()


def _std(mu: Tensor, knots: Tensor, log_variance: Tensor) -> Tensor:
    return torch.exp(0.5 * interpolate(_log_energy(mu), knots, log_variance[None])[0])


def _log_energy(mu: Tensor) -> Tensor:
    return gradient_energy(mu).double().add(ENERGY_FLOOR).log()
