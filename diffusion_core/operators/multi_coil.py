"""Multi-coil Cartesian MRI: each coil sees the image through its own sensitivity."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Bool, Complex
from torch import Tensor

from diffusion_core.operators.base import Operator
from diffusion_core.operators.fourier import from_complex, to_complex
from diffusion_core.protocols import Data, Signal


@final
class MultiCoil(Operator):
    """y_j = M F (s_j u), F = fft2 "ortho", for a complex image u of two channels (re, im).

    y is (b, coils, h, w) complex with zeros where nothing was measured. Where sum_j |s_j|^2 = 1 and
    everything is measured, A' A = I.

    Attributes:
        mask: (b|1, 1, h|1, w|1) boolean, True where k-space was measured, by all coils alike.
        sensitivities: (b|1, coils, h, w) complex s_j.

    Source: Pruessmann et al. 1999 (SENSE), doi:10.1002/(SICI)1522-2594(199911)42:5<952::AID-MRM16>.
    """

    kind: ClassVar[str] = "multi-coil"

    def __init__(
        self, mask: Bool[Tensor, "b 1 h w"], sensitivities: Complex[Tensor, "b coils h w"]
    ) -> None:
        """Raises ValueError on a mask that is not boolean, or maps that are not complex."""
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
            raise ValueError(f"mask must be boolean (b 1 h w), not {mask.dtype} {mask.shape}")
        if not sensitivities.is_complex() or sensitivities.ndim != 4:
            raise ValueError(
                "sensitivities must be complex (b coils h w), "
                f"not {sensitivities.dtype} {sensitivities.shape}"
            )
        self.mask = mask
        self.sensitivities = sensitivities

    def A(self, x: Signal) -> Data:
        """What every coil measures. Raises ValueError unless x has two channels."""
        if x.shape[1] != 2:
            raise ValueError(f"expected 2 channels (re, im), not {x.shape[1]}")
        image = to_complex(x)
        seen = self.sensitivities.to(image.dtype) * image
        return torch.fft.fft2(seen, norm="ortho") * self.mask

    def A_adjoint(self, y: Data) -> Signal:
        """The coils' zero-filled images, combined by their conjugate sensitivities."""
        images = torch.fft.ifft2(self.measured(y), norm="ortho")
        combined = (self.sensitivities.conj().to(images.dtype) * images).sum(dim=1, keepdim=True)
        return from_complex(combined)

    def measured(self, y: Data) -> Data:
        """0 for modes left out, of all coils."""
        return torch.where(self.mask, y, 0)
