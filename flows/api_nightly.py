"""`sashiko nightly`: restore what is new in an inbox, measure what can be, and report.

    INBOX/JOB/job.yaml         domain: city, and one of mask: FOLDER, kernel: FILE, scale: 4
    INBOX/JOB/*                damaged images
    INBOX/JOB.zarr             measurements; no job.yaml needed
    OUTPUT/JOB/                what `sashiko restore` makes of them
    OUTPUT/nightly/seen/       the ledger: one note a file, by digest of content and instructions
    OUTPUT/nightly/TIME.json   the report of a night, and TIME.html: the same as a page

The inbox is only read. A file is new if its content has not been taken under the same
instructions: it does not matter which nights were missed, or which model did it. A file that is
still being written is left for the next night. What cannot be used is quarantined with a reason,
once; remove its note to have it tried again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from diffusion_core.model import BadModelError
from domains.base import BadInputError
from domains.files import file_digest
from flows.config import NightlySettings, RestoreSettings, Settings, read_settings
from flows.engine.events import Event, EventHandler, ignore
from flows.engine.objects import LocalObjects
from flows.nightly_report import write_report
from flows.registry import MODEL_NAMES

if TYPE_CHECKING:
    from flows.api_restore import RestoreResult
    from flows.engine.restored import RestoredEntry

JOB_FILE = "job.yaml"
Status = Literal["restored", "nothing new", "quarantined", "failed"]


class NightlyError(RuntimeError):
    """Some job failed for no fault of its input; the others are done and reported."""


class JobSettings(Settings):
    """job.yaml: how the images of its folder are damaged."""

    domain: str
    mask: str | None = None
    kernel: Path | None = None
    scale: int | None = None
    sigma_y: float = 0.0


@dataclass(frozen=True)
class Figures:
    """One item restored this night, and what can be said of it without a truth.

    `residual` is the mean squared misfit to the measurement in units of its noise, 1 if all is
    well; where `exact_data`, the largest misfit.
    """

    item_id: str
    task: str
    method: str
    residual: float | None
    exact_data: bool
    seconds: float
    model_digest: str | None


@dataclass(frozen=True)
class Bad:
    """An input that could not be used; `item` is a code, for names of files may tell of people."""

    item: str
    reason: str


@dataclass(frozen=True)
class JobReport:
    """One job of one night."""

    name: str
    status: Status
    restored: tuple[Figures, ...] = ()
    quarantined: tuple[Bad, ...] = ()
    num_known: int = 0
    num_waiting: int = 0
    reason: str = ""


@dataclass(frozen=True)
class NightlyResult:
    """One night."""

    jobs: tuple[JobReport, ...]
    report: Path
    page: Path
    seconds: float

    @property
    def quarantined(self) -> list[Bad]:
        """Every input of the night that could not be used; a whole job counts as one."""
        bad = [entry for job in self.jobs for entry in job.quarantined]
        return bad + [Bad(j.name, j.reason) for j in self.jobs if j.status == "quarantined"]

    def summary(self) -> str:
        """The night in a few lines."""
        lines = [f"{job.name}: {_told(job)}" for job in self.jobs] or ["the inbox is empty"]
        return "\n".join([*lines, f"report: {self.page}"])


def nightly(settings: NightlySettings, on_event: EventHandler | None = None) -> NightlyResult:
    """Restore what is new in the inbox, job after job, and report.

    Args:
        settings: inbox, output, model.
        on_event: told of progress.

    Raises:
        BadInputError: if there is no inbox.
        NightlyError: if a job failed for no fault of its input; the report is written all the same.
    """
    start = time.monotonic()
    if not settings.inbox.is_dir():
        raise BadInputError(f"{settings.inbox}: there is no such folder; make it, with job folders")
    jobs = [_Job(path, settings) for path in find_jobs(settings.inbox)]
    reports = tuple(job.run(on_event or ignore) for job in jobs)
    seconds = time.monotonic() - start
    report, page = write_report(settings.output / "nightly", datetime.now(UTC), reports, seconds)
    failed = [job for job in reports if job.status == "failed"]
    if failed:
        raise NightlyError(
            f"{len(failed)} of {len(reports)} jobs failed, first {failed[0].name}: "
            f"{failed[0].reason}; the night's report is {page}"
        )
    return NightlyResult(reports, report, page, seconds)


def find_jobs(inbox: Path) -> list[Path]:
    """The job folders and measurement stores of an inbox; what is being written is left out."""
    return sorted(
        path
        for path in inbox.iterdir()
        if path.is_dir() and not path.is_symlink() and not _is_draft(path)
    )


@dataclass
class _Job:
    """One folder of the inbox and what is to be done with it tonight."""

    path: Path
    settings: NightlySettings
    waiting: int = field(default=0, init=False)
    known: int = field(default=0, init=False)

    @property
    def output(self) -> Path:
        return self.settings.output / self.path.name.removesuffix(".zarr")

    def run(self, on_event: EventHandler) -> JobReport:
        """Do the job; its faults are its own and stop no other."""
        on_event(Event("step", 0, 0, f"job {self.path.name}"))
        try:
            return self._restore(on_event)
        except (BadInputError, BadModelError, ValidationError) as error:
            return self._report("quarantined", reason=_sentence(error))
        except Exception as error:
            return self._report("failed", reason=f"{type(error).__name__}: {_sentence(error)}")

    def _restore(self, on_event: EventHandler) -> JobReport:
        if self.path.name.endswith(".zarr"):
            return self._restore_measurements(on_event)
        return self._restore_images(on_event)

    def _restore_measurements(self, on_event: EventHandler) -> JobReport:
        from flows.store import Measurements

        store = Measurements(self.path)
        ledger = _Ledger(self.settings.output)
        if ledger.knows(store.content_digest):
            self.known = len(store.entries())
            return self._report("nothing new")
        domains = sorted({entry.record.domain for entry in store.entries()})
        if len(domains) != 1:
            raise BadInputError(
                f"{self.path}: it holds measurements of {len(domains)} domains, and each has a "
                "model of its own: write a store for each"
            )
        result = self._call(self.path, domains[0], {}, on_event)
        ledger.note(store.content_digest, "restored")
        return self._report("restored", result=result)

    def _restore_images(self, on_event: EventHandler) -> JobReport:
        job = self._read_job()
        instructions = self._instructions(job)
        ledger = _Ledger(self.settings.output)
        new: dict[str, Path] = {}
        for path in self._images(job):
            if not self._settled(path):
                self.waiting += 1
                continue
            digest = file_digest(path)
            if ledger.knows(digest, instructions):
                self.known += 1
            else:
                new.setdefault(digest, path)
        if not new:
            return self._report("nothing new")
        with _staged(new, self.settings.output) as folder:
            result = self._call(folder, job.domain, self._damage(job), on_event)
        taken = {entry.record.source_digest for entry in result.published}
        for digest in new:
            ledger.note(digest, "restored" if digest in taken else "quarantined", instructions)
        return self._report("restored", result=result)

    def _read_job(self) -> JobSettings:
        path = self.path / JOB_FILE
        if not path.is_file():
            raise BadInputError(f"{path}: there is no such file; say `domain: city`, `mask: masks`")
        return read_settings(JobSettings, path)

    def _damage(self, job: JobSettings) -> dict[str, object]:
        """The job's damage as restore's settings have it."""
        mask = job.mask
        if mask not in (None, "nodata"):
            mask = str(self.path / mask)
        kernel = None if job.kernel is None else self.path / job.kernel
        return {"mask": mask, "kernel": kernel, "scale": job.scale, "sigma_y": job.sigma_y}

    def _instructions(self, job: JobSettings) -> dict[str, object]:
        """All that says how a file is to be restored, by content."""
        digests = {str(p.relative_to(self.path)): file_digest(p) for p in self._tools(job)}
        return {**job.model_dump(mode="json"), "digests": digests}

    def _tools(self, job: JobSettings) -> list[Path]:
        """The files that tell of the damage: masks and kernel."""
        places = [self.path / p for p in (job.mask, job.kernel) if p not in (None, "nodata")]
        found = [p for place in places for p in ([place] if place.is_file() else place.rglob("*"))]
        return sorted(p for p in found if p.is_file())

    def _images(self, job: JobSettings) -> list[Path]:
        from domains.registry import load_domain

        suffixes = load_domain(job.domain).suffixes
        tools = set(self._tools(job))
        return sorted(
            path
            for path in self.path.rglob("*")
            if path.name.lower().endswith(suffixes)
            and path.is_file()
            and not path.is_symlink()
            and not _is_draft(path)
            and path not in tools
        )

    def _settled(self, path: Path) -> bool:
        """Whether nobody has touched the file for a while."""
        stat = path.stat()
        return time.time() - max(stat.st_mtime, stat.st_ctime) >= self.settings.settle_s

    def _call(
        self,
        source: Path,
        domain: str,
        damage: Mapping[str, object],
        on_event: EventHandler,
    ) -> RestoreResult:
        from flows.api_restore import restore

        settings = self.settings
        common = {"seed": settings.seed, "dtype": settings.dtype, "compute": settings.compute}
        return restore(
            RestoreSettings(
                input=source,
                output=self.output,
                model=_model(settings.model, domain),
                domain=domain if damage else None,
                **common,
                **damage,
            ),
            on_event=on_event,
        )

    def _report(
        self, status: Status, *, result: RestoreResult | None = None, reason: str = ""
    ) -> JobReport:
        restored = () if result is None else tuple(map(_figures, result.published))
        bad = () if result is None else tuple(Bad(q.item_id, q.reason) for q in result.quarantined)
        return JobReport(self.path.name, status, restored, bad, self.known, self.waiting, reason)


class _Ledger:
    """What was taken on earlier nights: a note a content, created once, never changed."""

    def __init__(self, output: Path) -> None:
        self._objects = LocalObjects(output / "nightly" / "seen")

    def knows(self, digest: str, instructions: Mapping[str, object] | None = None) -> bool:
        """Whether a content was taken under these instructions."""
        return self._objects.exists(self._key(digest, instructions))

    def note(
        self, digest: str, fate: str, instructions: Mapping[str, object] | None = None
    ) -> None:
        """Remember a content and its fate."""
        now = datetime.now(UTC).isoformat("T", "seconds")
        text = json.dumps({"sha256": digest, "fate": fate, "when": now})
        self._objects.create(self._key(digest, instructions), text.encode())

    @staticmethod
    def _key(digest: str, instructions: Mapping[str, object] | None) -> str:
        from flows.store_files import json_digest

        return f"{json_digest([digest, instructions])}.json"


@contextmanager
def _staged(files: Mapping[str, Path], output: Path) -> Iterator[Path]:
    """A folder of just these files, by hard link where that can be; gone afterwards."""
    output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".nightly-", dir=output))
    try:
        for path in files.values():
            target = folder / path.name
            if target.exists():  # the same name in another subfolder
                target = folder / f"{len(list(folder.iterdir()))}-{path.name}"
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_draft(path: Path) -> bool:
    """Whether the name says that the file or folder is hidden, or still being written."""
    return path.name.startswith(".") or path.name.endswith((".partial", ".part", ".tmp"))


def _model(model: str, domain: str) -> str:
    """The model of a job: the champion of its domain, unless another is named."""
    if model != "champion":
        return model
    if domain not in MODEL_NAMES:
        raise BadInputError(f"the domain {domain} has no champion of its own: name a --model")
    return f"models:/{MODEL_NAMES[domain]}@champion"


def _figures(entry: RestoredEntry) -> Figures:
    return Figures(
        item_id=entry.item_id,
        task=entry.task,
        method=entry.method,
        residual=entry.residual,
        exact_data=entry.exact_data,
        seconds=entry.seconds,
        model_digest=entry.model_digest,
    )


def _told(job: JobReport) -> str:
    counts = {
        "restored": len(job.restored),
        "quarantined": len(job.quarantined),
        "done before": job.num_known,
        "still being written": job.num_waiting,
    }
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return ", ".join(filter(None, [job.status if job.reason or not told else "", told, job.reason]))


def _sentence(error: Exception) -> str:
    """An error in one line; of a validation the first fault."""
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"])) or error.title
        return f"{JOB_FILE}: '{where}': {fault['msg'].lower()}"
    return " ".join(str(error).split())
