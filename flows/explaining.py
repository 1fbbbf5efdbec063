"""Explain one restoration: its way along the levels, what the prior invented, how steady it is.

    film        D(x; sigma) at up to 12 levels, of any solver, seen by a denoiser that looks on
    levels      how far the data step moved the estimate, its CG steps and what they left
                (CovProx), and how badly D(x; sigma) alone explains the data
    invented    the part of the image that the data do not determine, and the part of it that the
                best linear estimate does not foretell either (posterior/null_space.py)
    steadiness  the spread over seeds, and the answer to small changes of what was measured

A slice is restored by itself, so that its last bits may differ from those of a block of several;
of a plane that is cut into blocks the one in the middle is explained. What cannot be told of a
measurement or a solver stands in `left_out`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffusion_core.model import BadModelError
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.posterior.null_space import Undetermined, picture, undetermined
from diffusion_core.posterior.pyramid import Pooled
from diffusion_core.posterior.run import positive_levels
from diffusion_core.posterior.steadiness import (
    image_change,
    linear_response,
    noise_change,
    rms,
    seed_spread,
)
from diffusion_core.posterior.trajectory import Recorder, spread_levels
from diffusion_core.protocols import Data, LinearOperator, Signal
from domains.base import Array, BadInputError, Domain, Item, ItemRecord, Problem
from domains.guides import posed
from domains.metrics import EXACT_VARIANCE, reached, residual
from domains.registry import load_domain

if TYPE_CHECKING:
    from diffusion_core.posterior.covariance import CovarianceTable
    from flows.engine.block import Restorer, Solved, Watch
    from flows.engine.grid import Block
    from flows.engine.plan import ItemPlan
    from flows.roots import Root

MAX_FRAMES = 12
MAX_FRAME_PX = 420
"""Longest side of a frame of the film; larger ones are averaged down."""
NOISE_SHARE = 0.01
"""The change of the data that is tried first, of their own noise."""
RANGE_SHARE = 1e-3
"""The second one: white noise on the image, of its range in network units."""


@dataclass(frozen=True)
class Frame:
    """What the denoiser said at a level: pixels (c h w) in source units, averaged down."""

    sigma: float
    pixels: Array


@dataclass(frozen=True)
class Level:
    """What happened at a level.

    Attributes:
        sigma: its noise level, network units.
        residual: of D(x; sigma) alone, as domains.metrics.residual has it, mean over the batch: in
            units of the noise, or where data are exact the largest misfit.
        moved: root mean square of what the data step added, network units; None where the solver
            does not tell.
        steps: of the linear solve; 0 for a closed form.
        left: relative residual of the linear system.
    """

    sigma: float
    residual: float
    moved: float | None = None
    steps: int | None = None
    left: float | None = None


@dataclass(frozen=True)
class Answer:
    """How the restoration answers a small change of the data.

    Attributes:
        moved: root mean square change of the picture, as a share of its range.
        gain: that of the unknown over that of the linear estimate; None where there is none.
    """

    moved: float
    gain: float | None


@dataclass(frozen=True)
class Steadiness:
    """How much of the result is chance.

    Attributes:
        num_seeds: restorations compared.
        seed_spread: root mean square of their standard deviation, as a share of the range.
        seed_spread_over_error: that over the root mean square error; None without a truth.
        noise: answer to a change by 1% of the noise; None where the data are exact.
        image: answer to white noise of 1e-3 of the range on the image.
        reference: "kriging" or "minimum norm": the linear estimate of the gains; "" for none.
    """

    num_seeds: int
    seed_spread: float
    seed_spread_over_error: float | None
    noise: Answer | None
    image: Answer
    reference: str


@dataclass(frozen=True)
class Invented:
    """The part of the image that the data do not determine.

    Attributes:
        share: of the energy of the image about its mean.
        std: of the image, network units.
        steps: CG steps that it took to tell.
        left: relative residual of that solve.
        beyond: share of what goes beyond the best linear estimate (kriging): of the detail that
            only the network knew of; None where the model knows no spectrum of images.
        amplitude: (h, w), in units of the image's standard deviation.
        determined: (c h w) in source units: the image without the first part.
        beyond_amplitude: (h, w) of the second one.
    """

    share: float
    std: float
    steps: int
    left: float
    beyond: float | None
    amplitude: Array = field(repr=False)
    determined: Array = field(repr=False)
    beyond_amplitude: Array | None = field(repr=False)


@dataclass(frozen=True)
class Explained:
    """All that is told of one slice.

    Attributes:
        item: its id.
        task: of the measurement.
        slice: along z, from 0.
        window: (y0, y1, x0, x1) of the plane.
        method: solver.
        model_digest: sha256 of the model directory; None where none took part.
        seed: of the restoration.
        nfe: evaluations of the network for one restoration.
        residual: of the restored image, mean over the batch.
        exact_data: whether that is the largest misfit of exact data.
        levels: in the order of the chain.
        invented: None for nonlinear measurements.
        steadiness: of the restoration.
        left_out: what could not be told, and why.
        record: of the slice.
        scale: (offset, gain) of the metrics' range.
        restored: (c h w) in source units.
        film: what the denoiser said.
    """

    item: str
    task: str
    slice: int
    window: tuple[int, int, int, int]
    method: str
    model_digest: str | None
    seed: int
    nfe: int
    residual: float
    exact_data: bool
    levels: tuple[Level, ...]
    invented: Invented | None
    steadiness: Steadiness
    left_out: tuple[str, ...]
    record: ItemRecord = field(repr=False)
    scale: tuple[float, float] = field(repr=False)
    restored: Array = field(repr=False)
    film: tuple[Frame, ...] = field(repr=False)


def explain_slice(
    restorer: Restorer,
    measurements: Root,
    item: ItemPlan,
    z: int,
    *,
    num_seeds: int,
    truth: Item | None = None,
    on_restored: Callable[[int], None] = lambda _: None,
) -> Explained:
    """Restore a slice num_seeds + 2 times, and tell what there is to see.

    Args:
        restorer: holds the model.
        measurements: path of the store.
        item: planned with blocks one slice deep; its method is a solver.
        z: slice, from 0.
        num_seeds: restorations that differ by their seed.
        truth: the clean item, if it is known.
        on_restored: told after each restoration how many there have been.

    Raises:
        BadInputError: if the method is a classical one, or the slice is not there.
    """
    if item.method.kind != "solver":
        raise BadInputError(
            f"'{item.method.name}' is a classical method, with no levels to show: choose a solver"
        )
    block = _middle_block(item, z)
    with torch.no_grad():
        domain = load_domain(item.record.domain)
        measurement = restorer.read(measurements, item, block)
        problem = posed(domain, measurement)
        overview = restorer.overview(measurements, item, block)
        subject = _Subject(restorer, item, domain, problem, block, overview, on_restored)
        if truth is None:
            return _explained(subject, z, num_seeds, None)
        clean = domain.as_measured(truth, item.record).pixels[:, z]
        return _explained(subject, z, num_seeds, subject.cut(clean))


def _middle_block(item: ItemPlan, z: int) -> Block:
    """The block of a slice: the only one, or that in the middle of the plane."""
    grid = item.grid
    if z >= grid.shape[1]:
        raise BadInputError(
            f"{item.item_id}: has no slice {z}: it has {grid.shape[1]}, counted from 0"
        )
    _, rows, columns = grid.counts
    return grid.block((z * rows + rows // 2) * columns + columns // 2)


class _Subject:
    """A block's problem, restored as often as asked."""

    def __init__(
        self,
        restorer: Restorer,
        item: ItemPlan,
        domain: Domain,
        problem: Problem,
        block: Block,
        overview: Pooled | None,
        on_restored: Callable[[int], None],
    ) -> None:
        self.restorer, self.item, self.domain = restorer, item, domain
        self.problem, self.block, self.overview = problem, block, overview
        self._on_restored, self._num_restored = on_restored, 0
        way = item.method
        sigmas = power_sigmas(way.num_levels, way.sigma_max, way.sigma_min, way.rho)
        self.levels = positive_levels(sigmas)

    def cut(self, plane: Array) -> Array:
        """The write region of a plane (c h w)."""
        region = self.block.write
        return plane[..., region.y0 : region.y1, region.x0 : region.x1]

    def show(self, x: Signal) -> Array:
        """Network units (b c h w) to pixels (c h w) of the write region, in source units."""
        image = self.problem.to_source(x.float().cpu()).numpy()
        image = image.reshape(-1, *image.shape[-2:])  # bands folded into the batch unfold
        return self._inner(image)

    def _inner(self, plane: Array) -> Array:
        write, read = self.block.write, self.block.read
        rows = slice(write.y0 - read.y0, write.y1 - read.y0)
        return plane[..., rows, write.x0 - read.x0 : write.x1 - read.x0]

    def amplitude(self, found: Undetermined) -> Array:
        """Its map, of the write region."""
        return self._inner(found.amplitude.cpu().numpy())

    def restore(self, seed_step: int = 0, change: Data | None = None) -> Signal:
        """The unknown by another seed, or from changed data."""
        item = replace(self.item, seed=self.item.seed + seed_step)
        problem = self.problem
        if change is not None:
            problem = replace(problem, y=problem.y + change.to(problem.y))
        return self.solve(item, problem).x

    def solve(self, item: ItemPlan, problem: Problem, watch: Watch | None = None) -> Solved:
        """Restore it once, perhaps with the network watched, and count that."""
        solved = self.restorer.solve(item, problem, self.block, watch, self.overview)
        self._num_restored += 1
        self._on_restored(self._num_restored)
        return solved

    def misfit(self, x: Signal, measured: torch.Tensor) -> float:
        """The residual of an image."""
        p = self.problem
        return float(np.mean(residual(p.operator, p.y, x, p.noise, measured)))

    def prior(self) -> CovarianceTable | None:
        """Mean and spectrum of images of the condition, if the model knows them."""
        try:
            return self.restorer.model_of(self.item).prior(self.problem.condition)
        except BadModelError:
            return None


def _explained(subject: _Subject, z: int, num_seeds: int, truth: Array | None) -> Explained:
    problem, item, left_out = subject.problem, subject.item, []
    measured = reached(problem.operator, torch.zeros(problem.shape))
    filmed = set(spread_levels(subject.levels, MAX_FRAMES))

    def look(sigma: float, mu: Signal) -> tuple[float, Frame | None]:
        frame = Frame(sigma, averaged_down(subject.show(mu))) if sigma in filmed else None
        return subject.misfit(mu, measured), frame

    recorders: list[Recorder[tuple[float, Frame | None]]] = []

    def watch(denoise: Any) -> Recorder[tuple[float, Frame | None]]:
        recorders.append(Recorder(denoise, subject.levels, look))
        return recorders[-1]

    solved = subject.solve(item, problem, watch)
    seen = recorders[0].seen
    restored = subject.show(solved.x)
    y0, x0 = subject.block.write.y0, subject.block.write.x0
    record = item.record.slices(z, z + 1)
    scale = subject.domain.unit_scale(restored[:, None], record)
    told = {entry["sigma"]: entry for entry in solved.trace.get("levels", ())}
    if not seen:
        left_out.append(f"film: {item.method.name} does not ask the network at its levels")
    elif not told:
        left_out.append(f"data steps: {item.method.name} does not tell how far they moved it")
    invented = _invented(subject, solved.x, left_out)
    variance = problem.noise.variance(problem.operator.A(solved.x))
    return Explained(
        item=item.item_id,
        task=item.task,
        slice=z,
        window=(y0, y0 + restored.shape[-2], x0, x0 + restored.shape[-1]),
        method=item.method.name,
        model_digest=None if item.model is None else item.model.digest,
        seed=item.seed,
        nfe=solved.nfe,
        residual=subject.misfit(solved.x, measured),
        exact_data=bool(variance.max() <= EXACT_VARIANCE),
        levels=tuple(_level(s, seen[s][0], told.get(s, {})) for s in subject.levels if s in seen),
        invented=invented,
        steadiness=_steadiness(subject, solved.x, scale[1], num_seeds, truth, left_out),
        left_out=tuple(left_out),
        record=record,
        scale=scale,
        restored=restored,
        film=tuple(f for s in subject.levels if s in seen and (f := seen[s][1]) is not None),
    )


def _level(sigma: float, misfit: float, told: Mapping[str, Any]) -> Level:
    return Level(sigma, misfit, told.get("moved"), told.get("steps"), told.get("left"))


def _invented(subject: _Subject, x: Signal, left_out: list[str]) -> Invented | None:
    operator = subject.problem.operator
    if not isinstance(operator, LinearOperator):
        left_out.append(
            "what the prior invented: the measurement is nonlinear, and what its data leave open "
            "differs from image to image"
        )
        return None
    noise, prior = subject.problem.noise, subject.prior()
    found = undetermined(operator, x, noise)
    beyond = None if prior is None else undetermined(operator, x, noise, prior=prior)
    return Invented(
        share=found.share,
        std=found.std,
        steps=found.num_steps,
        left=found.relative_residual,
        beyond=None if beyond is None else beyond.share,
        amplitude=subject.amplitude(found),
        determined=subject.show(x - found.part),
        beyond_amplitude=None if beyond is None else subject.amplitude(beyond),
    )


def _steadiness(
    subject: _Subject,
    x: Signal,
    range_gain: float,
    num_seeds: int,
    truth: Array | None,
    left_out: list[str],
) -> Steadiness:
    """Restorations by other seeds, and from data a little changed."""
    problem, first = subject.problem, subject.show(x)
    others = [subject.show(subject.restore(k)) for k in range(1, num_seeds)]
    spread = seed_spread([torch.from_numpy(np.ascontiguousarray(p)) for p in (first, *others)])
    error = None if truth is None else rms(torch.from_numpy(first.astype(np.float64) - truth))
    linear = isinstance(problem.operator, LinearOperator)
    prior = subject.prior() if linear else None
    if not linear:
        left_out.append("gains: the measurement is nonlinear, and has no linear estimate")

    def answer(change: Data) -> Answer:
        changed = subject.restore(change=change)
        moved = rms(torch.from_numpy(subject.show(changed).astype(np.float64) - first))
        gain = None
        if isinstance(problem.operator, LinearOperator):
            response = linear_response(problem.operator, x, problem.noise, change, prior)
            expected = rms(picture(problem.operator, response))
            gain = rms(picture(problem.operator, changed - x)) / expected if expected else None
        return Answer(moved * range_gain, gain)

    origin = (subject.block.read.z0, subject.block.read.y0, subject.block.read.x0)
    digest = f"{subject.item.record.source_digest}:changed"
    draws = KeyedDraws(subject.item.seed, digest, origin)
    of_noise = noise_change(problem.operator, x, problem.noise, NOISE_SHARE, draws)
    if of_noise is None:
        left_out.append("answer to 1% of the noise: the data are exact")
    of_range = image_change(problem.operator, x, RANGE_SHARE * _range(problem), draws)
    return Steadiness(
        num_seeds=num_seeds,
        seed_spread=spread * range_gain,
        seed_spread_over_error=spread / error if error else None,
        noise=None if of_noise is None else answer(of_noise),
        image=answer(of_range),
        reference="" if not linear else "minimum norm" if prior is None else "kriging",
    )


def _range(problem: Problem) -> float:
    """From black to white in network units: -1 to 1, but for the magnitudes of complex images."""
    return 1.0 if problem.shape[1] == 2 else 2.0


def averaged_down(pixels: Array, most: int = MAX_FRAME_PX) -> Array:
    """Pixels (c h w) in squares of a whole number of pixels, so that no side exceeds `most`."""
    c, h, w = pixels.shape
    step = -(-max(h, w) // most)
    if step == 1 or min(h, w) < step:
        return np.ascontiguousarray(pixels)
    h, w = h // step, w // step
    cut = pixels[:, : h * step, : w * step].reshape(c, h, step, w, step)
    return np.asarray(cut.mean(axis=(2, 4)))
