"""Start a command's work: through its Prefect flow, or straight through the plain function.

Both run the same code on the same settings. Without a server (PREFECT_API_URL or a profile of the
user's) Prefect starts one of its own for the length of the command, with its database under
Sashiko's home folder.
"""

from __future__ import annotations

import os
import threading
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.config import Home, Settings
from flows.engine.events import EventHandler

if TYPE_CHECKING:
    from flows.api_review import Asker

_STARTUP_TIMEOUT_S = 180  # a cold start takes 15 to 30 s on two busy cores; Prefect's limit is 20


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
    """
    if not prefect:
        more = {} if ask is None else {"ask": ask}
        return getattr(import_module("flows.api"), command)(settings, on_event=on_event, **more)
    use_prefect()
    from flows.watch import listening

    flow = getattr(import_module(f"flows.{command}"), f"{command}_flow")
    with listening(on_event, ask):
        return flow(settings)


def use_prefect() -> None:
    """Set Prefect up as this command wants it; call before anything imports Prefect.

    A home, server or profile that the user has chosen is left as it is.
    """
    chosen = ("PREFECT_HOME", "PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")
    profiles = Path.home() / ".prefect" / "profiles.toml"
    if not profiles.exists() and not any(os.environ.get(name) for name in chosen):
        os.environ["PREFECT_HOME"] = str(Home().home.resolve() / "prefect")
    os.environ.setdefault(
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", str(_STARTUP_TIMEOUT_S)
    )


def start_server_early() -> threading.Thread:
    """Start the server that the first flow will use, in the background, if it needs its own.

    Its start takes longer than all its later work; meanwhile other things can be done. A failure
    is not told here: the first flow tries again, and tells.
    """
    use_prefect()
    thread = threading.Thread(target=_start_server, name="prefect-server", daemon=True)
    thread.start()
    return thread


def _start_server() -> None:
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        SubprocessASGIServer().start()
