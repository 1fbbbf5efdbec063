"""A tiny dataset and quick settings for tests of training."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from domains.base import Item, ItemRecord
from flows.config import ComputeSettings, TrainSettings
from flows.store import DatasetWriter


def photograph(number: int, split: str) -> Item:
    """A smooth random colour image with edges."""
    rng = np.random.default_rng(number)
    field = np.cumsum(np.cumsum(rng.normal(size=(3, 1, 64, 64)), axis=2), axis=3)
    pixels = (127.5 + 60 * np.tanh(field / 20)).astype(np.uint8)
    record = ItemRecord(
        item_id=f"photo-{number}", domain="city", shape=(3, 1, 64, 64), dtype="uint8",
        units="intensity", source_digest=f"{number:064x}", source_format="png", split=split,
        meta={"value_range": [0.0, 255.0]},
    )  # fmt: skip
    return Item(pixels, record)


def dataset_of(path: Path, numbers: Iterable[int]) -> Path:
    """A dataset of photographs by number; the third is for validation."""
    with DatasetWriter(path) as writer:
        for number in numbers:
            writer.add(photograph(number, "validation" if number == 3 else "train"))
    return path


def settings(dataset: Path, output: Path, **changes: object) -> TrainSettings:
    """Of a small network, in this process."""
    values = {
        "name": "small", "data": [dataset], "output": output, "conditions": {"city": 1.0},
        "network": {"widths": [8, 8], "depths": [1, 1], "num_features": 8}, "patch_size": 32,
        "batch_size": 4, "num_steps": 30, "warmup_steps": 2, "dtype": "float32",
        "checkpoint_every_s": 0.0, "log_every_steps": 1, "picture_every_steps": 10,
        "compute": ComputeSettings(executor="inline"), "num_threads": 1,
    }  # fmt: skip
    return TrainSettings(**{**values, **changes})


def kill_training(asked: TrainSettings, folder: Path, after_readings: int = 5) -> Path:
    """Train in another process, and kill -9 it after some readings; returns its log."""
    driver = folder / "driver.py"
    driver.write_text(
        textwrap.dedent("""
        import sys
        from flows.api_train import train
        from flows.config import TrainSettings
        train(TrainSettings.model_validate_json(sys.argv[1]))
    """)
    )
    process = subprocess.Popen([sys.executable, driver, asked.model_dump_json()], env=os.environ)
    log = asked.output / asked.name / "log.jsonl"
    while process.poll() is None and (
        not log.exists() or log.read_text().count("\n") < after_readings
    ):
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return log
