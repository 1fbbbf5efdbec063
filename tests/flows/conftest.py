"""What several flow tests need: a registry that is made once, and one Prefect server for all."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from evaluation_kit import make_dataset, make_model, use_known_baselines
from train_kit import dataset_of

from flows.config import Home
from flows.tracking import open_client


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with its tables made, which takes seconds: once, then copied."""
    home = tmp_path_factory.mktemp("store")
    open_client(Home(home=home, mlflow_uri=None)).search_registered_models()
    return home / "mlflow.db"


@pytest.fixture
def registry_home(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own, with an empty registry."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("SASHIKO_HOME", str(home))
    monkeypatch.delenv("SASHIKO_MLFLOW_URI", raising=False)
    shutil.copy(empty_store, home / "mlflow.db")
    return home


@pytest.fixture(scope="module")
def clean_site(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Path]:
    """A folder with images, a model and a home of its own; classical methods of known results."""
    root = tmp_path_factory.mktemp("site")
    make_dataset(root / "clean.zarr")
    make_model(root / "model")
    (root / "home").mkdir()
    shutil.copy(empty_store, root / "home" / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SASHIKO_HOME", str(root / "home"))
        patch.delenv("SASHIKO_MLFLOW_URI", raising=False)
        use_known_baselines(patch, root / "log")
        yield root


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """A real ephemeral Prefect server on a database of its own; its start takes 5 to 30 s."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield PREFECT_API_URL.value()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photographs to train on, the last for validation."""
    return dataset_of(tmp_path_factory.mktemp("data") / "photos.zarr", range(4))
