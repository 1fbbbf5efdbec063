"""What is wrong with settings, in words: by the names that the user typed, and the nearest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


@dataclass(frozen=True)
class Mistake:
    """The first mistake in settings.

    Attributes:
        where: dotted name of the setting.
        sentence: what is wrong and what could be meant, without a full stop.
    """

    where: str
    sentence: str


def mistake_in(
    error: ValidationError, kind: type[BaseModel] | None, options: Mapping[str, str] | None = None
) -> Mistake:
    """Put the first fault of a validation into words.

    Args:
        error: of the validation.
        kind: the settings that were validated; None if that is not known.
        options: setting -> the option that a user sets it by.
    """
    faults = error.errors(include_url=False)
    # What is not known before what is missing: often the same setting, mistyped.
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    where = ".".join(map(str, fault["loc"])) or error.title
    if fault["type"] == "extra_forbidden":
        return Mistake(where, f"there is no setting '{where}'{_meant(where, kind)}")
    given = [options[name] for name in map(str, fault["loc"]) if options and name in options]
    called = given[-1] if given else f"the setting '{where}'"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Mistake(where, f"{called} cannot be used: {_begun_small(fault['msg'])}{more}")


def _meant(where: str, kind: type[BaseModel] | None) -> str:
    """What could be meant by a name: the nearest known one, or all of them."""
    known = [] if kind is None else list(_names(kind))
    by_last = {name.rpartition(".")[2]: name for name in known}
    if near := get_close_matches(where.rpartition(".")[2], by_last, 1):
        return f": did you mean '{by_last[near[0]]}'?"
    return f"; there are {', '.join(known)}" if known else ""


def _names(kind: type[BaseModel], outer: str = "") -> Iterator[str]:
    """Dotted names of all settings, those of groups after their group."""
    for name, field in kind.model_fields.items():
        yield outer + name
        if inner := _settings_of(field.annotation):
            yield from _names(inner, f"{outer}{name}.")


def _settings_of(annotation: Any) -> type[BaseModel] | None:
    """The group of settings that a field holds; None if it holds a value."""
    from pydantic import BaseModel

    parts = (annotation, *getattr(annotation, "__args__", ()))
    return next((p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)), None)


def _begun_small(text: str) -> str:
    """Pydantic's sentences as the end of ours; names in them keep their letters."""
    text = text.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]
