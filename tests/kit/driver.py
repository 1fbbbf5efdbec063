"""A driver in a process of its own: STORE OUTPUT LOG; tells its events as JSON lines on stdout."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import click
from engine_kit import method, tiny_plan

from flows.engine.campaign import run_plan
from flows.engine.executor import InlineExecutor

if __name__ == "__main__":
    store, output, log = sys.argv[1:]
    plan = tiny_plan(Path(store), Path(output), method(log=log))
    run_plan(
        plan,
        InlineExecutor(),
        lambda e: click.echo(json.dumps({"kind": e.kind, "done": e.done})),
    )
