"""The Prefect flows on a real ephemeral server: states, artifacts, forms, schedule."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domains.base import BadInputError
from flows.config import IngestSettings, TrainSettings, read_settings
from flows.engine.events import Event
from flows.watch import listening

pytestmark = [pytest.mark.prefect, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))


def photo(path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 255, (40, 48, 3), np.uint8)
    Image.fromarray(noise).save(path)


def server_state(state):
    """The state as the server has it, which is what people see."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_flow_run(state.state_details.flow_run_id).state


def test_ingest_completes_and_tells_who_listens(tmp_path: Path):
    from flows.ingest import ingest_flow

    (tmp_path / "in").mkdir()
    photo(tmp_path / "in" / "a.png", 1)
    settings = IngestSettings(source=tmp_path / "in", domain="city", output=tmp_path / "ds.zarr")
    heard: list[Event] = []
    with listening(heard.append):
        state = ingest_flow(settings, return_state=True)
    assert server_state(state).name == "Completed"
    assert len(state.result().items) == 1
    assert [e.kind for e in heard] == ["file"]


def test_a_quarantined_file_shows_in_the_state_and_in_the_result(tmp_path: Path):
    from flows.ingest import ingest_flow

    (tmp_path / "in").mkdir()
    photo(tmp_path / "in" / "a.png", 1)
    (tmp_path / "in" / "b.png").write_text("not a picture")
    settings = IngestSettings(source=tmp_path / "in", domain="city", output=tmp_path / "ds.zarr")
    state = ingest_flow(settings, return_state=True)
    seen = server_state(state)
    assert (seen.type.value, seen.name) == ("COMPLETED", "Quarantined")
    assert "1 quarantined" in seen.message
    assert len(state.result().quarantined) == 1


def test_a_user_s_mistake_comes_out_of_the_flow_as_it_is(tmp_path: Path):
    from flows.ingest import ingest_flow

    settings = IngestSettings(source=tmp_path / "no", domain="city", output=tmp_path / "ds.zarr")
    with pytest.raises(BadInputError, match="no such file or folder"):
        ingest_flow(settings)


def test_progress_becomes_an_artifact_of_the_run(monkeypatch: pytest.MonkeyPatch):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter

    import flows.train

    def train(settings, on_event):
        for step in (1, 2, 4):
            on_event(Event("train", step, 4, "loss"))
        return settings.name

    monkeypatch.setattr(flows.train, "train", train)
    settings = read_settings(TrainSettings, Path("train-tiny.yaml"))
    assert flows.train.train_flow(settings) == "tiny"
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(key={"any_": ["train-progress"]})
        )
    assert [(a.type, a.data) for a in found] == [("progress", 100.0)]
