"""The same request of many objects: one after the other on a disk, several at once on S3.

There a request takes 20 to 100 ms and hardly anything of this machine: an item of ten thousand
chunks that is verified and copied one by one would hold up its driver for a quarter of an hour.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from flows.engine.receipt import Objects

A = TypeVar("A")
B = TypeVar("B")


def each(objects: Objects, ask: Callable[[A], B], things: Iterable[A]) -> Iterator[B]:
    """What `ask` returns for each thing, in their order.

    Args:
        objects: that are asked; they say how many requests are worth making at the same time.
        ask: makes the requests of one thing.
        things: taken as they are needed, few of them ahead.
    """
    if objects.at_once == 1:
        yield from map(ask, things)
        return
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(objects.at_once) as pool:
        try:
            for thing in things:
                waiting.append(pool.submit(ask, thing))
                if len(waiting) == 2 * objects.at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
