"""Commands of every day: review and models, nightly, upkeep, tuning, serve."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.answers import (
    collected_text,
    models_text,
    quarantine_text,
    verified_text,
)
from flows.cli_group import PATH, ROOT, InOrder, cli, exit_code_of, run_flow, tell
from flows.cli_options import (
    compute_options,
    computing,
    given,
    json_flag,
    model_option,
    prefect_flag,
)
from flows.console import FAILED, OK, Terminal

if TYPE_CHECKING:
    from flows.api_review import Comparison
    from flows.roots import Root


@cli.command()
@click.argument("name")
@click.option("--candidate", help="Version.  [default: the newest]")
@click.option("--input", type=PATH, help="Clean dataset.  [default: the demo's items]")
@click.option("--task", "tasks", multiple=True, help="[default: the demo's]")
@click.option("--yes/--no", "answer", default=None, help="Answer at once.")
@click.option("--timeout-days", type=float, help="No answer by then means no.  [default: 3]")
@compute_options
@prefect_flag
@json_flag
def review(answer: bool | None, prefect: bool, as_json: bool, **options: Any) -> int:
    """Compare a candidate with the champion; promote on a yes."""
    from flows.checks import check
    from flows.config import ReviewSettings

    if answer is not None:
        options["answer"] = "yes" if answer else "no"
    settings = ReviewSettings(**computing(options))
    check(settings)  # what is not there is told before somebody is looked for who answers
    ask = _ask_here if answer is None and sys.stdin.isatty() else None
    if answer is None and ask is None and not (prefect and _has_server()):
        raise click.UsageError(
            "nobody can be asked here: say --yes or --no, or set PREFECT_API_URL"
        )
    result = run_flow("review", settings, prefect=prefect, ask=ask)
    done = "promoted" if result.promoted else "not promoted"
    text = f"{result.comparison.sentences()}\n{result.decision}: {done}"
    tell(result, text, as_json=as_json)
    return OK


@cli.command()
@json_flag
def models(as_json: bool) -> int:
    """List the registered models."""
    from flows.registry import models as rows

    found = rows()
    tell(found, models_text(found), as_json=as_json)
    return OK


@cli.command()
@click.argument("name")
@click.argument("version")
def promote(name: str, version: str) -> int:
    """Make a version the champion of its name."""
    from flows.registry import promote as crown

    crown(name, version)
    click.echo(f"{name}: version {version} is champion")
    return OK


@cli.command()
@click.argument("name")
def rollback(name: str) -> int:
    """Bring the former champion of a name back."""
    from flows.registry import rollback as go_back

    click.echo(f"{name}: version {go_back(name)} is champion again")
    return OK


@cli.command()
@click.option("--inbox", type=PATH, required=True, help="Folder of job folders (job.yaml, files).")
@click.option("--output", type=PATH, required=True)
@click.option("--settle-s", type=float, help="Leave files younger than this.  [default: 30]")
@model_option
@compute_options
@prefect_flag
@json_flag
def nightly(prefect: bool, as_json: bool, **options: Any) -> int:
    """Restore what is new in an inbox, and report."""
    from flows.config import NightlySettings

    result = run_flow("nightly", NightlySettings(**computing(options)), prefect=prefect)
    tell(result, result.summary(), as_json=as_json)
    return exit_code_of(result)


@cli.command()
@click.argument("output", type=ROOT)
@click.option("--set-aside", "hide_damaged", is_flag=True, help="Hide damaged items from readers.")
@json_flag
def verify(output: Root, hide_damaged: bool, as_json: bool) -> int:
    """Hash everything in an output (or a store) again, and name what is damaged.

    Nothing is changed, unless --set-aside is given: then the command that restored the damaged
    items, given again, restores them anew. The exit code is 1 if something is damaged.
    """
    from flows.api_upkeep import verify as look

    with Terminal() as terminal:
        result = look(output, hide_damaged=hide_damaged, on_event=terminal)
    tell({"intact": result.intact, **vars(result)}, verified_text(result), as_json=as_json)
    return OK if result.intact else FAILED


@cli.command()
@click.argument("output", type=ROOT)
@click.option("--dry-run", is_flag=True, help="Show what would be removed, remove nothing.")
@click.option(
    "--older-than",
    "hours",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    help="Hours; what is younger stays.",
)
@json_flag
def gc(output: Root, dry_run: bool, hours: float, as_json: bool) -> int:
    """Remove from an output what nobody can need.

    That is what killed and overtaken runs left, and what was set aside as corrupt. Blocks that an
    unfinished run can go on from stay, and so does all that runs under way have made.
    """
    from flows.api_upkeep import gc as collect

    with Terminal() as terminal:
        result = collect(output, dry_run=dry_run, min_age_s=3600 * hours, on_event=terminal)
    tell(result, collected_text(result), as_json=as_json)
    return FAILED if any(found.stuck for found in result.outputs.values()) else OK


@cli.group(cls=InOrder)
def quarantine() -> None:
    """See what was given up, or have it tried again."""


@quarantine.command("list")
@click.argument("output", type=ROOT)
@json_flag
def quarantine_list(output: Root, as_json: bool) -> int:
    """List what was given up: why, when, and after how many runs."""
    from flows.api_upkeep import quarantined

    found = quarantined(output)
    tell(found, quarantine_text(found), as_json=as_json)
    return OK


@quarantine.command("retry")
@click.argument("output", type=ROOT)
@click.argument("items", nargs=-1)
@json_flag
def quarantine_retry(output: Root, items: Sequence[str], as_json: bool) -> int:
    """Let the next run try ITEMS again (ids, or beginnings of keys); all without any."""
    from flows.api_upkeep import retry_quarantined

    released = retry_quarantined(output, items)
    tell(released, f"{len(released)} released; the next run tries them again", as_json=as_json)
    return OK


@cli.command("tune-baselines")
@click.option("--task", "names", multiple=True, required=True, help="Several can be given.")
@click.option("--data", type=PATH, required=True, help="Dataset that holds the samples.")
@click.option("--method", "methods", multiple=True, help="Only this method.")
def tune_baselines(names: Sequence[str], data: Path, methods: Sequence[str]) -> int:
    """Tune classical methods on validation items, and freeze."""
    from flows.config import load_task
    from flows.store import Dataset
    from flows.tune import freeze, frozen_path, tune

    dataset = Dataset(data)
    for task in map(load_task, names):
        say = Terminal().say
        freeze(task, tune(task, dataset, methods or None, say), frozen_path(task.name))
    return OK


@cli.command()
@click.option("--host", help="[default: 127.0.0.1]")
@click.option("--port", type=int, help="[default: 4200]")
@click.option("--cron", help="When nightly runs.  [default: 0 2 * * *]")
@click.option("--timezone", help="Of the schedule.  [default: UTC]")
@click.option("--inbox", type=PATH, help="Of nightly.")
@click.option("--output", type=PATH, help="Of nightly.")
def serve(**options: Any) -> int:
    """Run a server with the flows as forms, nightly by cron.

    With PREFECT_API_URL the flows are registered on that Prefect server instead.
    """
    from flows.config import ServeSettings
    from flows.serve import serve as run_server

    run_server(ServeSettings(**given(options)), say=lambda line: click.echo(line, err=True))
    return OK


def _ask_here(comparison: Comparison) -> bool:
    """Put the question to the person at the terminal."""
    click.echo(comparison.sentences(), err=True)
    return click.confirm("Make the candidate the champion?", default=False, err=True)


def _has_server() -> bool:
    """Whether somebody could answer on a server's page."""
    import os

    return bool(os.environ.get("PREFECT_API_URL"))
