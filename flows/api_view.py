"""`sashiko view`: by which command each result opens in napari, 3D Slicer, ITK-SNAP or QGIS.

Results lie twice: as OME-Zarr, with a pyramid for planes of any size, and as files of their field.
Nothing is started here, and no viewer is needed to know how it would be.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domains.base import BadInputError
from flows.engine.handed import FILES
from flows.engine.restored import RestoredEntry, open_restored
from flows.roots import Root

VOLUMES = (".nii", ".nii.gz", ".nrrd")
FRAMES = (".mp4", ".avi", ".mov")


@dataclass(frozen=True)
class Viewable:
    """A result that can be opened.

    Attributes:
        item_id: of the item.
        task: that it was restored for.
        method: that restored it.
        path: what is opened.
        commands: viewer -> command line.
        given: what its user said to be wrong with it: setting -> value; {} where that is not kept.
    """

    item_id: str
    task: str
    method: str
    path: Path
    commands: Mapping[str, str]
    given: Mapping[str, Any] = field(default_factory=dict)


def view(output: Root) -> list[Viewable]:
    """How to open each result of an output.

    Args:
        output: of `restore`, `evaluate` or `nightly`, on this machine.

    Raises:
        BadInputError: if it is on S3, no output of ours, or holds no result.
    """
    from flows.api_upkeep import output_places
    from flows.store_files import has_manifest

    if not isinstance(output, Path):
        raise BadInputError(
            f"{output}: viewers open files of this machine; copy it first with `aws s3 sync`"
        )
    if has_manifest(output):
        raise BadInputError(
            f"{output}: a store of inputs, not of results; `sashiko inspect {output} --preview "
            "look.png` shows it"
        )
    found = [one for place in output_places(output) for one in _results(output / place)]
    if not found:
        raise BadInputError(f"{output}: nothing is restored there; run `sashiko restore` first")
    return found


def _results(output: Path) -> Iterator[Viewable]:
    if not (output / "manifests").is_dir():
        return
    files = _files_by_key(output)
    for entry in open_restored(output).items():
        zarr, own = Path(str(entry.path)), files.get(entry.key, [])
        command = _command("napari", zarr, "napari-ome-zarr")
        yield _viewable(entry, zarr, {"napari": command}, own[0][1] if own else {})
        for path, given in own:
            yield _viewable(entry, path, commands_for(path, entry.record.meta), given)


def _viewable(
    entry: RestoredEntry, path: Path, commands: Mapping[str, str], given: Mapping[str, Any]
) -> Viewable:
    return Viewable(entry.item_id, entry.task, entry.method, path, commands, given)


def _files_by_key(output: Path) -> dict[str, list[tuple[Path, Mapping[str, Any]]]]:
    """Key of an item -> its files for other tools, by the provenance beside them.

    With each goes what its user said to be wrong; older provenances do not say it.
    """
    found: dict[str, list[tuple[Path, Mapping[str, Any]]]] = {}
    for note in sorted((output / FILES).rglob("*.json")):
        try:
            told = json.loads(note.read_text())
            key, path = str(told["key"]), note.with_name(told["file"])
            given = dict(told.get("given", {}))
        except (ValueError, KeyError, TypeError):
            continue  # no provenance of ours
        if path.exists():
            found.setdefault(key, []).append((path, given))
    return found


def commands_for(path: Path, meta: Mapping[str, object]) -> dict[str, str]:
    """Viewer -> command line for a file, or a folder of them.

    Args:
        path: of the result: a file, the folder of a DICOM series, or one of volumes, as magnitude
            and phase are; these open together.
        meta: of its record: says whether a picture lies on the earth.
    """
    name = path.name.lower()
    first = _first_dicom(path)
    volumes = sorted(p for p in path.iterdir() if is_volume(p)) if path.is_dir() else [path]
    if first is not None:
        volumes = [first]
    if volumes and (first is not None or is_volume(volumes[0])):
        shown = [str(volume.absolute()) for volume in volumes]
        load = "; ".join(f"slicer.util.loadVolume({volume!r})" for volume in shown)
        more = ["-o", *shown[1:]] if shown[1:] else []
        return {
            "3D Slicer": f"Slicer --python-code {shlex.quote(load)}",
            "ITK-SNAP": shlex.join(["itksnap", "-g", shown[0], *more]),
        }
    if name.endswith(FRAMES):
        return {"FFmpeg": f"ffplay {shlex.quote(str(path.absolute()))}"}
    commands = {"napari": _command("napari", path)}
    if "geotiff" in meta:
        commands = {"QGIS": _command("qgis", path), **commands}
    return commands


def is_volume(path: Path) -> bool:
    """Whether a file is a volume by its name."""
    return path.name.lower().endswith(VOLUMES)


def _first_dicom(path: Path) -> Path | None:
    """The file itself if it is DICOM, or the first of a folder of such; None for anything else."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as stream:
            if stream.read(132)[128:] == b"DICM":
                return file
    return None


def _command(program: str, path: Path, plugin: str | None = None) -> str:
    words = [program, *(["--plugin", plugin] if plugin else []), str(path.absolute())]
    return shlex.join(words)


def installed(command: str) -> bool:
    """Whether the program of a command is found here."""
    return shutil.which(shlex.split(command)[0]) is not None
