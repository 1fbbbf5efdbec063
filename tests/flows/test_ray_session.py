"""Ray of our own is ours, whatever else runs on the machine."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray

STARTS = """
from flows.engine.ray_session import ray_session
with ray_session(None, 1):
    import ray
    print("CPUs", ray.cluster_resources()["CPU"])
"""


def test_a_cluster_that_runs_here_already_is_not_joined():
    elsewhere = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}  # as `ray start` would leave behind
    made = subprocess.run(
        [sys.executable, "-c", STARTS], env=elsewhere, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert "CPUs 1.0" in made.stdout
