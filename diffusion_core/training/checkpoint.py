"""Training checkpoints: safetensors and JSON in a folder that appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_core.training.ema import Ema
from diffusion_core.training.files import folders_by_step, publish, staging_for, step_folder
from diffusion_core.training.power import PowerAverage, average_file


@dataclass
class TrainingState:
    """Everything that a resumed run needs; the data and noise sequences follow from `step`."""

    module: nn.Module
    ema: Ema
    optimisers: list[torch.optim.Optimizer]
    step: int = 0
    family: Sequence[PowerAverage] = ()


def save_checkpoint(
    folder: Path, state: TrainingState, facts: dict[str, Any], keep: int = 2
) -> Path:
    """Write folder/step-NNNNNNNNN by rename, then drop all but the newest `keep`."""
    final = step_folder(folder, state.step)
    staging = staging_for(final)
    save_file(_contiguous(state.module.state_dict()), staging / "module.safetensors")
    save_file(_contiguous(state.ema.module.state_dict()), staging / "ema.safetensors")
    for number, average in enumerate(state.family):
        save_file(_contiguous(average.module.state_dict()), staging / average_file(number))
    save_file(_optimiser_tensors(state.optimisers), staging / "optimisers.safetensors")
    (staging / "state.json").write_text(json.dumps({"step": state.step, **facts}))
    publish(staging, final)
    for _, old in folders_by_step(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = folders_by_step(folder)
    return found[-1][1] if found else None


def load_checkpoint(path: Path, state: TrainingState) -> dict[str, Any]:
    """Fill `state` from a checkpoint; returns the facts that were saved with it."""
    facts: dict[str, Any] = json.loads((path / "state.json").read_text())
    state.module.load_state_dict(load_file(path / "module.safetensors"))
    state.ema.module.load_state_dict(load_file(path / "ema.safetensors"))
    for number, average in enumerate(state.family):
        average.module.load_state_dict(load_file(path / average_file(number)))
    _fill_optimisers(state.optimisers, load_file(path / "optimisers.safetensors"))
    state.step = facts["step"]
    return facts


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in tensors.items()}


def _optimiser_tensors(optimisers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number, optimiser in enumerate(optimisers):
        for index, slots in optimiser.state_dict()["state"].items():
            for name, value in slots.items():
                tensors[f"{number}.{index}.{name}"] = torch.as_tensor(value).contiguous()
    return tensors


def _fill_optimisers(optimisers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    for number, optimiser in enumerate(optimisers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, index, name = key.split(".", 2)
            if int(owner) == number:
                state.setdefault(int(index), {})[name] = value
        optimiser.load_state_dict(
            {"state": state, "param_groups": optimiser.state_dict()["param_groups"]}
        )
