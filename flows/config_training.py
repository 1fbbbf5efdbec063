"""The settings of `sashiko train` and `sashiko distill`: data, network, recipe, scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from flows.config_base import (
    STARTER,
    ComputeSettings,
    GuideName,
    Settings,
)

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
    filled_by: Path | None = Field(
        None,
        description="model of an earlier part (a directory, or starter) or classical method whose "
        "restorations stand for what was not measured: then all pixels are learned from, and none "
        "more is hidden; of k-space, sinograms and other measurements it makes the images",
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
        None, description="of stores of measurements in `data`: what the images lack"
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

    @property
    def hidden_share(self) -> float | None:
        """Of measured pixels, what the network is not shown; None if it sees whole images."""
        if self.corruption is None or self.corruption.filled_by is not None:
            return None
        return self.corruption.further

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
