"""The demo end to end on small pictures: one folder holds it all, a second run reuses it."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from evaluation_kit import INLINE, TASKS, make_dataset, make_model, use_known_baselines

from flows import demo as module
from flows import registry
from flows.demo import demo


@pytest.fixture
def site(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small pictures for the samples, an untrained starter model, cheap classical methods."""
    starter = make_model(tmp_path / "starter")
    monkeypatch.setattr(module, "config_path", lambda *_: starter)
    monkeypatch.setattr(module, "demo_tasks", lambda: {"city": TASKS})
    monkeypatch.setattr(
        "flows.api_data.ingest_samples", lambda path, demo_only, on_event: make_dataset(path)
    )
    use_known_baselines(monkeypatch, tmp_path / "log")
    monkeypatch.delenv("SASHIKO_MLFLOW_URI", raising=False)
    monkeypatch.setenv("SASHIKO_HOME", "")  # restored after the test, for the demo sets it
    monkeypatch.delenv("SASHIKO_HOME")
    (tmp_path / "demo" / "home").mkdir(parents=True)
    shutil.copy(empty_store, tmp_path / "demo" / "home" / "mlflow.db")
    return tmp_path


def test_the_demo_leaves_report_rows_champions_and_nothing_outside(site: Path):
    result = demo(site / "demo", prefect=False, compute=INLINE)
    assert result.page == site / "demo" / "report" / "index.html"
    assert result.page.stat().st_size > 10_000
    rows = json.loads(result.results.read_text())
    assert {row["task"] for row in rows} == set(TASKS)
    assert {"covprox", "diffpir", "dds", "kriging", "biharmonic"} <= {r["method"] for r in rows}
    assert result.champions == dict.fromkeys(registry.MODEL_NAMES.values(), "1")
    assert {p.name for p in site.iterdir()} == {"demo", "starter", "log"}
    assert str(result.page) in result.summary()


def test_the_champion_is_what_restores_and_a_second_run_computes_nothing_again(site: Path):
    events: list = []
    demo(site / "demo", prefect=False, compute=INLINE)
    log = (site / "log").read_text()
    demo(site / "demo", prefect=False, compute=INLINE, on_event=events.append)
    assert (site / "log").read_text() == log
    kinds = [event.kind for event in events]
    assert "reused" in kinds
    assert "block" not in kinds
    assert len(registry.models()) == len(registry.MODEL_NAMES)
    digest = registry.resolve_model("models:/sashiko-city@champion").digest
    rows = json.loads((site / "demo" / "report" / "results.json").read_text())
    assert {row["model_digest"] for row in rows if row["method"] == "covprox"} == {digest}


def test_a_champion_that_a_person_chose_is_left_in_place(
    site: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SASHIKO_HOME", str(site / "demo" / "home"))
    other = shutil.copytree(site / "starter", site / "other")
    (other / "MODEL_CARD.md").write_text("# Another\n")
    digests = json.loads((other / "digests.json").read_text())
    digests["MODEL_CARD.md"] = hashlib.sha256(b"# Another\n").hexdigest()
    (other / "digests.json").write_text(json.dumps(digests))
    registry.register_model(other, ["sashiko-city"])
    registry.promote("sashiko-city", 1)
    champions = demo(site / "demo", prefect=False, compute=INLINE).champions
    assert champions == {"sashiko-ct": "1", "sashiko-mri": "1", "sashiko-city": "1"}
    starter = registry.resolve_model("models:/sashiko-city/2").digest
    assert registry.resolve_model("models:/sashiko-city@champion").digest != starter


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_installs_what_is_not_installed_and_nothing_twice(tmp_path):
    """Once by hand, as the README says, is enough; other pins install anew."""
    root = Path(__file__).parents[2]
    (tmp_path / "infra").mkdir()
    for name in ("Makefile", "pyproject.toml", "infra/constraints.txt"):
        shutil.copyfile(root / name, tmp_path / name)

    def steps() -> str:
        return subprocess.run(
            ["make", "-n", "demo"], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    assert "pip install" in steps()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "sashiko").touch()
    assert "pip install" not in steps()
    later = time.time() + 9
    os.utime(tmp_path / "infra" / "constraints.txt", (later, later))
    assert "pip install" in steps()
