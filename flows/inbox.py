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
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from domains.base import BadInputError
from domains.files import file_digest
from domains.registry import load_domain
from flows.config import Settings, read_settings
from flows.damage import AUTO, NAMED, NODATA
from flows.engine.objects import LocalObjects
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
        if mask not in NAMED:
            mask = str(self.path / mask)
        kernel = None if job.kernel is None else self.path / job.kernel
        said = {"mask": mask, "kernel": kernel, "scale": job.scale, "sigma_y": job.sigma_y}
        return {**said, "noise": job.noise, "damage": job.damage, "exposure": job.exposure}

    def instructions(self, image: Path) -> dict[str, object]:
        """All that says how an image is to be restored, files by their content."""
        digests = [file_digest(path) for path in self._tools_of(image)]
        values = self.settings.model_dump(mode="json", exclude={"mask", "kernel"})
        if values["noise"] == "gaussian":
            del values["noise"]  # what was taken before there was another stays known
        for name in ("damage", "exposure"):
            if values[name] is None:
                del values[name]  # likewise
        nodata = self.settings.mask == NODATA
        auto = {"auto": True} if self.settings.mask == AUTO else {}
        return {**values, **auto, "nodata": nodata, "digests": digests}

    def images(self) -> list[Path]:
        """The files that the domain reads, without masks and kernel, drafts and links."""
        domain = load_domain(self.settings.domain)
        tools = {*self._common, *(p for masks in self._masks.values() for p in masks)}
        return sorted(
            path
            for path in self.path.rglob("*")
            if path.is_file()
            and not path.is_symlink()
            and not is_draft(path)
            and domain.accepts(path)
            and path not in tools
        )

    def _tools_of(self, image: Path) -> list[Path]:
        """The files that tell of one image's damage: its mask, or what serves all images."""
        return [*self._common, *self._masks.get(_bare(image.relative_to(self.path)), [])]

    @cached_property
    def _common(self) -> list[Path]:
        """A kernel, or a mask that is one file."""
        job = self.settings
        named = [self.path / p for p in (job.mask, job.kernel) if p not in NAMED]
        return [path for path in named if path.is_file()]

    @cached_property
    def _masks(self) -> dict[Path, list[Path]]:
        """The files of a folder of masks by their place in it, without suffix."""
        by_place: dict[Path, list[Path]] = {}
        folder = self.path / (self.settings.mask or NODATA)
        if self.settings.mask not in NAMED and folder.is_dir():
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
    """Whether nobody has touched the file for a while."""
    stat = path.stat()
    return time.time() - max(stat.st_mtime, stat.st_ctime) >= settle_s


def _bare(place: Path) -> Path:
    """A place without the suffixes of its file (.nii.gz counts as one)."""
    return place.with_name(Path(place.name.removesuffix(".gz")).stem)


def is_draft(path: Path) -> bool:
    """Whether the name says that the file or folder is hidden, or still being written."""
    return path.name.startswith(".") or path.name.endswith(_DRAFTS)
