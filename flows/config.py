"""The typed configuration: what every command takes, and how configs/*.yaml fill it in.

    config_base.py       homes, methods, workers
    config_training.py   training
    config_files.py      reading YAML

Heavy imports are kept out: the command line imports this module before it knows what to do.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from zoneinfo import available_timezones

from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from flows.config_base import (
    ALONG_Z,
    DISTILLED_STARTER,
    GUIDES,
    MAX_SCALE,
    MODEL,
    SHIPPED,
    STARTER,
    ComputeSettings,
    GuideName,
    Home,
    MethodSettings,
    Settings,
    gpus_here,
)
from flows.config_files import (
    config_path,
    demo_tasks,
    domain_config,
    load_method,
    load_task,
    load_task_file,
    read_settings,
    task_names,
)
from flows.config_training import (
    NAME,
    CorruptionSettings,
    DistillSettings,
    FewSettings,
    OperatorSettings,
    ScoreSettings,
    StopSettings,
    TrainSettings,
)
from flows.roots import Root, parse_root

__all__ = [
    "DISTILLED_STARTER",
    "MAX_SCALE",
    "MODEL",
    "NAME",
    "SHIPPED",
    "STARTER",
    "AnyRoot",
    "CalibrateSettings",
    "ComputeSettings",
    "CorruptionSettings",
    "DistillSettings",
    "EvaluateSettings",
    "ExplainSettings",
    "FewSettings",
    "GenerateSettings",
    "Home",
    "IngestSettings",
    "InspectSettings",
    "MethodSettings",
    "NightlySettings",
    "OperatorSettings",
    "RestoreSettings",
    "ReviewSettings",
    "SamplesSettings",
    "ScoreSettings",
    "ServeSettings",
    "Settings",
    "SimulateSettings",
    "StopSettings",
    "TrainSettings",
    "config_path",
    "demo_tasks",
    "domain_config",
    "gpus_here",
    "load_method",
    "load_task",
    "load_task_file",
    "read_settings",
    "task_names",
]


class SamplesSettings(Settings):
    """`sashiko samples`: fetch the real sample data."""

    extra: Path | None = Field(None, description="folder of further files, found by their sha256")
    demo_only: bool = Field(False, description="only what the demo needs")


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
    modes: list[Literal["mean", "sample"]] = Field(["mean", "sample"])
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
