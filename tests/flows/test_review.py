"""The review: figures side by side, and nothing promoted without a person's yes."""

import hashlib
import json
import threading
import time
from pathlib import Path

import pytest

from domains.base import BadInputError
from flows import api_review, registry
from flows.config import ReviewSettings

NAME = "sashiko-ct"
TASK = "ct-sparse60"
PSNR = {"1": 30.0, "2": 31.5}


@pytest.fixture(autouse=True)
def two_versions(registry_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Versions 1 (champion) and 2; their evaluation is stood in for, the registry is real."""
    for weights in (b"one", b"two"):
        path = tmp_path / weights.decode()
        path.mkdir()
        (path / "weights.safetensors").write_bytes(weights)
        digests = {"weights.safetensors": hashlib.sha256(weights).hexdigest()}
        (path / "digests.json").write_text(json.dumps(digests))
        registry.register_model(path, [NAME])
    registry.promote(NAME, "1")
    evaluated: list[str] = []

    def evaluate(settings, version, data, tasks, on_event):
        evaluated.append(version)
        return {TASK: {("item", z): PSNR[version] + z for z in range(2)}}

    monkeypatch.setattr(api_review, "_evaluate", evaluate)
    return evaluated


def settings(**changes) -> ReviewSettings:
    return ReviewSettings(name=NAME, input=Path("data.zarr"), tasks=[TASK], **changes)


def review_tag(version: str) -> dict:
    tags = registry._client().get_model_version(NAME, version).tags
    return json.loads(tags["sashiko.review"])


def test_yes_promotes_and_the_decision_is_kept_with_the_version():
    result = api_review.review(settings(answer="yes"))
    assert result.promoted
    assert registry.champion(NAME) == "2"
    (row,) = result.comparison.tasks
    assert (row.num_slices, row.candidate, row.champion) == (2, 32.0, 30.5)
    assert review_tag("2")["decision"] == "yes"
    assert review_tag("2")["gain_db"] == {TASK: 1.5}


def test_no_does_not_promote():
    result = api_review.review(settings(answer="no"))
    assert not result.promoted
    assert registry.champion(NAME) == "1"
    assert review_tag("2")["decision"] == "no"


def test_without_an_answer_and_without_a_person_it_is_a_no():
    result = api_review.review(settings())
    assert not result.promoted
    assert registry.champion(NAME) == "1"


def test_the_person_is_shown_the_figures_and_decides():
    shown = []

    def ask(comparison):
        shown.append(comparison.sentences())
        return True

    assert api_review.review(settings(), ask=ask).promoted
    assert "32.00 dB" in shown[0]
    assert "(+1.50)" in shown[0]


def test_the_newest_version_is_the_candidate_and_both_are_evaluated(two_versions: list[str]):
    api_review.review(settings(answer="no"))
    assert two_versions == ["2", "1"]


def test_without_a_champion_the_candidate_is_shown_alone(two_versions: list[str]):
    registry._client().delete_registered_model_alias(NAME, "champion")
    result = api_review.review(settings(answer="yes"))
    assert two_versions == ["2"]
    assert result.comparison.tasks[0].gain is None
    assert registry.champion(NAME) == "2"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"candidate": "1"}, "champion already"), ({"candidate": "9"}, "has no version 9")],
)
def test_a_candidate_that_cannot_be_one_is_refused(changes: dict, reason: str):
    with pytest.raises(BadInputError, match=reason):
        api_review.review(settings(**changes))


def test_an_unknown_name_is_refused():
    with pytest.raises(BadInputError, match="no model is registered as nobody"):
        api_review.review(ReviewSettings(name="nobody"))


@pytest.fixture
def polling_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.review.POLL_S", 1)


@pytest.mark.prefect
@pytest.mark.usefixtures("polling_fast")
def test_the_flow_pauses_and_the_form_s_yes_promotes(prefect_server: str):
    from flows.review import review_flow

    done = answer_paused_runs({"promote": True})
    result = review_flow(settings(timeout_days=1))
    done.set()
    assert result.promoted
    assert registry.champion(NAME) == "2"


@pytest.mark.prefect
@pytest.mark.usefixtures("polling_fast")
def test_the_flow_pauses_and_the_form_s_no_does_not(prefect_server: str):
    from flows.review import review_flow

    done = answer_paused_runs({"promote": False})
    result = review_flow(settings(timeout_days=1))
    done.set()
    assert (result.decision, result.promoted) == ("no", False)
    assert registry.champion(NAME) == "1"


@pytest.mark.prefect
def test_the_flow_s_timeout_means_no_and_the_run_completes(prefect_server: str):
    from flows.review import review_flow

    state = review_flow(settings(timeout_days=2 / 86400), return_state=True)
    assert state.is_completed()
    assert not state.result().promoted
    assert registry.champion(NAME) == "1"
    assert review_tag("2")["decision"] == "no answer in time: no"


def answer_paused_runs(answer: dict) -> threading.Event:
    """Answer the form of every run that is paused, as a person at the server's page would."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.flow_runs import resume_flow_run

    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            with get_client(sync_client=True) as client:
                runs = client.read_flow_runs(
                    flow_run_filter=FlowRunFilter(state={"type": {"any_": ["PAUSED"]}})
                )
            for run in runs:
                resume_flow_run(run.id, run_input=answer)
            time.sleep(0.3)

    threading.Thread(target=watch, daemon=True).start()
    return done
