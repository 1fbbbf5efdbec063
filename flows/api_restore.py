"""Restore measurements or damaged images: plan, compute, publish, hand over files.

    settings -> prepare -> RestoreJob: a plan, and the names of the files behind its items
             -> restore_window, for the whole plan or a window of it -> WindowResult
             -> collect -> RestoreResult

`restore` does all of it in one go; the Prefect flow calls the same steps with one task a window.
Nothing that is published already is computed again.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from domains.base import BadInputError
from domains.files import file_digest
from domains.registry import domain_names, require_domain
from flows.config import Home, RestoreSettings
from flows.damage import given_of
from flows.engine.account import RunAccount, add_accounts
from flows.engine.campaign import (
    CampaignError,
    CampaignResult,
    run_plan,
)
from flows.engine.event_log import new_run
from flows.engine.events import EventHandler, ignore
from flows.engine.executor import Executor, default_workers, make_executor
from flows.engine.fencing import driving
from flows.engine.handed import FILES
from flows.engine.memory import machine_bytes
from flows.engine.methods import require_methods
from flows.engine.objects import LocalObjects, StoreError, open_objects
from flows.engine.plan import ModelRef, Plan, make_plan, require_memory
from flows.engine.quarantine import Quarantined, record_quarantine
from flows.engine.ray_session import require_cluster
from flows.engine.restored import RestoredEntry
from flows.engine.worker import FailureKind
from flows.given import Given, local_images, remove_scratch, take_images
from flows.handover import hand_over, place_of
from flows.roots import Root, S3Root

INPUT_TASK = "given"

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""No item's file can be written."""


class NothingRestoredError(CampaignError):
    """Every item was given up, and not all of them for their data. Attributes: quarantined."""

    def __init__(self, reason: str, quarantined: Sequence[Quarantined]) -> None:
        super().__init__(reason)
        self.quarantined = tuple(quarantined)


@dataclass(frozen=True)
class RestoreJob:
    """A restoration that is planned; a context that keeps its measurements from other runs.

    Attributes:
        settings: as given.
        plan: what will be computed.
        given: the measurements, and the names of the files behind each item.
        rejected: files that could not be used.
        run: names its log of events; see event_log.
    """

    settings: RestoreSettings
    plan: Plan
    given: Given
    rejected: tuple[Quarantined, ...] = ()
    run: str = field(default_factory=new_run)

    def windows(self) -> list[Plan]:
        """The plan in windows of `settings.window_items` items."""
        return self.plan.windows(self.settings.window_items)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.given.release()


@dataclass(frozen=True)
class WindowResult:
    """What became of a window: the engine's account, the files, the items that have none."""

    campaign: CampaignResult
    files: tuple[Path, ...]
    unwritten: tuple[Quarantined, ...] = ()


@dataclass(frozen=True)
class RestoreResult:
    """What was restored.

    Attributes:
        output: root of the results.
        campaign: id of the campaign.
        published: items that readers can see now, new or from before.
        num_reused: how many of them had been published before.
        quarantined: files and items that could not be done, with reasons.
        files: in the formats of their sources; none where the output is on S3.
        num_blocks: of the plan.
        num_computed: blocks computed now.
        num_retries: attempts that failed and were made again.
        seconds: wall time of computing and publishing.
        num_unknown: files of the input that are of no kind the domain reads.
        remarks: (file, what its user should know) of files that were used.
        account: what it took; kept in OUTPUT/campaigns/CAMPAIGN/account-RUN.json too.
    """

    output: Root
    campaign: str
    published: tuple[RestoredEntry, ...]
    num_reused: int
    quarantined: tuple[Quarantined, ...]
    files: tuple[Path, ...]
    num_blocks: int
    num_computed: int
    num_retries: int
    seconds: float
    num_unknown: int = 0
    remarks: tuple[tuple[Path, str], ...] = ()
    account: RunAccount = field(default_factory=RunAccount)


def restore(settings: RestoreSettings, on_event: EventHandler | None = None) -> RestoreResult:
    """Restore everything in the input that is not restored yet.

    Args:
        settings: input, output, model, method, and who computes.
        on_event: told of progress.

    Raises:
        BadInputError: if nothing of the input can be used.
        CampaignError: if the run cannot go on; what is done is kept.
    """
    handler = on_event or ignore
    with prepare(settings, handler) as job, make_executor(settings.compute) as executor:
        return collect(job, [restore_window(job, job.plan, executor, handler)])


def plan(settings: RestoreSettings, on_event: EventHandler | None = None) -> Plan:
    """What `restore` would do, without doing it: nothing is left in the output.

    Raises:
        BadInputError: as restore.
    """
    with (
        TemporaryDirectory(prefix="sashiko-plan-") as scratch,
        prepare(settings, on_event or ignore, work=Path(scratch)) as job,
    ):
        return job.plan


def prepare(
    settings: RestoreSettings, on_event: EventHandler, *, work: Path | None = None
) -> RestoreJob:
    """Read what has to be read, resolve the model once, and plan.

    Args:
        settings: of the restoration.
        on_event: told of each file read.
        work: where the measurements of damaged images are made; default: in the output, or, if
            that is on S3, in the cache here (SASHIKO_CACHE), which workers elsewhere must see.

    Raises:
        BadInputError: if nothing of the input can be used, or a name stands for nothing.
        PlanRefusedError: if it needs more memory than the stated limit, or than this machine has.
    """
    domains = check_request(settings)  # before the images: what is mistyped is told at once
    model = _model(settings, domains)
    if work is None and settings.compute.ray_address is not None:
        require_cluster(settings.compute.ray_address)
    given = _measurements(settings, work or _scratch(settings.output), on_event)
    try:
        planned = _plan(settings, given, model)
    except BaseException:
        given.withdraw()
        raise
    rejected = tuple(
        Quarantined(
            r.code,
            INPUT_TASK,
            "",
            r.reason,
            input_digest=file_digest(r.source),
            source_digest=r.digest,
            source=r.source,
        )
        for r in given.rejected
    )
    return RestoreJob(settings, planned, given, rejected)


def _plan(settings: RestoreSettings, given: Given, model: ModelRef | None) -> Plan:
    """The plan, refused if it needs more memory than there is."""
    compute = settings.compute
    planned = make_plan(
        given.path,
        settings.output,
        settings.method,
        model,
        seed=settings.seed,
        dtype=settings.dtype,
        device_class="cuda" if compute.num_gpus_per_worker > 0 else "cpu",
        block_size=settings.block_size,
        slices_per_block=settings.slices_per_block,
        batch_px=settings.batch_px,
        along_z=settings.along_z,
        num_lanes=compute.lanes,
        num_workers=_num_workers(settings),
        memory_limit_bytes=compute.memory_limit_bytes,
    )
    if given.scratch is not None:
        planned = replace(planned, scratch_bytes=_num_bytes(given.path))
    if compute.memory_limit_bytes is None and compute.ray_address is None:
        more = "restore smaller images or on a larger machine"
        require_memory(planned, machine_bytes(), "this machine has", more)
    return planned


def _num_bytes(measurements: Root) -> int:
    """Of all arrays of a store."""
    from flows.store import Measurements

    return sum(entry.num_bytes for entry in Measurements(measurements).entries())


def restore_window(
    job: RestoreJob, window: Plan, executor: Executor, on_event: EventHandler
) -> WindowResult:
    """Compute and publish a window of the plan, and write its files.

    Args:
        job: of prepare.
        window: the job's plan or one of its windows.
        executor: computes; stays open.
        on_event: told of progress.
    """
    campaign = run_plan(
        window,
        executor,
        on_event,
        max_attempts=job.settings.compute.max_attempts,
        max_runs=job.settings.compute.max_runs,
        run=job.run,
    )
    if not isinstance(window.output, Path):  # tools outside do not ask manifests what is whole
        return WindowResult(campaign, ())
    with driving(open_objects(window.output), window.campaign):
        files, unwritten = _hand_over(job, window.output, campaign.published)
    return WindowResult(campaign, files, unwritten)


def _hand_over(
    job: RestoreJob, output: Path, published: Sequence[RestoredEntry]
) -> tuple[tuple[Path, ...], tuple[Quarantined, ...]]:
    """Write the files of what is published; returns them, and the items that have none."""
    files: list[Path] = []
    unwritten: list[Quarantined] = []
    said = given_of(job.settings)
    for entry in published:
        places = job.given.names.get(entry.item_id) or (place_of(entry),)
        try:
            files += hand_over(output, entry, places, job.given.sources.get(entry.item_id), said)
        except BadInputError as error:
            unwritten.append(_unwritten(entry, str(error), "input"))
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise
            unwritten.append(_unwritten(entry, _told(error), "io"))
    return tuple(files), tuple(unwritten)


def _unwritten(entry: RestoredEntry, reason: str, kind: FailureKind) -> Quarantined:
    reason = f"restored, but not written as a file: {reason}"
    digest = entry.record.source_digest
    return Quarantined(
        entry.item_id,
        entry.task,
        entry.method,
        reason,
        key=entry.key,
        source_digest=digest,
        kind=kind,
    )


def _told(error: OSError) -> str:
    """What the system said, without names of files, which may tell of people."""
    said = error.strerror or type(error).__name__
    return (
        f"{said} at its place in {FILES}/; give the source another name, or move away what is "
        "there, and run it again"
    )


def collect(job: RestoreJob, results: Sequence[WindowResult]) -> RestoreResult:
    """The account of all windows.

    Raises:
        BadInputError: if nothing was restored because nothing of the input can be used.
        CampaignError: if nothing was restored for another reason.
    """
    _record_rejected(job)
    campaigns = [result.campaign for result in results]
    account = _record_account(job, campaigns)
    quarantined = [q for campaign in campaigns for q in campaign.quarantined]
    published = tuple(entry for campaign in campaigns for entry in campaign.published)
    if not published and quarantined:
        first = f"{quarantined[0].item_id}: {quarantined[0].reason}"
        if all(q.kind == "input" for q in quarantined):
            raise BadInputError(f"nothing could be restored: {first}")
        every = (*job.rejected, *quarantined)
        raise NothingRestoredError(f"nothing could be restored: {first}", every)
    unwritten = [q for result in results for q in result.unwritten]
    _remove_scratch(job, published)
    return RestoreResult(
        output=job.settings.output,
        campaign=job.plan.campaign,
        published=published,
        num_reused=sum(len(campaign.reused) for campaign in campaigns),
        quarantined=(*job.rejected, *quarantined, *unwritten),
        files=tuple(file for result in results for file in result.files),
        num_blocks=sum(campaign.num_blocks for campaign in campaigns),
        num_computed=sum(campaign.num_computed for campaign in campaigns),
        num_retries=sum(campaign.num_retries for campaign in campaigns),
        seconds=sum(campaign.seconds for campaign in campaigns),
        num_unknown=job.given.num_unknown,
        remarks=job.given.remarks,
        account=account,
    )


def _measurements(settings: RestoreSettings, work: Path, on_event: EventHandler) -> Given:
    """The store to restore from: the input itself, or one made of damaged images."""
    from flows.store import Measurements, open_store
    from flows.store_files import has_manifest

    said = (settings.mask, settings.kernel, settings.scale, settings.scale_z, settings.damage)
    damaged = any(p is not None for p in said)
    if not has_manifest(settings.input):
        return take_images(settings, work, on_event)
    store = open_store(settings.input)
    if not isinstance(store, Measurements):
        raise BadInputError(
            f"{settings.input}: holds clean items, not measurements; make some with "
            "`sashiko simulate`, or give a folder of damaged images"
        )
    if damaged or settings.guides:
        raise BadInputError(
            f"{settings.input}: measurements say themselves what is missing, and hold the guides "
            "that they were made with; leave out --mask, --kernel, --scale, --scale-z, --damage "
            "and --guide"
        )
    return Given(settings.input)


def check_request(settings: RestoreSettings) -> set[str]:
    """Refuse an input, a domain, a method or an output that is of no use, before anything is read.

    Returns:
        Whose images they are, as far as that can be told before any is read.

    Raises:
        BadInputError: naming it.
    """
    from flows.store_files import has_manifest

    _require_apart(settings)
    _require_answers(settings)
    measured = has_manifest(settings.input)
    if not measured:
        local_images(settings)
    if settings.domain is not None:
        require_domain(settings.domain)
    elif not measured:
        known = ", ".join(domain_names())
        raise BadInputError(
            f"{settings.input}: images need --domain, to say what they are: one of {known}"
        )
    domains = _domains(settings)
    if settings.method is not None and "name" in settings.method.model_fields_set and domains:
        require_methods([settings.method.name], sorted(domains))
    if isinstance(settings.output, Path):
        _require_links(settings.output)
    return domains


def _require_apart(settings: RestoreSettings) -> None:
    """Refuse to write results among what they are made of."""
    from flows.store_files import MANIFEST

    given, output = (
        root.resolve() if isinstance(root, Path) else root
        for root in (settings.input, settings.output)
    )
    if given == output:
        raise BadInputError(
            f"{settings.output}: this is the input too, and results would be restored again with "
            "it; choose another --output"
        )
    if isinstance(output, Path):
        for folder in output.parents:
            if (folder / MANIFEST).is_file() and _is_store(folder):
                raise BadInputError(
                    f"{settings.output}: it lies inside the store {folder}, and stores never "
                    "change; choose an --output beside it"
                )


def _is_store(folder: Path) -> bool:
    """Whether there is a manifest of ours, whole or damaged, and no other program's."""
    from flows.store_files import MANIFEST

    return '"sashiko-' in (folder / MANIFEST).read_text(encoding="utf-8", errors="replace")


def _require_links(output: Path) -> None:
    """Refuse an output in which nothing can be created whole and once.

    Raises:
        BadInputError: saying so.
    """
    try:
        LocalObjects(output).require_links()
    except StoreError as error:
        raise BadInputError(str(error)) from error


def _require_answers(settings: RestoreSettings) -> None:
    """Ask the buckets of a request for something, before anything is read or computed."""
    from flows.engine.s3_objects import S3Objects

    for root in (settings.input, settings.output):
        if isinstance(root, S3Root):
            try:
                S3Objects(root, rounds=2).names("manifests")  # whoever waits here is a person
            except OSError as error:
                raise BadInputError(str(error)) from error


def _scratch(output: Root) -> Path:
    """Where the measurements of damaged images are made until they are restored."""
    return output / ".work" if isinstance(output, Path) else Home().cache.resolve() / "given"


def _model(settings: RestoreSettings, domains: set[str]) -> ModelRef | None:
    """The model, resolved once; None where a classical method needs none."""
    from diffusion_core.posterior import METHODS

    method = settings.method
    if method is not None and (method.kind == "baseline" or method.name not in METHODS):
        return None
    from flows.registry import resolve_model

    found = resolve_model(settings.model, domains)
    return ModelRef(str(found.path), found.digest, found.name, found.version)


def _domains(settings: RestoreSettings) -> set[str]:
    """Whose images they are, as far as that can be told before any is read."""
    from flows.store import Measurements, open_store
    from flows.store_files import has_manifest

    if settings.domain is not None or not has_manifest(settings.input):
        return {settings.domain} - {None}  # type: ignore[return-value]
    store = open_store(settings.input)
    entries = store.entries() if isinstance(store, Measurements) else []
    return {entry.record.domain for entry in entries}


def _num_workers(settings: RestoreSettings) -> int:
    compute = settings.compute
    if compute.executor == "inline":
        return 1
    return compute.num_workers or default_workers(compute.num_gpus_per_worker)


def _remove_scratch(job: RestoreJob, published: Sequence[RestoredEntry]) -> None:
    """Remove the measurements made of images, once nothing is left to restore and no run of them.

    Who stops with something left, or first of several, leaves them to the others, or to gc.
    """
    job.given.release()
    left = {item.key for item in job.plan.items} - {entry.key for entry in published}
    if job.given.scratch is not None and not left:
        remove_scratch(job.given.scratch)


def _record_account(job: RestoreJob, campaigns: Sequence[CampaignResult]) -> RunAccount:
    """The account of all windows and of the files left out, kept beside the log of events."""
    account = add_accounts(campaign.account for campaign in campaigns)
    account = replace(account, num_quarantined=account.num_quarantined + len(job.rejected))
    values = {**asdict(account), "megapixels_per_s": account.megapixels_per_s}
    key = f"campaigns/{job.plan.campaign}/account-{job.run}.json"
    open_objects(job.settings.output).create(key, (json.dumps(values, indent=1) + "\n").encode())
    return account


def _record_rejected(job: RestoreJob) -> None:
    """Keep why files were left out."""
    objects = open_objects(job.settings.output)
    for entry in job.rejected:
        record_quarantine(objects, entry)
