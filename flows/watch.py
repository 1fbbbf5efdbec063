"""Who listens to a run: the terminal that started it, and the progress artifact on the server.

A Prefect flow takes only settings that a form can hold, so a listener reaches it beside them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from uuid import UUID

from flows.engine.events import Event, EventHandler, ignore

if TYPE_CHECKING:
    from prefect import State

    from flows.api_review import Asker


class HasQuarantine(Protocol):
    """A result that names what could not be used."""

    @property
    def quarantined(self) -> Sequence[Any]:
        """One entry an unusable input."""
        ...


Result = TypeVar("Result", bound=HasQuarantine)

_LISTENER: ContextVar[EventHandler] = ContextVar("listener", default=ignore)
_ASKER: ContextVar[Asker | None] = ContextVar("asker", default=None)
_LOG = logging.getLogger(__name__)


@contextmanager
def listening(handler: EventHandler, ask: Asker | None = None) -> Iterator[None]:
    """Let `handler` hear the events of every flow called inside, and `ask` answer for a person."""
    tokens = _LISTENER.set(handler), _ASKER.set(ask)
    try:
        yield
    finally:
        _LISTENER.reset(tokens[0])
        _ASKER.reset(tokens[1])


def listener() -> EventHandler:
    """The handler that listens here; one that ignores everything if none does."""
    return _LISTENER.get()


def asker() -> Asker | None:
    """Who puts a flow's question to the person at the terminal; None if there is no one."""
    return _ASKER.get()


def flow_events(key: str) -> EventHandler:
    """Events to the listener, and to the progress artifact `key` of the running flow."""
    heard, artifact = listener(), ProgressArtifact(key)

    def both(event: Event) -> None:
        heard(event)
        artifact(event)

    return both


def finished(result: Result) -> Result | State[Result]:
    """A flow's last word: Completed, or Quarantined if some of its input could not be used."""
    if not result.quarantined:
        return result
    from prefect.states import Completed

    message = f"finished, with {len(result.quarantined)} quarantined"
    return Completed(name="Quarantined", message=message, data=result)


class ProgressArtifact:
    """A Prefect progress artifact, moved every few seconds at most; never a reason to fail.

    Args:
        key: of the artifact: lower case and dashes.
        every_s: seconds between two updates, each of which is a request to the server.
        clock: monotonic seconds.
    """

    def __init__(
        self, key: str, every_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._key, self._every_s, self._clock = key, every_s, clock
        self._id: UUID | None = None
        self._last_s = float("-inf")
        self._lost = False

    def __call__(self, event: Event) -> None:
        """Show an event's share of the work, if it is time to."""
        now = self._clock()
        last = event.total > 0 and event.done >= event.total
        if self._lost or event.total <= 0 or not (last or now - self._last_s >= self._every_s):
            return
        self._last_s = now
        try:
            self._show(100.0 * event.done / event.total)
        except Exception as error:
            self._lost = True
            _LOG.warning("the server takes no progress any more (%s); the work goes on", error)

    def _show(self, percent: float) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self._id is None:
            made = create_progress_artifact(progress=percent, key=self._key)
            self._id = made if isinstance(made, UUID) else None
        else:
            update_progress_artifact(self._id, progress=percent)
