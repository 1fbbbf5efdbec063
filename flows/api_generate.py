"""`sashiko generate`: images out of nothing but the model, to see what it believes.

OUTPUT/
  city-000.png ...   previews, 8 bits; each says in its metadata that it was generated
                     (with --frames an animated PNG, which browsers play)
  samples.npz        pixels (n c h w) float32, or (n t c h w) of t frames, in the units that
                     provenance.json names
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
from flows.engine.grid import DENOISER_BATCH_PX
from flows.registry import ResolvedModel, resolve_model

if TYPE_CHECKING:
    import torch

    from diffusion_core.model import Model
    from diffusion_core.posterior.covariance import CovarianceTable

FRAME_MS = 80
"""How long a frame of a preview is shown."""

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
    """Draw images, or clips, from a model's prior: number n is the same however many are asked for.

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
    shown = domain.generated(condition, np.concatenate(images))
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
        self._dual: torch.Tensor | None = None

    def image(self, number: int) -> Array:
        """Image number `number`, (t c h w) float32 in network units, t its frames.

        The frames of a clip come out of noise that changes little from one to the next, and at
        every level neighbours are coupled as those of a clip that is restored.
        """
        import torch

        from diffusion_core.noise.draws import KeyedDraws
        from diffusion_core.samplers.start import gaussian_start

        settings, side = self._settings, self._settings.size
        length = settings.frames_alike if settings.frames > 1 else 0.0
        digest = f"generate-{self.condition}-{number}"
        draws = KeyedDraws(settings.seed, digest, length_z=length)
        self.num_calls, self._dual = 0, None
        with torch.no_grad():
            like = torch.empty(settings.frames, self._num_channels, side, side)
            x = gaussian_start(self.prior, like, settings.sigma_max, draws)
            x = self._sampler(self._counted, x, self.sigmas, draws)
        if not torch.isfinite(x).all():
            raise RuntimeError(f"image {number} has values that are not finite")
        pixels: Array = x.float().numpy()
        return pixels

    def _counted(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        import torch

        self.num_calls += 1
        step = max(1, DENOISER_BATCH_PX // self._settings.size**2)
        parts = zip(x.split(step), sigma.split(step), strict=True)
        return self._coupled(torch.cat([self._denoise(*part) for part in parts]), float(sigma[0]))

    def _coupled(self, mu: torch.Tensor, sigma: float) -> torch.Tensor:
        """Neighbouring frames brought together, where the model knows how far D errs."""
        from diffusion_core.posterior.coupling import couple, difference_precision

        coupling = self._settings.frame_coupling
        if self.prior is None or not coupling or len(mu) < 2:
            return mu
        covariance = self.prior.at(sigma).on(mu)
        precision = difference_precision(mu, covariance, coupling)
        coupled, solved = couple(mu, covariance, precision, start=self._dual)
        self._dual = solved.x
        return coupled


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
        **_clip_facts(settings),
        "size_px": settings.size,
        "dtype": settings.dtype,
        "num_denoiser_calls": source.num_calls,
        "units": shown.units,
        "preview_range": [shown.low, shown.high],
    }


def _clip_facts(settings: GenerateSettings) -> dict[str, Any]:
    """How the frames of clips hang together; nothing of still images."""
    if settings.frames == 1:
        return {}
    return {
        "num_frames": settings.frames,
        "frames_alike": settings.frames_alike,
        "frame_coupling": settings.frame_coupling,
    }


def _write(settings: GenerateSettings, shown: Generated, facts: dict[str, Any]) -> tuple[str, ...]:
    """Write arrays and previews, and last the provenance that vouches for them."""
    import numpy as np

    from flows.report.write import write_whole

    settings.output.mkdir(parents=True, exist_ok=True)
    clips = shown.pixels.reshape(settings.num, settings.frames, *shown.pixels.shape[1:])
    contents = {
        f"{facts['condition']}-{n:03d}.png": _png(clip, shown, facts)
        for n, clip in enumerate(clips)
    }
    names = tuple(contents)
    buffer = io.BytesIO()
    pixels = clips if settings.frames > 1 else shown.pixels
    np.savez_compressed(buffer, pixels=pixels.astype(np.float32))
    contents[SAMPLES] = buffer.getvalue()
    for name, data in contents.items():
        write_whole(settings.output / name, data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    text = json.dumps({**facts, "sha256": digests}, indent=2) + "\n"
    write_whole(settings.output / PROVENANCE, text.encode())
    return names


def _png(frames: Array, shown: Generated, facts: dict[str, Any]) -> bytes:
    """A preview of (t c h w), grey or colour, that says what it is; animated if t > 1."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from flows.report.pictures import Window

    note = PngInfo()
    note.add_text("Description", f"{facts['what']} (model {facts['model']['digest'][:12]})")
    buffer = io.BytesIO()
    window = Window("", shown.low, shown.high)
    first, *rest = (Image.fromarray(window.show(frame)) for frame in frames)
    playing = {"save_all": True, "append_images": rest, "duration": FRAME_MS, "loop": 0}
    first.save(buffer, "PNG", pnginfo=note, **(playing if rest else {}))
    return buffer.getvalue()


def generated_text(result: GenerateResult) -> str:
    """What was generated, for people."""
    names: Sequence[str] = result.files
    return (
        f"generated: {len(names)} images in {result.output}, {result.num_denoiser_calls} "
        f"evaluations each (model {result.model_digest[:12]})"
    )
