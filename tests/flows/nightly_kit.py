"""What tests of the nightly run share: a night, the fates in its ledger, its command."""

import json
import subprocess
from html import escape
from pathlib import Path

from evaluation_kit import INLINE

from flows.api_nightly import NightlyResult, nightly
from flows.config import NightlySettings


def run(inbox: Path, model: Path | str, **changes) -> NightlyResult:
    """One night, into the folder `out` beside the inbox."""
    given = {"settle_s": 0, "dtype": "float32", "compute": INLINE, "model": str(model)}
    settings = NightlySettings(inbox=inbox, output=inbox.parent / "out", **{**given, **changes})
    return nightly(settings)


def fates(inbox: Path) -> list[str]:
    """What the ledger says became of each content, sorted."""
    notes = (inbox.parent / "out/nightly/seen").glob("*.json")
    return sorted(json.loads(note.read_text())["fate"] for note in notes)


def found_by_command(result: NightlyResult, inbox: Path) -> set[Path]:
    """The files that the report's command finds, run as it stands there."""
    (command,) = [x for x in result.summary().splitlines() if "find it with: " in x]
    command = command.split("find it with: ")[1]
    assert escape(command) in result.page.read_text()
    command = command.replace("INBOX", str(inbox))
    found = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    return {Path(line.split(maxsplit=1)[1]) for line in found.stdout.splitlines()}
