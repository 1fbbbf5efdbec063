"""A domain that costs nothing, for tests of the engine: its methods count, fail, kill on request.

Found by its entry point, as a guest's domain would be, in this process and in Ray's workers.
Options of the methods: `log` (a file that gains a line for every block computed), `where` (item ids
that the misbehaviour is meant for) and `once` (a file that, once there, stops it).
"""

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_core.noise.likelihood import GaussianNoise
from domains.base import BadInputError, Domain, Item, ItemRecord, Measurement, Problem
from domains.imaging import operator_of, slices_first


class Tiny(Domain):
    name = "tiny"
    suffixes = (".npy",)
    conditions = {"tiny": 1}

    def read(self, path):
        try:
            pixels = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise BadInputError(f"{path}: not an array; save it anew") from error
        return tiny_item(path.stem.lower(), pixels)

    def write(self, item, stem):
        path = stem.with_name(stem.name + ".npy")
        np.save(path, item.pixels)
        return path

    def simulate(self, item, task, seed):
        raise BadInputError("nothing is simulated here")

    def given(self, item, *, mask, kernel, scale, sigma_y):
        measured = np.ones(item.pixels.shape[1:], bool) if mask is None else ~mask.astype(bool)
        return tiny_measurement(item, measured.reshape(-1, 1, *measured.shape[-2:]))

    def problem(self, measurement):
        z, c, h, w = measurement.y.shape
        return Problem(
            operator=operator_of(
                measurement.operator, measurement.params, measurement.arrays, (h, w)
            ),
            y=torch.from_numpy(np.array(measurement.y)),
            noise=GaussianNoise(0.1),
            shape=(z, c, h, w),
            reach=0,
            condition="tiny",
            to_source=lambda x: x * 100,
        )

    def baselines(self):
        return {name.removesuffix("_").replace("_", "-"): f for name, f in METHODS.items()}

    def unit_scale(self, truth, record):
        return 0.0, 1.0

    def training_windows(self, item):
        return {"tiny": [item.pixels]}

    def truth_signal(self, item, measurement):
        return torch.from_numpy(slices_first(item.pixels)) / 100


def twice(measurement: Measurement, problem: Problem, options: Mapping[str, Any]) -> Tensor:
    count(measurement, options)
    return 2 * problem.y


def box_blur(measurement: Measurement, problem: Problem, options: Mapping[str, Any]) -> Tensor:
    """Looks 2 pixels far, and mirrors at the border of the plane."""
    count(measurement, options)
    padded = torch.nn.functional.pad(problem.y, (2, 2, 2, 2), mode="reflect")
    return torch.nn.functional.avg_pool2d(padded, 5, stride=1)


def not_finite(measurement: Measurement, problem: Problem, options: Mapping[str, Any]) -> Tensor:
    x = twice(measurement, problem, options)
    if due(measurement, options):
        x[0, 0, 0, 0] = torch.nan
    return x


def refuse(measurement: Measurement, problem: Problem, options: Mapping[str, Any]) -> Tensor:
    if due(measurement, options):
        raise BadInputError(f"{measurement.record.item_id}: cannot be used")
    return twice(measurement, problem, options)


def stumble(measurement: Measurement, problem: Problem, options: Mapping[str, Any]) -> Tensor:
    if due(measurement, options):
        raise RuntimeError("stumbled")
    return twice(measurement, problem, options)


def kill(measurement: Measurement, problem: Problem, options: Mapping[str, Any]) -> Tensor:
    if due(measurement, options):
        os.kill(os.getpid(), signal.SIGKILL)
    return twice(measurement, problem, options)


def nap(measurement: Measurement, problem: Problem, options: Mapping[str, Any]) -> Tensor:
    """Takes `seconds`, and none of the processor's."""
    time.sleep(options["seconds"])
    return twice(measurement, problem, options)


def toil(measurement: Measurement, problem: Problem, options: Mapping[str, Any]) -> Tensor:
    """Takes the processor as long as `rounds` convolutions do."""
    x, kernel = problem.y[:1, :1], torch.ones(8, 1, 5, 5)
    for _ in range(options["rounds"]):
        torch.nn.functional.conv2d(x, kernel)
    return twice(measurement, problem, options)


def hold(measurement: Measurement, problem: Problem, options: Mapping[str, Any]) -> Tensor:
    """Waits until the file `gate` is there."""
    if due(measurement, options):
        until(Path(options["gate"]).exists)
    return twice(measurement, problem, options)


def meet(measurement: Measurement, problem: Problem, options: Mapping[str, Any]) -> Tensor:
    """Waits until `workers` processes have been at a block."""
    x = twice(measurement, problem, options)
    log = Path(options["log"])
    if due(measurement, options):
        until(lambda: len({row.split()[1] for row in log.open()}) >= options["workers"])
    return x


def until(happened: Callable[[], bool]) -> None:
    """Wait for other processes; too long a wait is a failure that is not tried again."""
    for _ in range(6000):
        if happened():
            return
        time.sleep(0.01)
    raise BadInputError("waited in vain")


def disk_full(measurement: Measurement, problem: Problem, options: Mapping[str, Any]) -> Tensor:
    raise OSError(28, "No space left on device")


def unread(measurement: Measurement, problem: Problem, options: Mapping[str, Any]) -> Tensor:
    """As if the disk failed; with `times`, so often (counted in the file `once`)."""
    counter, times = Path(options.get("once", os.devnull)), options.get("times")
    failed = len(counter.read_text()) if times and counter.exists() else 0
    due_now = measurement.record.item_id in options.get("where", [measurement.record.item_id])
    if due_now and (times is None or failed < times):
        with counter.open("a") as file:
            file.write("x")
        raise OSError(5, "Input/output error")
    return twice(measurement, problem, options)


def torn_write(measurement: Measurement, problem: Problem, options: Mapping[str, Any]) -> Tensor:
    """The worker dies half-way through the next chunk that it writes."""
    if due(measurement, options):
        from flows.engine.objects import LocalObjects

        def tear(objects: LocalObjects, key: str, data: bytes) -> None:
            path = objects.path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        LocalObjects.put = tear
    return twice(measurement, problem, options)


def stop(measurement: Measurement, problem: Problem, options: Mapping[str, Any]) -> Tensor:
    """The worker stands still (of `pid`, by which it is found) until somebody lets it go on."""
    if due(measurement, options):
        Path(options["pid"]).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    return twice(measurement, problem, options)


METHODS = {
    "torn_write": torn_write,
    "stop": stop,
    "unread": unread,
    "twice": twice,
    "box_blur": box_blur,
    "not_finite": not_finite,
    "refuse": refuse,
    "stumble": stumble,
    "kill": kill,
    "disk_full": disk_full,
    "nap": nap,
    "toil": toil,
    "hold": hold,
    "meet": meet,
}


def count(measurement: Measurement, options: Mapping[str, Any]) -> None:
    """Add a line to the log: short appends are whole, whoever else writes."""
    if options.get("log"):
        with Path(options["log"]).open("a") as file:
            file.write(f"{measurement.record.item_id} {os.getpid()}\n")


def due(measurement: Measurement, options: Mapping[str, Any]) -> bool:
    """Whether to misbehave at this item, now; `once` is used up by asking."""
    if measurement.record.item_id not in options.get("where", [measurement.record.item_id]):
        return False
    if options.get("once"):
        marker = Path(options["once"])
        if marker.exists():
            return False
        marker.touch()
    return True


def tiny_item(item_id: str, pixels: np.ndarray) -> Item:
    record = ItemRecord(
        item_id=item_id,
        domain="tiny",
        shape=pixels.shape,
        dtype="float32",
        units="percent",
        source_digest=f"source-{item_id}",
        source_format="npy",
        spacing_mm=(2.0, 0.5, 0.25),
    )
    return Item(pixels.astype(np.float32), record)


def tiny_measurement(item: Item, measured: np.ndarray, task: str = "given") -> Measurement:
    """`measured` (z 1 h w): a mask; y = pixels / 100 where measured."""
    y = slices_first(item.pixels) / 100 * measured
    return Measurement(
        record=item.record,
        task=task,
        operator="mask",
        params={},
        noise={"kind": "gaussian", "sigma_y": 0.1},
        y=np.ascontiguousarray(y, dtype=np.float32),
        arrays={"mask": np.broadcast_to(measured, (len(y), 1, *y.shape[2:]))},
    )
