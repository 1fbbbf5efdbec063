"""Compute one block: measurement -> problem -> solver or classical baseline -> source units.

A block is a pure function of (measurement, method, model, seed) and of its place in the grid: the
same on any worker, in any order, however often it is retried.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_core.model import BadModelError, Model
from diffusion_core.networks.precond import guided
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import Mask
from diffusion_core.posterior import make_solver
from diffusion_core.posterior.pyramid import Pooled
from diffusion_core.protocols import (
    Denoiser,
    Sigma,
    Signal,
    Solver,
    UnsuitedError,
)
from diffusion_core.tiles import tiled_denoiser
from domains.base import Array, BadInputError, Domain, Measurement, Problem
from domains.guides import as_channels, posed
from domains.metrics import EXACT_VARIANCE, reached, residual
from domains.registry import load_domain
from flows.engine.batches import Batcher
from flows.engine.coarse import (
    Found,
    coarse_scales,
    fills_wide_holes,
    overview_of,
    pooled_problem,
)
from flows.engine.cost import coarse_factor
from flows.engine.grid import (
    DENOISER_BATCH_PX,
    DENOISER_PLANE_PX,
    DENOISER_TILE_PX,
    HALO_PX,
    MAX_BATCH,
    STRIDE,
    Block,
    Region,
)
from flows.engine.methods import solver_options
from flows.engine.plan import ItemPlan, ModelRef
from flows.engine.receipt import Account
from flows.roots import Root
from flows.store import Measurements
from flows.store_files import manifest_stamp

Watch = Callable[[Denoiser], Denoiser]
"""Makes of a denoiser one that says the same, and looks on."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NotFiniteError(ValueError):
    """A result with NaN or infinite pixels: never published."""


class ModelChangedError(RuntimeError):
    """The model's files are not those that the plan was made with."""


class InputChangedError(RuntimeError):
    """The store of measurements is not the one that the plan was made with."""


@dataclass(frozen=True)
class Solved:
    """A batch restored in network units, and what it took."""

    x: Tensor
    nfe: int
    num_operator_calls: int
    trace: Mapping[str, Any] = field(default_factory=dict)


class Restorer:
    """Computes blocks, and keeps between them what is costly to make: stores, domains, models.

    Threads may share one: each reads and computes blocks of its own.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._planes: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.RLock()
        self._batcher = Batcher()

    def read(self, measurements: Root, item: ItemPlan, block: Block) -> Measurement:
        """What is measured in the read region of a block.

        Args:
            measurements: path of the store.
            item: whose block it is.
            block: which.

        Raises:
            BadInputError: if it is damaged.
            InputChangedError: if the store is gone, or its measurement not the plan's.
        """
        stamp = manifest_stamp(measurements)
        if stamp is None:
            raise InputChangedError(f"the input {measurements} is gone; plan again")
        store: Measurements = self._keep(("store", measurements, stamp), Measurements)
        if store.find_digest(item.item_id, item.task) != item.input_digest:
            raise InputChangedError(_input_changed(measurements, item))
        region = block.read
        z = slice(region.z0, region.z1)
        rows, columns = slice(region.y0, region.y1), slice(region.x0, region.x1)
        plane = (rows, columns) if item.grid.tiled else (slice(None), slice(None))
        measurement = store.read(item.item_id, item.task, z, plane)
        if manifest_stamp(measurements) != stamp:  # what was read may be of either
            raise InputChangedError(_input_changed(measurements, item))
        return window(measurement, region) if item.grid.tiled else measurement

    def overview(self, measurements: Root, item: ItemPlan, block: Block) -> Pooled | None:
        """The whole plane of a block that sees a part of it, pooled; None if it is not wanted.

        Args:
            measurements: path of the store.
            item: whose block it is.
            block: which.

        Raises:
            As `read`.
        """
        if not (item.grid.tiled and fills_wide_holes(item)):
            return None
        domain: Domain = self._keep(("domain", item.record.domain), load_domain)

        def read(region: Region) -> Measurement:
            return self.read(measurements, item, replace(block, read=region))

        z = block.read.z0, block.read.z1
        key = ("overview", item.input_digest, z, coarse_factor(item.grid))
        return self._keep_plane(key, lambda _: overview_of(item, z, domain, read))

    def compute(
        self,
        measurement: Measurement,
        item: ItemPlan,
        block: Block,
        overview: Pooled | None = None,
    ) -> tuple[Array, Account]:
        """Restore the write region of a block.

        Args:
            measurement: of its read region.
            item: whose block it is.
            block: which.
            overview: of the plane, where the block sees a part of it.

        Returns:
            Pixels (c z h w) float32 in source units, and the account, whose seconds
            and memory are the caller's to fill in.

        Raises:
            BadInputError: if the measurement cannot be used.
            NotFiniteError: if the result has NaN or infinite pixels.
            ModelChangedError: if the model is not the plan's.
        """
        with torch.no_grad():
            domain: Domain = self._keep(("domain", item.record.domain), load_domain)
            problem = posed(domain, measurement)
            solved = self._restored(item, domain, measurement, problem, block, overview)
            pixels = _to_source(problem, solved.x, item, block)
            residuals, exact = _residuals(problem, solved.x, block)
        account = Account(
            seconds=0.0,
            peak_bytes=0,
            nfe=solved.nfe,
            num_operator_calls=solved.num_operator_calls,
            residual=residuals,
            exact_data=exact,
            low=float(pixels.min()),
            high=float(pixels.max()),
        )
        return pixels, account

    def _restored(
        self,
        item: ItemPlan,
        domain: Domain,
        measurement: Measurement,
        problem: Problem,
        block: Block,
        overview: Pooled | None,
    ) -> Solved:
        method = item.method
        if method.kind == "baseline":
            return _classical(domain, measurement, problem, method.name, method.options)
        return self.solve(item, problem, block, overview=overview)

    def solve(
        self,
        item: ItemPlan,
        problem: Problem,
        block: Block,
        watch: Watch | None = None,
        overview: Pooled | None = None,
    ) -> Solved:
        """Restore the read region of a block by the item's solver, in network units.

        Args:
            item: whose block it is; its method is a solver.
            problem: of the block's measurement.
            block: which.
            watch: puts a denoiser that looks on in place of the block's own.
            overview: of the plane, where the block sees a part of it.

        Raises:
            BadInputError: if the solver has no model, or cannot take the operator.
            ModelChangedError: if the model is not the plan's.
        """
        method, model = item.method, self.model_of(item)
        guide = _guide(model, problem)
        operator, y, noise = problem.operator, problem.y, problem.noise
        found = self._wide_holes(item, problem, block, overview)
        if found is not None and isinstance(operator, Mask):
            read = block.read
            part = found.means.window(read.y0, read.y1, read.x0, read.x1)
            operator, y, noise = part.applied(operator.mask, y, noise)
        sigmas = power_sigmas(method.num_levels, method.sigma_max, method.sigma_min, method.rho)
        bands = problem.shape[0] // (block.read.z1 - block.read.z0)  # folded into the batch
        options = dict(method.options)
        if options.get("z_coupling"):
            options["z_stride"] = bands
        solver = self._solver(model, problem, method.name, options, item.grid.reach)
        origin = (block.read.z0 * bands, block.read.y0, block.read.x0)
        denoise = self._denoiser(model, problem.condition, item, origin[1:], guide)
        denoise = denoise if watch is None else watch(denoise)
        draws = KeyedDraws(item.seed, item.record.source_digest, origin)
        try:
            with self._batcher.lane():
                result = solver(denoise, operator, y, noise, sigmas, draws)
        except UnsuitedError as error:
            raise BadInputError(str(error)) from error
        nfe = result.num_denoiser_calls + (0 if found is None else found.nfe)
        return Solved(result.x, nfe, result.num_operator_calls, result.trace)

    def _wide_holes(
        self, item: ItemPlan, problem: Problem, block: Block, overview: Pooled | None
    ) -> Found | None:
        """What coarse scales say of the block's plane; None if none of its holes is wide."""
        if not (fills_wide_holes(item) and isinstance(problem.operator, Mask)):
            return None  # a guest's masks may be operators of its own
        if not item.grid.tiled:
            overview = pooled_problem(problem, coarse_factor(item.grid))
            return None if overview is None else self._coarse(item, problem, block, overview)
        if overview is None:
            raise RuntimeError("a block of a cut plane with holes needs the plane's overview")
        key = ("wide-holes", item.key, item.seed, block.read.z0)
        return self._keep_plane(key, lambda _: self._coarse(item, problem, block, overview))

    def _coarse(
        self, item: ItemPlan, problem: Problem, block: Block, overview: Pooled
    ) -> Found | None:
        model, bands = self.model_of(item), problem.shape[0] // (block.read.z1 - block.read.z0)
        try:
            prior = model.prior(problem.condition)
        except BadModelError:
            return None  # of solvers that do without a table
        own = model.student if model.is_distilled else model.denoiser
        denoise = _on_device(own(problem.condition), item.device_class)
        return coarse_scales(
            item, overview, problem.noise, prior, _bounded(denoise, (0, 0)), block.read.z0 * bands
        )

    def model_of(self, item: ItemPlan) -> Model:
        """The model that restores an item.

        Raises:
            BadInputError: if it has none.
            ModelChangedError: if the model is not the plan's.
        """
        if item.model is None:
            raise BadInputError(
                f"the solver '{item.method.name}' needs a model: name one with --model"
            )
        return self._model(item.model, item.dtype, item.device_class)

    def _denoiser(
        self,
        model: Model,
        condition: str,
        item: ItemPlan,
        origin_yx: tuple[int, int],
        guide: Tensor | None,
    ) -> Denoiser:
        """D(x; sigma) of a block's canvas, on the item's device, in calls of bounded size.

        Guides go with the image as further channels of it, into tiles and batches.
        """
        if guide is not None:
            carrying = model.carrying_denoiser(condition)
            return guided(self._bounded_calls(model, condition, item, origin_yx, carrying), guide)
        own = model.student if model.is_distilled else model.denoiser
        return self._bounded_calls(model, condition, item, origin_yx, own(condition))

    def _bounded_calls(
        self,
        model: Model,
        condition: str,
        item: ItemPlan,
        origin_yx: tuple[int, int],
        network: Denoiser,
    ) -> Denoiser:
        denoise = _on_device(network, item.device_class)
        alone = _bounded(denoise, origin_yx)
        if not item.batch_px:
            return alone
        key = (model.digest, condition, type(network), item.dtype, item.device_class, item.batch_px)
        batched = self._batcher.denoiser(key, denoise, item.batch_px)
        shared = _tiled(batched, origin_yx, max_batch=MAX_BATCH)

        def call(x: Signal, sigma: Sigma) -> Signal:
            # A graph of gradients ends at its own lane: nothing of it may be another's.
            if torch.is_grad_enabled() and x.requires_grad:
                return alone(x, sigma)
            return shared(x, sigma)

        return call

    def _model(self, ref: ModelRef, dtype: str, device: str) -> Model:
        def load(_: Any) -> Model:
            try:
                model = Model.load(Path(ref.path), dtype=_DTYPES[dtype], device=device)
            except (BadModelError, OSError) as error:
                raise ModelChangedError(f"the model cannot be loaded: {error}") from error
            if model.digest != ref.digest:
                raise ModelChangedError(
                    f"the model at {ref.path} changed since the plan was made; plan again"
                )
            return model

        return self._keep(("model", ref, dtype, device), load)

    def _solver(
        self,
        model: Model,
        problem: Problem,
        name: str,
        options: Mapping[str, Any],
        reach: int | None,
    ) -> Solver:
        condition = problem.condition
        all_guides = bool(problem.guides) and set(model.guides(condition)) <= set(problem.guides)

        def make(_: Any) -> Solver:
            try:
                prior = replace(model.prior(condition, guided=all_guides), reach=reach)
            except BadModelError as error:
                if condition not in model.conditions:
                    raise BadInputError(str(error)) from error
                prior = None  # solvers that need the table say so themselves
            try:
                return make_solver(name, prior, solver_options(options))
            except ValueError as error:
                raise BadInputError(str(error)) from error

        text = json.dumps(options, sort_keys=True)
        return self._keep(("solver", model.digest, condition, all_guides, name, text, reach), make)

    def _keep(self, key: tuple[Any, ...], make: Callable[[Any], Any]) -> Any:
        """The thing of a key, made from the key's second part if it is not kept."""
        return self._held(self._kept, 16, key, make)

    def _keep_plane(self, key: tuple[Any, ...], make: Callable[[Any], Any]) -> Any:
        """The same of what is as large as a plane's coarse scale: its data and its means."""
        return self._held(self._planes, 2, key, make)

    def _held(
        self,
        kept: OrderedDict[Hashable, Any],
        most: int,
        key: tuple[Any, ...],
        make: Callable[[Any], Any],
    ) -> Any:
        with self._lock:  # making one may ask for another
            if key not in kept:
                kept[key] = make(key[1])
                while len(kept) > most:
                    kept.popitem(last=False)
            kept.move_to_end(key)
            return kept[key]


def _input_changed(measurements: Root, item: ItemPlan) -> str:
    return (
        f"the input {measurements} changed since the plan was made ({item.item_id}, {item.task}); "
        "plan again"
    )


def window(measurement: Measurement, region: Region) -> Measurement:
    """The measurement of a window of the plane, for operators that act pixel by pixel.

    Every array whose last two axes are the plane is cut, and copied: a view would keep the plane.
    Those that were read as this window are taken as they are.

    Args:
        measurement: of whole planes, its slices those of the region already.
        region: rows and columns to keep.
    """
    c, z, h, w = measurement.record.shape

    def cut(array: Array) -> Array:
        if array.shape[-2:] != (h, w):
            return array
        return array[..., region.y0 : region.y1, region.x0 : region.x1].copy()

    _, height, width = region.shape
    return replace(
        measurement,
        record=replace(measurement.record, shape=(c, z, height, width)),
        y=cut(measurement.y),
        arrays={name: cut(array) for name, array in measurement.arrays.items()},
    )


def _guide(model: Model, problem: Problem) -> Tensor | None:
    """The problem's guides as the model's channels.

    Raises:
        BadInputError: if the model was not trained with one of them.
    """
    unknown = sorted(set(problem.guides) - set(model.guides(problem.condition)))
    if unknown:
        raise BadInputError(
            f"the model was not trained with the guide '{unknown[0]}' for {problem.condition}: "
            "leave out --guide, or choose another model"
        )
    return as_channels(problem, model.guide_channels)


def _classical(
    domain: Domain,
    measurement: Measurement,
    problem: Problem,
    name: str,
    params: Mapping[str, Any],
) -> Solved:
    known = domain.baselines()
    if name not in known:
        raise BadInputError(
            f"domain '{domain.name}' has no method '{name}': choose one of {', '.join(known)}"
        )
    with _counted(problem.operator) as calls:
        x = known[name](measurement, problem, params)
    return Solved(x, 0, calls())


@contextmanager
def _counted(operator: Any) -> Iterator[Callable[[], int]]:
    """Count calls of A and A_adjoint on this very object, so that its type stays what it is."""
    count = 0

    def counting(apply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(value: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return apply(value)

        return call

    names = ("A", "A_adjoint")
    for name in names:
        vars(operator)[name] = counting(getattr(operator, name))
    try:
        yield lambda: count
    finally:
        for name in names:
            vars(operator).pop(name, None)


def _on_device(denoise: Denoiser, device: str) -> Denoiser:
    """The denoiser of tensors on the CPU: the data step stays there, where the operators are."""

    def call(x: Signal, sigma: Sigma) -> Signal:
        return denoise(x.to(device), sigma.to(device)).to(x.device)

    return call


def _tiled(denoise: Denoiser, origin_yx: tuple[int, int], max_batch: int) -> Denoiser:
    """The denoiser with planes beyond a size in tiles, some of them in one call."""
    tiles = tiled_denoiser(
        denoise,
        tile=DENOISER_TILE_PX,
        halo=HALO_PX,
        stride=STRIDE,
        max_batch=max_batch,
        origin_yx=origin_yx,
    )

    def call(x: Signal, sigma: Sigma) -> Signal:
        return (tiles if math.prod(x.shape[-2:]) > DENOISER_PLANE_PX else denoise)(x, sigma)

    return call


def _bounded(denoise: Denoiser, origin_yx: tuple[int, int]) -> Denoiser:
    """The denoiser with bounded memory: few pixels a call."""

    def split(x: Signal, sigma: Sigma) -> Signal:
        step = max(1, DENOISER_BATCH_PX // math.prod(x.shape[-2:]))
        if len(x) <= step:
            return denoise(x, sigma)
        parts = range(0, len(x), step)
        return torch.cat([denoise(x[i : i + step], sigma[i : i + step]) for i in parts])

    return _tiled(split, origin_yx, max_batch=1)


def _inner(block: Block) -> tuple[slice, slice, slice]:
    """Slices, rows and columns of the write region inside the read region."""
    write, read = block.write, block.read
    slices = slice(write.z0 - read.z0, write.z1 - read.z0)
    rows = slice(write.y0 - read.y0, write.y1 - read.y0)
    return slices, rows, slice(write.x0 - read.x0, write.x1 - read.x0)


def _to_source(problem: Problem, x: Tensor, item: ItemPlan, block: Block) -> Array:
    """Network units (b c h w) of the read region -> source units (c z h w) of the write region."""
    image = problem.to_source(x.float().cpu()).numpy()
    inner = image.swapaxes(0, 1)[:, *_inner(block)]
    pixels = np.ascontiguousarray(inner, dtype=np.float32)
    expected = (item.grid.shape[0], *block.write.shape)
    if pixels.shape != expected:
        raise RuntimeError(f"the method returned pixels {pixels.shape}, not {expected}")
    if not np.isfinite(pixels).all():
        bad = int(pixels.size - np.count_nonzero(np.isfinite(pixels)))
        raise NotFiniteError(f"{bad} of {pixels.size} restored pixels are NaN or infinite")
    return pixels


def _residuals(problem: Problem, x: Tensor, block: Block) -> tuple[tuple[float, ...], bool]:
    """The residual of each element of the write region, and whether data are exact."""
    measured = reached(problem.operator, x)
    slices, rows, columns = _inner(block)
    if block.read.shape[1:] != block.write.shape[1:]:
        inside = torch.zeros_like(measured)
        inside[..., rows, columns] = measured[..., rows, columns]
        measured = inside
    values = residual(problem.operator, problem.y, x, problem.noise, measured)
    variance = problem.noise.variance(problem.operator.A(x))
    bands = len(values) // block.read.shape[0]
    written = values[slices.start * bands : slices.stop * bands]
    return tuple(written), bool(variance.max() <= EXACT_VARIANCE)
