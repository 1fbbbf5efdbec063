"""The inbox of `sashiko nightly`: which folders are jobs, which files are new, what was taken.

The inbox is only read. A file that is still being written is left alone: it is hidden, named as a
draft, or was touched a moment ago. What was taken is noted by digest of content and instructions,
so that neither a new name nor a missed night matters.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from domains.base import BadInputError
from domains.files import code_of, file_digest, files_digest
from domains.registry import load_domain
from flows.config import Settings, read_settings
from flows.damage import NODATA, is_file
from flows.engine.objects import LocalObjects
from flows.given import files_of
from flows.store_files import json_digest

JOB_FILE = "job.yaml"
PARTLY = "partly"
"""Fate of a store of which some items are in quarantine."""

_DRAFTS = (".partial", ".part", ".tmp")


class JobSettings(Settings):
    """job.yaml: how the images of its folder are damaged."""

    domain: str
    mask: str | None = None
    kernel: Path | None = None
    scale: int | None = None
    scale_z: int | None = None
    sigma_y: float = 0.0
    noise: str = "gaussian"
    damage: str | None = None
    exposure: float | None = None


def find_jobs(inbox: Path) -> list[Path]:
    """The job folders and measurement stores of an inbox; what is being written is left out.

    Raises:
        BadInputError: if there is no inbox.
    """
    if not inbox.is_dir():
        raise BadInputError(f"{inbox}: there is no such folder; make it, with job folders")
    return sorted(
        path
        for path in inbox.iterdir()
        if path.is_dir() and not path.is_symlink() and not is_draft(path)
    )


@dataclass(frozen=True)
class Scan:
    """What is restored as one: an image, the files of a series, raw data with their geometry.

    Attributes:
        lead: the file that stands for it.
        files: all that it is made of, the lead first.
        awaited: what must lie still before it is read: these, its mask, and whatever may still
            become one of them.
    """

    lead: Path
    files: tuple[Path, ...]
    awaited: tuple[Path, ...]

    @cached_property
    def digest(self) -> str:
        """Of its content, whatever its files are called; as records have it."""
        return files_digest(self.files)

    @cached_property
    def code(self) -> str:
        """What stands for it in reports, and a person finds: see code_of."""
        return code_of(file_digest(self.lead))

    def is_settled(self, settle_s: float) -> bool:
        """Whether nobody has touched any of it for a while."""
        return all(is_settled(path, settle_s) for path in self.awaited)


class JobFolder:
    """A folder of damaged images with a job.yaml.

    Raises:
        BadInputError: if job.yaml is missing or unreadable, or a setting in it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        job_file = path / JOB_FILE
        if not job_file.is_file():
            raise BadInputError(
                f"{job_file}: there is no such file; write `domain: city` and `mask: masks` there"
            )
        self.settings = read_settings(JobSettings, job_file)

    def damage(self) -> dict[str, object]:
        """The job's damage as the settings of restore have it."""
        job, mask = self.settings, self.settings.mask
        if mask is not None and is_file(mask):
            mask = str(self.path / mask)
        kernel = None if job.kernel is None else self.path / job.kernel
        names = ("scale", "scale_z", "sigma_y", "noise", "damage", "exposure")
        return {"mask": mask, "kernel": kernel, **{name: getattr(job, name) for name in names}}

    def instructions(self, image: Path) -> dict[str, object]:
        """All that says how an image is to be restored, files by their content."""
        digests = [file_digest(path) for path in self._tools_of(image)]
        values = self.settings.model_dump(mode="json", exclude={"mask", "kernel"})
        # What was taken before there were others stays known.
        if values["noise"] == "gaussian":
            del values["noise"]
        for name in ("scale_z", "damage", "exposure"):
            if values[name] is None:
                del values[name]
        mask = self.settings.mask
        nodata = mask == NODATA
        named = {} if mask is None or nodata or is_file(mask) else {mask: True}
        return {**values, **named, "nodata": nodata, "digests": digests}

    def scans(self) -> list[Scan]:
        """What the domain reads, without masks and kernel, drafts and links; sorted."""
        domain = load_domain(self.settings.domain)
        tools = {*self._common, *(p for masks in self._masks.values() for p in masks)}

        def is_own(path: Path) -> bool:
            return is_plain(path) and path not in tools

        found = [p for p in self.path.rglob("*") if is_own(p) and domain.accepts(p)]
        scans = {}
        for lead in domain.gather(sorted(found)):
            files = tuple(filter(is_own, files_of(lead, domain)))
            around = (path for path in domain.awaited(lead) if path.is_file())
            awaited = {*files, *around, *self._tools_of(files[0])}
            scans[files[0]] = Scan(files[0], files, tuple(sorted(awaited)))
        return sorted(scans.values(), key=lambda scan: scan.lead)

    def _tools_of(self, image: Path) -> list[Path]:
        """The files that tell of one image's damage: its mask, or what serves all images."""
        return [*self._common, *self._masks.get(_bare(image.relative_to(self.path)), [])]

    @cached_property
    def _common(self) -> list[Path]:
        """A kernel, or a mask that is one file."""
        job = self.settings
        named = [self.path / p for p in (job.mask, job.kernel) if p is not None and is_file(p)]
        return [path for path in named if path.is_file()]

    @cached_property
    def _masks(self) -> dict[Path, list[Path]]:
        """The files of a folder of masks by their place in it, without suffix."""
        by_place: dict[Path, list[Path]] = {}
        folder = self.path / (self.settings.mask or NODATA)
        if is_file(self.settings.mask) and folder.is_dir():
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                by_place.setdefault(_bare(path.relative_to(folder)), []).append(path)
        return by_place


class Ledger:
    """What a job took on earlier nights: a note a content, created once, never changed."""

    def __init__(self, output: Path, job: str) -> None:
        self._objects, self._job = LocalObjects(output / "nightly" / "seen"), job

    def knows(self, digest: str, instructions: Mapping[str, object] | None = None) -> bool:
        """Whether a content was taken under these instructions."""
        return self._objects.exists(self._key(digest, instructions))

    def note(
        self, digest: str, fate: str, instructions: Mapping[str, object] | None = None
    ) -> None:
        """Remember a content and its fate."""
        now = datetime.now(UTC).isoformat("T", "seconds")
        text = json.dumps({"sha256": digest, "fate": fate, "when": now, "job": self._job})
        self._objects.create(self._key(digest, instructions), text.encode())

    def _key(self, digest: str, instructions: Mapping[str, object] | None) -> str:
        return f"{json_digest([self._job, digest, instructions])}.json"


def forget_notes(job_output: Path, digests: Collection[str]) -> int:
    """Forget what a job could not do, so that the next night takes it anew; returns how many notes.

    Args:
        job_output: of the job, beside the folder of the notes; need not be of a nightly run.
        digests: of the files that were given up. A store that was done in part is always forgotten.
    """
    forgotten = 0
    for path in (job_output.resolve().parent / "nightly" / "seen").glob("*.json"):
        note = json.loads(path.read_text(encoding="utf-8"))
        named = note.get("job", job_output.name).removesuffix(".zarr") == job_output.name
        if named and (note["fate"] == PARTLY or _is_given_up(note, digests)):
            path.unlink(missing_ok=True)
            forgotten += 1
    return forgotten


def _is_given_up(note: Mapping[str, str], digests: Collection[str]) -> bool:
    return note["fate"] == "quarantined" and note["sha256"] in digests


@contextmanager
def staged(files: Iterable[Path], root: Path, output: Path) -> Iterator[Path]:
    """A folder of just these files, at the places they have below `root`; gone afterwards.

    They are hard links where that can be, else copies.
    """
    output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".nightly-", dir=output))
    try:
        for path in files:
            target = folder / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                target.hardlink_to(path)
            except OSError:
                shutil.copyfile(path, target)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_settled(path: Path, settle_s: float) -> bool:
    """Whether nobody has touched the file for a while; what is gone was being renamed."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    return time.time() - max(stat.st_mtime, stat.st_ctime) >= settle_s


def _bare(place: Path) -> Path:
    """A place without the suffixes of its file (.nii.gz counts as one)."""
    return place.with_name(Path(place.name.removesuffix(".gz")).stem)


def is_plain(path: Path) -> bool:
    """Whether it is a file of its own, and no draft."""
    return path.is_file() and not path.is_symlink() and not is_draft(path)


def is_draft(path: Path) -> bool:
    """Whether the name says that the file or folder is hidden, or still being written."""
    return path.name.startswith(".") or path.name.endswith(_DRAFTS)
