"""Distillation: a student learns to restore in a few evaluations (posterior/distilled.py).

    patches (a PatchSource) --measure--> Measured: x0, where the chain starts, what is told of A
    objective: the chain is unrolled, x0 is asked of every level, and every level but the last is
               drawn towards what the next ones make of it (consistency)

The chain's own states are what each level learns from; no gradient goes through a data step or from
one level to another, so that a level costs what a denoising loss costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffusion_core.networks.local_unet import NUM_CHANNELS
from diffusion_core.networks.precond import Preconditioned
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.posterior.distilled import DataTerm, Distilled
from diffusion_core.posterior.run import Counted
from diffusion_core.protocols import Data, LinearOperator, NoiseModel, Signal
from diffusion_core.training.patches import Batch, PatchSource

Measure = Callable[[str, Signal, np.random.Generator], tuple[LinearOperator, Data, NoiseModel]]
"""(condition, x0 (1 c h w), rng) -> an operator of the condition, data y = A x0 + n, its noise."""

_LEAST_VARIANCE = 1e-5
"""Of the start's error, that errors are counted in: a hundredth of 8-bit steps."""
_STREAM = 1
"""Of the generators of measurements; 0 is the patches' own."""


@dataclass(frozen=True)
class Measured(Batch):
    """A batch of patches that were measured.

    Attributes:
        start: (b 3 h w), m_0 of each, unused channels at 0.
        inputs: (b inputs h w), see DataTerm.
        variance: (b,) mean square of the draw of m_0's error.
        scale: (b,) of the levels that the student is told.
        terms: the measurements, one a sample; they stay on the CPU.
    """

    start: Tensor = field(default_factory=lambda: torch.empty(0))
    inputs: Tensor = field(default_factory=lambda: torch.empty(0))
    variance: Tensor = field(default_factory=lambda: torch.empty(0))
    scale: Tensor = field(default_factory=lambda: torch.empty(0))
    terms: Sequence[DataTerm] = ()

    def part(self, samples: slice) -> Measured:
        """See Batch."""
        return self._mapped(lambda t: t[samples], self.terms[samples])

    def to(self, device: str) -> Measured:
        """See Batch."""
        return self._mapped(lambda t: t.to(device), self.terms)

    def _mapped(self, change: Callable[[Tensor], Tensor], terms: Sequence[DataTerm]) -> Measured:
        return Measured(
            change(self.x0),
            change(self.condition),
            change(self.channels),
            start=change(self.start),
            inputs=change(self.inputs),
            variance=change(self.variance),
            scale=change(self.scale),
            terms=terms,
        )


class MeasuredPatches(PatchSource):
    """Patches with a measurement of each, which depends on the sample's number alone.

    Args:
        patches: the clean ones.
        measure: draws an operator, and measures.
        solvers: condition -> the chain that the student learns for it.
        seed: of operators and noise.
    """

    def __init__(
        self,
        patches: PatchSource,
        measure: Measure,
        solvers: Sequence[Distilled],
        seed: int,
    ) -> None:
        self.conditions = patches.conditions
        self._patches, self._measure, self._solvers, self._seed = patches, measure, solvers, seed

    @torch.no_grad()
    def batch(self, first: int, count: int) -> Measured:
        """Samples first .. first + count - 1 of the sequence."""
        clean = self._patches.batch(first, count)
        terms = [self._term(clean, i, first + i) for i in range(count)]
        start = torch.cat([_padded(term.start) for term in terms])
        inputs = torch.cat([term.inputs for term in terms])
        variance = torch.cat([term.variance for term in terms]).clamp_min(_LEAST_VARIANCE)
        scale = torch.cat([term.scale for term in terms])
        return Measured(
            clean.x0,
            clean.condition,
            clean.channels,
            start=start,
            inputs=inputs,
            variance=variance,
            scale=scale,
            terms=terms,
        )

    def _term(self, clean: Batch, place: int, number: int) -> DataTerm:
        index = int(clean.condition[place])
        x0 = clean.x0[place : place + 1, : int(clean.channels[place].sum())]
        rng = np.random.Generator(np.random.Philox(key=[self._seed, number], counter=_STREAM << 64))
        operator, y, noise = self._measure(self.conditions[index], x0, rng)
        draws = KeyedDraws(self._seed, f"distil-{number}")
        return DataTerm(self._solvers[index], Counted(_never, operator), y, noise, draws)


@dataclass(frozen=True)
class DistillationLoss:
    """The objective (loss.Objective) over a batch of Measured.

    Per sample and level, |mu_k - x0|^2 in units of the start's expected error, and `consistency`
    times |mu_k - m_(k+1)|^2 in the same units, m_(k+1) what the next level and its data step make
    of it, held fixed. The head u(sigma_k, condition) weighs levels and conditions as it does in
    denoising.

    Attributes:
        levels: sigma_k.
        consistency: weight of the agreement between neighbouring levels.
    """

    levels: Sequence[float]
    consistency: float = 0.0

    def __call__(
        self, model: Preconditioned, batch: Batch, sigma: Tensor, eps: Tensor
    ) -> tuple[Tensor, Float[Tensor, " b"]]:
        """The loss, and each sample's error at the last level in units of its start's.

        Args:
            model: the student.
            batch: a Measured one.
            sigma: not used: the levels are the chain's.
            eps: not used: the noise is the measurements'.

        Raises:
            TypeError: if the batch was not measured.
        """
        del sigma, eps
        if not isinstance(batch, Measured):
            raise TypeError("a distillation needs measured patches")
        in_use = batch.channels[:, :, None, None]
        m, means, estimates = batch.start, [], []
        for number, level in enumerate(self.levels):
            levels = level * batch.scale
            mu = model(m, levels, batch.condition, inputs=batch.inputs) * in_use
            means.append((levels, mu))
            if number + 1 < len(self.levels) or self.consistency:
                m = _after(batch, number, mu)
                estimates.append(m)

        def error(mu: Tensor, target: Tensor) -> Float[Tensor, " b"]:
            squared = ((mu - target) * in_use).square().mean(dim=(2, 3)).sum(dim=1)
            return squared / (batch.channels.sum(dim=1) * batch.variance)

        total = torch.zeros_like(batch.variance)
        for number, (levels, mu) in enumerate(means):
            u = model.uncertainty(levels, batch.condition)
            own = error(mu, batch.x0)
            if self.consistency and number + 1 < len(means):
                own = own + self.consistency * error(mu, estimates[number + 1])
            total = total + own * (-u).exp() + u
        return total.mean() / len(means), error(means[-1][1], batch.x0).detach()


@torch.no_grad()
def _after(batch: Measured, level: int, mu: Tensor) -> Tensor:
    """m of a level: each sample's data step, in float32 on the CPU, where its operator is."""
    with torch.autocast(mu.device.type, enabled=False):
        parts = []
        for number, term in enumerate(batch.terms):
            own = mu[number : number + 1, : term.start.shape[1]].detach().float().cpu()
            parts.append(_padded(own + term.update(level, own).delta))
        return torch.cat(parts).to(mu.device)


def _padded(image: Signal) -> Tensor:
    return F.pad(image.float(), (0, 0, 0, 0, 0, NUM_CHANNELS - image.shape[1]))


def _never(x: Signal, sigma: Tensor) -> Signal:
    del x, sigma
    raise AssertionError("the network is called by the objective")
