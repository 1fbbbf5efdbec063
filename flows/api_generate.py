"""`sashiko generate`: images out of nothing but the model, to see what it believes.

OUTPUT/
  city-000.png ...   previews, 8 bits; each says in its metadata that it was generated
  samples.npz        pixels (n c h w) float32, in the units that provenance.json names
  provenance.json    model digest, sampler, noise levels, seed, sha256 of the files above
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domains.base import Array, BadInputError, Domain, Generated
from domains.registry import load_domain
from flows.config import GenerateSettings
from flows.engine.events import Event, EventHandler, ignore
from flows.registry import ResolvedModel, resolve_model

if TYPE_CHECKING:
    import torch

    from diffusion_core.model import Model
    from diffusion_core.posterior.covariance import CovarianceTable

SAMPLES, PROVENANCE = "samples.npz", "provenance.json"


@dataclass(frozen=True)
class GenerateResult:
    """What was generated.

    Attributes:
        output: the folder.
        files: names of the previews in it.
        num_denoiser_calls: evaluations of the network for one image.
        model_digest: of the model.
    """

    output: Path
    files: tuple[str, ...]
    num_denoiser_calls: int
    model_digest: str


def generate(settings: GenerateSettings, on_event: EventHandler | None = None) -> GenerateResult:
    """Draw images from a model's prior. Image n is the same however many are asked for.

    Args:
        settings: what, how many, by which sampler.
        on_event: told of every image.

    Raises:
        BadInputError: if the domain, its condition or the model is unknown, or the output folder
            is not empty.
        BadModelError: if the model was not trained for the condition.
    """
    import numpy as np
    import torch

    from diffusion_core.model import Model

    report = on_event or ignore
    domain = load_domain(settings.domain)
    condition = _condition(domain, settings.condition)
    if settings.output.exists() and (
        not settings.output.is_dir() or any(settings.output.iterdir())
    ):
        raise BadInputError(f"{settings.output}: there is something already; name a new folder")
    found = resolve_model(settings.model)
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    source = _Source(Model.load(found.path, dtype=dtype), condition, settings)
    images = []
    for number in range(settings.num):
        images.append(source.image(number))
        message = f"generating {condition} images"
        report(Event("image", number + 1, settings.num, message))
    shown = domain.generated(condition, np.stack(images))
    files = _write(settings, shown, _provenance(settings, found, source, shown))
    return GenerateResult(settings.output, files, source.num_calls, found.digest)


class _Source:
    """Draws the images of one condition."""

    def __init__(self, model: Model, condition: str, settings: GenerateSettings) -> None:
        import torch

        from diffusion_core.model import BadModelError
        from diffusion_core.noise.schedules import power_sigmas
        from diffusion_core.samplers import make_sampler

        self._settings, self.condition = settings, condition
        self._denoise = model.denoiser(condition)
        self._num_channels = model.conditions[condition]
        self.prior: CovarianceTable | None
        try:
            self.prior = model.prior(condition)
        except BadModelError:  # no table: start from noise alone, and say so
            self.prior = None
        self._sampler = make_sampler(settings.sampler)
        positive = power_sigmas(
            settings.num_levels, settings.sigma_max, settings.sigma_min, settings.rho
        )
        self.sigmas = torch.cat([positive, torch.zeros(1, dtype=positive.dtype)])
        self.num_calls = 0

    def image(self, number: int) -> Array:
        """Image number `number`, (c h w) float32 in network units."""
        import torch

        from diffusion_core.noise.draws import KeyedDraws
        from diffusion_core.samplers.start import gaussian_start

        side = self._settings.size
        draws = KeyedDraws(self._settings.seed, f"generate-{self.condition}-{number}")
        self.num_calls = 0
        with torch.no_grad():
            like = torch.empty(1, self._num_channels, side, side)
            x = gaussian_start(self.prior, like, self._settings.sigma_max, draws)
            x = self._sampler(self._counted, x, self.sigmas, draws)
        if not torch.isfinite(x).all():
            raise RuntimeError(f"image {number} has values that are not finite")
        pixels: Array = x[0].float().numpy()
        return pixels

    def _counted(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        return self._denoise(x, sigma)


def _condition(domain: Domain, asked: str | None) -> str:
    """The condition asked for, or the domain's first."""
    known = list(domain.conditions)
    if asked is not None and asked not in known:
        raise BadInputError(
            f"{domain.name} has no condition '{asked}': choose one of {', '.join(known)}"
        )
    return asked or known[0]


def _provenance(
    settings: GenerateSettings, model: ResolvedModel, source: _Source, shown: Generated
) -> dict[str, Any]:
    return {
        "what": "generated images: drawn from a model, measured from nothing",
        "domain": settings.domain,
        "condition": source.condition,
        "model": {"name": model.name, "version": model.version, "digest": model.digest},
        "sampler": settings.sampler,
        "sigmas": source.sigmas.tolist(),
        "start": "noise" if source.prior is None else "Gaussian prior of the model, and noise",
        "seed": settings.seed,
        "num_images": settings.num,
        "size_px": settings.size,
        "dtype": settings.dtype,
        "num_denoiser_calls": source.num_calls,
        "units": shown.units,
        "preview_range": [shown.low, shown.high],
    }


def _write(settings: GenerateSettings, shown: Generated, facts: dict[str, Any]) -> tuple[str, ...]:
    """Write arrays and previews, and last the provenance that vouches for them."""
    import numpy as np

    from flows.report.write import write_whole

    settings.output.mkdir(parents=True, exist_ok=True)
    contents = {
        f"{facts['condition']}-{n:03d}.png": _png(image, shown, facts)
        for n, image in enumerate(shown.pixels)
    }
    names = tuple(contents)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, pixels=shown.pixels.astype(np.float32))
    contents[SAMPLES] = buffer.getvalue()
    for name, data in contents.items():
        write_whole(settings.output / name, data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    text = json.dumps({**facts, "sha256": digests}, indent=2) + "\n"
    write_whole(settings.output / PROVENANCE, text.encode())
    return names


def _png(image: Array, shown: Generated, facts: dict[str, Any]) -> bytes:
    """A preview of (c h w), grey or colour, that says what it is."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from flows.report.pictures import Window

    note = PngInfo()
    note.add_text("Description", f"{facts['what']} (model {facts['model']['digest'][:12]})")
    buffer = io.BytesIO()
    grey_levels = Window("", shown.low, shown.high).show(image)
    Image.fromarray(grey_levels).save(buffer, "PNG", pnginfo=note)
    return buffer.getvalue()


def generated_text(result: GenerateResult) -> str:
    """What was generated, for people."""
    names: Sequence[str] = result.files
    return (
        f"generated: {len(names)} images in {result.output}, {result.num_denoiser_calls} "
        f"evaluations each (model {result.model_digest[:12]})"
    )
