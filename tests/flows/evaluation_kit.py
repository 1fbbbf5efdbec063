"""What tests of evaluation and report share: small pictures, a small model, known baselines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from diffusion_core.model import save_model
from diffusion_core.networks.local_unet import LocalUNet
from diffusion_core.networks.precond import ConditionedDenoiser, Preconditioned
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.posterior.covariance import fit_covariance
from domains.base import Item, ItemRecord
from domains.city.domain import City
from flows.config import ComputeSettings, EvaluateSettings
from flows.store import DatasetWriter

GREY = 0.25
"""The network value that the baseline "telea" puts everywhere."""

TASKS = ["inpaint-random70", "inpaint-strokes"]
INLINE = ComputeSettings(executor="inline", num_workers=1)


def picture(number: int, shape: tuple[int, int, int, int]) -> np.ndarray:
    """Smooth uint8 pixels (c z h w) with an edge, different for every number."""
    c, z, h, w = shape
    rows, columns = np.mgrid[0:h, 0:w] / 9.0
    planes = [np.sin(rows + i + number) + (columns > 2 + i) for i in range(c * z)]
    unit = (np.reshape(planes, shape) + 1) / 3
    return np.round(255 * unit).astype(np.uint8)


def make_dataset(path: Path) -> Path:
    """A grey still, and a colour item of five frames."""
    shapes = {"still": (1, 1, 40, 48), "frames": (3, 5, 32, 32)}
    with DatasetWriter(path) as writer:
        for number, (name, shape) in enumerate(shapes.items()):
            record = ItemRecord(
                item_id=name,
                domain="city",
                shape=shape,
                dtype="uint8",
                units="intensity",
                source_digest=f"{number}" * 64,
                source_format="png",
                group=f"scene-{name}",
            )
            writer.add(Item(picture(number, shape), record))
    return path


PHOTOGRAPHS = {"city": 3, "city-grey": 1}


def make_model(path: Path, seed: int = 0, conditions: Mapping[str, int] = PHOTOGRAPHS) -> Path:
    """An untrained network with covariance tables measured on the pictures above."""
    weights = KeyedDraws(seed, "weights")
    network = LocalUNet(len(conditions), widths=[8, 8], depths=[1, 1], num_features=8)
    with torch.no_grad():
        for level, parameter in enumerate(network.parameters()):
            parameter.copy_(0.05 * weights.normal(level, parameter))
    module = Preconditioned(network, 0.5).eval()
    tables = {}
    for index, (name, channels) in enumerate(conditions.items()):
        pixels = picture(3, (channels, 1, 48, 48))[:, 0]
        image = torch.from_numpy(pixels[None] / 127.5 - 1).float()
        with torch.no_grad():
            denoise = ConditionedDenoiser(module, index, channels)
            tables[name] = fit_covariance(denoise, [image], sigmas=(0.05, 0.2, 0.7))
    card = "# Tiny\n\nA <b>test</b> model.\n\n| data | licence |\n|---|---|\n| none | none |\n"
    save_model(path, module, conditions, tables, card, {})
    return path


def known_baselines(log: Path):
    """Stand-ins for the classical methods, cheap and with known results; each call is logged."""

    def logged(name, method):
        def call(measurement, problem, params):
            with log.open("a") as lines:
                lines.write(f"{name} {measurement.task} {measurement.record.item_id}\n")
            return method(problem)

        return call

    def known_pixels(problem):
        return problem.operator.A_adjoint(problem.y)

    def flat(problem):
        return torch.full(problem.shape, GREY)

    methods = {"biharmonic": known_pixels, "tv": known_pixels, "telea": flat}
    return {name: logged(name, method) for name, method in methods.items()}


def use_known_baselines(monkeypatch, log: Path) -> None:
    monkeypatch.setattr(City, "baselines", lambda self: known_baselines(log))


def settings(root: Path, **changes) -> EvaluateSettings:
    """An evaluation of everything that make_dataset and make_model made under `root`."""
    given = {
        "input": root / "clean.zarr",
        "tasks": TASKS,
        "model": str(root / "model"),
        "output": root / "out",
        "compute": INLINE,
        "dtype": "float32",
    }
    return EvaluateSettings(**{**given, **changes})
