"""Options that several commands share, and what was given of them as settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from flows.roots import Root


class LocalPath(click.Path):
    """A path of this machine; a URL is refused, which would be a folder of that name."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path of what was typed."""
        from flows.roots import require_local

        return super().convert(require_local(value), param, ctx)


class AnyPlace(click.ParamType):  # type: ignore[type-arg]  # generic only in newer clicks
    """A path of this machine, or s3://BUCKET/PREFIX."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Root:
        """The root of what was typed."""
        from flows.roots import parse_root

        del param, ctx
        return parse_root(value)


F = TypeVar("F", bound=Callable[..., Any])

json_flag = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
prefect_flag = click.option(
    "--prefect/--no-prefect", default=True, help="Run as a Prefect flow, or call directly."
)
model_option = click.option(
    "--model",
    help="champion, starter, starter-distilled, a directory or models:/NAME@ALIAS.  "
    "[default: champion of the domain, the starter while it has none]",
)
along_z_option = click.option(
    "--along-z/--no-along-z",
    default=None,
    help="Restore slices or frames jointly, or each by itself.  [default: jointly in clips]",
)
seed_option = click.option("--seed", type=int, help="Of all noise.  [default: 0]")


def compute_options(command: F) -> F:
    """Options of every command that computes with a model."""
    dtype = click.Choice(["bfloat16", "float32"])
    executor = click.Choice(["ray", "inline"])
    for option in (
        seed_option,
        click.option("--ray-address", help="Of a running Ray cluster.  [default: Ray is started]"),
        click.option(
            "--memory-limit-gb",
            type=float,
            help="Refuse plans beyond this, all workers together.",
        ),
        click.option(
            "--gpus-per-worker",
            "num_gpus_per_worker",
            type=float,
            help="May be a fraction.  [default: 1 where torch sees a GPU, else 0]",
        ),
        click.option("--workers", "num_workers", type=int, help="[default: one a core or GPU]"),
        click.option("--executor", type=executor, help="[default: ray]"),
        click.option("--dtype", type=dtype, help="Of the network.  [default: bfloat16]"),
    ):
        command = option(command)
    return command


input_option = click.option(
    "--input",
    type=AnyPlace(),
    required=True,
    help="Measurements (or s3://...), or a folder of images.",
)


def damage_options(command: F) -> F:
    """Options that say what is wrong with images, and how they are restored."""
    for option in (
        click.option(
            "--levels",
            "num_levels",
            type=int,
            help="Evaluations of the network.  [default: the task's own]",
        ),
        click.option("--method", help="Solver or classical method.  [default: the task's own]"),
        click.option(
            "--exposure",
            type=float,
            help="Of low light: share of the light that it should have.  [default: estimated]",
        ),
        click.option("--damage", help="What spoilt them as a whole: jpeg, haze or low-light."),
        click.option(
            "--no-large-holes",
            "no_large_holes",
            is_flag=True,
            help="Fill holes wider than 100 pixels as the others, not from coarse to fine.",
        ),
        click.option("--noise", help="gaussian, or rician (MRI magnitudes).  [default: gaussian]"),
        click.option(
            "--sigma-y", type=float, help="Noise std of the images on [-1, 1].  [default: 0]"
        ),
        click.option("--scale", type=int, help="Times larger to make the images, 2 to 16."),
        click.option("--scale-z", type=int, help="Thinner slices to make of each, 2 to 16."),
        click.option("--kernel", type=LocalPath(), help="Blur kernel, an image or .npy."),
        click.option(
            "--mask",
            help="Masks (white = missing), boxes (.csv, .json, .geojson), nodata (as the file "
            "says; 0 in a GeoTIFF that names no value), auto, slices, slices:7,9 or moved.",
        ),
        guide_option,
        click.option("--domain", help="Needed for a folder: ct, mri, city."),
    ):
        command = option(command)
    return command


class NamedPath(click.ParamType):  # type: ignore[type-arg]  # generic only in newer clicks
    """NAME=PATH, a path of this machine."""

    name = "name=path"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        """Name and path of what was typed."""
        name, sign, path = str(value).partition("=")
        if not (name and sign and path):
            self.fail(f"'{value}' is not NAME=PATH, such as t1=SCANS/T1", param, ctx)
        return name, Path(LocalPath().convert(path, param, ctx))


guide_option = click.option(
    "--guide",
    "guides",
    type=NamedPath(),
    multiple=True,
    help="NAME=FILE|FOLDER: another image of the same thing on its grid, such as t1=T1DIR, for a "
    "model that learned with it; several can be given.",
)


def numbers(text: str) -> list[int]:
    """Whole numbers of "2,4,8".

    Raises:
        click.BadParameter: if it is something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"'{text}' is no list of whole numbers such as 2,4,8") from error


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the user gave: the settings know the defaults of the others."""
    told = {k: v for k, v in options.items() if v is not None and v != ()}
    if "guides" in told:
        told["guides"] = dict(told["guides"])
    return {k: list(v) if isinstance(v, tuple) else v for k, v in told.items()}


def computing(options: Mapping[str, Any]) -> dict[str, Any]:
    """As `given`, with the options of `compute` in their place."""
    told = given(options)
    names = ("executor", "num_workers", "num_gpus_per_worker", "ray_address")
    compute = {name: told.pop(name) for name in names if name in told}
    if "memory_limit_gb" in told:
        compute["memory_limit_bytes"] = int(told.pop("memory_limit_gb") * 1e9)
    return {**told, "compute": compute} if compute else told


def options_of(command: click.Command | None) -> dict[str, str]:
    """Setting -> the option that sets it."""
    options = [] if command is None else [p for p in command.params if isinstance(p, click.Option)]
    named = {str(option.name): option.opts[0] for option in options}
    if "memory_limit_gb" in named:
        named["memory_limit_bytes"] = named["memory_limit_gb"]
    return named


def method_of(options: dict[str, Any]) -> dict[str, Any] | None:
    """Settings of the method, taken out of a command's options; None leaves it to the task."""
    told = given({"name": options.pop("method"), "num_levels": options.pop("num_levels")})
    if options.pop("no_large_holes"):
        told["options"] = {"large_holes": False}
    if not told:
        return None
    from flows.config import MethodSettings

    return MethodSettings(**told).model_dump(exclude_unset=True)  # the rest is the task's
