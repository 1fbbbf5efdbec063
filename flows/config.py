"""The typed configuration: what every command takes, and how configs/*.yaml fill it in.

Heavy imports are kept out: the command line imports this module before it knows what to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from zoneinfo import available_timezones

import yaml
from platformdirs import user_cache_path, user_data_path
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from domains.base import BadInputError, Task
from domains.registry import config_folders
from flows.mistakes import mistake_in
from flows.roots import Root, parse_root


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

MODEL = "champion (of the domain; the starter while it has none), starter, a directory, or models:/"

ALONG_Z = "whether slices or frames are restored jointly; default: frames of clips are"

STARTER = "starter"
"""Name of the shipped model."""

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


class SamplesSettings(Settings):
    """`sashiko samples`: fetch the real sample data."""

    extra: Path | None = Field(None, description="folder of further files, found by their sha256")
    demo_only: bool = Field(False, description="only what the demo needs")


GuideName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")]

GUIDES: Any = Field(
    default_factory=dict,
    description="name -> file or folder of other images on the same grid, of the images' names: a "
    "second contrast, a panchromatic band",
)


class IngestSettings(Settings):
    """`sashiko ingest`: files into one dataset."""

    source: Path = Field(description="a file, or a folder with all below it")
    domain: str
    output: Path = Field(description="the dataset, a new .zarr folder")
    split: Literal["unassigned", "train", "validation", "test", "by-group"] = Field(
        "unassigned",
        description="by-group: about 80% train, 10% validation, 10% test, drawn by subfolder of "
        "the source (patient or scene)",
    )
    guides: dict[GuideName, Path] = GUIDES
    mask: str | None = Field(
        None,
        description="what the images lack, as for restore: masks (white = missing), a file of "
        "boxes, 'nodata' or 'auto'; they become a store of measurements to train from",
    )

    @field_validator("mask")
    @classmethod
    def _lacks_pixels(cls, mask: str | None) -> str | None:
        if mask == "slices":
            raise ValueError("'slices' that are not there teach nothing; leave it out")
        return mask

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        if self.mask is not None and self.guides:
            raise ValueError("guides go with whole images: leave out --mask or --guide")
        return self


class InspectSettings(Settings):
    """`sashiko inspect`: what an input is."""

    source: Path = Field(description="a file, a folder of files, or a store of ours")
    domain: str | None = Field(None, description="default: whichever reads it")
    preview: Path | None = Field(None, description="a PNG to be written")


class SimulateSettings(Settings):
    """`sashiko simulate`: a task's measurements of a dataset's items."""

    dataset: Path
    tasks: list[str]
    output: Path = Field(description="the measurements, a new .zarr folder")
    items: list[str] | None = Field(None, description="default: all of the tasks' domains")
    slices: list[int] | None = Field(None, description="slices or frames, default: all")
    seed: int = 0


AnyRoot = Annotated[
    Root,
    PlainValidator(parse_root),
    PlainSerializer(str, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "path"}),
]
"""A setting that is a folder here, or s3://BUCKET/PREFIX."""


class RestoreSettings(Settings):
    """`sashiko restore`."""

    input: AnyRoot = Field(description="measurements (a folder or s3://...), or a folder of images")
    output: AnyRoot = Field(description="a folder, or s3://BUCKET/PREFIX")
    model: str = Field("champion", description=MODEL)
    domain: str | None = None
    mask: str | None = Field(
        None,
        description="masks (white = missing), a file of boxes or polygons, 'nodata', 'auto', "
        "'slices' that a series lacks, 'slices:7,9', or slices that 'moved'",
    )
    kernel: Path | None = None
    scale: int | None = Field(None, ge=2, le=MAX_SCALE, description="times larger to make them")
    scale_z: int | None = Field(
        None, ge=2, le=MAX_SCALE, description="slices to make of one, where they are thick"
    )
    guides: dict[GuideName, Path] = GUIDES
    sigma_y: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="noise std on [-1, 1] of a given damaged image"
    )
    noise: Literal["gaussian", "rician"] = Field(
        "gaussian", description="rician: of MRI magnitude images, whose noise is all that is wrong"
    )
    damage: Literal["jpeg", "haze", "low-light"] | None = Field(
        None, description="what spoilt them as a whole; its strength is read off the pictures"
    )
    exposure: float | None = Field(
        None,
        gt=0,
        le=1,
        description="of low-light: share of the light that a well exposed picture has; default: "
        "estimated",
    )
    method: MethodSettings | None = Field(None, description="default: the task's own")
    along_z: bool | None = Field(None, description=ALONG_Z)
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    block_size: int = Field(512, description="write region of a tiled block, pixels")
    slices_per_block: int = 4
    batch_px: int | None = Field(
        None,
        ge=0,
        description="pixels in a denoiser call, shared by the lanes of a worker; 0: each block has "
        "its own calls; default: 0 on a CPU, 2^22 on a GPU",
    )
    window_items: int = Field(8, description="items a Prefect window task")
    compute: ComputeSettings = Field(default_factory=ComputeSettings)


class ExplainSettings(RestoreSettings):
    """`sashiko explain`: how a restoration came about, in this process."""

    output: Path = Field(description="folder of the page, the pictures and explain.json")
    items: list[str] | None = Field(None, description="default: the first `num`")
    num: int = Field(1, ge=1, le=100, description="items, where none is named")
    slices: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="slices or frames, from 0; default: the middle one"
    )
    num_seeds: int = Field(4, ge=2, le=100, description="restorations that differ by their seed")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16 rounds more than the changes that are tried"
    )
    slices_per_block: int = 1
    along_z: bool | None = Field(False, description="explained is what one slice's data say")
    batch_px: int | None = Field(0, ge=0)
    compute: ComputeSettings = Field(default_factory=lambda: ComputeSettings(executor="inline"))


class EvaluateSettings(Settings):
    """`sashiko evaluate`."""

    input: Path
    domain: str | None = None
    tasks: list[str]
    model: str = Field("champion", description=MODEL)
    output: Path
    guides: dict[GuideName, Path] = GUIDES
    methods: list[str] | None = Field(None, description="default: all that the task names")
    num_levels: int | None = Field(
        None, ge=1, le=10_000, description="evaluations of each solver; default: its own"
    )
    items: list[str] | None = None
    num_samples: int = Field(0, ge=0, description="posterior samples an image, 0 or 2 and more")
    along_z: bool | None = Field(None, description=ALONG_Z)
    explain: int = Field(0, ge=0, le=100, description="first items of each task that are explained")
    json_path: Path | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compute: ComputeSettings = Field(default_factory=ComputeSettings)


class CalibrateSettings(Settings):
    """`sashiko calibrate MODEL`: fit the solver's settings on images whose truth is known."""

    model: str = Field(description="a directory, starter, or models:/NAME@ALIAS")
    data: Path = Field(description="dataset that holds validation images")
    tasks: list[str]
    modes: list[Literal["mean", "sample"]] = ["mean", "sample"]
    levels: dict[str, list[int]] = Field(
        {"mean": [8, 12], "sample": [8, 20]}, description="evaluations to fit for, by mode"
    )
    parts: Path | None = Field(
        None, description="YAML of the images by domain; default: the validation items"
    )
    output: Path | None = Field(None, description="default: the model's own directory")
    again: bool = Field(False, description="fit anew what the model holds already")
    num_samples: int = Field(6, ge=2, description="chains an image, in sample mode")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


NAME = r"[a-z0-9][a-z0-9._-]*"  # of a folder or model: it cannot lead out of its place


class ScoreSettings(Settings):
    """How a network in training is scored: by short restorations of validation images."""

    every_steps: int = Field(
        0, ge=0, description="between scores, the best network being kept; 0: none before the end"
    )
    num_images: int = Field(2, ge=1, le=100, description="of each condition")
    side: int = Field(96, ge=32, le=1024, description="of the images' centre crops, pixels")
    num_levels: int = Field(6, ge=1, le=100, description="evaluations a restoration")
    decides: bool = Field(
        True,
        description="whether the best by score is shipped; else the newest, scored for the curve",
    )


class FewSettings(Settings):
    """Little data: which slices of the training items are learned from, and which are held out."""

    slices: int = Field(
        0, ge=0, description="taken in all, spread over the training items; 0: every slice"
    )
    held_out: int = Field(
        0,
        ge=0,
        description="of these, to score the network by instead of the validation items, unlearned",
    )
    draw: int = Field(0, ge=0, lt=2**63, description="which choice; 0 is evenly spread")

    @model_validator(mode="after")
    def _leave_some(self) -> Self:
        if self.slices and self.held_out >= self.slices:
            raise ValueError(f"of {self.slices} slices {self.held_out} cannot be held out")
        return self


class CorruptionSettings(Settings):
    """What the training images lack, all of them: nothing clean is ever seen."""

    kind: Literal["mask"] = Field("mask", description="pixels that were not measured")
    further: float = Field(
        0.1,
        ge=0,
        lt=0.5,
        description="mean share of the measured pixels that the network is not shown either",
    )


class StopSettings(Settings):
    """When a training ends before its last step: once its score (`score`) gains no more."""

    patience: int = Field(
        0, ge=0, description="scores in a row without a gain that end it; 0: it runs to the end"
    )
    min_gain_db: float = Field(0.0, ge=0, allow_inf_nan=False, description="less is no gain")


class TrainSettings(Settings):
    """`sashiko train configs/train-*.yaml`."""

    name: str = Field(max_length=100, description="of the run's folder: a-z, 0-9, dot, dash, _")
    data: list[Path] = Field(default_factory=list, description="datasets; empty: the samples")
    extra_samples: Path | None = Field(
        None, description="folder of the catalogue's local files, to learn from beside the samples"
    )
    output: Path = Path("runs")
    conditions: dict[str, float] = Field(
        min_length=1, description="network condition -> share of the batch"
    )
    network: dict[str, Any]
    init_from: Path | None = Field(
        None, description="model directory whose weights to start from, or starter: the shipped one"
    )
    init_conditions: dict[str, str] = Field(
        default_factory=dict,
        description="condition that init_from lacks -> the one of its conditions to begin as",
    )
    low_rank: int = Field(
        0,
        ge=0,
        le=1024,
        description="train corrections of this rank of each convolution that init_from brings, and "
        "nothing else; 0: all weights",
    )
    few: FewSettings | None = Field(None, description="learn from some slices; default: all")
    corruption: CorruptionSettings | None = Field(
        None, description="of stores of measurements in `data`, whose images lack pixels"
    )
    least_view_scale: float = Field(
        0.0,
        ge=0,
        le=1,
        description="leave out views of an item narrower than this share of its first",
    )
    soft_shares: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict,
        description="condition -> share of its patches that are blurred a little, as other optics "
        "and resampling would",
    )
    guides: dict[str, list[GuideName]] = Field(
        default_factory=dict,
        description="condition -> guides that the network is shown with its images, by the names "
        "that the datasets have for them: {mri: [t1]}",
    )
    guide_drop_share: float = Field(
        0.4, ge=0, le=1, description="share of the samples that are shown without a guide"
    )
    patch_size: int = Field(64, ge=8, le=1024)
    batch_size: int = Field(32, ge=1, le=100_000)
    micro_batch: int = Field(
        0,
        ge=0,
        description="samples a worker computes at once, gradients added up; 0: its whole share",
    )
    num_steps: int = Field(ge=1, lt=10**9)
    learning_rate: float = Field(2e-3, gt=0, le=1)
    warmup_steps: int = Field(100, ge=0)
    decay_share: float = Field(
        0.4, ge=0, le=1, description="last share of the steps, rate falling to 0"
    )
    adamw_ratio: float = Field(0.25, gt=0, allow_inf_nan=False)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    ema_snapshots: int = Field(
        0,
        ge=0,
        le=1000,
        description="of averages whose length is chosen at the end by score; 0: none is kept",
    )
    ema_lengths: list[float] = Field(
        [0.03, 0.05, 0.08, 0.12, 0.18],
        description="to choose from: standard deviations as shares of the run; needs ema_snapshots",
    )
    score: ScoreSettings = Field(default_factory=ScoreSettings)
    stop: StopSettings = Field(default_factory=StopSettings)
    ln_sigma_mean: float = Field(-1.5, ge=-20, le=20)
    ln_sigma_std: float = Field(1.3, gt=0, le=20)
    uniform_share: float = Field(0.25, ge=0, le=1)
    sigma_range: tuple[float, float] = Field((0.01, 4.0), description="least and greatest level")
    level_mass: list[float] = Field(
        default_factory=list,
        description="shares of the samples in bins of ln sigma, of even width over sigma_range; "
        "empty: ln_sigma_mean, ln_sigma_std and uniform_share",
    )
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = Field(0, ge=0, lt=2**63)
    checkpoint_every_s: float = Field(60.0, ge=0)
    log_every_steps: int = Field(50, ge=1)
    picture_every_steps: int = Field(500, ge=1)
    num_threads: int = Field(
        0, ge=0, description="CPU threads a worker; 0: the cores shared evenly"
    )
    data_memory_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="a worker's bound for training images, which are read from Zarr as patches "
        "touch them where they do not fit; default: its part of 40% of the machine's memory",
    )
    prefetch_threads: int = Field(1, ge=1, le=64, description="that draw batches ahead")
    register_as: list[str] = Field(default_factory=list)
    calibration_items: list[str] = Field(
        default_factory=list,
        description="training items that the covariance tables are measured on too",
    )
    shippable_only: bool = Field(True, description="leave out data whose licence forbids shipping")
    compute: ComputeSettings = Field(default_factory=lambda: ComputeSettings(num_workers=1))

    @field_validator("name", "register_as")
    @classmethod
    def _are_names(cls, given: str | list[str]) -> str | list[str]:
        for name in [given] if isinstance(given, str) else given:
            if not re.fullmatch(NAME, name):
                raise ValueError(f"'{name}' is no name: use a-z, 0-9, dot, dash and _")
        return given

    @field_validator("conditions")
    @classmethod
    def _have_shares(cls, conditions: dict[str, float]) -> dict[str, float]:
        for name, share in conditions.items():
            if not 0 < share < float("inf"):
                raise ValueError(f"the share of '{name}' must be above 0")
        return conditions

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.guides and self.corruption is not None:
            raise ValueError("guides go with whole images: leave out guides or corruption")
        if self.guides and self.low_rank:
            raise ValueError("what guides add is learned from nothing: leave out low_rank")
        return self

    @field_validator("soft_shares", "guides")
    @classmethod
    def _are_of_conditions(cls, shares: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        unknown = [name for name in shares if name not in info.data.get("conditions", shares)]
        if unknown:
            raise ValueError(f"'{unknown[0]}' is none of the run's conditions")
        return shares

    @field_validator("ema_lengths")
    @classmethod
    def _are_lengths(cls, lengths: list[float]) -> list[float]:
        if not all(0 < length <= 0.288 for length in lengths):
            raise ValueError("lengths are above 0 and at most .288, that of the mean of all steps")
        return lengths

    @field_validator("low_rank")
    @classmethod
    def _has_weights_to_correct(cls, rank: int, info: ValidationInfo) -> int:
        if rank and info.data.get("init_from") is None:
            raise ValueError("it corrects the weights of init_from: name a model there")
        return rank

    @field_validator("stop")
    @classmethod
    def _is_scored(cls, stop: StopSettings, info: ValidationInfo) -> StopSettings:
        score = info.data.get("score")
        if stop.patience and score is not None and not score.every_steps:
            raise ValueError("stop.patience counts scores: set score.every_steps")
        return stop

    @field_validator("level_mass")
    @classmethod
    def _are_shares(cls, mass: list[float]) -> list[float]:
        if not all(0 < share < float("inf") for share in mass):
            raise ValueError("every bin's share must be above 0")
        return mass

    @field_validator("sigma_range")
    @classmethod
    def _is_range(cls, levels: tuple[float, float]) -> tuple[float, float]:
        if not 0 < levels[0] < levels[1] < float("inf"):
            raise ValueError("give the least and the greatest level, both above 0, in this order")
        return levels


class OperatorSettings(Settings):
    """One kind of operator that a student learns to restore from (domains/patches.py)."""

    kind: str = Field(description="mask, fourier, pool, blur; of CT parallel-beam too")
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="against the condition's others"
    )
    params: dict[str, Any] = Field(
        default_factory=dict, description="numbers, or pairs or lists that they are drawn from"
    )


class DistillSettings(TrainSettings):
    """`sashiko distill configs/distill-*.yaml`: a training whose network restores in few passes."""

    init_from: Path | None = Field(
        Path(STARTER), description="the teacher: a model directory, or starter; it has the tables"
    )
    network: dict[str, Any] = Field(default_factory=dict, description="default: the teacher's")
    operators: dict[str, list[OperatorSettings]] = Field(
        description="condition -> what its patches are measured by"
    )
    levels: list[Annotated[float, Field(gt=0, le=10)]] = Field(
        [0.4, 0.2, 0.1, 0.05],
        min_length=1,
        max_length=16,
        description="sigma of each evaluation where the start errs by .07, in proportion elsewhere",
    )
    inflation: list[Annotated[float, Field(gt=0, le=100)]] = Field(
        [4.0], min_length=1, description="c of the data steps, one or one a level"
    )
    final_data_step: bool = Field(
        True, description="whether the last estimate is brought to the data; of a regressor not"
    )
    consistency: float = Field(
        0.0, ge=0, le=100, description="weight of the agreement between neighbouring levels"
    )

    @field_validator("operators")
    @classmethod
    def _are_measured(
        cls, operators: dict[str, list[OperatorSettings]], info: ValidationInfo
    ) -> dict[str, list[OperatorSettings]]:
        for name in info.data.get("conditions", {}):
            if not operators.get(name):
                raise ValueError(f"the condition '{name}' has no operator to be measured by")
        return operators

    @model_validator(mode="after")
    def _learns_whole(self) -> Self:
        given = [n for n in ("low_rank", "corruption", "guides") if getattr(self, n)]
        if given:
            raise ValueError(f"a student learns from clean images, all weights: no {given[0]}")
        return self

    @field_validator("inflation")
    @classmethod
    def _fits_levels(cls, inflation: list[float], info: ValidationInfo) -> list[float]:
        if len(inflation) not in {1, len(info.data.get("levels", inflation))}:
            raise ValueError("give one, or one a level")
        return inflation


class GenerateSettings(Settings):
    """`sashiko generate`: images drawn from a model's prior."""

    domain: str
    output: Path = Field(description="a new folder")
    condition: str | None = Field(None, description="of the network; default: the domain's first")
    num: int = Field(4, ge=1, le=10_000)
    size: int = Field(256, ge=16, le=1024, description="side in pixels")
    frames: int = Field(1, ge=1, le=100, description="of a clip; 1: still images")
    frames_alike: float = Field(
        6.0, gt=0, description="frames over which the noise of a clip stays alike; inf: one noise"
    )
    frame_coupling: float = Field(
        0.01,
        ge=0,
        allow_inf_nan=False,
        description="of neighbouring frames, as in restoring; 0: none",
    )
    model: str = "starter"
    sampler: Literal["ancestral", "ddim", "euler", "heun", "dpm-solver", "churn"] = "heun"
    num_levels: int = Field(40, ge=2, le=1000)
    sigma_max: float = Field(4.0, gt=0, description="the greatest level of the starter's training")
    sigma_min: float = Field(0.02, gt=0)
    rho: float = Field(5.0, gt=0)
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"


class ReviewSettings(Settings):
    """`sashiko review NAME`: shall a registered model become champion?"""

    name: str = Field(description="registered name, such as sashiko-ct")
    candidate: str | None = Field(None, description="version; default: the newest")
    input: Path | None = Field(None, description="clean dataset; default: the demo's items")
    tasks: list[str] = Field(default_factory=list, description="default: the demo's tasks")
    method: str = "covprox"
    output: Path | None = Field(None, description="default: under the home folder")
    answer: Literal["yes", "no"] | None = Field(None, description="default: a person is asked")
    timeout_days: float = Field(3.0, gt=0, description="no answer within this time means no")
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compute: ComputeSettings = Field(default_factory=ComputeSettings)


class NightlySettings(Settings):
    """`sashiko nightly`: restore what is new in the inbox."""

    inbox: Path = Field(description="one folder a job: job.yaml and files, or measurements (Zarr)")
    output: Path
    model: str = Field("champion", description=MODEL)
    settle_s: float = Field(30.0, ge=0, description="a file younger than this is left for later")
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compute: ComputeSettings = Field(default_factory=ComputeSettings)


class ServeSettings(Settings):
    """`sashiko serve`: a server, the flows as forms, and the nightly run."""

    host: str = Field("127.0.0.1", description="loopback: the server asks nobody who they are")
    port: int = Field(4200, ge=1, le=65535)
    cron: str = Field("0 2 * * *", description="when `nightly` runs")
    timezone: str = "UTC"
    inbox: Path | None = Field(None, description="of nightly; default: under the home folder")
    output: Path | None = Field(None, description="of nightly; default: under the home folder")
    model: str = Field("champion", description=MODEL)

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, cron: str) -> str:
        if not re.fullmatch(r"([0-9*A-Z][\w*/,-]*\s+){4}[0-9A-Za-z*][\w*/,#-]*", cron.strip()):
            raise ValueError(f"'{cron}' is no cron line; five fields, such as 0 2 * * *")
        return cron

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, name: str) -> str:
        if name not in available_timezones():
            raise ValueError(f"'{name}' is no time zone of the IANA list, such as Europe/Berlin")
        return name


def config_path(*parts: str) -> Path:
    """Path of a shipped configuration file or folder."""
    return Path(str(files("configs").joinpath(*parts)))


def domain_config(kind: str, name: str) -> Path | None:
    """A YAML file of the shipped ones or, where they have none of its name, of a guest's domain.

    Args:
        kind: "tasks" or "baselines".
        name: of the task.
    """
    shipped = config_path(kind, f"{name}.yaml")
    if shipped.is_file():
        return shipped
    guests = (folder / kind / shipped.name for folder in config_folders())
    return next((path for path in guests if path.is_file()), None)


def task_names() -> list[str]:
    """Names of the shipped tasks, and of those that guests' domains bring along."""
    folders = (config_path("tasks"), *(folder / "tasks" for folder in config_folders()))
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def load_task_file(name: str) -> dict[str, Any]:
    """A task's YAML as it stands: Task fields, and `solver` with the default MethodSettings."""
    path = domain_config("tasks", name)
    if path is None:
        known = ", ".join(task_names())
        raise BadInputError(f"unknown task '{name}': choose one of {known}")
    return dict(yaml.safe_load(path.read_text()))


def load_task(name: str) -> Task:
    """The protocol of a task."""
    values = load_task_file(name)
    values.pop("solver", None)
    return Task(name=name, **values)


def load_method(task: str) -> MethodSettings:
    """The task's default way to restore."""
    return MethodSettings(**load_task_file(task).get("solver", {}))


def demo_tasks() -> dict[str, list[str]]:
    """The demo's tasks by domain, in the order of configs/demo.yaml."""
    names = yaml.safe_load(config_path("demo.yaml").read_text())["tasks"]
    by_domain: dict[str, list[str]] = {}
    for name in names:
        by_domain.setdefault(load_task(name).domain, []).append(name)
    return by_domain


def read_settings(kind: type[S], path: Path, changes: Sequence[str] = ()) -> S:
    """Settings from a YAML file, with changes of the form "a.b=value" (the value as YAML).

    Args:
        kind: of settings.
        path: of the file; a name that is not there is looked for among the shipped ones.
        changes: applied in order.

    Raises:
        BadInputError: if the file or a change cannot be read, or a setting is unknown, missing or
            unusable: it names the file or the change.
    """
    if not path.is_file():
        shipped = config_path(path.name)
        if not shipped.is_file():
            known = ", ".join(sorted(p.name for p in config_path().glob("train-*.yaml")))
            raise BadInputError(f"{path}: there is no such file; shipped are {known}")
        path = shipped
    values = _parse_yaml(path.read_text(), str(path))
    if not isinstance(values, dict):
        raise BadInputError(f"{path}: it must hold `setting: value` lines; see configs/")
    for change in changes:
        _change(values, change)
    try:
        return kind(**values)
    except ValidationError as error:
        mistake = mistake_in(error, kind)
        made = [c for c in changes if f"{mistake.where}.".startswith(f"{c.partition('=')[0]}.")]
        holder = f"--set {made[-1]}" if made else path
        raise BadInputError(f"{holder}: {mistake.sentence}") from error


def _change(values: dict[str, Any], change: str) -> None:
    name, equals, text = change.partition("=")
    *outer, last = name.split(".")
    if not equals or not all([*outer, last]):
        raise BadInputError(f"--set {change}: write it as a.b=value")
    for key in outer:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise BadInputError(f"--set {change}: '{key}' is a value, not a group of settings")
    values[last] = _parse_yaml(text, f"--set {change}")


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise BadInputError(f"{where}: it is not YAML ({reason}); correct it") from error
