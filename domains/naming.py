"""What is said of a name that nobody knows: the nearest known one, and all of them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like a mistyped one; None if none is near."""
    found = get_close_matches(name, list(known), 1)
    return found[0] if found else None


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence that refuses a name.

    Args:
        what: the name is of: "domain", "task".
        name: as it was typed.
        known: names, in the order in which they are told.
    """
    names = list(dict.fromkeys(known))
    near = nearest(name, names)
    meant = "" if near is None else f"did you mean '{near}'? "
    return f"unknown {what} '{name}': {meant}choose one of {', '.join(names) or '(there is none)'}"
