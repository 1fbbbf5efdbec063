"""The near side of peer_deepinv.py: writes jobs for deepinv's environment, reads its answers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import torch
from scipy.sparse import csr_array, save_npz

from diffusion_core.operators import Blur, Fourier, Mask, Pool
from diffusion_core.protocols import LinearOperator
from domains.ct.matrices import matrix_pair
from domains.ct.operators import ParallelBeam
from tests.benchmarks.cases import Case
from tests.benchmarks.ours import Run

ROOT = Path(__file__).parents[2]


class Peer:
    """A process in deepinv's environment that restores one job after another.

    Args:
        python: of the environment.
        model: model directory.
        folder: for jobs and results.
        num_threads: of torch.
        dtype: that our network computes in.
    """

    def __init__(
        self, python: Path, model: Path, folder: Path, num_threads: int, dtype: str = "float32"
    ) -> None:
        self._command = [
            str(python), str(ROOT / "tests" / "benchmarks" / "peer_deepinv.py"),
            str(model), str(num_threads), dtype,
        ]  # fmt: skip
        self._threads = num_threads
        self._folder = folder
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(self._threads),
        }
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.versions = self._answer()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _pipe(self._process.stdin).close()
        self._process.wait()

    def run(self, method: str, options: Mapping[str, Any], case: Case) -> Run:
        """Restore a case by deepinv's `method` ("diffpir", "dps", "ddrm")."""
        path = self._folder / "job.npz"
        np.savez(path, method=method, options=json.dumps(dict(options)), **self._problem(case))
        stdin = _pipe(self._process.stdin)
        stdin.write(f"{path}\n")
        stdin.flush()
        answer = self._answer()
        x = torch.from_numpy(np.load(answer["result"]))
        return Run(x, int(answer["nfe"]), float(answer["seconds"]))

    def _answer(self) -> dict[str, Any]:
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise RuntimeError("deepinv's process ended; its error stands above")
        return dict(json.loads(line))

    def _problem(self, case: Case) -> dict[str, Any]:
        """Operator and data on [0, 1]: y01 = (y + A 1) / 2, noise halved; see peer_deepinv.py."""
        problem = case.problem
        ones = torch.ones(problem.shape)
        probe = torch.linspace(0, 1, ones.numel()).reshape(ones.shape)
        y = (problem.y + problem.operator.A(ones)) / 2
        probe_data = problem.operator.A(probe)
        arrays = self._operator(problem.operator)
        variance = problem.noise.variance(problem.y)
        sigma_y = float(variance.flatten()[0].sqrt()) / 2
        if isinstance(problem.operator, ParallelBeam):
            weight = variance.rsqrt()  # of the measured line integrals: no truth in it
            y, probe_data, sigma_y = weight * y, weight * probe_data, 0.5
            arrays["weight"] = weight.numpy()
        return {
            **arrays,
            "y": y.numpy(),
            "sigma_y": sigma_y,
            "shape": np.array(problem.shape),
            "condition": problem.condition,
            "probe": probe.numpy(),
            "probe_data": probe_data.numpy(),
            "x_init": first_image(case).numpy(),
        }

    def _operator(self, operator: LinearOperator) -> dict[str, Any]:
        if isinstance(operator, Mask):
            return {"kind": "mask", "mask": operator.mask.numpy()}
        if isinstance(operator, Blur):
            return {"kind": "blur", "kernel": operator.kernel.numpy()}
        if isinstance(operator, Pool):
            return {"kind": "pool", "factor": operator.factor}
        if isinstance(operator, Fourier):
            return {"kind": "fourier", "mask": operator.mask.numpy()}
        if isinstance(operator, ParallelBeam):
            # All views in one matrix: how ours folds them is not given away, nor is it timed.
            geometry = operator.geometry
            matrix, transpose = matrix_pair(geometry, range(geometry.num_views))
            return {
                "kind": "sparse",
                "matrix": self._stored(matrix, f"{geometry.digest}-forward"),
                "transpose": self._stored(transpose, f"{geometry.digest}-transpose"),
                "scale": operator.scale,
            }
        raise TypeError(f"deepinv is not asked for {type(operator).__name__}")

    def _stored(self, matrix: csr_array, name: str) -> str:
        """Path of a matrix, stored once."""
        path = self._folder / f"{name}.npz"
        if not path.exists():
            save_npz(path, matrix, compressed=False)
        return str(path)


def first_image(case: Case) -> torch.Tensor:
    """Where deepinv's DiffPIR starts, on [0, 1]: A'y, spread over its square where A pools.

    Tomography's A'y is no image; filtered backprojection is.
    """
    problem = case.problem
    if isinstance(problem.operator, ParallelBeam):
        params = {"window": "hann", "cutoff": 0.5}
        return (case.domain.baselines()["fbp"](case.measurement, problem, params) + 1) / 2
    y = (problem.y + problem.operator.A(torch.ones(problem.shape))) / 2
    image = problem.operator.A_adjoint(y)
    return image * problem.operator.factor**2 if isinstance(problem.operator, Pool) else image


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("the process has no pipe")
    return stream
