"""What every command's settings are made of: homes, methods, workers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from platformdirs import user_cache_path, user_data_path
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
)
from pydantic_settings import BaseSettings, SettingsConfigDict


class Home(BaseSettings):
    """Where things are kept; every field can be set by an environment variable SASHIKO_*."""

    model_config = SettingsConfigDict(env_prefix="SASHIKO_")

    home: Path = Field(default_factory=lambda: user_data_path("sashiko"))
    cache: Path = Field(default_factory=lambda: user_cache_path("sashiko"))
    mlflow_uri: str | None = None

    @property
    def tracking_uri(self) -> str:
        """MLflow's store: SASHIKO_MLFLOW_URI, or sqlite under the home folder."""
        return self.mlflow_uri or f"sqlite:///{self.home.resolve() / 'mlflow.db'}"


class Settings(BaseModel):
    """Base of every command's settings: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Settings)

MODEL = (
    "champion (of the domain; the starter while it has none), starter, starter-distilled, a "
    "directory, or models:/"
)

ALONG_Z = "whether slices or frames are restored jointly; default: frames of clips are"

GuideName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")]

GUIDES: Any = Field(
    default_factory=dict,
    description="name -> file or folder of other images on the same grid, of the images' names: a "
    "second contrast, a panchromatic band",
)

STARTER, DISTILLED_STARTER = "starter", "starter-distilled"
"""Names of the shipped model, and of its student for four evaluations and fewer."""

SHIPPED = (STARTER, DISTILLED_STARTER)

MAX_SCALE = 16
"""Of 256 pixels 255 are made up then: more is no restoration."""


class MethodSettings(Settings):
    """One way to restore: a diffusion solver with its levels, or a classical baseline."""

    name: str = "covprox"
    kind: Literal["solver", "baseline"] = "solver"
    num_levels: int = Field(12, ge=1, le=10_000)
    sigma_max: float = Field(0.5, gt=0)
    sigma_min: float = Field(0.05, ge=0)
    rho: float = Field(3.0, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)


def gpus_here() -> float:
    """1 where torch can use a GPU of this machine, else 0; without one torch is not imported."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0.0
    import torch

    return float(torch.cuda.is_available())


class ComputeSettings(Settings):
    """Who computes, none of which changes a pixel (device class apart)."""

    executor: Literal["ray", "inline"] = "ray"
    num_workers: int = Field(0, ge=0, description="0: one a core (CPU) or one a GPU")
    num_gpus_per_worker: float = Field(
        default_factory=gpus_here,
        ge=0,
        description="may be a fraction; default: 1 where torch sees a GPU, else 0",
    )
    num_lanes: int = Field(
        0, ge=0, description="blocks a worker computes at once; 0: 1 on a CPU, 4 on a GPU"
    )
    memory_limit_bytes: int | None = Field(None, gt=0)
    ray_address: str | None = None
    max_attempts: int = Field(3, ge=1)
    max_runs: int = Field(3, ge=1, description="that give an item up before it is left alone")

    @property
    def lanes(self) -> int:
        """Blocks that a worker computes at the same time."""
        return self.num_lanes or (4 if self.num_gpus_per_worker > 0 else 1)
