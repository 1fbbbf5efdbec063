"""Fault 15: another number of workers, another order, another fill of batches: the same bytes.

Another block grid changes rounding and no more: tests/flows/test_engine_account.py. The fill of
batches: tests/flows/test_engine_batches.py. A kill amid any of it: test_restore_killed.py.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from engine_kit import published, same
from starter_kit import SIZE, WAYS, make_photographs, photograph_plan

from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor, RayExecutor

pytestmark = pytest.mark.ray

PLANE = SIZE[0] * SIZE[1]
MOST = 4


@pytest.fixture(scope="module")
def pool() -> Iterator[RayExecutor]:
    """Four workers of the starter; their places are logical, whatever cores there are."""
    import ray

    from flows.engine.ray_session import ray_session

    with ray_session(None, num_cpus=MOST), RayExecutor(MOST) as executor:
        executor.start()
        ray.get([seat.starting for seat in executor._seats if seat.starting])
        yield executor


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("in") / "m.zarr")


def some_of(pool: RayExecutor, count: int) -> RayExecutor:
    """The first workers of a pool, as a pool."""
    few = RayExecutor(count)
    few._seats = pool._seats[:count]
    return few


@pytest.mark.parametrize("per_batch", [0, 4], ids=["a block's own batches", "shared batches"])
def test_one_to_four_workers_in_any_order_publish_the_bytes_of_one_process(
    pool, store, tmp_path, per_batch
):
    settings = {"batch_px": per_batch * PLANE}
    run_plan(photograph_plan(store, tmp_path / "one", **settings), InlineExecutor())
    expected = published(tmp_path / "one")
    assert len(expected) == 5 * len(WAYS)
    for count in range(1, MOST + 1):
        plan = photograph_plan(store, tmp_path / f"{count}", **settings)
        items = random.Random(count).sample(plan.items, len(plan.items))
        result = run_plan(replace(plan, items=tuple(items)), few := some_of(pool, count))
        assert few.num_workers == count
        assert result.num_computed == plan.num_blocks
        assert same(published(tmp_path / f"{count}"), expected)
