"""A model as a directory: safetensors and JSON, each file's sha256, one digest for the whole.

    weights.safetensors            the averaged weights, float16
    config.json                    network, sigma_data, conditions in the order of their index; of
                                   a distilled model the options of its solver ("distilled"), of
                                   one with guides their names by condition
    covariance-CONDITION.safetensors   measured on validation (posterior/covariance.py)
    covariance-CONDITION-guided.safetensors    the same with all guides given, if it knows guides
    MODEL_CARD.md                  data, licences, recipe, figures, limits
    solver.json                    settings fitted on validation images, by task, mode and number
                                   of levels (`sashiko calibrate`); may be missing
    digests.json                   sha256 of every file above

There is never a pickle: nothing in the directory can run.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a digest needs no torch: plans and the registry are to be quick
    import torch

    from diffusion_core.networks.precond import Preconditioned
    from diffusion_core.posterior.covariance import CovarianceTable
    from diffusion_core.protocols import Denoiser

WEIGHTS, CONFIG, CARD, DIGESTS, SOLVER = (
    "weights.safetensors",
    "config.json",
    "MODEL_CARD.md",
    "digests.json",
    "solver.json",
)
DISTILLED = "distilled"
"""In config.json of a student: options of the solver of that name."""
GUIDED = "-guided"
"""In the name of a covariance table that was measured with all guides given."""
_SECTION = "## Solver settings"


class BadModelError(ValueError):
    """A model directory that is missing, incomplete or altered; the message is one sentence."""


def save_model(
    path: Path,
    module: Preconditioned,
    conditions: Mapping[str, int],
    tables: Mapping[str, CovarianceTable],
    card: str,
    facts: Mapping[str, Any],
) -> str:
    """Write a model directory by rename; an older one at `path` is replaced.

    Args:
        path: of the directory.
        module: the denoiser (the averaged weights).
        conditions: condition -> channels, in the order of the network's indices.
        tables: condition -> covariance table; may be empty, then solvers that need one refuse.
        card: the model card, Markdown.
        facts: further JSON-able configuration (training settings, data digests).
    Returns:
        The model's digest.
    """
    import torch
    from safetensors.torch import save_file

    staging = _staging(path)
    weights = {k: v.to(torch.float16).contiguous() for k, v in module.state_dict().items()}
    save_file(weights, staging / WEIGHTS)
    config = {
        "format": 1,
        "sigma_data": module.sigma_data,
        "network": module.network.config,
        "conditions": dict(conditions),
        **facts,
    }
    (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (staging / CARD).write_text(card)
    for condition, table in tables.items():
        table.save(staging / f"covariance-{condition}.safetensors")
    return _publish(staging, path)


def is_student(path: Path) -> bool:
    """Whether a model directory holds a distilled model.

    Args:
        path: of the model directory.

    Raises:
        BadModelError: if it has no readable configuration.
    """
    return DISTILLED in _read_json(Path(path) / CONFIG)


def solver_settings(path: Path) -> dict[str, Any]:
    """Settings of solvers fitted for a model: solver.json, {} if it has none. Needs no torch.

    Of a distilled model they hold, as DISTILLED, the options that its student was trained for.

    Raises:
        BadModelError: if a file cannot be read.
    """
    settings = _read_json(Path(path) / SOLVER)
    trained_for = _read_json(Path(path) / CONFIG).get(DISTILLED)
    return settings if trained_for is None else {**settings, DISTILLED: trained_for}


def _read_json(file: Path) -> dict[str, Any]:
    """What a file holds, {} if there is none."""
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise BadModelError(f"{file} cannot be read ({error}): fetch the model again") from error


def store_solver_settings(
    path: Path, settings: Mapping[str, Any], section: str, output: Path | None = None
) -> str:
    """Give a model solver settings, instead of those it has; all else stays as it is.

    Args:
        path: of the model directory.
        settings: of solvers, JSON-able.
        section: of the model card that tells of them, Markdown without its heading.
        output: directory to write; default: `path` itself.

    Returns:
        The digest of the model with its new settings.

    Raises:
        BadModelError: if `path` is not a whole model.
    """
    target = output or path
    staging = _copied(path, target)
    (staging / SOLVER).write_text(json.dumps(settings, indent=1) + "\n")
    _set_section(staging / CARD, _SECTION, section)
    return _publish(staging, target)


def store_card_section(path: Path, heading: str, section: str) -> str:
    """Give a model card a section, instead of the one of that heading; all else stays as it is.

    Args:
        path: of the model directory.
        heading: without its marks: "Restoration of test images".
        section: Markdown, no heading of second order in it.

    Returns:
        The digest of the model with its new card.

    Raises:
        BadModelError: if `path` is not a whole model.
    """
    staging = _copied(path, path)
    _set_section(staging / CARD, f"## {heading}", section)
    return _publish(staging, path)


def _copied(path: Path, target: Path) -> Path:
    """A whole model's files in a folder beside `target`, to be changed and published."""
    model_digest(path)
    staging = _staging(target)
    for name in json.loads((path / DIGESTS).read_text()):
        shutil.copyfile(path / name, staging / name)
    return staging


def _set_section(card: Path, heading: str, section: str) -> None:
    """Replace the section of a heading where it stands; a new one comes last."""
    text = card.read_text() if card.is_file() else ""
    parts = [part for part in re.split(r"(?m)^(?=## )", text) if part.strip()]
    new = f"{heading}\n\n{section.strip()}"
    place = next((n for n, part in enumerate(parts) if part.startswith(f"{heading}\n")), None)
    if place is None:
        parts.append(new)
    else:
        parts[place] = new
    card.write_text("\n\n".join(part.strip() for part in parts) + "\n")


def _staging(path: Path) -> Path:
    """A folder beside `path`, to be filled and published."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    staging.chmod(0o755)
    return staging


def _publish(staging: Path, path: Path) -> str:
    """Digest the files, and put the folder in place of an older model by rename.

    Raises:
        BadModelError: if what is there is no model; it is left as it is.
    """
    for file in staging.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone
    digests = {p.name: _sha256(p) for p in sorted(staging.iterdir())}
    (staging / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")
    old = None
    if path.exists():
        if any(path.iterdir()) and not (path / DIGESTS).is_file():
            shutil.rmtree(staging)
            raise BadModelError(
                f"{path} holds files that are no model's: name another folder for the model"
            )
        old = staging.with_suffix(".old")
        path.rename(old)
    staging.rename(path)
    if old is not None:
        shutil.rmtree(old)
    return model_digest(path)


def model_digest(path: Path) -> str:
    """The digest of a model directory after checking every file against digests.json.

    Raises:
        BadModelError: if the directory is not a model, or a file is missing or altered.
    """
    listing = path / DIGESTS
    if not listing.is_file():
        raise BadModelError(
            f"{path} is not a model directory (no {DIGESTS}): give one that `sashiko train` made"
        )
    try:
        digests: dict[str, str] = json.loads(listing.read_text())
        named = sorted(digests.items())
    except (ValueError, AttributeError) as error:
        raise BadModelError(f"{listing} cannot be read ({error}): fetch the model again") from error
    for name, expected in named:
        file = path / name
        if Path(name).name != name or not file.is_file() or _sha256(file) != expected:
            raise BadModelError(
                f"{file} is missing or not the file that was trained (sha256 differs): "
                "fetch the model again"
            )
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
        path: its directory.
        digest: of the whole directory.
        config: config.json.
        module: the denoiser network on the chosen device.
    """

    path: Path
    digest: str
    config: dict[str, Any]
    module: Preconditioned

    @classmethod
    def load(cls, path: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Model:
        """Load a model directory, checking every digest.

        Args:
            path: of the directory.
            dtype: precision that F computes in; default float32.
            device: torch device.
        Raises:
            BadModelError: as model_digest, and if the weights do not fit the configuration.
        """
        import torch
        from safetensors.torch import load_file

        from diffusion_core.networks.local_unet import LocalUNet
        from diffusion_core.networks.precond import Preconditioned, to_channels_last
        from diffusion_core.networks.student import StudentUNet

        path = Path(path)
        digest = model_digest(path)
        config = json.loads((path / CONFIG).read_text())
        try:
            kind = StudentUNet if "num_inputs" in config["network"] else LocalUNet
            module = Preconditioned(kind(**config["network"]), config["sigma_data"])
            module.load_state_dict(load_file(path / WEIGHTS))
        except (KeyError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise BadModelError(
                f"{path} does not hold a model of this version ({reason}): train or fetch one"
            ) from error
        module = module.to(device).eval()
        to_channels_last(module)
        module.network.to(dtype or torch.float32)
        module.requires_grad_(requires_grad=False)
        return cls(path, digest, config, module)

    @property
    def conditions(self) -> dict[str, int]:
        """Condition -> number of channels."""
        return dict(self.config["conditions"])

    @property
    def is_distilled(self) -> bool:
        """Whether it is a student, which the solver `distilled` restores with, and no denoiser."""
        return DISTILLED in self.config

    def denoiser(self, condition: str) -> Denoiser:
        """D(x; sigma) for one condition; gradients are not tracked.

        Raises:
            BadModelError: if the model was not trained for the condition, or is a student.
        """
        from diffusion_core.networks.precond import ConditionedDenoiser

        self._check(condition)
        if self.is_distilled:
            raise BadModelError(
                f"{self.path} is a distilled model and no denoiser: name the one that it was "
                "distilled from"
            )
        index = list(self.conditions).index(condition)
        return ConditionedDenoiser(self.module, index, self.conditions[condition])

    def student(self, condition: str) -> Denoiser:
        """A distilled model's denoiser, which takes its inputs beside the image (student.py).

        Raises:
            BadModelError: if the model was not trained for the condition, or is no student.
        """
        from diffusion_core.networks.student import StudentDenoiser

        self._check(condition)
        if not self.is_distilled:
            raise BadModelError(f"{self.path} is no distilled model: make one with sashiko distill")
        index = list(self.conditions).index(condition)
        return StudentDenoiser(self.module, index, self.conditions[condition])

    def guides(self, condition: str) -> list[str]:
        """Names of the guides that the model was trained with for a condition; may be none."""
        return list(self.config.get("guides", {}).get(condition, []))

    @property
    def guide_channels(self) -> list[str]:
        """Names of all guides in the order of the network's channels."""
        return guide_channels(self.config.get("guides", {}))

    def carrying_denoiser(self, condition: str) -> Denoiser:
        """D of images (b c+g h w) with their guides as last channels (`guide_channels`).

        See precond.CarryingDenoiser, and precond.guided to bind the guides.

        Raises:
            BadModelError: if the model was not trained for the condition.
        """
        from diffusion_core.networks.precond import CarryingDenoiser

        self._check(condition)
        index = list(self.conditions).index(condition)
        return CarryingDenoiser(self.module, index, self.conditions[condition])

    def prior(self, condition: str, *, guided: bool = False) -> CovarianceTable:
        """The covariance table measured for a condition.

        Args:
            condition: of the network.
            guided: the one measured with all guides given, if there is one.

        Raises:
            BadModelError: if there is none.
        """
        from diffusion_core.posterior.covariance import CovarianceTable

        self._check(condition)
        file = self.path / f"covariance-{condition}.safetensors"
        with_guides = self.path / f"covariance-{condition}{GUIDED}.safetensors"
        if guided and with_guides.is_file():
            file = with_guides
        if not file.is_file():
            raise BadModelError(
                f"{self.path} has no covariance table for '{condition}': train it with "
                "validation data, or use --method diffpir or dds"
            )
        return CovarianceTable.load(file)

    def _check(self, condition: str) -> None:
        if condition not in self.conditions:
            known = ", ".join(self.conditions)
            raise BadModelError(
                f"{self.path} was not trained for '{condition}' (it knows {known}): "
                "choose another model"
            )


def guide_channels(guides: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of all conditions' guides, each once, in the order of the network's channels."""
    return list(dict.fromkeys(name for names in guides.values() for name in names))


def known_guides(path: Path) -> dict[str, list[str]]:
    """Condition -> names of the guides that a model was trained with; needs no torch.

    Raises:
        BadModelError: if the model's configuration cannot be read.
    """
    file = Path(path) / CONFIG
    try:
        return dict(json.loads(file.read_text()).get("guides", {}))
    except (OSError, ValueError) as error:
        raise BadModelError(f"{file} cannot be read ({error}): fetch the model again") from error


def weights_digest(path: Path) -> str:
    """The digest of a model's weights alone: the same whatever is fitted to them later.

    Raises:
        BadModelError: if `path` is not a whole model.
    """
    model_digest(path)
    digests: dict[str, str] = json.loads((path / DIGESTS).read_text())
    return digests[WEIGHTS]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
