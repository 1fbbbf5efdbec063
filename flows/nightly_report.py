"""The report of a night: a JSON file and a page that needs no network, both whole or absent."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domains.files import CODE, CODE_DIGITS
from flows.answers import account_lines
from flows.engine.objects import LocalObjects

if TYPE_CHECKING:
    from flows.api_nightly import JobReport

WAITING = "left for the next run (touched within the last --settle-s seconds)"
"""Said of files that may still be being written."""

_CODED = re.compile(f"{CODE}([0-9a-f]{{{CODE_DIGITS}}})")

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}
body{color:#1c2333}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.25rem .6rem;border-bottom:1px solid #d8dce6}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.bad{color:#9b1c1c}
"""


def write_report(
    folder: Path, when: datetime, jobs: Sequence[JobReport], seconds: float
) -> tuple[Path, Path]:
    """Write the night's report.

    Args:
        folder: of all reports.
        when: names the files.
        jobs: what became of each.
        seconds: wall time of the night.

    Returns:
        (JSON file, page).
    """
    objects = LocalObjects(folder)
    stem = when.strftime("%Y%m%dT%H%M%SZ")
    number = 1
    while objects.exists(f"{stem}.json"):  # two nights in one second: a person at the keyboard
        number += 1
        stem = f"{when.strftime('%Y%m%dT%H%M%SZ')}-{number}"
    night = {"when": when.isoformat("T", "seconds"), "seconds": round(seconds, 1)}
    told = [
        {**asdict(job), "find": finding(job), "account_lines": _account_lines(job)} for job in jobs
    ]
    values = {**night, "jobs": told}
    objects.create(f"{stem}.json", (json.dumps(values, indent=1) + "\n").encode())
    objects.create(f"{stem}.html", page(values).encode())
    return objects.path(f"{stem}.json"), objects.path(f"{stem}.html")


def _account_lines(job: JobReport) -> list[str]:
    return [] if job.account is None else account_lines(job.account)


def finding(job: JobReport) -> str:
    """A command that lists a job's quarantined files by their digests, INBOX being the inbox."""
    codes = [code for bad in job.quarantined for code in _CODED.findall(f"{bad.item} {bad.reason}")]
    wanted = " ".join(f"-e ^{code}" for code in dict.fromkeys(codes))
    return f"find {shlex.quote(f'INBOX/{job.name}')} -type f -exec sha256sum {{}} + | grep {wanted}"


def page(night: dict[str, Any]) -> str:
    """The report as HTML; everything that came from outside is escaped."""
    body = "".join(_job(job) for job in night["jobs"]) or "<p>The inbox was empty.</p>"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Sashiko nightly</title>'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style><h1>Nightly restoration, {escape(night['when'])}</h1>"
        f"<p>{len(night['jobs'])} jobs in {night['seconds']:.0f} s. The residual is the mean "
        "squared misfit to the measurement in units of its noise: 1 if all is well; for exact "
        "data it is the largest misfit. Restored pixels are estimates, not measurements.</p>"
        f"{body}</html>\n"
    )


def _job(job: dict[str, Any]) -> str:
    counts = f"{job['num_known']} done before, {job['num_waiting']} {WAITING}"
    told = f"<p>{escape(job['status'])}; {counts}</p>"
    reason = f'<p class="bad">{escape(job["reason"])}</p>' if job["reason"] else ""
    parts = (_took(job), _restored(job), _quarantined(job))
    return f"<h2>{escape(job['name'])}</h2>{told}{reason}{''.join(parts)}"


def _took(job: dict[str, Any]) -> str:
    """The account of the job; the same lines as at the end of `sashiko restore`."""
    lines = job["account_lines"]
    return f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else ""


def _restored(job: dict[str, Any]) -> str:
    if not job["restored"]:
        return ""
    rows = "".join(
        f"<tr><td>{escape(r['item_id'])}<td>{escape(r['task'])}<td>{escape(r['method'])}"
        f'<td class="n">{_residual(r)}<td class="n">{r["seconds"]:.1f}'
        f"<td>{escape((r['model_digest'] or '')[:12])}"
        for r in job["restored"]
    )
    head = '<tr><th>item<th>task<th>method<th class="n">residual<th class="n">seconds<th>model'
    return f"<table>{head}{rows}</table>"


def _residual(row: dict[str, Any]) -> str:
    if row["residual"] is None:
        return ""
    return f"{row['residual']:.3g}{' (exact data)' if row['exact_data'] else ''}"


def _quarantined(job: dict[str, Any]) -> str:
    if not job["quarantined"]:
        return ""
    rows = "".join(
        f'<tr class="bad"><td>{escape(b["item"])}<td>{escape(b["reason"])}'
        for b in job["quarantined"]
    )
    how = f"<p>Reports hold no names of files: <code>{escape(job['find'])}</code></p>"
    return f"<table><tr><th>quarantined<th>reason{rows}</table>{how}"
