"""The parts of the projector's benchmark that run in a process of their own, perhaps deepinv's.

    python -m tests.benchmarks.projector_parts ours|deepinv|lowdose

prints one line of JSON. Nothing beyond torch and numpy is imported before a part asks for it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIDE_PX, NUM_VIEWS = 256, 60


def least_seconds(call: Callable[[], Any], repeats: int = 12) -> float:
    """The shortest of some runs, after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measured(A: Callable[[Any], Any], A_adjoint: Callable[[Any], Any]) -> dict[str, float]:
    """Seconds of A and A' on one image, and |<A u, v> - <u, A' v>| / (|A u| |v|) in float32."""
    import torch

    rng = np.random.default_rng(0)
    u = torch.from_numpy(rng.standard_normal((1, 1, SIDE_PX, SIDE_PX))).float()
    Au = A(u)
    v = torch.from_numpy(rng.standard_normal(tuple(Au.shape))).float()
    forward = float((Au.double() * v.double()).sum())
    backward = float((u.double() * A_adjoint(v).double()).sum())
    gap = abs(forward - backward) / float(Au.double().norm() * v.double().norm())
    return {
        "A_seconds": least_seconds(lambda: A(u)),
        "A_adjoint_seconds": least_seconds(lambda: A_adjoint(v)),
        "adjoint_error": gap,
    }


def run_ours() -> dict[str, float]:
    """Our parallel beam."""
    from domains.ct.geometry import ParallelGeometry
    from domains.ct.operators import ParallelBeam

    geometry = ParallelGeometry.covering(SIDE_PX, SIDE_PX, (1.0, 1.0), NUM_VIEWS, 180.0)
    beam = ParallelBeam(geometry)
    return measured(beam.A, beam.A_adjoint)


def run_deepinv() -> dict[str, float]:
    """deepinv's Tomography as it comes; runs in its own environment."""
    import torch

    from tests.benchmarks.peer_deepinv import dinv

    physics = dinv.physics.Tomography(
        angles=torch.arange(NUM_VIEWS) * 180.0 / NUM_VIEWS,
        img_width=SIDE_PX,
        circle=False,
        normalize=False,
    )
    return measured(physics.A, physics.A_adjoint)


def run_lowdose() -> dict[str, float]:
    """720 views of 512 x 512: bytes mapped, this process's own memory, seconds."""
    import torch

    from domains.ct.geometry import ParallelGeometry
    from domains.ct.operators import ParallelBeam

    started = time.perf_counter()
    beam = ParallelBeam(ParallelGeometry.covering(512, 512, (0.7, 0.7), 720, 180.0))
    build = time.perf_counter() - started
    x = torch.rand(1, 1, 512, 512)
    before = _own_bytes()
    y = beam.A(x)
    return {
        "build_or_load_seconds": build,
        "mapped_gib": beam.num_bytes / 2**30,
        "own_mib": (_own_bytes() - before) / 2**20,
        "A_seconds": least_seconds(lambda: beam.A(x), 4),
        "A_adjoint_seconds": least_seconds(lambda: beam.A_adjoint(y), 4),
    }


def _own_bytes() -> int:
    """Memory of this process that no other shares (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


PARTS: dict[str, Callable[[], dict[str, float]]] = {
    "ours": run_ours,
    "deepinv": run_deepinv,
    "lowdose": run_lowdose,
}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(PARTS[sys.argv[1]]()) + "\n")
