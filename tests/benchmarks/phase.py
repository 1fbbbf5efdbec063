"""Phase retrieval for the benchmark: Fienup's hybrid input-output, and scores up to ambiguity.

The modulus of a transform does not tell an image from its half turn, nor, where the image is dark
at its borders, from its shifts: results are turned and shifted onto the truth before they are
scored. Which of several runs is the result, the data alone decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.operators import PhaseRetrieval
from diffusion_core.protocols import Data, Signal

BRIGHTEST = 2.0
"""Of an image in [-1, 1] plus its offset of 1."""


def hybrid_input_output(
    operator: PhaseRetrieval,
    y: Data,
    draws: KeyedDraws,
    num_steps: int = 600,
    num_reductions: int = 100,
    beta: float = 0.9,
) -> Signal:
    """Images (b c h w) of moduli y (b c H W), from random phases; each batch element its own.

    Args:
        operator: whose image lies in the field's first corner.
        y: moduli.
        draws: of the first phases.
        num_steps: of hybrid input-output.
        num_reductions: steps of error reduction that follow.
        beta: feedback where a pixel breaks the constraints: dark outside the image, 0 to 2 inside.

    Source: Fienup 1982, "Phase retrieval algorithms: a comparison", Equations 43 to 45.
    """
    h, w = operator.shape
    field = draws.normal(0, y)
    for step in range(num_steps + num_reductions):
        spectrum = torch.fft.fft2(field, norm="ortho")
        modulus = spectrum.abs().clamp_min(1e-12)
        image = torch.fft.ifft2(spectrum * (y / modulus), norm="ortho").real
        allowed = torch.zeros_like(image, dtype=torch.bool)
        inside = image[..., :h, :w]
        allowed[..., :h, :w] = (inside >= 0) & (inside <= BRIGHTEST)
        elsewhere = field - beta * image if step < num_steps else torch.zeros_like(image)
        field = torch.where(allowed, image, elsewhere)
    return field[..., :h, :w].clamp(0, BRIGHTEST) - operator.offset


def best_by_data(operator: PhaseRetrieval, y: Data, runs: Signal) -> Signal:
    """The run of a batch whose modulus is nearest to the data, (1 c h w)."""
    misfit = (operator.A(runs) - y).square().flatten(1).sum(dim=1)
    return runs[int(misfit.argmin())][None]


def onto(x: Signal, truth: Signal) -> Signal:
    """x turned by a half turn or not, and shifted over a dark field, as it fits the truth best."""
    h, w = truth.shape[-2:]

    def field(image: Tensor) -> Tensor:
        return torch.nn.functional.pad(image + 1, (0, w, 0, h))

    wanted = torch.fft.fft2(field(truth))
    candidates = []
    for turned in (x, x.flip((-2, -1))):
        overlap = torch.fft.ifft2(wanted * torch.fft.fft2(field(turned)).conj()).real.sum(dim=1)
        row, column = divmod(int(overlap.flatten().argmax()), 2 * w)
        shifted = field(turned).roll((row, column), (-2, -1))[..., :h, :w] - 1
        candidates.append(shifted)
    return min(candidates, key=lambda c: float((c - truth).square().sum()))
