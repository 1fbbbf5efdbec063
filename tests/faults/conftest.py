"""Places for the tests here: a folder, an S3 server, and the same behind a bad network."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_kit import make_store, published, tiny_plan
from fault_proxy import FaultProxy
from object_places import LocalPlace, Place, S3Place, s3_server, use_endpoint

from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture(scope="module")
def store(request, tmp_path_factory) -> Path:
    """Measurements of the tiny domain, as many items and slices as the module says."""
    items, slices = request.module.ITEMS, request.module.SLICES
    folder = tmp_path_factory.mktemp("in")
    return make_store(folder / "m.zarr", items=items, shape=(1, slices, 20, 24))


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory) -> dict:
    """What a run that nothing disturbs publishes of them."""
    output = tmp_path_factory.mktemp("undisturbed")
    run_plan(tiny_plan(store, output), InlineExecutor())
    return published(output)


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch) -> None:
    """Logs of runs on S3 are kept at home."""
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))


@pytest.fixture
def s3(s3_port, monkeypatch) -> S3Place:
    use_endpoint(monkeypatch, f"http://127.0.0.1:{s3_port}")
    return S3Place(s3_port)


@pytest.fixture(params=["local", "s3", "s3 on a bad day"])
def place(request, tmp_path, monkeypatch) -> Iterator[Place]:
    if request.param == "local":
        yield LocalPlace(tmp_path / "out")
        return
    port = request.getfixturevalue("s3_port")
    if request.param == "s3":
        use_endpoint(monkeypatch, f"http://127.0.0.1:{port}")
        yield S3Place(port)
        return
    with FaultProxy(port, seed=11, rate=0.15) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        yield S3Place(port)
        assert sum(proxy.done.values()) > proxy.done[""], "no fault was met"
