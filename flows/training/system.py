"""Figures of the machine beside those of the training, under the names that MLflow's page knows."""

from __future__ import annotations

import shutil
from pathlib import Path

_MB = 1e6


def system_metrics(run: Path, device: str) -> dict[str, float]:
    """What is in use now: processor since the last call, memory, disk, the GPU's memory.

    Args:
        run: folder on the disk to tell of.
        device: torch device of the training.
    """
    import psutil

    memory = psutil.virtual_memory()
    figures = {
        "system/cpu_utilization_percentage": float(psutil.cpu_percent()),
        "system/system_memory_usage_megabytes": memory.used / _MB,
        "system/system_memory_usage_percentage": float(memory.percent),
        "system/process_memory_megabytes": psutil.Process().memory_info().rss / _MB,
        "system/disk_available_megabytes": shutil.disk_usage(run).free / _MB,
    }
    if device.startswith("cuda"):
        figures |= _gpu_metrics(device)
    return figures


def _gpu_metrics(device: str) -> dict[str, float]:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return {
        "system/gpu_0_memory_usage_megabytes": (total - free) / _MB,
        "system/gpu_0_memory_usage_percentage": 100 * (total - free) / total,
        "system/gpu_0_peak_allocated_megabytes": torch.cuda.max_memory_allocated(device) / _MB,
    }
