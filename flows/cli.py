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
from typing import NoReturn

import click

from flows import cli_data, cli_restore, cli_rounds, quiet  # their commands
from flows.cli_group import cli
from flows.cli_options import options_of
from flows.console import BAD_INPUT, INTERRUPTED, OK, explain

__all__ = ["cli", "main", "run"]

COMMANDS = (cli_data, cli_restore, cli_rounds)
"""Modules of the commands, in the order of work: imported, they have joined the group."""


RESUMING = {"demo", "train", "distill", "calibrate", "evaluate", "restore", "nightly"}
"""Commands that take up what an interrupted run has done; the others begin anew."""


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
        then = "; the same command goes on where it stopped" * (
            next(iter(arguments), "") in RESUMING
        )
        click.echo(f"\nsashiko: interrupted{then}", err=True)
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


if __name__ == "__main__":
    main()
