"""Where a block was computed, as far as that decides its bits: in receipts and manifests."""

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from engine_kit import make_store, published, recorder, same, tiny_plan

from flows.answers import account_lines
from flows.engine import worker
from flows.engine.campaign import run_plan
from flows.engine.environment import environment
from flows.engine.executor import InlineExecutor
from flows.engine.objects import LocalObjects
from flows.engine.receipt import load_receipts, seal, unseal
from flows.engine.restored import open_restored


class StopError(Exception):
    """Stops a run."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("in") / "m.zarr", items=1, shape=(1, 3, 12, 16))


def run_until_block(plan, number: int) -> None:
    def handler(event):
        if event.kind == "block" and event.done == number:
            raise StopError

    with pytest.raises(StopError):
        run_plan(plan, InlineExecutor(), handler)


def test_a_line_names_libraries_and_what_the_processor_is_let_do():
    code = "from flows.engine.environment import environment; print(environment('cpu'))"

    def line(**choices: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code],
            env={"PATH": "", "PYTHONPATH": str(Path(__file__).parents[2]), **choices},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    ours = line()
    assert all(f"{name} {version(name)}" in ours for name in ("torch", "numpy", "scipy"))
    assert line() == ours, "the same in every process"
    assert line(ATEN_CPU_CAPABILITY="default") != ours


def test_receipts_and_the_manifest_name_where_blocks_were_computed(store, tmp_path):
    plan = tiny_plan(store, tmp_path)
    run_until_block(plan, 1)
    [receipt] = load_receipts(LocalObjects(tmp_path), plan.items[0]).values()
    assert receipt.environment == environment("cpu")
    result = run_plan(plan, InlineExecutor())
    [entry] = open_restored(tmp_path).items()
    assert entry.facts["environments"] == {environment("cpu"): 3}
    assert result.account.num_mixed == 0
    assert "environments" not in " ".join(account_lines(result.account))


def test_an_item_whose_run_was_upgraded_halfway_says_so(store, tmp_path, monkeypatch):
    plan, (events, handler) = tiny_plan(store, tmp_path), recorder()
    run_until_block(plan, 1)
    monkeypatch.setattr(worker, "environment", lambda _: "torch 99")
    result = run_plan(plan, InlineExecutor(), handler)
    assert result.num_computed == 2, "what is receipted is not computed again"
    [entry] = open_restored(tmp_path).items()
    assert entry.facts["environments"] == {environment("cpu"): 1, "torch 99": 2}
    assert result.account.num_mixed == 1
    [told] = [e.message for e in events if e.kind == "published"]
    assert "computed in 2 environments" in told
    assert "1 item has blocks of several environments" in " ".join(account_lines(result.account))
    again = run_plan(plan, InlineExecutor())
    assert again.account.num_mixed == 1, "told by every run that finds it"


def test_receipts_of_the_version_before_are_still_true(store, tmp_path):
    plan = tiny_plan(store, tmp_path / "out")
    run_until_block(plan, 2)
    for path in (tmp_path / "out").glob(".work/*/receipts/*.json"):
        body = unseal(path.read_bytes())
        assert body.pop("environment")
        path.write_bytes(seal({**body, "format": 1}))
    assert run_plan(plan, InlineExecutor()).num_computed == 1
    [entry] = open_restored(tmp_path / "out").items()
    assert entry.facts["environments"] == {"": 2, environment("cpu"): 1}
    run_plan(replace(plan, output=tmp_path / "other"), InlineExecutor())
    assert same(published(tmp_path / "out"), published(tmp_path / "other"))
