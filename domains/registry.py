"""Finds domains by entry point: the built-in ones use the same door as guests."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from domains.base import BadInputError, Domain
from domains.naming import unknown

GROUP = "sashiko.domains"


def _found() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def domain_names() -> list[str]:
    """Names of the installed domains, sorted; imports none of them."""
    return sorted(_found())


def require_domain(name: str) -> EntryPoint:
    """Where a domain is to be found; imports nothing.

    Raises:
        BadInputError: if no installed package offers a domain of that name.
    """
    point = _found().get(name)
    if point is None:
        raise BadInputError(unknown("domain", name, domain_names()))
    return point


def config_folders() -> list[Path]:
    """Folders of tasks and frozen baselines that installed domains bring along, by domain."""
    found = (load_domain(name).configs for name in domain_names())
    return [folder for folder in found if folder is not None]


def load_domain(name: str) -> Domain:
    """Load a domain.

    Raises:
        BadInputError: if no installed package offers a usable domain of that name.
    """
    point = require_domain(name)
    domain_class = point.load()
    if not (isinstance(domain_class, type) and issubclass(domain_class, Domain)):
        raise BadInputError(
            f"domain '{name}': its entry point {point.value} is no subclass of domains.base.Domain"
        )
    return domain_class()
