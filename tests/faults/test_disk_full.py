"""Fault 7: a disk that is really full, here a file system of 1 MB mounted for the test."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engine_kit import make_store

SCENE = Path(__file__).parents[1] / "kit" / "full_disk.py"


def may_mount() -> bool:
    """Whether an unprivileged mount namespace can be had."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    command = [unshare, "-rm", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="no file system can be mounted here")
def test_a_full_disk_stops_the_run_clearly_and_it_goes_on_once_there_is_space(tmp_path):
    store = make_store(tmp_path / "m.zarr", items=4, shape=(1, 3, 64, 64))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=1m tmpfs "{disk}" && exec "$@"'
    scene = [sys.executable, str(SCENE), str(store), str(disk), str(tmp_path / "undisturbed")]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", *scene],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for error in told["errors"]:
        assert "No space left on device" in error
        assert "run it again" in error
    assert len(told["errors"]) == 3
    assert told["num_quarantined"] == 0
    assert told["torn"] == 0
    assert told["num_computed_twice"] == 0, "what is receipted is not computed again"
    assert told["same"]
