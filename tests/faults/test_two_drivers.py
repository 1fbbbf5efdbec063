"""Fault 5: two drivers on the same campaign, each a process of its own, at the same time."""

import os
from collections.abc import Iterator

import pytest
from engine_kit import lines, make_store, method, published, same, tiny_plan
from kills import ended_well, fork, reap

from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.objects import LocalObjects
from flows.engine.verify import verify_output

ITEMS, SLICES = 6, 2


@pytest.fixture(autouse=True)
def _nobody_is_left() -> Iterator[None]:
    yield
    reap()


def driver(plan, gate: int, told: int):
    """Waits at the gate, runs, and tells what became of its items."""

    def work() -> None:
        os.read(gate, 1)
        result = run_plan(plan, InlineExecutor())
        won = len(result.published) - len(result.reused) - result.num_lost
        os.write(told, f"{won} {result.num_lost} {len(result.reused)}\n".encode())

    return work


@pytest.mark.parametrize("repeat", range(3))
def test_one_manifest_wins_no_bytes_are_mixed_and_the_loser_says_so(repeat, tmp_path):
    store = make_store(tmp_path / "m.zarr", items=ITEMS, shape=(1, SLICES, 20, 24))
    run_plan(tiny_plan(store, tmp_path / "undisturbed"), InlineExecutor())
    log, output = tmp_path / "log", tmp_path / "out"
    plan = tiny_plan(store, output, method(log=str(log)))
    (gate, opener), (ear, mouth) = os.pipe(), os.pipe()
    drivers = [fork(driver(plan, gate, mouth)) for _ in range(2)]
    os.write(opener, b"go")
    for child in drivers:
        assert ended_well(child)
    counts = [tuple(map(int, line.split())) for line in os.read(ear, 1000).decode().splitlines()]
    for pipe in (gate, opener, ear, mouth):
        os.close(pipe)
    assert len(counts) == 2
    assert sum(won for won, _, _ in counts) == ITEMS, "each item was published once"
    assert all(sum(told) == ITEMS for told in counts), "and told by both: won, lost or found"
    assert ITEMS * SLICES <= lines(log) <= 2 * ITEMS * SLICES
    assert len(list((output / "manifests").glob("*.json"))) == ITEMS
    assert len(list((output / "items").glob("*/*/*"))) == ITEMS, "losers left no folder"
    assert same(published(output), published(tmp_path / "undisturbed"))
    assert verify_output(LocalObjects(output)).intact
