"""Looking after an output: is it intact, what is garbage, what was given up.

    verify            every object hashed again, against what vouches for it
    gc                what nobody can need is removed
    quarantined       what was given up, and why
    retry_quarantined has it tried again

Each takes the output of `restore` or `evaluate`, or that of `nightly`, which holds one a job.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from domains.base import BadInputError
from flows.engine.events import EventHandler
from flows.engine.garbage import DAY_S, Collection, collect_garbage
from flows.engine.handed import FILES
from flows.engine.objects import open_objects
from flows.engine.publish import manifest_key, parse_manifest
from flows.engine.quarantine import Quarantined, list_quarantine, release
from flows.engine.receipt import Objects, get_sound, set_aside
from flows.engine.verify import Verification, verify_output
from flows.inbox import forget_notes
from flows.roots import Root
from flows.store import open_store
from flows.store_check import verify_store
from flows.store_files import has_manifest

_PARTS = ("manifests", "campaigns", "quarantine", ".work")
"""One of them is in every output of ours."""

_NIGHTLY = "nightly"


@dataclass(frozen=True)
class VerifyResult:
    """What was found in each output.

    Attributes:
        outputs: place below the path that was asked for ("." for itself) -> what was found.
        hidden: keys of damaged items whose manifests were set aside.
    """

    outputs: Mapping[str, Verification]
    hidden: tuple[str, ...] = ()

    @property
    def intact(self) -> bool:
        """Whether everything is as it should be."""
        return all(found.intact for found in self.outputs.values())


@dataclass(frozen=True)
class GcResult:
    """What was removed from each output, or would have been.

    Attributes:
        outputs: place below the path that was asked for ("." for itself) -> what was found.
        dry_run: nothing was removed.
    """

    outputs: Mapping[str, Collection]
    dry_run: bool


@dataclass(frozen=True)
class GivenUp:
    """Something in quarantine: its output, below the path that was asked for, and its record."""

    output: str
    entry: Quarantined


def verify(
    output: Root, *, hide_damaged: bool = False, on_event: EventHandler | None = None
) -> VerifyResult:
    """Hash everything that manifests and receipts name.

    Args:
        output: of `restore`, `evaluate` or `nightly`; or a dataset, or a store of measurements.
        hide_damaged: set the manifests of damaged items aside: readers no longer see these items,
            and the run that made them makes them again. Else nothing is changed.
        on_event: told of progress.

    Raises:
        BadInputError: if it is neither, or the manifest of a store is damaged.
    """
    if has_manifest(output):
        return VerifyResult({".": verify_store(open_store(output), on_event)})
    found, hidden = {}, []
    for place, objects in _outputs(output).items():
        found[place] = verify_output(objects, on_event)
        if hide_damaged:
            hidden += _hide(objects, found[place])
    return VerifyResult(found, tuple(hidden))


def gc(
    output: Root,
    *,
    dry_run: bool = False,
    min_age_s: float = DAY_S,
    on_event: EventHandler | None = None,
) -> GcResult:
    """Remove what nobody can need; see engine.garbage. Runs that are under way lose nothing.

    Args:
        output: of `restore`, `evaluate` or `nightly`.
        dry_run: find, and remove nothing.
        min_age_s: what is younger stays, by the store's own clock.
        on_event: told of each thing found.

    Raises:
        BadInputError: if it is no output of ours.
    """
    found = {
        place: collect_garbage(objects, min_age_s=min_age_s, dry_run=dry_run, on_event=on_event)
        for place, objects in _outputs(output).items()
    }
    return GcResult(found, dry_run)


def quarantined(output: Root) -> list[GivenUp]:
    """What was given up, the latest of each output first.

    Raises:
        BadInputError: if it is no output of ours.
    """
    return [
        GivenUp(place, entry)
        for place, objects in _outputs(output).items()
        for entry in list_quarantine(objects)
    ]


def retry_quarantined(output: Root, items: Sequence[str] = ()) -> list[GivenUp]:
    """Let the next run try what was given up as if for the first time.

    Args:
        output: of `restore`, `evaluate` or `nightly`.
        items: item ids, codes of files or beginnings of keys; none: everything in quarantine.

    Raises:
        BadInputError: if it is no output of ours, or something asked for is not in quarantine;
            what else was asked for is released all the same.
    """
    released: list[GivenUp] = []
    unknown = set(items)
    for place, objects in _outputs(output).items():
        entries, missing = release(objects, items)
        unknown &= set(missing)
        released += [GivenUp(place, entry) for entry in entries]
        if isinstance(output, Path):
            digests = {d for e in entries for d in (e.input_digest, e.source_digest) if d}
            forget_notes(output / place, digests)
    if unknown:
        raise BadInputError(
            f"{output}: '{min(unknown)}' is not in quarantine; `sashiko quarantine list` shows "
            "what is"
        )
    return released


def _outputs(root: Root) -> dict[str, Objects]:
    """The output itself, or those of the jobs of a nightly run."""
    places = {"."} if _is_output(open_objects(root)) else set()
    if isinstance(root, Path) and (root / _NIGHTLY).is_dir():
        jobs = [path for path in root.iterdir() if path.is_dir() and path.name != _NIGHTLY]
        places |= {path.name for path in jobs if _is_output(open_objects(path))}
    if not places:
        raise BadInputError(
            f"{root}: no output of ours; give the folder that `sashiko restore` wrote"
        )
    return {place: open_objects(_below(root, place)) for place in sorted(places)}


def output_places(root: Path) -> list[str]:
    """Where outputs lie below a folder: "." for itself, or the jobs of a nightly run.

    Raises:
        BadInputError: if there is none.
    """
    return list(_outputs(root))


def _below(root: Root, place: str) -> Root:
    return root / place if isinstance(root, Path) else root


def _is_output(objects: Objects) -> bool:
    return any(objects.exists(part) for part in _PARTS)


def _hide(objects: Objects, found: Verification) -> list[str]:
    """Set the manifests of damaged published items aside."""
    elsewhere = (".work/", f"{FILES}/")
    damaged = {
        d.key: d.manifest_sha256
        for d in found.damages
        if d.key and not d.file.startswith(elsewhere)
    }
    return [key for key, judged in damaged.items() if _set_aside(objects, key, judged)]


def _set_aside(objects: Objects, key: str, judged: str) -> bool:
    """Hide a manifest, unless a run put another in its place since it was judged."""
    name = manifest_key(key)
    data = get_sound(objects, name)
    if data is None:
        return objects.exists(name) and set_aside(objects, name, None)
    if judged and hashlib.sha256(data).hexdigest() != judged:
        return False
    if not judged and parse_manifest(data, key) is not None:
        return False
    return set_aside(objects, name, data)
