"""configs/*.yaml: tasks, methods and settings, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    ValidationError,
)

from domains.base import BadInputError, Task
from domains.naming import unknown
from domains.registry import config_folders
from flows.config_base import (
    MethodSettings,
    S,
)
from flows.mistakes import mistake_in


def config_path(*parts: str) -> Path:
    """Path of a shipped configuration file or folder."""
    return Path(str(files("configs").joinpath(*parts)))


def domain_config(kind: str, name: str) -> Path | None:
    """A YAML file of the shipped ones or, where they have none of its name, of a guest's domain.

    Args:
        kind: "tasks" or "baselines".
        name: of the task.
    """
    shipped = config_path(kind, f"{name}.yaml")
    if shipped.is_file():
        return shipped
    guests = (folder / kind / shipped.name for folder in config_folders())
    return next((path for path in guests if path.is_file()), None)


def task_names() -> list[str]:
    """Names of the shipped tasks, and of those that guests' domains bring along."""
    folders = (config_path("tasks"), *(folder / "tasks" for folder in config_folders()))
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def load_task_file(name: str) -> dict[str, Any]:
    """A task's YAML as it stands: Task fields, and `solver` with the default MethodSettings."""
    path = domain_config("tasks", name)
    if path is None:
        raise BadInputError(unknown("task", name, task_names()))
    return dict(yaml.safe_load(path.read_text()))


def load_task(name: str) -> Task:
    """The protocol of a task."""
    values = load_task_file(name)
    values.pop("solver", None)
    return Task(name=name, **values)


def load_method(task: str) -> MethodSettings:
    """The task's default way to restore."""
    return MethodSettings(**load_task_file(task).get("solver", {}))


def demo_tasks() -> dict[str, list[str]]:
    """The demo's tasks by domain, in the order of configs/demo.yaml."""
    names = yaml.safe_load(config_path("demo.yaml").read_text())["tasks"]
    by_domain: dict[str, list[str]] = {}
    for name in names:
        by_domain.setdefault(load_task(name).domain, []).append(name)
    return by_domain


def read_settings(kind: type[S], path: Path, changes: Sequence[str] = ()) -> S:
    """Settings from a YAML file, with changes of the form "a.b=value" (the value as YAML).

    Args:
        kind: of settings.
        path: of the file; a name that is not there is looked for among the shipped ones.
        changes: applied in order.

    Raises:
        BadInputError: if the file or a change cannot be read, or a setting is unknown, missing or
            unusable: it names the file or the change.
    """
    if not path.is_file():
        shipped = config_path(path.name)
        if not shipped.is_file():
            known = ", ".join(sorted(p.name for p in config_path().glob("train-*.yaml")))
            raise BadInputError(f"{path}: there is no such file; shipped are {known}")
        path = shipped
    values = _parse_yaml(path.read_text(), str(path))
    if not isinstance(values, dict):
        raise BadInputError(f"{path}: it must hold `setting: value` lines; see configs/")
    for change in changes:
        _change(values, change)
    try:
        return kind(**values)
    except ValidationError as error:
        mistake = mistake_in(error, kind)
        made = [c for c in changes if f"{mistake.where}.".startswith(f"{c.partition('=')[0]}.")]
        holder = f"--set {made[-1]}" if made else path
        raise BadInputError(f"{holder}: {mistake.sentence}") from error


def _change(values: dict[str, Any], change: str) -> None:
    name, equals, text = change.partition("=")
    *outer, last = name.split(".")
    if not equals or not all([*outer, last]):
        raise BadInputError(f"--set {change}: write it as a.b=value")
    for key in outer:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise BadInputError(f"--set {change}: '{key}' is a value, not a group of settings")
    values[last] = _parse_yaml(text, f"--set {change}")


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise BadInputError(f"{where}: it is not YAML ({reason}); correct it") from error
