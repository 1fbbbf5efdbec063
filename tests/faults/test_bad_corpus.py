"""Fault 12 at large: hundreds of mutated files through ingest and restore, in a bounded process."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bad_files import ORIGINALS, BadFile, corpus, dicom_mr

from domains.registry import load_domain

MOST_CPU_S = 120
MOST_MEMORY_BYTES = 1 << 30
"""Resident, torch and all: images here have a few thousand pixels, bombs promise gigabytes."""

NAMES = ("CompressedSamples", "1CT1", "4MR1")
"""Of the patients in pydicom's files."""

CODE = """
import contextlib, io, json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]),) * 2)
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[3]),) * 2)
from flows import cli
from flows.engine.memory import peak_bytes  # not getrusage's: that begins as the parent's
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.run(line)
    answer = json.loads(out.getvalue())
    print(json.dumps({"code": code, "answer": answer, "peak": peak_bytes()}))
"""


def kinds_of(domain: str) -> tuple[str, ...]:
    suffixes = load_domain(domain).suffixes
    return tuple(kind for kind in ORIGINALS if kind in suffixes)


def files_of(domain: str) -> list[BadFile]:
    """The bad files of a domain; raw measurements are restored and cannot be ingested."""
    return list(corpus(kinds_of(domain), seed=len(domain), of_mr=domain == "mri"))


def good_files_of(domain: str) -> list[BadFile]:
    """The originals that the bad files were made of."""
    made = {**ORIGINALS, ".dcm": dicom_mr} if domain == "mri" else ORIGINALS
    return [BadFile(f"good{kind}", made[kind]()) for kind in kinds_of(domain)]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, bad files by domain, answers of ingest by domain and of restore, stderr)."""
    root = tmp_path_factory.mktemp("corpus")
    bad = {domain: files_of(domain) for domain in ("ct", "mri", "city")}
    lines = []
    for domain, found in bad.items():
        folder = root / "in" / domain
        folder.mkdir(parents=True)
        for file in [*found, *good_files_of(domain)]:
            # DICOM files of one folder are one series, which the worst of them would spoil.
            place = folder / file.name if ".dcm" in file.name else folder
            place.mkdir(exist_ok=True)
            (place / file.name).write_bytes(file.data)
        here = ["--domain", domain, "--json", "--no-prefect"]
        lines.append(["ingest", str(folder), "--to", str(root / f"{domain}.zarr"), *here])
    photographs = ["--input", str(root / "in" / "city"), "--output", str(root / "city-out")]
    how = ["--method", "nlm", "--sigma-y", "0.1", "--executor", "inline"]
    lines.append(["restore", *photographs, *how, *here])
    before = contents(root / "in")
    env = {**os.environ, "SASHIKO_HOME": str(root / "home"), "SASHIKO_CACHE": str(root / "cache")}
    bounds = [str(MOST_CPU_S), str(4 * MOST_MEMORY_BYTES)]
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(lines), *bounds],
        env=env, cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert contents(root / "in") == before, "a source was changed, or something written beside it"
    return root, bad, answers, done.stderr


def test_there_are_hundreds_of_bad_files(run):
    assert sum(len(found) for found in run[1].values()) >= 200


def test_every_file_becomes_an_item_or_is_quarantined_and_the_good_ones_are_there(run):
    root, bad, answers, _ = run
    for (domain, found), answer in zip(bad.items(), answers, strict=False):
        assert answer["code"] == 3, domain
        refused = {Path(q["path"]).name for q in answer["answer"]["quarantined"]}
        assert {f.name for f in found if f.hopeless} <= refused, domain
        raw = load_domain(domain).raw_suffixes
        images = [f"good{kind}" for kind in kinds_of(domain) if kind not in raw]
        assert not refused & set(images), domain
        num_files = sum(path.is_file() for path in (root / "in" / domain).rglob("*"))
        assert len(answer["answer"]["items"]) + len(refused) == num_files, domain


def test_reasons_are_sentences_for_people_and_name_no_patient(run):
    _, _, answers, stderr = run
    reasons = [q["reason"] for answer in answers for q in answer["answer"]["quarantined"]]
    assert len(reasons) > 150
    for reason in reasons:
        assert 4 <= len(reason.split()) <= 60, reason
        assert not re.search(r"Error|Exception|Traceback|0x|\n|<class|None\b", reason), reason
        assert ";" in reason, f"no next step: {reason}"
    told = stderr + json.dumps(answers)
    assert not [name for name in NAMES if name in told]


def test_no_bomb_fills_memory(run):
    assert max(answer["peak"] for answer in run[2]) < MOST_MEMORY_BYTES


def test_nothing_is_written_outside_the_outputs(run):
    root = run[0]
    places = {path.name for path in root.iterdir()} - {"home", "cache"}
    assert places == {"in", "ct.zarr", "mri.zarr", "city.zarr", "city-out"}


def test_good_photographs_are_restored_beside_the_bad_ones(run):
    root, bad, answers, _ = run
    assert answers[3]["code"] == 3
    written = [
        path for path in (root / "city-out" / "files").glob("good*") if path.suffix != ".json"
    ]
    suffixes = sorted(path.suffix for path in written)
    assert suffixes == [".avi", ".png", ".png", ".tif"]  # PNG of .jpg too
    assert len(answers[3]["answer"]["quarantined"]) >= sum(f.hopeless for f in bad["city"])
