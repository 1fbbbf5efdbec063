"""A Prefect server of our own, on loopback, for as long as one command runs.

Prefect would start one by itself, in the terminal's process group: Ctrl-C then stops the server
first, and the flow waits minutes for an answer before it can end. This one has a session of its
own, and goes when its parent goes, however that ends.

    python -m flows.prefect_server PARENT_PID PORT      what `CommandServer` starts
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from flows.config import Home

START_TIMEOUT_S = 180.0
"""A cold start takes 15 to 30 s on two busy cores."""

_HOST = "127.0.0.1"
_ATTEMPTS = 3  # a port that was free may be taken in the moment before the server has it


class CommandServer:
    """The server of one command. Started at once, in the background; closed at the end."""

    def __init__(self) -> None:
        self._log = Home().home / "prefect" / "server.log"
        self._launch()

    def wait(self) -> str:
        """Wait until the server answers; returns the address of its API.

        Raises:
            RuntimeError: if it does not start.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                wait_until_healthy(self.api_url, self._process, self._log)
            except RuntimeError:
                if attempt == _ATTEMPTS:
                    raise
                self.close()
                self._launch()
            else:
                break
        return self.api_url

    @property
    def api_url(self) -> str:
        """Address of the API."""
        return f"http://{_HOST}:{self._port}/api"

    def close(self) -> None:
        """Stop the server; may be called twice."""
        stop(self._process)

    def _launch(self) -> None:
        self._port = _free_port()
        command = [sys.executable, "-m", "flows.prefect_server", str(os.getpid()), str(self._port)]
        self._process = start(command, self._log)


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a server process in a session of its own; its output goes to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a server process, by force if it does not go."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until_healthy(api_url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server that was just started answers.

    Raises:
        RuntimeError: if it ends or does not answer in time.
    """
    until = time.monotonic() + START_TIMEOUT_S
    while not healthy(api_url):
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the Prefect server did not start: {log} says why")
        time.sleep(0.1)


def healthy(api_url: str) -> bool:
    """Whether a server answers at an API address."""
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _serve(parent: int, port: int) -> None:
    """Serve until stopped, or until the parent is gone."""
    import uvicorn
    from prefect.server.api.server import create_app

    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    app = create_app(ephemeral=True, final=True)
    uvicorn.run(app, host=_HOST, port=port, log_level="error")


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
