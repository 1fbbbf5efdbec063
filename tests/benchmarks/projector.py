"""The CT projector beside deepinv's and ASTRA's: time, adjointness, agreement, memory.

    python -m tests.benchmarks.projector [--peer-python PYTHON] [--astra-python PYTHON]

Times A and A' at 256 x 256 and 60 views of ours and of deepinv's Tomography, one process each with
the same number of threads, the least of some repeats. ASTRA (its strip kernels, which compute the
same averages over bins) projects a smooth image and a disk, parallel and fan. Low-dose CT is built
and run at full size for its memory. What has no python given is skipped. Results land in
tests/benchmarks/results/projector.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "projector.json"
ASTRA_SCRIPT = """
import sys, astra, numpy as np
job = np.load(sys.argv[1])
h, w = job["image"].shape
dy, dx = job["pixel_mm"]
volume = astra.create_vol_geom(h, w, -w * dx / 2, w * dx / 2, -h * dy / 2, h * dy / 2)
angles, bins, width = job["angles"], int(job["num_bins"]), float(job["bin_mm"])
if "source_mm" in job:
    source = float(job["source_mm"])
    beyond = float(job["detector_mm"]) - source
    rays = astra.create_proj_geom("fanflat", width, bins, angles, source, beyond)
    kind = "strip_fanflat"
else:
    rays, kind = astra.create_proj_geom("parallel", width, bins, angles), "strip"
projector = astra.create_projector(kind, rays, volume)
# ASTRA's rows run downwards in y, ours upwards.
_, sinogram = astra.create_sino(np.flipud(job["image"]), projector)
np.save(sys.argv[2], sinogram)
"""


def part(name: str, python: str, threads: int) -> dict[str, float]:
    """One part in a process of its own."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    root = str(HERE.parents[1])
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONPATH": root}
    command = [python, "-m", "tests.benchmarks.projector_parts", name]
    done = subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def agreement(astra_python: str) -> dict[str, float]:
    """Relative L2 difference of our sinograms from ASTRA's."""
    import torch

    from domains.ct.geometry import FanGeometry, Geometry, ParallelGeometry
    from domains.ct.operators import beam_of

    size = (128, 112, (0.8, 0.8), 40)
    geometries: dict[str, Geometry] = {
        "parallel": ParallelGeometry.covering(*size, 180.0),
        "fan": FanGeometry.covering(*size, 360.0, 300.0, 500.0),
    }
    y, x = np.mgrid[:128, :112] * 0.8
    smooth = np.exp(-((x - 52) ** 2 + (y - 38) ** 2) / 200) + np.exp(-((x - 30) ** 2) / 90 - y / 40)
    images = {"smooth": smooth, "disk": (np.hypot(x - 50, y - 60) < 28).astype(float)}
    found = {}
    for kind, geometry in geometries.items():
        for name, image in images.items():
            theirs = _astra(astra_python, geometry, image)
            ours = beam_of(geometry).A(torch.from_numpy(image).float()[None, None])[0, 0].numpy()
            difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            found[f"{kind}-{name}"] = float(difference)
    return found


def _astra(python: str, geometry: Any, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder) / "job.npz", Path(folder) / "out.npy"
        fields = {"angles": geometry.angles, "num_bins": geometry.num_bins}
        fields |= {"bin_mm": geometry.bin_mm, "pixel_mm": geometry.pixel_mm, "image": image}
        if hasattr(geometry, "source_mm"):
            fields |= {"source_mm": geometry.source_mm, "detector_mm": geometry.detector_mm}
        np.savez(job, **fields)
        subprocess.run([python, "-c", ASTRA_SCRIPT, str(job), str(out)], check=True)
        sinogram: np.ndarray[Any, Any] = np.load(out)
        return sinogram


@click.command(help=__doc__)
@click.option("--peer-python", help="Python that has deepinv (tests.benchmarks.peer_env makes it).")
@click.option("--astra-python", help="Python that has astra-toolbox and numpy.")
@click.option("--threads", default=1, show_default=True)
@click.option("--lowdose/--no-lowdose", default=True, help="720 views at 512 x 512 (1.6 GiB).")
def main(peer_python: str | None, astra_python: str | None, threads: int, lowdose: bool) -> None:
    """Measure and record."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results["threads"] = threads
    results["ours"] = part("ours", sys.executable, threads)
    if peer_python:
        results["deepinv"] = part("deepinv", peer_python, threads)
        for name in ("A_seconds", "A_adjoint_seconds"):
            ratio = results["deepinv"][name] / results["ours"][name]
            results[f"{name.removesuffix('_seconds')}_times_faster"] = ratio
    if astra_python:
        results["astra_relative_difference"] = agreement(astra_python)
    if lowdose:
        results["lowdose"] = part("lowdose", sys.executable, threads)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    click.echo(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
