"""Tracking: runs reach an sqlite store, and losing MLflow loses nothing and fails nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from flows import tracking
from flows.config import Home


@pytest.fixture
def home(tmp_path, empty_store):
    (tmp_path / "home").mkdir()
    shutil.copyfile(empty_store, tmp_path / "home" / "mlflow.db")
    return Home(home=tmp_path / "home", cache=tmp_path / "cache", mlflow_uri=None)


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def only_run(home, experiment):
    client = tracking.open_client(home)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id])
    assert len(runs) == 1
    return client, runs[0]


def a_whole_run(home):
    with tracking.track_run("trial", "one", params={"nfe": 12}, tags={"task": "t"}, home=home) as r:
        r.log_metrics({"psnr": 31.5, "hole": None}, step=3)
        r.log_picture("pictures/square.png", np.full((4, 5, 3), 7, np.uint8))
        r.log_json("rows.json", [{"psnr": 31.5}])
    return r


def test_a_first_run_reaches_a_new_sqlite_store_and_says_nothing(tmp_path):
    home = Home(home=tmp_path / "new", mlflow_uri=None)
    script = (
        "from pathlib import Path; from flows.config import Home; from flows.tracking import *\n"
        f"home = Home(home=Path({str(home.home)!r}), mlflow_uri=None)\n"
        "with track_run('trial', 'one', params={'nfe': 12}, home=home) as run:\n"
        "    run.log_metrics({'psnr': 31.5}, step=3)\n"
        "    run.log_json('a/rows.json', [1])\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path / "user")}
    for name in ("PYTEST_CURRENT_TEST", "CI", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # MLflow's telemetry leaves an installation id in the user's folder as soon as it is on.
    assert not (tmp_path / "user").exists()
    _, run = only_run(home, "trial")
    assert run.data.metrics == {"psnr": 31.5}
    assert run.data.params == {"nfe": "12"}
    assert run.info.status == "FINISHED"
    stored = list((home.home / "mlflow-artifacts").rglob("a/rows.json"))
    assert [json.loads(p.read_text()) for p in stored] == [[1]]


def test_a_failed_body_ends_the_run_as_failed_and_the_error_passes(home):
    with pytest.raises(ZeroDivisionError), tracking.track_run("trial", "bad", home=home):
        1 / 0  # noqa: B018
    assert only_run(home, "trial")[1].info.status == "FAILED"


def test_an_unreachable_server_spools_and_a_later_run_sends_it(home, closed_port, caplog):
    away = home.model_copy(update={"mlflow_uri": f"http://user:secret@127.0.0.1:{closed_port}"})
    with caplog.at_level(logging.WARNING):
        run = a_whole_run(away)
    (warning,) = caplog.messages
    assert "cannot be used" in warning
    assert "secret" not in warning
    assert run.run_id is None
    (spool,) = (home.home / "mlflow-spool").glob("*.jsonl")
    kinds = [json.loads(line)["kind"] for line in spool.read_text().splitlines()]
    assert kinds == ["run", "tags", "params", "metrics", "file", "file", "end"]

    with tracking.track_run("other", "next", home=home):
        pass
    assert list((home.home / "mlflow-spool").iterdir()) == []
    client, sent = only_run(home, "trial")
    assert sent.data.metrics == {"psnr": 31.5}
    assert sent.data.tags["task"] == "t"
    assert {a.path for a in client.list_artifacts(sent.info.run_id)} == {"pictures", "rows.json"}
    assert client.get_metric_history(sent.info.run_id, "psnr")[0].step == 3


def test_losing_mlflow_in_mid_run_goes_on_in_the_spool_and_ends_up_in_one_run(
    home, monkeypatch, caplog
):
    with caplog.at_level(logging.WARNING), tracking.track_run("trial", "one", home=home) as run:
        run.log_metrics({"before": 1.0})
        with monkeypatch.context() as broken:
            broken.setattr(tracking._Mlflow, "write", _refuse)
            run.log_metrics({"during": 2.0})
        run.log_metrics({"after": 3.0})
    assert len(caplog.messages) == 1
    assert tracking.send_spooled(home) == 1
    _, sent = only_run(home, "trial")
    assert sent.data.metrics == {"before": 1.0, "during": 2.0, "after": 3.0}
    assert sent.info.status == "FINISHED"


def _refuse(self, entry):
    raise ConnectionError("gone")


def test_a_spool_that_cannot_be_sent_is_put_back(home, closed_port, monkeypatch, caplog):
    a_whole_run(home.model_copy(update={"mlflow_uri": f"http://127.0.0.1:{closed_port}"}))
    monkeypatch.setattr(tracking._Mlflow, "_metrics", _refuse)
    assert tracking.send_spooled(home) == 0
    assert "could not be sent" in caplog.messages[-1]
    assert len(list((home.home / "mlflow-spool").glob("*.jsonl"))) == 1


def test_no_store_and_no_spool_still_lets_the_work_go_on(tmp_path, closed_port, caplog):
    (tmp_path / "home").write_text("a file where the folder should be")
    home = Home(home=tmp_path / "home", mlflow_uri=f"http://127.0.0.1:{closed_port}")
    a_whole_run(home)
    assert "neither MLflow nor a spool" in caplog.messages[0]


def test_importing_the_module_does_not_import_mlflow():
    code = "import sys, flows.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
