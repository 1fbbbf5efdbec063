"""Which method, with which settings: what the user left open comes from the task's own file.

asked for                     becomes
nothing                       the task's `solver`
--levels 8                    the task's `solver` with 8 levels
--method diffpir              diffpir on the task's noise levels
--method tv                   the classical method with its parameters of configs/baselines
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import yaml

from diffusion_core.posterior import SOLVERS
from flows.config import MethodSettings, config_path, load_method, task_names

if TYPE_CHECKING:
    from flows.store import MeasurementEntry

_LIKE = {"blur": "deblur-gauss", "pool": "sr-x4", "identity": "inpaint-random70"}


def reference_task(task: str, operator: str, noise: Mapping[str, Any]) -> str | None:
    """The shipped task whose settings suit a measurement; None if there is none.

    A user's own damaged image ("given") is treated as the task that it is most like.
    """
    if task in _task_names():
        return task
    if operator == "mask":
        return "inpaint-random70" if noise.get("sigma_y", 0.0) > 0 else "inpaint-strokes"
    return _LIKE.get(operator)


def resolve_method(asked: MethodSettings | None, entry: MeasurementEntry) -> MethodSettings:
    """A method with every setting that its pixels depend on.

    Args:
        asked: what the user set; fields that were not set are open.
        entry: the measurement to be restored.
    """
    like = reference_task(entry.task, entry.operator, entry.noise)
    own = _load_method(like) if like else MethodSettings()
    if asked is None:
        return own
    given = {name: getattr(asked, name) for name in asked.model_fields_set}
    name = given.get("name", own.name)
    kind = given.get("kind", "solver" if name in SOLVERS else "baseline")
    options = dict(given.get("options", {}))
    if kind == "baseline":
        frozen = baseline_params(like, name) if like else {}
        return MethodSettings(name=name, kind="baseline", options={**frozen, **options})
    if name == own.name:
        options = {**own.options, **options}
    levels = {**own.model_dump(exclude={"name", "kind", "options"}), **given}
    return MethodSettings(**{**levels, "name": name, "kind": kind, "options": options})


def baseline_params(task: str, name: str) -> dict[str, Any]:
    """Frozen parameters of a classical method on a task; {} where it has none to tune."""
    return dict(_frozen(task).get(name, {}))


@cache
def _frozen(task: str) -> dict[str, dict[str, Any]]:
    path = config_path("baselines", f"{task}.yaml")
    return dict(yaml.safe_load(path.read_text())["methods"]) if path.is_file() else {}


@cache
def _task_names() -> frozenset[str]:
    return frozenset(task_names())


@cache
def _load_method(task: str) -> MethodSettings:
    return load_method(task)
