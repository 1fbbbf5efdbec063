"""What decides the bits of a block beside its key: libraries, and what the processor can do.

The same block is the same to the bit on any worker of one environment. A newer torch, or another
kind of processor, rounds otherwise: so each receipt names where its block was computed, and a
manifest how many blocks were computed where. Blocks are not computed again for that: the key says
what is computed, and an item that was begun before an update would else be lost to it.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "numpy", "scipy", "scikit-image", "PyWavelets")
"""Whose arithmetic is in the pixels: of the network, the data steps, the classical methods."""

_ABILITIES = (
    "avx2", "fma3", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile",
    "bf16", "sve", "sve2", "sve_bf16",
)  # fmt: skip
"""Instructions by which libraries choose their kernels."""

_CHOICES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
"""Variables by which a user chooses otherwise."""


@cache
def environment(device_class: str) -> str:
    """A line that is equal for two workers if, and as far as is known only if, their bits are.

    Args:
        device_class: "cpu" or "cuda".
    """
    import torch

    abilities = torch.cpu.get_capabilities()
    can = " ".join(name for name in _ABILITIES if abilities.get(name))
    parts = [
        *(f"{name} {library_version(name)}" for name in LIBRARIES),
        f"{platform.machine()} {abilities.get('cpu_name', '')}".strip(),
        f"{torch.backends.cpu.get_cpu_capability()} ({can})",
        *(f"{name}={os.environ[name]}" for name in _CHOICES if os.environ.get(name)),
    ]
    if device_class == "cuda":
        parts.append(f"{torch.cuda.get_device_name()} CUDA {torch.version.cuda}")
    return ", ".join(parts)


def library_version(package: str) -> str:
    """The version of a package, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
