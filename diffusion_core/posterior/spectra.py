"""Radial spectra, gradient energies and other small tools of the covariance model."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffusion_core.protocols import Signal

_BLUR_STD = 2.0
_NUM_RINGS = 40


def opponent_basis(num_channels: int) -> Float[Tensor, "c c"]:
    """Orthonormal channels that are nearly uncorrelated: luminance first for colour; else as is."""
    if num_channels != 3:
        return torch.eye(num_channels, dtype=torch.float64)
    rows = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]], dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)


def radial_frequency(height: int, width: int) -> Float[Tensor, "h w_half"]:
    """|f| in cycles a pixel, in the layout of rfft2; float64."""
    rows = torch.fft.fftfreq(height, dtype=torch.float64)
    columns = torch.fft.rfftfreq(width, dtype=torch.float64)
    return torch.hypot(rows[:, None], columns[None, :])


def radial_spectrum(
    fields: Iterable[Tensor],
    basis: Float[Tensor, "c c"],
    log_frequencies: Float[Tensor, " knots"],
) -> Float[Tensor, "c knots"]:
    """Power per Fourier mode (unitary transform) of zero-mean fields (b c h w), by radius.

    White noise of variance v has the constant spectrum v. A Hann window keeps the jump between
    opposite borders out of the high frequencies. A pair of channels (re, im) shares one spectrum:
    the phase of a complex image is arbitrary. Fields may live on any device; the sums are made on
    the CPU.
    """
    num_channels, num_knots = len(basis), len(log_frequencies)
    power = torch.zeros(num_channels, num_knots, dtype=torch.float64)
    weight = torch.zeros(num_knots, dtype=torch.float64)
    for field in fields:
        h, w = field.shape[-2:]
        window = torch.outer(_hann(h), _hann(w))
        opponent = torch.einsum("kc,bchw->bkhw", basis, field.cpu().double()) * window
        periodogram = torch.fft.rfft2(opponent, norm="ortho").abs().square().sum(dim=0)
        periodogram = periodogram / window.square().mean()
        hats = _hat_weights(radial_frequency(h, w), log_frequencies)
        # Columns between 0 and Nyquist stand for their mirror images too.
        hats = hats * torch.where(torch.arange(w // 2 + 1) % ((w + 1) // 2) == 0, 1.0, 2.0)
        power += torch.einsum("khw,fhw->kf", periodogram, hats)
        weight += len(field) * hats.sum(dim=(1, 2))
    if num_channels == 2:
        power = power.mean(dim=0, keepdim=True).expand(2, -1)
    seen = weight > 0
    spectrum = power[:, seen] / weight[seen]
    spectrum = spectrum.clamp_min(float(1e-12 + 1e-8 * spectrum.max()))
    return interpolate(log_frequencies, log_frequencies[seen], spectrum.log()).exp()


def radial_mean(modes: Float[Tensor, "h w_half"], width: int) -> Float[Tensor, "h w_half"]:
    """The mean of real rfft2 modes over rings, interpolated back to every mode; float64."""
    frequency = radial_frequency(modes.shape[0], width)
    ends = math.log(1.0 / max(modes.shape[0], width)), math.log(math.sqrt(0.5))
    knots = torch.linspace(*ends, _NUM_RINGS, dtype=torch.float64)
    seen = _hat_weights(frequency, knots).sum(dim=(1, 2)) > 0
    frequency, knots = frequency.to(modes.device), knots[seen].to(modes.device)
    hats = _hat_weights(frequency, knots)
    means = torch.einsum("fhw,hw->f", hats, modes.double()) / hats.sum(dim=(1, 2))
    return interpolate(frequency.clamp_min(1e-9).log(), knots, means[None])[0]


def gradient_energy(mu: Signal) -> Float[Tensor, "b 1 h w"]:
    """Squared gradient of mu (central differences, mean over channels), blurred by a Gaussian."""
    padded = F.pad(mu, (1, 1, 1, 1), mode="replicate")
    dx = 0.5 * (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2])
    dy = 0.5 * (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1])
    energy = (dx**2 + dy**2).mean(dim=1, keepdim=True)
    reach = round(3 * _BLUR_STD)
    steps = torch.arange(-reach, reach + 1, dtype=mu.dtype, device=mu.device)
    kernel = torch.exp(-0.5 * (steps / _BLUR_STD) ** 2)
    kernel = kernel / kernel.sum()
    energy = F.pad(energy, (reach,) * 4, mode="replicate")
    energy = F.conv2d(energy, kernel[None, None, None, :])
    return F.conv2d(energy, kernel[None, None, :, None])


def interpolate(
    x: Float[Tensor, "*shape"], knots: Float[Tensor, " knots"], values: Float[Tensor, "rows knots"]
) -> Float[Tensor, " rows *shape"]:
    """Piecewise linear interpolation of functions given at increasing knots, constant beyond."""
    if len(knots) == 1:
        return values.reshape(-1, *(1,) * x.ndim).expand(-1, *x.shape)
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    # Knots may have met in the precision of x: there 0 / 0 means the first of them.
    gap = (knots[right] - knots[left]).clamp_min(torch.finfo(knots.dtype).tiny)
    weight = ((x - knots[left]) / gap).clamp(0.0, 1.0)
    return values[:, left] * (1.0 - weight) + values[:, right] * weight


def short_sighted(
    spectrum: Float[Tensor, "c h w_half"], reach: int, width: int
) -> Float[Tensor, "c h w_half"]:
    """The spectrum of C with C^-1 tapered to 0 at `reach` pixels: what is farther is screened.

    Given a ring of known pixels as wide as the reach, what it encloses depends on nothing beyond.
    Tapering C itself would not do that, and cost more of the large scales. A product of positive
    definite functions is one, so C^-1 stays positive definite.

    Args:
        spectrum: eigenvalues of C > 0, in the layout of rfft2.
        reach: pixels, 2 at least.
        width: of the canvas.

    Source: Gaspari and Cohn 1999, equation 4.10, for the taper.
    """
    height = spectrum.shape[-2]
    rows, columns = (torch.arange(n).minimum(n - torch.arange(n)) for n in (height, width))
    taper = _gaspari_cohn(torch.hypot(rows[:, None].double(), columns.double()) * (2.0 / reach))
    kernel = torch.fft.irfft2(1.0 / spectrum.double(), s=(height, width)) * taper.to(
        spectrum.device
    )
    # Not below the least eigenvalue of C^-1 but for rounding: the taper averages over frequencies.
    inverse = torch.fft.rfft2(kernel).real.maximum(1.0 / spectrum.amax(dim=(1, 2), keepdim=True))
    return (1.0 / inverse).to(spectrum)


def _gaspari_cohn(r: Tensor) -> Tensor:
    """A positive definite function in up to three dimensions: 1 at 0, 0 from r = 2 on."""
    near = 1 - 5 / 3 * r**2 + 5 / 8 * r**3 + r**4 / 2 - r**5 / 4
    r_far = r.clamp(1.0, 2.0)
    far = 4 - 5 * r_far + 5 / 3 * r_far**2 + 5 / 8 * r_far**3 - r_far**4 / 2 + r_far**5 / 12
    return torch.where(r <= 1, near, (far - 2 / (3 * r_far)).clamp_min(0.0))


def fast_size(size: int) -> int:
    """The least even size >= `size` whose prime factors are 2, 3 and 5."""
    while size % 2 or not _is_smooth(size):
        size += 1
    return size


def _is_smooth(size: int) -> bool:
    for prime in (2, 3, 5):
        while size % prime == 0:
            size //= prime
    return size == 1


def _hann(size: int) -> Tensor:
    """Hann window that is positive at both ends."""
    steps = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return torch.sin(torch.pi * steps).square()


def _hat_weights(frequency: Tensor, log_knots: Tensor) -> Tensor:
    """(knots, h, w) weights of each mode on each knot: hats, the transpose of interpolation."""
    log_f = frequency.clamp_min(1e-9).log()
    eye = torch.eye(len(log_knots), dtype=torch.float64, device=log_knots.device)
    return interpolate(log_f, log_knots, eye)


def full_spectrum(half: Float[Tensor, "c h w_half"], width: int) -> Float[Tensor, "c h w"]:
    """The spectrum of a real field at all modes from those that rfft2 keeps."""
    columns = torch.arange(width, device=half.device)
    kept = columns < half.shape[-1]
    full = half[..., torch.where(kept, columns, width - columns)]
    rows = (-torch.arange(half.shape[-2], device=half.device)) % half.shape[-2]
    return torch.where(kept, full, full[..., rows, :])
