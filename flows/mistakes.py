"""What is wrong with settings, in words: by the names that the user typed, and the nearest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from domains.naming import nearest

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails


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
    if plain := _plain(fault):
        return Mistake(where, f"{called} cannot be {fault['input']}: {plain}{more}")
    return Mistake(where, f"{called} cannot be used: {_begun_small(fault['msg'])}{more}")


def _plain(fault: ErrorDetails) -> str:
    """What is wrong with a value that is one of few, or out of its range; "" of other faults."""
    limits = {"greater_than": ("gt", "above"), "greater_than_equal": ("ge", "or more"),
              "less_than": ("lt", "below"), "less_than_equal": ("le", "or less")}  # fmt: skip
    context = fault.get("ctx", {})
    if fault["type"] == "literal_error":
        known = [part.strip("'") for part in re.findall(r"'[^']*'", context["expected"])]
        near = nearest(str(fault["input"]), known)
        meant = "" if near is None else f"did you mean '{near}'? "
        return f"{meant}choose one of {', '.join(known)}" if known else ""
    if fault["type"] in limits:
        name, word = limits[fault["type"]]
        bound = context[name]
        return f"give {f'{bound} {word}' if word.startswith('or') else f'a number {word} {bound}'}"
    return ""


def _meant(where: str, kind: type[BaseModel] | None) -> str:
    """What could be meant by a name: the nearest known one, or all of them."""
    known = [] if kind is None else list(_names(kind))
    by_last = {name.rpartition(".")[2]: name for name in known}
    if near := nearest(where.rpartition(".")[2], by_last):
        return f": did you mean '{by_last[near]}'?"
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
