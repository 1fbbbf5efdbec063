"""Two actors are worth two, in one run side by side; the benchmark's own arithmetic."""

import os
from pathlib import Path

import pytest

from tests.benchmarks import engine

pytestmark = pytest.mark.ray


def test_two_actors_do_naps_nearly_twice_as_fast_as_one(tmp_path: Path):
    store = engine.store_of(tmp_path, 2, 10, 32)
    with engine.RayExecutor(2) as two:
        engine.warm(two, store)
        one = engine.replace_pool(two)
        alone, both = (
            engine.timed(pool, store, name="nap", seconds=engine.NAP_S)[0] for pool in (one, two)
        )
        assert alone / both >= 1.6
        assert alone >= 20 * engine.NAP_S


@pytest.mark.slow
def test_two_actors_keep_two_cores_busy(tmp_path: Path):
    cores = len(os.sched_getaffinity(0))
    if cores < 2 or os.getloadavg()[0] > cores / 4:
        pytest.skip("needs two cores that nobody else is using")
    rounds = engine.ROUNDS[0]
    assert engine.speedup(tmp_path, (rounds,))[f"{rounds}_rounds"]["best"] >= 1.6
