"""Numbers of things as people say them."""

from __future__ import annotations


def plural(count: int, noun: str) -> str:
    """A count with its noun: 1 item, 2 items, 0 retries."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("ry") else f"{count} {noun}s"
