"""Single-coil Cartesian MRI: a masked unitary Fourier transform of a real or complex image."""

from __future__ import annotations

from typing import ClassVar, Literal, final

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusion_core.operators.base import Operator
from diffusion_core.protocols import Data, Signal, SpectralForm


def to_complex(x: Signal) -> Tensor:
    """Two channels (re, im) -> (b 1 h w) complex."""
    return torch.complex(x[:, :1], x[:, 1:])


def from_complex(z: Tensor) -> Signal:
    """(b 1 h w) complex -> two channels (re, im)."""
    return torch.cat([z.real, z.imag], dim=1)


@final
class Fourier(Operator):
    """y = M F x, F = fft2 with norm "ortho" (unitary), zero frequency at index (0, 0).

    A complex image has two channels (re, im), a real one a single channel, whose spectrum is
    Hermitian: then A' y = Re(F^H M y), the true adjoint among real images. y keeps the shape
    (b 1 h w), complex, with zeros where nothing was measured.

    Attributes:
        mask: (b|1, 1, h|1, w|1) boolean, True where k-space was measured.
        channels: 1 (real image) or 2 (complex image).
    """

    kind: ClassVar[str] = "fourier"

    def __init__(self, mask: Bool[Tensor, "b 1 h w"], channels: Literal[1, 2]) -> None:
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
            raise ValueError(f"mask must be boolean (b 1 h w), not {mask.dtype} {mask.shape}")
        if channels not in {1, 2}:
            raise ValueError(f"an image has 1 (real) or 2 (re, im) channels, not {channels}")
        self.mask = mask
        self.channels = channels

    def A(self, x: Signal) -> Data:
        """Transform, and keep what was measured. Raises ValueError on a wrong channel count."""
        if x.shape[1] != self.channels:
            raise ValueError(f"expected {self.channels} channels, not {x.shape[1]}")
        image = x if self.channels == 1 else to_complex(x)
        return torch.fft.fft2(image, norm="ortho") * self.mask

    def A_adjoint(self, y: Data) -> Signal:
        """Zero-filled reconstruction; its real part if the image is known to be real."""
        image = torch.fft.ifft2(self.measured(y), norm="ortho")
        return image.real if self.channels == 1 else from_complex(image)

    def measured(self, y: Data) -> Data:
        """0 for modes left out."""
        return torch.where(self.mask, y, 0)

    def spectral_form(self, like: Signal) -> SpectralForm:
        """V' is the unitary Fourier transform and S the mask.

        A real image is measured at k by what the mask keeps of k and of -k: S^2 is their mean, and
        U' y the part of y that a Hermitian spectrum can explain.
        """
        mask = self.mask.to(like).expand(-1, -1, *like.shape[-2:])

        def coefficients(x: Signal) -> Tensor:
            return torch.fft.fft2(x if self.channels == 1 else to_complex(x), norm="ortho")

        def image(z: Tensor) -> Signal:
            values = torch.fft.ifft2(z, norm="ortho")
            return values.real if self.channels == 1 else from_complex(values)

        if self.channels == 2:
            return SpectralForm(mask, coefficients, image, lambda y: y)
        share = 0.5 * (mask + mask.flip((-2, -1)).roll((1, 1), (-2, -1)))
        root = share.sqrt()
        safe = root.clamp_min(0.5)

        def data(y: Data) -> Tensor:
            return coefficients(self.A_adjoint(y)) / safe

        return SpectralForm(root, coefficients, image, data)
