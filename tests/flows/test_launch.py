"""A command's own Prefect server: it outlives Ctrl-C long enough, and nothing else."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from flows import launch
from flows.prefect_server import healthy

pytestmark = pytest.mark.prefect

SLEEPING_COMMAND = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
import flows.api_data
from flows import cli

def sleep(settings, on_event):
    print("inside the flow", flush=True)
    time.sleep(600)

flows.api_data.ingest = sleep
sys.exit(cli.run(["ingest", "in", "--domain", "city", "--to", "out.zarr"]))
"""


SERVE = "from flows.cli import main; main()"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    return {**kept, "SASHIKO_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}


def test_ctrl_c_in_a_flow_ends_the_command_with_130_and_one_line(
    tmp_path: Path, environment: dict[str, str]
):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").touch()
    command = subprocess.Popen(
        [sys.executable, "-c", SLEEPING_COMMAND],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as a terminal gives it
    )
    with command:
        assert command.stdout is not None
        assert command.stdout.readline() == "inside the flow\n"
        start = time.monotonic()
        os.killpg(command.pid, signal.SIGINT)
        _, err = command.communicate(timeout=120)
    assert command.returncode == 130
    assert [line for line in err.splitlines() if line] == ["sashiko: interrupted"]
    assert time.monotonic() - start < 60


def test_the_server_goes_when_its_command_is_killed(tmp_path: Path, environment: dict[str, str]):
    code = (
        "import time; from flows.prefect_server import CommandServer;"
        "print(CommandServer().wait(), flush=True); time.sleep(600)"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )
    with command:
        assert command.stdout is not None
        address = command.stdout.readline().strip()
        assert healthy(address)
        command.kill()
    until = time.monotonic() + 30
    while healthy(address) and time.monotonic() < until:
        time.sleep(0.2)
    assert not healthy(address)


@pytest.mark.parametrize("name", ["PREFECT_API_URL", "PREFECT_PROFILE"])
def test_a_server_that_the_user_chose_is_left_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "http://127.0.0.1:1/api")
    monkeypatch.setattr(launch, "CommandServer", None)
    launch.start_prefect()()
    assert os.environ[name] == "http://127.0.0.1:1/api"


def test_a_server_schedules_the_nightly_run(tmp_path: Path, environment: dict[str, str]):
    """Not the schedule as posted: a run that the server's own scheduler has put down."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = subprocess.Popen(
        [sys.executable, "-c", SERVE, "serve", "--port", str(port), "--cron", "* * * * *"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 240
        names: list[str] = []
        while not names and time.monotonic() < until:
            time.sleep(1)
            names = _scheduled(f"http://127.0.0.1:{port}/api")
    finally:
        command.terminate()
        command.wait(timeout=60)
    assert names


def _scheduled(api_url: str) -> list[str]:
    """Names of the runs that wait for their time; none while the server is not up."""
    asked = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    request = urllib.request.Request(
        f"{api_url}/flow_runs/filter",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return [run["name"] for run in json.load(answer)]
    except OSError:
        return []
