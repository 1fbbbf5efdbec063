"""Start a command's work: through its Prefect flow, or straight through the plain function.

Both run the same code on the same settings. Without a server (PREFECT_API_URL or a profile of the
user's) one is started for the length of the command, with its database under the home folder.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.checks import check
from flows.config import Home, Settings
from flows.engine.events import EventHandler
from flows.prefect_server import CommandServer

if TYPE_CHECKING:
    from flows.api_review import Asker


def run(
    command: str,
    settings: Settings,
    *,
    prefect: bool,
    on_event: EventHandler,
    ask: Asker | None = None,
) -> Any:
    """Run a command.

    Args:
        command: "ingest", "train", "evaluate", "restore", "review" or "nightly".
        settings: the command's settings.
        prefect: through its Prefect flow.
        on_event: told of progress.
        ask: puts the question of `review` to a person.

    Returns:
        What the plain function returns.

    Raises:
        BadInputError: if the input cannot be used; what is mistyped is told before a server starts.
    """
    if not prefect:
        more = {} if ask is None else {"ask": ask}
        return getattr(import_module("flows.api"), command)(settings, on_event=on_event, **more)
    check(settings)
    start_prefect()()
    return _run_flow(command, settings, on_event, ask)


def start_prefect() -> Callable[[], None]:
    """Start a server for the flows to come, unless there is one; returns at once.

    It starts while other things are done; the function that is returned waits for it, and flows
    may run after that. A home, server or profile that the user has chosen is left as it is. The
    server stops when this process does: after Prefect's own last words to it, for which Prefect
    would wait a minute if it had gone.
    """
    chosen = os.environ.get("PREFECT_API_URL") or os.environ.get("PREFECT_PROFILE")
    if chosen or (Path.home() / ".prefect" / "profiles.toml").exists():
        return lambda: None
    set_prefect_home()
    server = CommandServer()
    atexit.register(server.close)

    def wait() -> None:
        os.environ["PREFECT_API_URL"] = server.wait()

    return wait


def set_prefect_home() -> None:
    """Let Prefect keep its database under our home folder, unless it has another."""
    os.environ.setdefault("PREFECT_HOME", str(Home().home.resolve() / "prefect"))


def _run_flow(command: str, settings: Settings, on_event: EventHandler, ask: Asker | None) -> Any:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.watch import listening

    flow = getattr(import_module(f"flows.{command}"), f"{command}_flow")
    # Prefect reads the environment when it is imported, which may have been before the server.
    address = os.environ.get("PREFECT_API_URL")
    server = temporary_settings({PREFECT_API_URL: address} if address else {})
    with server, listening(on_event, ask):
        return flow(settings)
