"""An address at which no cluster answers, or one that does not let us in, is told at once."""

import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_kit import image_settings, put_images

from domains.base import BadInputError
from flows.api_restore import restore
from flows.config import ComputeSettings
from flows.engine.executor import RayExecutor
from flows.engine.ray_session import require_cluster


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_address_where_nothing_listens_is_told_before_an_image_is_read(tmp_path, free_port):
    images = put_images(tmp_path / "images", 1)
    compute = ComputeSettings(executor="ray", ray_address=f"127.0.0.1:{free_port}")
    settings = image_settings(images, tmp_path / "out").model_copy(update={"compute": compute})
    with pytest.raises(BadInputError, match=rf"no Ray cluster .*127.0.0.1:{free_port} \(.*refused"):
        restore(settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInputError, match=f"127.0.0.1:{free_port}"):
        RayExecutor(1, address=f"127.0.0.1:{free_port}").start()


@pytest.mark.parametrize("address", ["here", "127.0.0.1", "127.0.0.1:many", ":"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(BadInputError, match="no address of a Ray cluster"):
        require_cluster(address)


def test_a_machine_that_never_answers_is_waited_for_seconds(monkeypatch):
    asked = []

    def slow(place, timeout):
        asked.append((place, timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", slow)
    with pytest.raises(BadInputError, match=r"\[fd00::1\]:6379 \(timed out\)"):
        require_cluster("ray://[fd00::1]:6379")
    [(place, timeout)] = asked
    assert place == ("fd00::1", 6379)
    assert timeout <= 10


@pytest.fixture
def guarded(tmp_path: Path, free_port: int) -> Iterator[str]:
    """A cluster that asks for a token."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(20)}
    code = f"""
import ray, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=dict(
    num_cpus=1, object_store_memory={80 * 2**20}, include_dashboard=False,
    gcs_server_port={free_port}))
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **token},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        address = process.stdout.readline().strip()
        assert address
        yield address
        process.stdin.close()


@pytest.mark.ray
def test_a_cluster_that_wants_another_token_is_told_with_the_names_to_set(guarded):
    code = """
import sys
from domains.base import BadInputError
from flows.engine.ray_session import connect
try:
    connect(sys.argv[1], 1)
except BadInputError as error:
    print(error)
"""
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(20)}
    for ours in ({}, wrong):
        done = subprocess.run(
            [sys.executable, "-c", code, guarded],
            env={**os.environ, **ours},
            capture_output=True,
            text=True,
            check=True,
        )
        assert guarded in done.stdout
        assert "RAY_AUTH_TOKEN" in done.stdout


def test_a_server_that_is_no_cluster_is_told(free_port, monkeypatch):
    import ray

    with socket.create_server(("127.0.0.1", free_port)) as server:
        heard = threading.Event()

        def refuse(**settings):
            heard.set()
            raise ConnectionError(f"Failed to connect to Ray cluster at {settings['address']}")

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", refuse)
        with pytest.raises(BadInputError, match="does not let us in as a Ray cluster"):
            RayExecutor(1, address=f"127.0.0.1:{server.getsockname()[1]}").start()
        assert heard.is_set()
