"""Which method, with which settings: what the user left open comes from the task's own file.

asked for                     becomes
nothing                       the task's `solver`
--levels 8                    the task's `solver` with 8 levels
--method diffpir              diffpir on the task's noise levels
--method tv                   the classical method with its parameters of configs/baselines

A model that was calibrated (`sashiko calibrate`) knows better than the task's file: its noise
levels and its options for the task, the mode and a number of levels near the one asked for come
before the file's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import yaml

from diffusion_core.posterior import DISTILLED, METHODS
from domains.base import BadInputError
from domains.naming import unknown
from domains.registry import load_domain
from flows.config import MethodSettings, domain_config, load_method, load_task

if TYPE_CHECKING:
    from flows.store import MeasurementEntry

CONVERGED = {"tolerance": 3e-5, "max_steps": 300}
"""Options of the linear solves on planes that are cut into blocks: what is asked is a thousandth of
the range, and about ten times the tolerance was seen at the worst pixel (infra/decisions/0009)."""

_NEAR = 1.4
"""Ratio of numbers of levels below which what was fitted for one serves the other: what suits
8 levels (little fresh noise, few small levels) does not suit 20."""

CUT_OUT = {"tolerance": 3e-3, "max_steps": 300}
"""Options of the linear solves of a blurred picture whose scene goes on beyond its border: they
take a hundred steps where those of a periodic one take ten, and to 1e-2 blocks would differ from
the whole by 2e-3 (infra/decisions/0012)."""

COUPLING = "z_coupling"
"""Option of covprox: how much is made of the likeness of neighbouring slices or frames."""

ALONG_Z: Mapping[str, float] = {"mask": 0.3, "identity": 0.03}
"""That option by kind of operator, as fitted on frames 137 to 186 of bikes.mp4 and on a CT volume
(infra/decisions/0028)."""
OTHERWISE_ALONG_Z = 0.1
THIN_SLICES_MM = 3.0
"""Slices as near to each other as that are denoised jointly; where they lie 5 mm apart or more they
say too little of each other."""

LARGE_HOLES = "large_holes"
"""Option of masks: whether holes wider than the network sees are filled from coarse to fine. On
in tasks that ask for it and in users' masks; an item without such a hole comes out the same."""

HOLES = {"tolerance": 1e-4, "max_steps": 400, LARGE_HOLES: True}
"""Options of a user's own masks, whose holes may be large: what lies deep in a
hole converges last. At the usual tolerance a hole of half the side was 3 dB worse, its middle still
at the mean of all images; small holes take hardly more steps (infra/decisions/0024)."""

GIVEN = "given"
"""The task of a user's own damaged image."""

_SOLVED = frozenset({"covprox", "diffpir", "kriging", DISTILLED})
_LIKE = {
    "blur": "deblur-gauss",
    "cropped-blur": "deblur-gauss",
    "pool": "sr-x4",
    "pool-rows": "ct-sr-z3",
    "identity": "denoise-25",
    "fourier": "kspace-x4",
    "multi-coil": "kspace-x4-8coil",
    "parallel-beam": "ct-sparse60",
    "fan-beam": "ct-sparse60",
}
_OF_NOISE = {"rician": "denoise-rician", "haze": "dehaze", "low-light": "low-light"}
COARSE_JPEG = 0.11
"""A file of stronger artefacts is treated as one of quality 10, else as one of 20."""
_SCANS = ("parallel-beam", "fan-beam")
LOW_DOSE_COUNTS = 3e4
"""A scan of fewer photons a ray is treated as the low-dose task."""


def reference_task(task: str, operator: str, noise: Mapping[str, Any]) -> str | None:
    """The known task whose settings suit a measurement; None if there is none.

    A user's own damaged image ("given") is treated as the task that it is most like.
    """
    if _is_known(task):
        return task
    if noise.get("kind") in _OF_NOISE:
        return _OF_NOISE[noise["kind"]]
    if noise.get("kind") == "jpeg":
        return "jpeg-q10" if noise["sigma_y"] > COARSE_JPEG else "jpeg-q20"
    if operator == "mask":
        return "inpaint-random70" if noise.get("sigma_y", 0.0) > 0 else "inpaint-strokes"
    if operator in _SCANS and noise.get("counts_per_ray", LOW_DOSE_COUNTS) < LOW_DOSE_COUNTS:
        return "ct-lowdose"
    return _LIKE.get(operator)


def resolve_method(
    asked: MethodSettings | None,
    entry: MeasurementEntry,
    calibrated: Mapping[str, Any] | None = None,
    *,
    along_z: bool | None = None,
) -> MethodSettings:
    """A method with every setting that its pixels depend on.

    Args:
        asked: what the user set; fields that were not set are open.
        entry: the measurement to be restored.
        calibrated: the model's solver settings (diffusion_core.model.solver_settings).
        along_z: whether slices or frames are restored jointly (coupled).
    """
    like = reference_task(entry.task, entry.operator, entry.noise)
    own = _load_method(like) if like else MethodSettings()
    given = {name: getattr(asked, name) for name in asked.model_fields_set} if asked else {}
    student = (calibrated or {}).get(DISTILLED)
    name = given.get("name", own.name if student is None else DISTILLED)
    kind = given.get("kind", "solver" if name in METHODS else "baseline")
    options = dict(given.get("options", {}))
    if kind == "baseline":
        frozen = baseline_params(like, name) if like else {}
        return MethodSettings(name=name, kind="baseline", options={**frozen, **options})
    _require_kind(name, student)
    if name == DISTILLED:
        own = _of_student(student or {}, given.get("num_levels"))
    own_mode = own.options.get("mode", "mean")
    mode = options.get("mode", own_mode)
    if mode != own_mode:  # what was tuned for one mode misleads the other
        own = _without(own, "mode", "inflation", "zeta", "momentum")
    if calibrated and like and student is None:
        num_levels = given.get("num_levels", own.num_levels)
        own = calibrated_method(own, calibrated.get("tasks", {}).get(like, {}), mode, num_levels)
    if name != DISTILLED:
        own = _at_noise_of(entry, own, like)
    if name == own.name:
        options = {**own.options, **options}
    if entry.operator == "cropped-blur" and name in _SOLVED:
        options = {**CUT_OUT, **options}
    if entry.operator == "mask" and name in _SOLVED:
        asked_of_task = {key: own.options[key] for key in HOLES if key in own.options}
        accuracy = HOLES if entry.task == GIVEN else asked_of_task
        options = {**accuracy, **options}
    if name == "covprox" and mode == "mean":
        options = coupled(options, entry, along_z)
    levels = {**own.model_dump(exclude={"name", "kind", "options"}), **given}
    return MethodSettings(**{**levels, "name": name, "kind": kind, "options": options})


def _require_kind(name: str, student: Mapping[str, Any] | None) -> None:
    """Refuse a student for another solver, and another model for the student's.

    Raises:
        BadInputError: if so.
    """
    if name == DISTILLED and student is None:
        raise BadInputError(
            "the method 'distilled' needs a distilled model: make one with `sashiko distill` and "
            "name it with --model, or choose another --method"
        )
    if student is not None and name not in {DISTILLED, "kriging"}:
        raise BadInputError(
            f"the model is a distilled one, which '{name}' cannot use: choose --method distilled "
            "or kriging, or the model that it was distilled from"
        )


def _of_student(student: Mapping[str, Any], num_levels: int | None) -> MethodSettings:
    """The student's own method: as many evaluations as asked for, or as it was trained for.

    Raises:
        BadInputError: if more are asked for.
    """
    levels = student["levels"]
    if num_levels is not None and num_levels > len(levels):
        raise BadInputError(
            f"the model was distilled for {len(levels)} evaluations at most, not {num_levels}: ask "
            "for fewer, or take covprox with the model that it was distilled from"
        )
    return MethodSettings(
        name=DISTILLED,
        num_levels=len(levels),
        sigma_max=levels[0],
        sigma_min=levels[-1],
        options=dict(student),
    )


def coupled(
    options: Mapping[str, Any], entry: MeasurementEntry, along_z: bool | None
) -> dict[str, Any]:
    """Options of covprox with the coupling of slices or frames, if there is to be one.

    Args:
        options: an explicit z_coupling stays, unless `along_z` is False.
        entry: the measurement.
        along_z: True: whatever it is; False: none; None: where it helped whenever it was measured:
            frames of a clip, and noisy slices that lie near to each other.
    """
    record = entry.record
    rest = {name: value for name, value in options.items() if name != COUPLING}
    if along_z is False or record.shape[1] < 2:
        return rest
    is_clip = record.source_format == "video" and not record.meta.get("turned")
    is_noisy = entry.operator == "identity" and entry.noise.get("kind") == "gaussian"
    is_thin = record.spacing_mm is not None and record.spacing_mm[0] <= THIN_SLICES_MM
    if COUPLING in options or not (along_z or is_clip or (is_noisy and is_thin)):
        return dict(options)
    return {**rest, COUPLING: ALONG_Z.get(entry.operator, OTHERWISE_ALONG_Z)}


def _at_noise_of(entry: MeasurementEntry, own: MethodSettings, like: str | None) -> MethodSettings:
    """Levels that end where the noise of the data is: denoising has no other (decisions/0007)."""
    sigma_y = entry.noise.get("sigma_y")
    scaled = entry.noise.get("kind") in {*_OF_NOISE, "jpeg"}  # each measurement has its own
    same = like == entry.task and not scaled
    if not (scaled or entry.operator == "identity") or like is None or same or not sigma_y:
        return own
    ratio = float(sigma_y) / float(load_task(str(like)).noise["sigma_y"])
    levels = {"sigma_max": own.sigma_max * ratio, "sigma_min": own.sigma_min * ratio}
    return own.model_copy(update=levels)


def solver_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options less those that are the engine's own."""
    return {key: value for key, value in options.items() if key != LARGE_HOLES}


def converged(method: MethodSettings, asked: MethodSettings | None) -> MethodSettings:
    """A method for planes cut into blocks: its linear solves go on until no cut can be seen.

    Where a solve stops early depends on all of its canvas; at the usual tolerance blocks differ
    from the whole by a hundredth of the range.

    Args:
        method: with every setting.
        asked: what the user set: an accuracy asked for is kept.
    """
    if method.name not in _SOLVED:
        return method
    given = asked.options if asked else {}
    return method.model_copy(update={"options": {**method.options, **CONVERGED, **given}})


def known_methods(domain: str) -> list[str]:
    """Every method that a domain's images can be restored by: solvers, then classical ones."""
    return [*METHODS, *load_domain(domain).baselines()]


def require_methods(names: Iterable[str], domains: Iterable[str]) -> None:
    """Refuse names that stand for no method, before anything is read or computed.

    Raises:
        BadInputError: if a name fits none of the domains; it lists those that do.
    """
    known = [name for domain in domains for name in known_methods(domain)]
    for name in names:
        if name not in known:
            raise BadInputError(unknown("method", name, known))


def _without(own: MethodSettings, *names: str) -> MethodSettings:
    """Settings less some options."""
    options = {name: value for name, value in own.options.items() if name not in names}
    return own.model_copy(update={"options": options})


def calibrated_method(
    own: MethodSettings, fits: Mapping[str, Any], mode: str, num_levels: int
) -> MethodSettings:
    """A task's settings with what was fitted for the nearest number of levels, if it is near.

    Args:
        own: of the task's file.
        fits: of the task in solver.json, by solver, mode and number of levels.
        mode: "mean" or "sample".
        num_levels: that will be taken.
    """
    by_levels = fits.get(own.name, {}).get(mode, {})
    apart = {count: abs(math.log(int(count) / num_levels)) for count in by_levels}
    near = [count for count in apart if apart[count] < math.log(_NEAR)]
    if not near:
        return own
    fit = by_levels[min(near, key=lambda count: (apart[count], int(count)))]
    options = {**own.options, **fit["options"]}
    levels = {name: fit[name] for name in ("sigma_max", "sigma_min", "rho")}
    return own.model_copy(update={**levels, "num_levels": num_levels, "options": options})


def baseline_params(task: str, name: str) -> dict[str, Any]:
    """Frozen parameters of a classical method on a task; {} where it has none to tune."""
    return dict(_frozen(task).get(name, {}))


def frozen_methods(task: str) -> list[str]:
    """Names of the classical methods whose parameters are frozen for a task."""
    return sorted(_frozen(task))


@cache
def _frozen(task: str) -> dict[str, dict[str, Any]]:
    path = domain_config("baselines", task)
    return {} if path is None else dict(yaml.safe_load(path.read_text())["methods"])


@cache
def _is_known(task: str) -> bool:
    """Whether a task has a file; guests' domains are loaded for names that are not ours alone."""
    return task != GIVEN and domain_config("tasks", task) is not None


@cache
def _load_method(task: str) -> MethodSettings:
    return load_method(task)
