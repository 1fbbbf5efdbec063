"""Call a function of a package that lives in an environment of its own, on arrays in files.

    PEER-PYTHON tests/benchmarks/peer_call.py MODULE FUNCTION < JOBS

A line of input is a job in JSON: {"input": PATH.npy, "output": PATH.npy, "options": {...}}. The
function gets the array and the options, and its array is written; "done" answers each line. Needs
numpy and what the package needs: nothing of ours, and nothing of it comes to us but files.
"""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np


def main() -> None:
    """See the module."""
    module, function = sys.argv[1:]
    call = getattr(importlib.import_module(module), function)
    for line in sys.stdin:
        job = json.loads(line)
        np.save(job["output"], call(np.load(job["input"]), **job["options"]))
        sys.stdout.write("done\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
