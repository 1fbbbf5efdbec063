"""Commands that restore, and show it: evaluate, restore, explain, view, generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.answers import (
    plan_text,
    restored_text,
)
from flows.cli_group import PATH, ROOT, cli, exit_code_of, run_flow, tell
from flows.cli_options import (
    along_z_option,
    compute_options,
    computing,
    damage_options,
    given,
    guide_option,
    input_option,
    json_flag,
    method_of,
    model_option,
    prefect_flag,
    seed_option,
)
from flows.console import OK

if TYPE_CHECKING:
    from flows.roots import Root


@cli.command()
@click.option("--input", type=PATH, required=True, help="A dataset, or a folder of clean images.")
@click.option("--task", "tasks", multiple=True, required=True, help="Several can be given.")
@click.option("--domain", help="Of the images in a folder.  [default: the tasks' own]")
@guide_option
@click.option("--method", "methods", multiple=True, help="[default: all that the task names]")
@click.option("--evals", "num_levels", type=int, help="Evaluations a solver.  [default: its own]")
@click.option("--item", "items", multiple=True, help="Only this item; several can be given.")
@click.option("--num-samples", type=int, help="Posterior samples an image, for V/B.  [default: 0]")
@click.option(
    "--explain", type=int, help="Explain the first items' restorations, N a task.  [default: 0]"
)
@click.option("--output", type=PATH, default=Path("evaluation"), show_default=True)
@click.option("--json", "json_path", type=PATH, help="Where the rows go as JSON.")
@click.option("--report", type=PATH, help="Write a page with pictures into this folder.")
@along_z_option
@model_option
@compute_options
@prefect_flag
def evaluate(prefect: bool, report: Path | None, **options: Any) -> int:
    """Compare our solvers and classical methods on a task.

    Clean images are damaged as the task says, restored by every method, and measured.
    """
    from flows.config import EvaluateSettings

    result = run_flow("evaluate", EvaluateSettings(**computing(options)), prefect=prefect)
    click.echo(result.table())
    click.echo(f"rows: {result.json_path}")
    if report is not None:
        from flows.report import write_report

        click.echo(f"report: {write_report(result, report)}")
    return exit_code_of(result)


@cli.command()
@input_option
@click.option("--output", type=ROOT, required=True, help="A folder, or s3://BUCKET/PREFIX.")
@damage_options
@along_z_option
@click.option("--plan", "plan_only", is_flag=True, help="Print what would be done, do nothing.")
@model_option
@compute_options
@prefect_flag
@json_flag
def restore(prefect: bool, as_json: bool, plan_only: bool, **options: Any) -> int:
    """Restore measurements or damaged images.

    The input is a store of measurements, or a folder of damaged images together with --domain
    and one of --mask, --kernel, --scale, --scale-z, --sigma-y or --damage, or of raw measurements
    (k-space) together with --domain alone. What is restored already is not computed again.
    """
    from flows.config import RestoreSettings

    options["method"] = method_of(options)
    settings = RestoreSettings(**computing(options))
    if plan_only:
        from flows.api_restore import plan
        from flows.engine.forecast import foretell

        planned = plan(settings)
        left = foretell(planned)
        facts = {**planned.to_json(), "left": left} if as_json else None
        tell(facts, plan_text(planned, left), as_json=as_json)
        return OK
    result = run_flow("restore", settings, prefect=prefect)
    tell(result, restored_text(result), as_json=as_json)
    return exit_code_of(result)


@cli.command("explain")
@input_option
@click.option("--output", type=PATH, required=True, help="Folder of the page and explain.json.")
@damage_options
@click.option("--item", "items", multiple=True, help="Only this item; several can be given.")
@click.option("--num", type=int, help="Items, where none is named.  [default: 1]")
@click.option(
    "--slice",
    "slices",
    type=int,
    multiple=True,
    help="Slice or frame, from 0; several can be given.  [default: the middle one]",
)
@click.option("--seeds", "num_seeds", type=int, help="Restorations compared.  [default: 4]")
@model_option
@compute_options
@json_flag
def explain_command(as_json: bool, **options: Any) -> int:
    """Show how restorations came about: level by level, what the prior invented, how steady.

    The input is that of restore. A slice is restored anew in this process, as often as there are
    seeds, and twice more from data a little changed.
    """
    from flows.config import ExplainSettings

    options["method"] = method_of(options)
    result = run_flow("explain", ExplainSettings(**computing(options)), prefect=False)
    text = f"{result.text()}\npage: {result.page}"
    tell(result.to_json(), text, as_json=as_json)
    return OK


@cli.command()
@click.argument("output", type=ROOT)
@json_flag
def view(output: Root, as_json: bool) -> int:
    """Print by which command each result opens in napari, 3D Slicer, ITK-SNAP or QGIS."""
    from flows.answers import view_text
    from flows.api_view import view as find

    found = find(output)
    tell(found, view_text(found), as_json=as_json)
    return OK


@cli.command()
@click.option("--domain", required=True, help="ct, mri, city or a plug-in's name.")
@click.option("--output", type=PATH, required=True, help="A new folder.")
@click.option("--condition", help="Of the network, such as city-grey.  [default: domain's first]")
@click.option("--num", type=int, help="Images.  [default: 4]")
@click.option("--size", type=int, help="Side in pixels.  [default: 256]")
@click.option("--frames", type=int, help="Of clips, whose frames hang together.  [default: 1]")
@click.option("--sampler", help="ancestral, ddim, euler, heun, dpm-solver, churn.  [default: heun]")
@click.option("--levels", "num_levels", type=int, help="Noise levels.  [default: 40]")
@model_option
@seed_option
@json_flag
def generate(as_json: bool, **options: Any) -> int:
    """Draw images from a model, measured from nothing."""
    from flows.api_generate import generated_text
    from flows.config import GenerateSettings

    result = run_flow("generate", GenerateSettings(**given(options)), prefect=False)
    tell(result, generated_text(result), as_json=as_json)
    return OK
