"""Make deepinv's own environment: python -m tests.benchmarks.peer_env FOLDER.

deepinv depends on torchvision, of which the package index has no build beside a CPU torch; its
wheel is installed without its dependencies, for the image transforms in Python that deepinv
imports (peer_deepinv.py declares the missing operators). Nothing of the product goes in.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "infra" / "constraints.txt"
SHARED = ("torch", "numpy", "scipy", "safetensors", "jaxtyping", "matplotlib", "tqdm", "einops",
          "requests", "h5py", "natsort", "pillow")  # fmt: skip
ALONE = ("deepinv==0.5.0", "torchvision", "torchmetrics", "lightning-utilities")


def make(folder: Path) -> Path:
    """The environment's python; built where it is missing (about a minute and 1.2 GB)."""
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if stamp.exists():
        return python
    venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(CONSTRAINTS), *SHARED], check=True)
    subprocess.run([*pip, "--no-deps", *ALONE], check=True)
    stamp.touch()
    return python


if __name__ == "__main__":
    sys.stdout.write(f"{make(Path(sys.argv[1]))}\n")
