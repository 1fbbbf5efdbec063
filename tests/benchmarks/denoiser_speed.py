"""What compiling the starter network gains on this CPU, and what precision and layout do.

    python -m tests.benchmarks.denoiser_speed [--threads 1] [--batch 1 --batch 4] [--no-compile]

CPU seconds (of all threads) of one evaluation at 256^2, the best of some after a first; compiled by
torch.compile with inductor for fixed shapes. `compile_cpu_s` is what the first call took, unless
inductor's cache on disk has it. Written to tests/benchmarks/results/denoiser_speed.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from diffusion_core.model import Model
from flows.config import config_path

RESULTS = Path(__file__).parent / "results" / "denoiser_speed.json"
SIDE_PX = 256
REPEATS = 4


def best_seconds(evaluate: Callable[[], Tensor]) -> float:
    """CPU seconds of one evaluation, the best of some."""
    evaluate()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        evaluate()
        times.append(time.process_time() - start)
    return min(times)


def spent_s() -> float:
    """CPU seconds of this process and of the compilers it has waited for."""
    import resource

    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = [resource.getrusage(w) for w in who]
    return sum(u.ru_utime + u.ru_stime for u in usages)


def contiguous(module: nn.Module) -> None:
    """Weights in torch's own layout, in place."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()


def row(dtype: str, batch: int, *, compiled: bool) -> dict[str, Any]:
    """One precision and batch: in both layouts, and compiled in the product's."""
    network = Model.load(config_path("models", "starter"), dtype=getattr(torch, dtype)).module
    x = torch.from_numpy(_noise(batch))
    sigma, condition = torch.full((batch,), 0.2), torch.zeros(batch, dtype=torch.long)
    found: dict[str, Any] = {"dtype": dtype, "batch": batch}
    eager = network(x, sigma, condition)
    found["eager_s"] = best_seconds(lambda: network(x, sigma, condition))
    if compiled:
        fixed = torch.compile(network, dynamic=False)
        start = spent_s()
        apart = (fixed(x, sigma, condition) - eager).abs().max()
        found["compile_cpu_s"] = spent_s() - start
        found["compiled_s"] = best_seconds(lambda: fixed(x, sigma, condition))
        found["gain"] = found["eager_s"] / found["compiled_s"]
        found["apart"] = float(apart)
    contiguous(network)
    found["contiguous_s"] = best_seconds(lambda: network(x, sigma, condition))
    return {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in found.items()}


def _noise(batch: int) -> Any:
    import numpy as np

    shape = (batch, 3, SIDE_PX, SIDE_PX)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32) / 2


@click.command(help=__doc__)
@click.option("--threads", default=1, show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 4), show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True)
def main(threads: int, batches: tuple[int, ...], compiled: bool) -> None:
    """See the module."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    rows = []
    for dtype in ("bfloat16", "float32"):
        for batch in batches:
            torch.compiler.reset()
            rows.append(row(dtype, batch, compiled=compiled))
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    found = {"threads": threads, "torch": torch.__version__, "rows": rows}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
