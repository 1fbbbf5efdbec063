"""The model registry on a fresh sqlite store: names, aliases, digests, and what is refused."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion_core.model import BadModelError, model_digest
from domains.base import BadInputError
from flows import registry
from flows.prefect_server import wait_until_healthy

NAMES = ["sashiko-ct", "sashiko-mri", "sashiko-city"]


@pytest.fixture(autouse=True)
def home(registry_home: Path) -> Path:
    return registry_home


def make_model(path: Path, weights: bytes) -> Path:
    """A directory that model_digest accepts; the registry never looks into the weights."""
    path.mkdir()
    (path / "weights.safetensors").write_bytes(weights)
    (path / "config.json").write_text("{}")
    seal(path)
    return path


def seal(path: Path) -> None:
    files = sorted(p for p in path.iterdir() if p.name != "digests.json")
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (path / "digests.json").write_text(json.dumps(digests))


def test_three_names_carry_one_digest_and_one_directory(tmp_path: Path):
    model = make_model(tmp_path / "m", b"one")
    assert registry.register_model(model, NAMES) == dict.fromkeys(NAMES, "1")
    resolved = [registry.resolve_model(f"models:/{name}/1") for name in NAMES]
    assert {r.digest for r in resolved} == {model_digest(model)}
    assert len({r.path for r in resolved}) == 1
    assert [r.name for r in resolved] == NAMES


def test_the_registered_files_are_a_copy_under_home(tmp_path: Path, home: Path):
    model = make_model(tmp_path / "m", b"one")
    registry.register_model(model, NAMES[:1])
    shutil.rmtree(model)
    resolved = registry.resolve_model("models:/sashiko-ct/1")
    assert (resolved.path / "weights.safetensors").read_bytes() == b"one"
    assert resolved.path.is_relative_to(home)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home"]


def test_the_same_files_are_not_registered_twice(tmp_path: Path):
    model = make_model(tmp_path / "m", b"one")
    registry.register_model(model, NAMES[:1])
    again = shutil.copytree(model, tmp_path / "copy")
    assert registry.register_model(again, NAMES[:2]) == {"sashiko-ct": "1", "sashiko-mri": "1"}
    assert len(registry.models()) == 2


def test_champion_moves_by_promote_and_back_by_rollback(tmp_path: Path):
    for weights in (b"one", b"two", b"three"):
        registry.register_model(make_model(tmp_path / weights.decode(), weights), NAMES[:1])
    assert registry.champion("sashiko-ct") is None
    for version in (1, 3, 2):
        registry.promote("sashiko-ct", version)
    assert registry.resolve_model("models:/sashiko-ct@champion").version == "2"
    assert registry.rollback("sashiko-ct") == "3"
    assert registry.rollback("sashiko-ct") == "1"
    assert registry.resolve_model("models:/sashiko-ct@champion").version == "1"
    with pytest.raises(BadInputError, match="nothing to roll back to"):
        registry.rollback("sashiko-ct")


def test_promoting_the_champion_again_leaves_the_history_alone(tmp_path: Path):
    registry.register_model(make_model(tmp_path / "m", b"one"), NAMES[:1])
    registry.promote("sashiko-ct", 1)
    registry.promote("sashiko-ct", 1)
    with pytest.raises(BadInputError, match="nothing to roll back to"):
        registry.rollback("sashiko-ct")


def test_rollback_skips_a_champion_that_a_crash_left_in_its_own_history(tmp_path: Path):
    for weights in (b"one", b"two"):
        registry.register_model(make_model(tmp_path / weights.decode(), weights), NAMES[:1])
    registry.promote("sashiko-ct", 1)
    registry._set_former(registry._client(), "sashiko-ct", ["1"])  # and no alias moved
    with pytest.raises(BadInputError, match="nothing to roll back to"):
        registry.rollback("sashiko-ct")


def test_altered_files_are_refused_and_not_promoted(tmp_path: Path):
    registry.register_model(make_model(tmp_path / "m", b"one"), NAMES[:1])
    path = registry.resolve_model("models:/sashiko-ct/1").path
    (path / "weights.safetensors").write_bytes(b"bad")
    with pytest.raises(BadModelError, match="sha256 differs"):
        registry.promote("sashiko-ct", 1)
    seal(path)  # now whole in itself, but not what was registered
    with pytest.raises(BadInputError, match="not those that were registered"):
        registry.resolve_model("models:/sashiko-ct/1")
    assert registry.champion("sashiko-ct") is None


def test_models_lists_version_alias_digest_and_metrics(tmp_path: Path):
    for weights, psnr in ((b"one", 30.5), (b"two", 31.25)):
        model = make_model(tmp_path / weights.decode(), weights)
        registry.register_model(model, NAMES[:1], metrics={"psnr_ct": psnr})
    registry.promote("sashiko-ct", 1)
    new, old = registry.models()
    assert (new.version, old.version) == ("2", "1")
    assert (new.aliases, old.aliases) == ((), ("champion",))
    assert new.metrics == {"psnr_ct": 31.25}
    assert new.digest == model_digest(tmp_path / "two")
    assert new.created[:2] == "20"


@pytest.mark.parametrize(
    "ref",
    ["models:/sashiko-ct@champion", "models:/sashiko-ct/7", "models:/nobody/1", "models:sashiko"],
)
def test_an_unknown_registered_model_is_one_clear_sentence(tmp_path: Path, ref: str):
    registry.register_model(make_model(tmp_path / "m", b"one"), NAMES[:1])
    with pytest.raises(BadInputError) as caught:
        registry.resolve_model(ref)
    assert ref in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_directory_and_a_folder_that_is_no_model_are_refused(tmp_path: Path):
    with pytest.raises(BadInputError, match="no model at"):
        registry.resolve_model(str(tmp_path / "absent"))
    with pytest.raises(BadModelError, match="not a model directory"):
        registry.resolve_model(str(tmp_path))


def test_a_directory_is_resolved_without_opening_the_registry(tmp_path: Path, home: Path):
    shutil.rmtree(home)
    model = make_model(tmp_path / "m", b"one")
    resolved = registry.resolve_model(str(model))
    assert (resolved.path, resolved.name, resolved.version) == (model, "m", "")
    assert not home.exists()


@pytest.fixture
def mlflow_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real MLflow server that keeps the artifacts to itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(uri, process, tmp_path / "server.log")
        monkeypatch.setenv("SASHIKO_MLFLOW_URI", uri)
        monkeypatch.setenv("SASHIKO_CACHE", str(tmp_path / "cache"))
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


@pytest.mark.slow
def test_a_model_on_a_server_is_fetched_once_whole_and_checked(
    tmp_path: Path, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
):
    model = make_model(tmp_path / "m", b"one")
    registry.register_model(model, NAMES)
    registry.promote(NAMES[0], 1)
    resolved = registry.resolve_model("models:/sashiko-ct@champion")
    assert resolved.path == tmp_path / "cache" / "models" / model_digest(model)
    assert [p.name for p in resolved.path.parent.iterdir()] == [resolved.digest]
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", None)
    assert registry.resolve_model("models:/sashiko-city/1").path == resolved.path
    (resolved.path / "weights.safetensors").write_bytes(b"bad")
    with pytest.raises(BadModelError, match="sha256 differs"):
        registry.resolve_model("models:/sashiko-ct@champion")


def test_a_guest_s_domain_has_a_champion_once_one_is_promoted(tmp_path: Path):
    with pytest.raises(BadInputError, match=r"tiny has no champion: .* registered as sashiko-tiny"):
        registry.resolve_model("champion", ["tiny"])
    registry.register_model(make_model(tmp_path / "a", b"weights"), ["sashiko-tiny"])
    registry.promote("sashiko-tiny", "1")
    assert registry.resolve_model("champion", ["tiny"]).name == "sashiko-tiny"
