"""Our local U-Net against MONAI's DiffusionModelUNet: throughput, and equal time of training.

    python -m tests.benchmarks.unet_vs_monai speed
    python -m tests.benchmarks.unet_vs_monai train --data DATASET --clock cpu --seconds 600

Trained from nothing by the same loop on the same patches, each for the same seconds, the rate
falling to 0 with the time that is left; each stands inside the same preconditioning and sees the
same six channels. MONAI's has channels 32, 64, 128, two blocks a level and no attention at any:

    monai       as it comes; its middle block attends, which no argument switches off
    monai-bare  without that attention too
    ours        the starter's network
    ours-half   with half its widths, a quarter of its operations

Each is timed in both memory layouts and the better counts; each is trained in the layout that is
the quicker for it (channels-last for ours; for MONAI's it would halve the steps). Weights are
float32, trained under bfloat16 autocast. A run NAME:OPTIMISER:RATE of `train` says which optimiser
has the hidden convolutions: Muon, as in our recipe, or AdamW as all else.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from torch import Tensor, nn

from diffusion_core.networks.blocks import Features
from diffusion_core.networks.local_unet import NUM_CHANNELS, LocalUNet
from diffusion_core.networks.precond import Preconditioned, to_channels_last
from diffusion_core.training import loop
from diffusion_core.training.loop import Callbacks, Recipe, train
from diffusion_core.training.muon import Muon
from flows.api_train import recipe_of
from flows.config import TrainSettings, config_path, read_settings
from flows.training.data import patch_source
from flows.training.validation import denoising_psnr, validation_images

SIGMAS = (0.05, 0.2, 0.5)
NUM_IMAGES, SIDE_PX = 6, 256
HALF_WIDTHS = (32, 48, 96)
RESULTS = Path(__file__).parent / "results" / "unet_vs_monai.json"
Clock = Callable[[], float]
RUNS = (
    "ours:muon:2.5e-3",
    "ours-half:muon:2.5e-3",
    "monai-bare:muon:2.5e-3",
    "monai-bare:adamw:1e-3",
    "monai:muon:2.5e-3",
)
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


class NoAttention(nn.Identity):
    """In the place of MONAI's attention."""

    def forward(self, x: Tensor, *_context: object) -> Tensor:
        """X as it is."""
        return x


class MonaiUNet(nn.Module):
    """MONAI's network with the interface of ours: F(c_in x, detail; ln sigma, condition)."""

    stride = 4

    def __init__(
        self, num_conditions: int, num_features: int = 128, *, middle_attention: bool = True
    ) -> None:
        from monai.networks.nets import diffusion_model_unet

        super().__init__()
        self.config: dict[str, Any] = {"num_features": num_features}
        self.features = Features(num_conditions, num_features)  # of the uncertainty head alone
        attention = diffusion_model_unet.SpatialAttentionBlock if middle_attention else NoAttention
        with patch.object(diffusion_model_unet, "SpatialAttentionBlock", attention):
            self.inner = diffusion_model_unet.DiffusionModelUNet(
                spatial_dims=2,
                in_channels=2 * NUM_CHANNELS,
                out_channels=NUM_CHANNELS,
                num_res_blocks=2,
                channels=(32, 64, 128),
                attention_levels=(False, False, False),
                num_class_embeds=num_conditions,
            )

    def forward(
        self, x_scaled: Tensor, x_detail: Tensor, ln_sigma: Tensor, condition: Tensor
    ) -> Tensor:
        """Its time embedding is made for 0 to 1000: ln sigma from -5.3 to 2.1 is spread there."""
        steps = (ln_sigma.float() + 5.3) * (1000 / 7.4)
        x = torch.cat([x_scaled, x_detail], dim=1)
        out: Tensor = self.inner(x, steps.to(x.dtype), class_labels=condition)
        return out


class TimeIsUp(Exception):
    """Carries the averaged weights out of the loop."""

    def __init__(self, averaged: Preconditioned, num_steps: int) -> None:
        super().__init__()
        self.averaged, self.num_steps = averaged, num_steps


@dataclass(frozen=True)
class Timed(Recipe):
    """A recipe of so many seconds: the learning rate depends on the time that is left."""

    seconds: float = 60.0
    clock: Clock = time.perf_counter
    start: float = 0.0

    def rate(self, step: int) -> float:
        """Warm-up by steps, decay by time."""
        warmup = (step + 1) / max(1, self.warmup_steps)
        left = 1.0 - (self.clock() - self.start) / self.seconds
        return self.learning_rate * min(1.0, warmup, max(0.0, left) / self.decay_share)


def optimisers_of(kind: str) -> Callable[[Preconditioned, Recipe], list[torch.optim.Optimizer]]:
    """Builds optimisers as the loop wants them: "muon" for hidden convolutions, or "adamw" alone.

    The first and the last layer of MONAI's network count as not hidden, like our head.
    """
    outer = ("network.head", "network.inner.conv_in", "network.inner.out")

    def build(model: Preconditioned, recipe: Recipe) -> list[torch.optim.Optimizer]:
        named = dict(model.named_parameters())
        hidden = [n for n, p in named.items() if p.ndim == 4 and not n.startswith(outer)]
        rest = [p for n, p in named.items() if n not in hidden]
        convolutions = [named[n] for n in hidden]
        ratio = 1.0 if kind == "adamw" else recipe.adamw_ratio
        first: torch.optim.Optimizer = (
            _adamw(convolutions, recipe)
            if kind == "adamw"
            else Muon(convolutions, lr=recipe.learning_rate)
        )
        second = _adamw(rest, recipe)
        first.param_groups[0]["ratio"] = 1.0
        second.param_groups[0]["ratio"] = ratio
        return [first, second]

    return build


def _adamw(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )


def trained(
    network: nn.Module,
    settings: TrainSettings,
    seconds: float,
    clock: Clock,
    rate: float,
    optimiser: str,
) -> tuple[Preconditioned, int]:
    """The averaged network after so many seconds of training, and the steps it had."""
    torch.manual_seed(0)
    model = Preconditioned(network)  # type: ignore[arg-type]
    plain = recipe_of(settings)
    values = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    values |= {"num_steps": 10**9, "log_every_steps": 1, "checkpoint_every_s": 1e9}
    values |= {"learning_rate": rate, "ema_decay": 0.99, "decay_share": 0.5}
    patches = patch_source(settings)
    recipe = Timed(**values, seconds=seconds, clock=clock, start=clock())

    def watch(step: int, _metrics: dict[str, float], averaged: Preconditioned) -> None:
        if clock() - recipe.start >= seconds:
            raise TimeIsUp(averaged, step)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as changed:
        changed.enter_context(patch.object(loop, "_optimisers", optimisers_of(optimiser)))
        if isinstance(network, MonaiUNet):
            changed.enter_context(patch.object(loop, "to_channels_last", lambda _: None))
        try:
            train(model, patches, recipe, Path(folder), Callbacks(on_log=watch))
        except TimeIsUp as end:
            return end.averaged.eval(), end.num_steps
    raise RuntimeError("the loop ended before its time")


def networks(settings: TrainSettings) -> dict[str, nn.Module]:
    """All, new."""
    count = len(settings.conditions)
    torch.manual_seed(0)
    return {
        "ours": LocalUNet(count, **settings.network),
        "ours-half": LocalUNet(count, **{**settings.network, "widths": HALF_WIDTHS}),
        "monai": MonaiUNet(count),
        "monai-bare": MonaiUNet(count, middle_attention=False),
    }


def megapixels_per_s(network: nn.Module, dtype: torch.dtype, repeats: int = 4) -> float:
    """Best of some evaluations of a 256^2 image in either memory layout, by CPU time."""
    model = Preconditioned(network).eval()  # type: ignore[arg-type]
    model.network.to(dtype)
    x = torch.randn(1, NUM_CHANNELS, SIDE_PX, SIDE_PX)
    condition = torch.zeros(1, dtype=torch.long)
    times = []
    with torch.no_grad():
        for lay_out in (lambda _: None, to_channels_last):
            lay_out(model)
            for repeat in range(repeats + 1):
                start = time.process_time()
                model(x, torch.tensor([0.2]), condition)
                if repeat:
                    times.append(time.process_time() - start)
    return SIDE_PX**2 / 1e6 / min(times)


def _settings(data: list[Path], seed: int) -> TrainSettings:
    changes = [f"seed={seed}", "init_from=null", "patch_size=64"]
    settings = read_settings(TrainSettings, config_path("train-starter-2.yaml"), changes)
    return settings.model_copy(update={"data": data})


def _keep(name: str, values: Any) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[name] = values
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    sys.stdout.write(json.dumps({name: values}, indent=1) + "\n")


@click.group(help=__doc__)
def main() -> None:
    """See the module."""


@main.command()
@click.option("--threads", default=1, show_default=True)
def speed(threads: int) -> None:
    """Megapixels a second (per second of CPU time) at 256^2, in both precisions."""
    torch.set_num_threads(threads)
    found: dict[str, Any] = {"threads": threads}
    for dtype in (torch.bfloat16, torch.float32):
        for name, network in networks(_settings([], 0)).items():
            key = f"{name}-{str(dtype).removeprefix('torch.')}"
            found[key] = round(megapixels_per_s(network, dtype), 4)
    for one, other in product(("ours", "ours-half"), ("monai", "monai-bare")):
        for kind in ("bfloat16", "float32"):
            ratio = found[f"{one}-{kind}"] / found[f"{other}-{kind}"]
            found[f"{one} / {other}, {kind}"] = round(ratio, 2)
    _keep("megapixels_per_s", found)


@main.command("train")
@click.option("--data", required=True, multiple=True, type=click.Path(path_type=Path, exists=True))
@click.option("--seconds", default=900.0, show_default=True, help="Of training, each.")
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="wall", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--run", "runs", multiple=True, default=RUNS, help="NAME:OPTIMISER:RATE.")
def train_command(
    data: tuple[Path, ...],
    seconds: float,
    clock: str,
    threads: int,
    seed: int,
    runs: tuple[str, ...],
) -> None:
    """Train each for as long, and compare PSNR on validation crops; kept after each run."""
    torch.set_num_threads(threads)
    settings = _settings(list(data), seed)
    images = validation_images(settings, NUM_IMAGES, SIDE_PX)
    key = f"trained {seconds:g} s of {clock} time, {threads} threads, seed {seed}"
    for run in runs:
        name, optimiser, rate = run.split(":")
        network = networks(settings)[name]
        model, steps = trained(network, settings, seconds, CLOCKS[clock], float(rate), optimiser)
        psnr = denoising_psnr(model, images, SIGMAS)
        means = {
            f"{s:g}": round(_mean([v for k, v in psnr.items() if k.endswith(f"-{s:g}")]), 3)
            for s in SIGMAS
        }
        each = {k: round(v, 3) for k, v in psnr.items()}
        found = json.loads(RESULTS.read_text()).get(key, {}) if RESULTS.exists() else {}
        _keep(key, found | {run: {"steps": steps, "mean": means, "psnr": each}})


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
