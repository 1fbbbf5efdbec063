"""Commands that make things ready: samples, datasets, measurements, models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from flows.answers import (
    train_plan_text,
    trained_text,
)
from flows.cli_group import PATH, cli, exit_code_of, run_flow, tell
from flows.cli_options import (
    given,
    guide_option,
    json_flag,
    numbers,
    prefect_flag,
    seed_option,
)
from flows.console import OK, Terminal, table


@cli.command()
@click.option("--output", type=PATH, default=Path("demo"), show_default=True)
@prefect_flag
@json_flag
def demo(output: Path, prefect: bool, as_json: bool) -> int:
    """See the whole path work on real data, with a report."""
    from flows.demo import demo as run_demo

    with Terminal() as terminal:
        result = run_demo(output, prefect=prefect, on_event=terminal)
    tell(result, result.summary(), as_json=as_json)
    return exit_code_of(result)


@cli.command()
@click.option("--extra", type=PATH, help="Folder of further files, found by their sha256.")
@click.option("--demo-only", is_flag=True, help="Only what the demo needs.")
@json_flag
def samples(as_json: bool, **options: Any) -> int:
    """Fetch the real sample data (cached, checksummed)."""
    from flows.api_data import samples as fetch
    from flows.config import SamplesSettings

    with Terminal() as terminal:
        found = fetch(SamplesSettings(**options), on_event=terminal)
    columns = ("label", "domain", "split", "licence", "path")
    rows = [[getattr(sample, c) for c in columns] for sample in found]
    tell(found, table(columns, rows), as_json=as_json)
    return OK


@cli.command()
@click.argument("source", type=PATH)
@click.option("--domain", required=True, help="ct, mri, city or a plug-in's name.")
@click.option("--to", "output", type=PATH, required=True, help="The dataset, a new .zarr folder.")
@click.option(
    "--split",
    help="unassigned, train, validation, test, or by-group: about 80% train, 10% validation, 10% "
    "test, drawn by subfolder (patient or scene).  [default: unassigned]",
)
@guide_option
@click.option("--mask", help="What the images lack, to train from the rest; as for restore.")
@prefect_flag
@json_flag
def ingest(prefect: bool, as_json: bool, **options: Any) -> int:
    """Read images into one dataset (Zarr).

    Items are named by keyed hashes, never by file or patient; splits go by patient or scene.
    """
    from flows.config import IngestSettings

    result = run_flow("ingest", IngestSettings(**given(options)), prefect=prefect)
    tell(result, f"dataset: {options['output']}", as_json=as_json)
    return exit_code_of(result)


@cli.command()
@click.argument("source", type=PATH)
@click.option("--domain", help="ct, mri, city or a plug-in's name.  [default: whichever reads it]")
@click.option("--preview", type=PATH, help="Write a PNG: the slices, and what looks damaged.")
@json_flag
def inspect(as_json: bool, **options: Any) -> int:
    """Say what a file, a folder or a store holds, and what looks damaged in it.

    Format, size, spacing, units, bit depth, frames; no data, missing, blank or repeated slices,
    dead lines, saturation. Nothing is changed.
    """
    from flows.answers import inspected_text
    from flows.api_inspect import inspect as look
    from flows.config import InspectSettings

    with Terminal() as terminal:
        result = look(InspectSettings(**given(options)), on_event=terminal)
    tell(result, inspected_text(result), as_json=as_json)
    return exit_code_of(result)


@cli.command()
@click.argument("dataset", type=PATH)
@click.option("--task", "tasks", multiple=True, required=True, help="Several can be given.")
@click.option("--to", "output", type=PATH, required=True, help="New .zarr folder.")
@click.option("--item", "items", multiple=True, help="Only this item; several can be given.")
@seed_option
@json_flag
def simulate(as_json: bool, **options: Any) -> int:
    """Make a task's measurements of a clean dataset."""
    from flows.config import SimulateSettings

    result = run_flow("simulate", SimulateSettings(**given(options)), prefect=False)
    tell(result, f"measurements: {options['output']}", as_json=as_json)
    return OK


@cli.command()
@click.argument("config", type=PATH)
@click.option("--set", "changes", multiple=True, metavar="A.B=C", help="Change a setting.")
@click.option("--plan", "plan_only", is_flag=True, help="Print what it would take, do nothing.")
@click.option("--curve", metavar="N,N,...", help="Would more data help? Train on so many slices.")
@click.option("--draws", default=2, show_default=True, help="Of the slices, for --curve.")
@prefect_flag
@json_flag
def train(
    config: Path,
    changes: Sequence[str],
    plan_only: bool,
    curve: str | None,
    draws: int,
    prefect: bool,
    as_json: bool,
) -> int:
    """Train a model as a configuration file says.

    A run that was killed goes on where it was when the same command is given again.
    """
    from flows.config import TrainSettings, read_settings

    settings = read_settings(TrainSettings, config, changes)
    if plan_only:
        from flows.training.plan import plan_training

        planned = plan_training(settings)
        tell(planned, train_plan_text(planned), as_json=as_json)
        return OK
    if curve is not None:
        from flows.answers import curve_text
        from flows.api_learning_curve import learning_curve

        with Terminal() as terminal:
            found = learning_curve(settings, numbers(curve), draws=draws, on_event=terminal)
        tell(found, curve_text(found), as_json=as_json)
        return OK
    result = run_flow("train", settings, prefect=prefect)
    tell(result, trained_text(result), as_json=as_json)
    return OK


@cli.command()
@click.argument("config", type=PATH)
@click.option("--set", "changes", multiple=True, metavar="A.B=C", help="Change a setting.")
@json_flag
def distill(config: Path, changes: Sequence[str], as_json: bool) -> int:
    """Distil a model into one that restores in one to four evaluations.

    A run that was killed goes on where it was when the same command is given again.
    """
    from flows.config import DistillSettings, read_settings

    settings = read_settings(DistillSettings, config, changes)
    result = run_flow("distill", settings, prefect=False)
    tell(result, trained_text(result), as_json=as_json)
    return OK


@cli.command()
@click.argument("model")
@click.option("--data", type=PATH, required=True, help="Dataset that holds validation images.")
@click.option("--task", "tasks", multiple=True, required=True, help="Several can be given.")
@click.option("--mode", "modes", multiple=True, help="mean or sample.  [default: both]")
@click.option("--parts", type=PATH, help="YAML of the images.  [default: the validation items]")
@click.option("--output", type=PATH, help="[default: the model's own directory]")
@click.option("--again", is_flag=True, help="Fit anew what the model holds already.")
@json_flag
def calibrate(as_json: bool, **options: Any) -> int:
    """Fit the solver's settings on validation images, and keep them with the model.

    A run that was stopped goes on where it was when the same command is given again.
    """
    from flows.config import CalibrateSettings

    result = run_flow("calibrate", CalibrateSettings(**given(options)), prefect=False)
    text = f"{result.table()}\nmodel: {result.model_path}  (digest {result.digest[:12]})"
    tell(result, text, as_json=as_json)
    return OK
