"""The command `sashiko`: options in, one public function called, the answer printed.

Whatever takes time to import is imported inside the commands, so that --help answers at once.
Progress goes to stderr and the answer to stdout. Exit codes: 0 done; 1 the run failed; 2 the
input cannot be used; 3 done, with some items quarantined; 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from flows import quiet
from flows.answers import (
    collected_text,
    models_text,
    plan_text,
    quarantine_text,
    restored_text,
    train_plan_text,
    trained_text,
    verified_text,
)
from flows.cli_options import (
    AnyPlace,
    LocalPath,
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
    numbers,
    options_of,
    prefect_flag,
    seed_option,
)
from flows.console import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    OK,
    QUARANTINED,
    Terminal,
    explain,
    print_json,
    table,
)

if TYPE_CHECKING:
    from flows.api_review import Comparison
    from flows.roots import Root

PATH = LocalPath()
ROOT = AnyPlace()


class _InOrder(click.Group):
    """Lists the commands as they stand in this file: in the order of work."""

    def list_commands(self, _: click.Context) -> list[str]:
        """Names of the commands, in order."""
        return list(self.commands)


@click.group(
    cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="sashiko", message="%(prog)s %(version)s")
def cli() -> None:
    """Restore large sets of damaged or under-measured images with one shared diffusion core.

    \b
    See it work on real data:
        sashiko demo
    Restore photographs with holes (white in the masks is missing):
        sashiko restore --domain city --input PHOTOS --mask MASKS --output OUT
    """  # noqa: D301  # \b is click's mark for lines to leave as they are


@cli.command()
@click.option("--output", type=PATH, default=Path("demo"), show_default=True)
@prefect_flag
@json_flag
def demo(output: Path, prefect: bool, as_json: bool) -> int:
    """See the whole path work on real data, with a report."""
    from flows.demo import demo as run_demo

    with Terminal() as terminal:
        result = run_demo(output, prefect=prefect, on_event=terminal)
    _answer(result, result.summary(), as_json=as_json)
    return _exit_code(result)


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
    _answer(found, table(columns, rows), as_json=as_json)
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

    result = _run("ingest", IngestSettings(**given(options)), prefect=prefect)
    _answer(result, f"dataset: {options['output']}", as_json=as_json)
    return _exit_code(result)


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
    _answer(result, inspected_text(result), as_json=as_json)
    return _exit_code(result)


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

    result = _run("simulate", SimulateSettings(**given(options)), prefect=False)
    _answer(result, f"measurements: {options['output']}", as_json=as_json)
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
        _answer(planned, train_plan_text(planned), as_json=as_json)
        return OK
    if curve is not None:
        from flows.answers import curve_text
        from flows.api_learning_curve import learning_curve

        with Terminal() as terminal:
            found = learning_curve(settings, numbers(curve), draws=draws, on_event=terminal)
        _answer(found, curve_text(found), as_json=as_json)
        return OK
    result = _run("train", settings, prefect=prefect)
    _answer(result, trained_text(result), as_json=as_json)
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
    result = _run("distill", settings, prefect=False)
    _answer(result, trained_text(result), as_json=as_json)
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

    result = _run("calibrate", CalibrateSettings(**given(options)), prefect=False)
    text = f"{result.table()}\nmodel: {result.model_path}  (digest {result.digest[:12]})"
    _answer(result, text, as_json=as_json)
    return OK


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

    result = _run("evaluate", EvaluateSettings(**computing(options)), prefect=prefect)
    click.echo(result.table())
    click.echo(f"rows: {result.json_path}")
    if report is not None:
        from flows.report import write_report

        click.echo(f"report: {write_report(result, report)}")
    return _exit_code(result)


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
    (k-space)
    together with --domain alone. What is restored already is not computed again.
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
        _answer(facts, plan_text(planned, left), as_json=as_json)
        return OK
    result = _run("restore", settings, prefect=prefect)
    _answer(result, restored_text(result), as_json=as_json)
    return _exit_code(result)


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
    result = _run("explain", ExplainSettings(**computing(options)), prefect=False)
    text = f"{result.text()}\npage: {result.page}"
    _answer(result.to_json(), text, as_json=as_json)
    return OK


@cli.command()
@click.argument("output", type=ROOT)
@json_flag
def view(output: Root, as_json: bool) -> int:
    """Print by which command each result opens in napari, 3D Slicer, ITK-SNAP or QGIS."""
    from flows.answers import view_text
    from flows.api_view import view as find

    found = find(output)
    _answer(found, view_text(found), as_json=as_json)
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

    result = _run("generate", GenerateSettings(**given(options)), prefect=False)
    _answer(result, generated_text(result), as_json=as_json)
    return OK


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
    from flows.config import ReviewSettings

    if answer is not None:
        options["answer"] = "yes" if answer else "no"
    settings = ReviewSettings(**computing(options))
    ask = _ask_here if answer is None and sys.stdin.isatty() else None
    if answer is None and ask is None and not (prefect and _has_server()):
        raise click.UsageError(
            "nobody can be asked here: say --yes or --no, or set PREFECT_API_URL"
        )
    result = _run("review", settings, prefect=prefect, ask=ask)
    done = "promoted" if result.promoted else "not promoted"
    text = f"{result.comparison.sentences()}\n{result.decision}: {done}"
    _answer(result, text, as_json=as_json)
    return OK


@cli.command()
@json_flag
def models(as_json: bool) -> int:
    """List the registered models."""
    from flows.registry import models as rows

    found = rows()
    _answer(found, models_text(found), as_json=as_json)
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

    result = _run("nightly", NightlySettings(**computing(options)), prefect=prefect)
    _answer(result, result.summary(), as_json=as_json)
    return _exit_code(result)


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
    _answer({"intact": result.intact, **vars(result)}, verified_text(result), as_json=as_json)
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
    _answer(result, collected_text(result), as_json=as_json)
    return FAILED if any(found.stuck for found in result.outputs.values()) else OK


@cli.group(cls=_InOrder)
def quarantine() -> None:
    """See what was given up, or have it tried again."""


@quarantine.command("list")
@click.argument("output", type=ROOT)
@json_flag
def quarantine_list(output: Root, as_json: bool) -> int:
    """List what was given up: why, when, and after how many runs."""
    from flows.api_upkeep import quarantined

    found = quarantined(output)
    _answer(found, quarantine_text(found), as_json=as_json)
    return OK


@quarantine.command("retry")
@click.argument("output", type=ROOT)
@click.argument("items", nargs=-1)
@json_flag
def quarantine_retry(output: Root, items: Sequence[str], as_json: bool) -> int:
    """Let the next run try ITEMS again (ids, or beginnings of keys); all without any."""
    from flows.api_upkeep import retry_quarantined

    released = retry_quarantined(output, items)
    _answer(released, f"{len(released)} released; the next run tries them again", as_json=as_json)
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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code and raises nothing."""
    quiet.hush()
    _heed_sigterm()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = cli.main(arguments, prog_name="sashiko", standalone_mode=False)
        return code if isinstance(code, int) else OK
    except click.ClickException as error:
        error.show()
        return BAD_INPUT
    except BaseException as error:
        if not _is_interruption(error):
            return explain(error, options_of(cli.commands.get(arguments[0])))
        click.echo("\nsashiko: interrupted; the same command goes on where it stopped", err=True)
        return INTERRUPTED


def _heed_sigterm() -> None:
    """Let SIGTERM (systemd, Kubernetes, timeout) end a command as Ctrl-C does: in order."""
    with suppress(ValueError):  # not the main thread: its signals are not ours
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _is_interruption(error: BaseException) -> bool:
    """Whether Ctrl-C or a signal is behind an error: Ray's waiting turns it into a SystemError."""
    if isinstance(error, KeyboardInterrupt | click.exceptions.Abort | SystemExit):
        return True
    if type(error).__name__ == "TerminationSignal":  # Prefect's, of SIGTERM inside a flow
        return True
    cause = error.__cause__ or error.__context__
    return isinstance(error, SystemError) and cause is not None and _is_interruption(cause)


def _run(command: str, settings: Any, *, prefect: bool, ask: Any = None) -> Any:
    from flows import launch

    with Terminal() as terminal:
        return launch.run(command, settings, prefect=prefect, on_event=terminal, ask=ask)


def _answer(value: Any, text: str, *, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        click.echo(text)


def _exit_code(result: Any) -> int:
    return QUARANTINED if result.quarantined else OK


def _ask_here(comparison: Comparison) -> bool:
    """Put the question to the person at the terminal."""
    click.echo(comparison.sentences(), err=True)
    return click.confirm("Make the candidate the champion?", default=False, err=True)


def _has_server() -> bool:
    """Whether somebody could answer on a server's page."""
    import os

    return bool(os.environ.get("PREFECT_API_URL"))
