"""Fault 3: machines that go and come in mid-run. Nodes of a Ray cluster, all of them here."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_kit import lines, make_store, method, published, same, tiny_plan
from starter_kit import SIZE, WAYS, make_photographs, photograph_plan

from flows.config import ComputeSettings
from flows.engine import executor as pools
from flows.engine.campaign import run_plan
from flows.engine.executor import ExecutorError, InlineExecutor, RayExecutor, make_executor
from flows.engine.seats import Seat

pytestmark = pytest.mark.ray

KIT = Path(__file__).parents[1] / "kit"
STORE_BYTES = 80 * 2**20
QUICK_DETECTION = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
ITEMS, SLICES = 2, 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """One machine with one CPU; the tests add others and remove them."""
    import ray
    from ray.cluster_utils import Cluster

    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_USAGE_STATS_ENABLED")}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(KIT), before["PYTHONPATH"]]))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {
        "num_cpus": 1,
        "num_gpus": 0,
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
        "_system_config": QUICK_DETECTION,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(
        tmp_path_factory.mktemp("in") / "m.zarr", items=ITEMS, shape=(1, SLICES, 20, 24)
    )


@pytest.fixture(autouse=True)
def _watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "RESIZE_S", 0.2)


def machine(cluster, num_cpus: int, num_gpus: int = 0):
    return cluster.add_node(
        num_cpus=num_cpus, num_gpus=num_gpus, object_store_memory=STORE_BYTES
    )  # fmt: skip


def remove(cluster, node) -> None:
    """Remove a machine, and let the cluster know it before the next test."""
    cluster.remove_node(node)
    cluster.wait_for_nodes()


def expected(store: Path, output: Path, name: str) -> dict:
    """What this process makes of it, under the name of another method."""
    run_plan(tiny_plan(store, output), InlineExecutor())
    return {(item, name): pixels for (item, _), pixels in published(output).items()}


def await_workers(pool: RayExecutor) -> None:
    """Until all that there are places for are up."""
    import ray

    pool.start()
    ray.get([seat.starting for seat in pool._seats if seat.starting], timeout=60)


def nodes_of(pool: RayExecutor) -> set[str]:
    """Where the actors of a pool are."""
    import ray

    def where(worker) -> str:
        return ray.get_runtime_context().get_node_id()

    return {ray.get(seat.actor.__ray_call__.remote(where), timeout=60) for seat in pool._seats}


def test_a_machine_removed_hard_and_another_added_leave_the_same_bytes(cluster, store, tmp_path):
    log, gate = tmp_path / "log", tmp_path / "gate"
    way = method("hold", log=str(log), gate=str(gate), where=["item-1"])
    first = machine(cluster, 2)
    cluster.wait_for_nodes()
    added = []

    def remove_one_and_add_another(event):
        # The blocks of item-1 are in the hands of all workers, and wait at the gate.
        if event.kind == "block" and event.done == SLICES and not added:
            cluster.remove_node(first, allow_graceful=False)
            added.append(machine(cluster, 2))
            gate.touch()

    plan = tiny_plan(store, tmp_path / "out", way)
    with RayExecutor(0, address=cluster.address) as pool:
        await_workers(pool)
        assert pool.num_workers == 3
        result = run_plan(plan, pool, remove_one_and_add_another, max_attempts=1)
        assert pool.num_replaced >= 1
        assert first.node_id not in nodes_of(pool)
        assert added[0].node_id in nodes_of(pool)
    remove(cluster, added[0])
    assert result.quarantined == (), "a machine that goes is held against no item"
    assert result.num_computed == ITEMS * SLICES
    assert lines(log) <= ITEMS * SLICES + 4, "only what was in the hands of its two workers"
    assert same(published(tmp_path / "out"), expected(store, tmp_path / "other", "hold"))


def test_the_pool_grows_onto_a_machine_that_comes_later(cluster, store, tmp_path):
    log = tmp_path / "log"
    way = method("meet", log=str(log), workers=3, where=["item-1"])
    added = []

    def add_one(event):
        if event.kind == "block" and not added:
            added.append(machine(cluster, 2))

    with make_executor(ComputeSettings(ray_address=cluster.address, num_gpus_per_worker=0)) as pool:
        pool.start()
        assert pool.num_workers == 1
        result = run_plan(tiny_plan(store, tmp_path / "out", way), pool, add_one)
        assert pool.num_workers == 3
        assert added[0].node_id in nodes_of(pool)
    remove(cluster, added[0])
    assert result.quarantined == ()
    assert same(published(tmp_path / "out"), expected(store, tmp_path / "other", "meet"))


def test_workers_with_half_a_gpu_and_two_lanes_make_the_bytes_of_this_process(cluster, tmp_path):
    """The GPU is a number to Ray; what is computed there is computed on the CPU."""
    photographs = make_photographs(tmp_path / "m.zarr")
    settings = {"batch_px": 4 * SIZE[0] * SIZE[1]}
    run_plan(photograph_plan(photographs, tmp_path / "one", WAYS[1], **settings), InlineExecutor())
    box = machine(cluster, 4, num_gpus=1)
    cluster.wait_for_nodes()
    shared = {"address": cluster.address, "num_lanes": 2}
    with RayExecutor(0, num_gpus_per_worker=0.5, **shared) as pool:
        plan = photograph_plan(photographs, tmp_path / "two", WAYS[1], **settings)
        result = run_plan(plan, pool)
        assert pool.num_workers == 2
        assert nodes_of(pool) == {box.node_id}
    assert result.num_retries == 0
    assert same(published(tmp_path / "one"), published(tmp_path / "two"))
    refused = RayExecutor(0, num_gpus_per_worker=2.0, **shared)
    with refused, pytest.raises(ExecutorError, match="no place with 2 GPU and 2 CPUs"):
        refused.start()
    remove(cluster, box)


def test_the_pool_follows_the_places_and_lets_only_those_go_that_hold_nothing(monkeypatch):
    pool, places = RayExecutor(3), 2
    monkeypatch.setattr(RayExecutor, "_places", lambda _: places)
    monkeypatch.setattr(RayExecutor, "_new_seat", lambda _: Seat(actor=None, starting="soon"))
    assert pool._resize()
    assert pool.num_workers == 2
    places = 8
    assert pool._resize()
    assert pool.num_workers == 3, "no more than were wanted"
    assert not pool._resize()
    up, *_ = pool._seats
    up.starting = None
    places = 0
    assert pool._resize()
    assert pool._seats == [up], "nobody who is up is dismissed, and one place is kept"
