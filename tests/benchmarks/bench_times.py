"""Absolute times on this machine, printed by `make bench`. Nothing here is asserted but success.

Synthetic images stand in for real ones, since times do not depend on what is in them: one slice
of the demo's size each. One worker, one thread.
"""

import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from domains.base import Item, ItemRecord
from flows.api_data import simulate
from flows.api_evaluate import evaluate, machine
from flows.config import ComputeSettings, EvaluateSettings, SimulateSettings, config_path
from flows.console import size, table
from flows.report.rows import summarise
from flows.store import DatasetWriter

CASES = {
    "ct-sparse60": ("ct", (1, 1, 512, 512), "HU", (5.0, 0.7, 0.7)),
    "kspace-x4": ("mri", (1, 1, 256, 256), "intensity", (5.0, 0.9, 0.9)),
    "inpaint-random70": ("city", (3, 1, 416, 640), "intensity", None),
}
STARTER = config_path("models", "starter")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))


def show(capsys: pytest.CaptureFixture[str], title: str, text: str) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\n{title}\n{text}\n")


def dataset(path: Path, task: str) -> Path:
    """One item of soft blobs in the domain's units."""
    domain, shape, units, spacing = CASES[task]
    rows, columns = np.mgrid[0 : shape[2], 0 : shape[3]] / 25.0
    plane = (np.sin(rows) * np.cos(columns) + 1) / 2
    if domain == "ct":
        pixels = np.round(plane * 1200 - 1000).astype(np.int16)
    elif domain == "mri":
        pixels = np.round(plane * 900).astype(np.int16)
    else:
        pixels = np.round(plane * 255).astype(np.uint8)
    record = ItemRecord(
        item_id="blobs",
        domain=domain,
        shape=shape,
        dtype=str(pixels.dtype),
        units=units,
        source_digest="0" * 64,
        source_format="png" if domain == "city" else "nifti",
        spacing_mm=spacing,
    )
    with DatasetWriter(path) as writer:
        writer.add(Item(np.broadcast_to(pixels, shape).copy(), record))
    return path


def test_the_command_starts(capsys: pytest.CaptureFixture[str]):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "import flows.cli; flows.cli.main(['--help'])"],
            check=True,
            capture_output=True,
        )
        times.append(time.perf_counter() - start)
    text = f"{min(times):.2f} to {max(times):.2f} s over {len(times)} starts"
    show(capsys, f"sashiko --help on {machine()}, Python {platform.python_version()}", text)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_network(dtype: str, capsys: pytest.CaptureFixture[str]):
    from diffusion_core.model import Model

    torch.set_num_threads(1)
    model = Model.load(STARTER, dtype=getattr(torch, dtype))
    denoise, x = model.denoiser("ct"), torch.zeros(1, 1, 256, 256)
    times = []
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            denoise(x, torch.tensor([0.2]))
            times.append(time.perf_counter() - start)
    speeds = sorted(x.numel() / 1e6 / t for t in times[1:])
    text = f"{speeds[0]:.3f} to {speeds[-1]:.3f} megapixels a second on one thread"
    show(capsys, f"one evaluation of the starter model, {dtype}", text)


@pytest.mark.parametrize("task", list(CASES))
def test_every_method_of_a_task(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = EvaluateSettings(
        input=dataset(tmp_path / "data.zarr", task),
        tasks=[task],
        output=tmp_path / "out",
        compute=ComputeSettings(executor="inline"),
    )
    start = time.perf_counter()
    simulate(SimulateSettings(dataset=settings.input, tasks=[task], output=tmp_path / "again.zarr"))
    measuring = time.perf_counter() - start
    (summary,) = summarise(evaluate(settings).rows)
    rows = [
        [m.method, m.means["nfe"], m.means["seconds"], size(m.means["peak_bytes"])]
        for m in summary.methods
    ]
    shape = " x ".join(map(str, CASES[task][1]))
    title = f"{task}, one slice ({shape}), measured in {measuring:.1f} s"
    show(capsys, title, table(["method", "NFE", "seconds", "peak"], rows))
