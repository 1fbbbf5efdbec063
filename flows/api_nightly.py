"""`sashiko nightly`: restore what is new in an inbox, measure what can be, and report.

    INBOX/JOB/job.yaml         domain: city, and one of mask: FOLDER, kernel: FILE, scale: 4
    INBOX/JOB/*                damaged images
    INBOX/JOB.zarr             measurements; no job.yaml needed
    OUTPUT/JOB/                what `sashiko restore` makes of them
    OUTPUT/nightly/seen/       the ledger: one note a file, by digest of content and instructions
    OUTPUT/nightly/TIME.json   the report of a night, and TIME.html: the same as a page

The inbox is only read. A file is new if its content has not been taken under the same
instructions: it does not matter which nights were missed, or which model did it. The files of a
DICOM series, or a raw scan and its header, are one: they are taken together, once all of them have
settled. What is still being written is left for the next night. What cannot be used is quarantined
with a reason, once; what failed for another reason (its worker died, the disk failed) is tried
again on the next nights, `max_runs` in all. `sashiko quarantine retry` has either tried again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from diffusion_core.model import BadModelError
from domains.base import BadInputError
from flows.answers import account_lines
from flows.api_restore import NothingRestoredError, RestoreResult, restore
from flows.config import NightlySettings, RestoreSettings
from flows.damage import place_below
from flows.engine.account import RunAccount
from flows.engine.events import Event, EventHandler, ignore
from flows.engine.plan import PlanRefusedError
from flows.engine.quarantine import Quarantined
from flows.engine.restored import RestoredEntry
from flows.inbox import JOB_FILE, PARTLY, JobFolder, Ledger, Scan, find_jobs, staged
from flows.mistakes import mistake_in
from flows.nightly_report import WAITING, finding, write_report
from flows.store import Measurements

Status = Literal["restored", "nothing new", "quarantined", "failed"]


class NightlyError(RuntimeError):
    """Some job failed for no fault of its input; the others are done and reported."""


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
    """An input that could not be used.

    Attributes:
        item: a code: names of files may tell of people, and reports and logs travel.
        reason: what is wrong with it, without its name.
    """

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
    account: RunAccount | None = None


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
        return bad + [
            Bad(j.name, j.reason) for j in self.jobs if j.status == "quarantined" and j.reason
        ]

    def summary(self) -> str:
        """The night in a few lines, without names of files."""
        lines = []
        for job in self.jobs:
            lines.append(f"{job.name}: {_told(job)}")
            if job.account is not None:
                lines += [f"  {line}" for line in account_lines(job.account)]
            lines += [f"  quarantined: {bad.item}: {bad.reason}" for bad in job.quarantined]
            if job.quarantined:
                lines.append(f"  find it with: {finding(job)}")
        return "\n".join([*(lines or ["the inbox is empty"]), f"report: {self.page}"])


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


@dataclass
class _Job:
    """One folder of the inbox and what is done with it tonight."""

    path: Path
    settings: NightlySettings
    waiting: int = field(default=0, init=False)
    known: int = field(default=0, init=False)

    def run(self, on_event: EventHandler) -> JobReport:
        """Do the job; its faults are its own and stop no other."""
        on_event(Event("step", 0, 0, f"job {self.path.name}"))
        try:
            if self.path.name.endswith(".zarr"):
                return self._restore_measurements(on_event)
            return self._restore_images(on_event)
        except (BadInputError, BadModelError, ValidationError) as error:
            return self._report("quarantined", reason=_sentence(error))
        except Exception as error:
            return self._report("failed", reason=f"{type(error).__name__}: {_sentence(error)}")

    def _restore_measurements(self, on_event: EventHandler) -> JobReport:
        store, ledger = Measurements(self.path), Ledger(self.settings.output, self.path.name)
        if ledger.knows(store.content_digest):
            self.known = len(store.entries())
            return self._report("nothing new")
        domains = sorted({entry.record.domain for entry in store.entries()})
        if len(domains) != 1:
            raise BadInputError(
                f"{self.path.name}: it holds measurements of {len(domains)} domains, and each has "
                "a model of its own: write a store for each"
            )
        result, given_up = self._outcome(self.path, self.settings.model, {}, on_event)
        if not any(self._comes_again(entry) for entry in given_up):
            ledger.note(store.content_digest, PARTLY if given_up else "restored")
        bad = tuple(Bad(entry.item_id, entry.reason) for entry in given_up)
        return self._report("quarantined" if result is None else "restored", result, bad)

    def _restore_images(self, on_event: EventHandler) -> JobReport:
        folder, ledger = JobFolder(self.path), Ledger(self.settings.output, self.path.name)
        new = self._new(folder, ledger)
        if not new:
            return self._report("nothing new")
        model = self.settings.model
        more = {"domain": folder.settings.domain, **folder.damage()}
        files = {file for scan in new for file in scan.files}
        with staged(files, self.path, self.settings.output) as stage:
            result, given_up, bad = self._restore_files(stage, new, model, more, on_event)
        published = () if result is None else result.published
        keys = {entry.key for entry in published}
        again = [q for q in given_up if self._comes_again(q)]
        # What is published and could not be handed over comes again too.
        taken = {entry.record.source_digest for entry in published}
        taken -= {q.source_digest for q in again if q.key in keys}
        # An image may be taken with one mask and refused with another.
        refused = {self.path / q.source.relative_to(stage) for q in given_up if q.source}
        waiting = {q.source_digest for q in again} - taken
        for scan in new:
            if scan.digest in waiting and scan.lead not in refused:
                continue  # nothing is wrong with it: the next night tries it again
            done = scan.digest in taken and scan.lead not in refused
            fate = "restored" if done else "quarantined"
            ledger.note(scan.digest, fate, folder.instructions(scan.lead))
        return self._report("restored" if published else "quarantined", result, bad)

    def _comes_again(self, entry: Quarantined) -> bool:
        """Whether another night may do what this one could not."""
        return entry.may_mend and entry.num_runs < self.settings.compute.max_runs

    def _restore_files(
        self,
        stage: Path,
        scans: Sequence[Scan],
        model: str,
        more: Mapping[str, Any],
        on_event: EventHandler,
    ) -> tuple[RestoreResult | None, tuple[Quarantined, ...], tuple[Bad, ...]]:
        """Restore the staged files; no result if nothing was restored.

        Returns what was given up too, and that for the report, without names.
        """
        reasons: dict[str, str] = {}

        def hear(event: Event) -> None:
            if event.kind == "quarantined":
                place, _, reason = event.message.partition(": ")
                reasons[place] = reason
            on_event(event)

        try:
            result, given_up = self._outcome(stage, model, more, hear)
        except PlanRefusedError:  # no fault of the files: another night, another machine
            raise
        except BadInputError as error:  # not one of them can be used as the job says
            whole = self._without_names(str(error).replace(f"{stage}/", ""), scans)
            bad = tuple(
                Bad(scan.code, reasons.get(place_below(scan.lead, self.path), whole))
                for scan in scans
            )
            return None, (), bad
        codes = {stage / scan.lead.relative_to(self.path): scan.code for scan in scans}
        of_content = {scan.digest: scan.code for scan in scans}
        told = tuple(
            Bad(
                (q.source and codes.get(q.source)) or of_content.get(q.source_digest, q.item_id),
                q.reason,
            )
            for q in given_up
        )
        return result, given_up, told

    def _new(self, folder: JobFolder, ledger: Ledger) -> list[Scan]:
        """What is to be done tonight; counts the rest."""
        new: list[Scan] = []
        for scan in folder.scans():
            if not scan.is_settled(self.settings.settle_s):
                self.waiting += 1
            elif ledger.knows(scan.digest, folder.instructions(scan.lead)):
                self.known += 1
            else:
                new.append(scan)
        return new

    def _without_names(self, text: str, scans: Sequence[Scan]) -> str:
        """The text with codes for names of files: reports and ledgers must not tell of people."""
        for scan in scans:
            for path in scan.files:
                place = str(path.relative_to(self.path))
                for name in (place, place.removesuffix(".gz").rpartition(".")[0]):
                    text = text.replace(name, scan.code) if len(name) > 2 else text
        return text

    def _outcome(
        self, source: Path, model: str, more: Mapping[str, Any], on_event: EventHandler
    ) -> tuple[RestoreResult | None, tuple[Quarantined, ...]]:
        """What was restored, None if nothing was; and what was given up."""
        try:
            result = self._call(source, model, more, on_event)
        except NothingRestoredError as error:
            return None, error.quarantined
        return result, result.quarantined

    def _call(
        self, source: Path, model: str, more: Mapping[str, Any], on_event: EventHandler
    ) -> RestoreResult:
        settings = self.settings
        wanted = RestoreSettings(
            input=source,
            output=settings.output / self.path.name.removesuffix(".zarr"),
            model=model,
            seed=settings.seed,
            dtype=settings.dtype,
            compute=settings.compute,
            **more,
        )
        return restore(wanted, on_event=on_event)

    def _report(
        self,
        status: Status,
        result: RestoreResult | None = None,
        quarantined: tuple[Bad, ...] = (),
        reason: str = "",
    ) -> JobReport:
        restored = () if result is None else tuple(map(_figures, result.published))
        return JobReport(
            name=self.path.name,
            status=status,
            restored=restored,
            quarantined=quarantined,
            num_known=self.known,
            num_waiting=self.waiting,
            reason=reason,
            account=None if result is None else result.account,
        )


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
        WAITING: job.num_waiting,
    }
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return ", ".join(filter(None, [job.status if job.reason or not told else "", told, job.reason]))


def _sentence(error: Exception) -> str:
    """An error in one line; of a validation the first fault."""
    if isinstance(error, ValidationError):
        return f"{JOB_FILE}: {mistake_in(error, None).sentence}"
    return " ".join(str(error).split())
