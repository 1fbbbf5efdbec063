"""The Prefect flows on a real ephemeral server: states, artifacts, forms, schedule."""

from pathlib import Path

import numpy as np
import pytest
from evaluation_kit import INLINE, make_model
from PIL import Image

from domains.base import BadInputError
from flows.config import IngestSettings, RestoreSettings, TrainSettings, read_settings
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


def test_restore_runs_a_task_a_window_and_tells_of_them_as_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    import flows.restore

    pools = []
    make_executor = flows.restore.make_executor
    monkeypatch.setattr(
        flows.restore, "make_executor", lambda c: pools.append(make_executor(c)) or pools[-1]
    )
    (tmp_path / "in").mkdir()
    for number in range(3):
        holey = np.random.default_rng(number).integers(1, 255, (32, 40, 3), np.uint8)
        holey[10:14, 10:20] = 0
        Image.fromarray(holey).save(tmp_path / "in" / f"{number}.png")
    Image.fromarray((holey[..., 0] == 0).astype(np.uint8) * 255).save(tmp_path / "mask.png")
    settings = RestoreSettings(
        input=tmp_path / "in",
        output=tmp_path / "out",
        model=str(make_model(tmp_path / "model")),
        domain="city",
        mask=str(tmp_path / "mask.png"),
        dtype="float32",
        window_items=2,
        compute=INLINE,
    )
    heard: list[Event] = []
    with listening(heard.append):
        state = flows.restore.restore_flow(settings, return_state=True)
    result = state.result()
    assert (len(result.published), result.num_computed) == (3, 3)
    assert len(pools) == 1
    blocks = [e for e in heard if e.kind == "block"]
    assert [(e.done, e.total) for e in blocks] == [(1, 3), (2, 3), (3, 3)]
    assert [e.kind for e in heard].count("done") == 1
    with get_client(sync_client=True) as client:
        run_id = state.state_details.flow_run_id
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run_id]}))
    assert {run.name for run in runs} <= {"window-0", "window-1"}  # Prefect's rows arrive late
    again = flows.restore.restore_flow(settings)
    assert (again.num_reused, again.num_computed) == (3, 0)


def test_every_flow_is_a_deployment_with_a_form_and_nightly_has_a_schedule(tmp_path: Path):
    from prefect.client.orchestration import get_client

    from flows.config import ServeSettings
    from flows.serve import deployments, end_zombies

    settings = ServeSettings(inbox=tmp_path / "in", output=tmp_path / "out", cron="30 1 * * *")
    ids = {d.flow_name: d.apply() for d in deployments(settings)}
    assert set(ids) == {"ingest", "train", "evaluate", "restore", "review", "nightly"}
    with get_client(sync_client=True) as client:
        made = {name: client.read_deployment(number) for name, number in ids.items()}
    for name, deployment in made.items():
        form = deployment.parameter_openapi_schema
        fields = form["definitions"][f"{name.title()}Settings"]["properties"]
        assert fields
        assert deployment.enforce_parameter_schema
        assert [s.schedule.cron for s in deployment.schedules] == (
            ["30 1 * * *"] if name == "nightly" else []
        )
    night = made["nightly"]
    assert night.parameters["settings"]["inbox"] == str(tmp_path / "in")
    assert night.concurrency_options.collision_strategy.value == "CANCEL_NEW"
    end_zombies()
    end_zombies()
    with get_client(sync_client=True) as client:
        assert (
            len(client.read_automations_by_name("sashiko: crash runs whose process is gone")) == 1
        )
