"""The near side of peer_call.py: a function of a package that lives in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from domains.base import Array


class PeerFunction:
    """A process that calls one function on one array after another.

    Args:
        python: of the environment.
        module: of the function; nothing of it is imported here.
        function: its name; it takes an array and named options, and returns an array.
    """

    def __init__(self, python: Path, module: str, function: str) -> None:
        # -P and no PYTHONPATH: a module of ours would come before the package of its name.
        script = Path(__file__).parent / "peer_call.py"
        command = [str(python), "-P", str(script), module, function]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment
        )
        self._scratch = tempfile.TemporaryDirectory()
        self._name = module

    def __enter__(self) -> Self:
        return self

    def __call__(self, array: Array, **options: Any) -> Array:
        """What the function makes of an array.

        Raises:
            RuntimeError: if the process ended.
        """
        folder = Path(self._scratch.name)
        paths = {name: str(folder / f"{name}.npy") for name in ("input", "output")}
        np.save(paths["input"], array)
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the process has no pipe")
        stdin.write(json.dumps({**paths, "options": options}) + "\n")
        stdin.flush()
        if stdout.readline() != "done\n":
            raise RuntimeError(f"{self._name}'s process ended; its error stands above")
        answer: Array = np.load(paths["output"])
        return answer

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self._process.__exit__(kind, error, trace)
        self._scratch.cleanup()
