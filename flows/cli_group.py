"""The group of all commands, and what they have in common."""

from __future__ import annotations

from typing import Any

import click

from flows.cli_options import (
    AnyPlace,
    LocalPath,
)
from flows.console import OK, QUARANTINED, Terminal, print_json

PATH = LocalPath()
ROOT = AnyPlace()


class InOrder(click.Group):
    """Lists the commands as they are made: in the order of work."""

    def list_commands(self, _: click.Context) -> list[str]:
        """Names of the commands, in order."""
        return list(self.commands)


@click.group(
    cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
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


def run_flow(command: str, settings: Any, *, prefect: bool, ask: Any = None) -> Any:
    """Run what a command stands for, with its progress on stderr."""
    from flows import launch

    with Terminal() as terminal:
        return launch.run(command, settings, prefect=prefect, on_event=terminal, ask=ask)


def tell(value: Any, text: str, *, as_json: bool) -> None:
    """Print the answer of a command: as JSON, or in words."""
    if as_json:
        print_json(value)
    else:
        click.echo(text)


def exit_code_of(result: Any) -> int:
    """Of a command that is done: whether something of it is in quarantine."""
    return QUARANTINED if result.quarantined else OK
