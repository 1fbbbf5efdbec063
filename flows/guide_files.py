"""Guides as a user gives them: `--guide NAME=FILE|FOLDER`, a folder holding one for each image.

A guide belongs to the image that has its name, in the same subfolder; the kind of file may differ.
An image for which the folder holds none goes without, and it is said of how many that is so; a
folder that holds none for any image is a mistake. What a guide must be to serve an image says
domains/guides.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from domains.base import BadInputError, Item
from domains.files import file_digest
from flows.damage import place_below
from flows.engine.events import Event, EventHandler


@dataclass(frozen=True)
class Guides:
    """Where guides lie.

    Attributes:
        files: name -> place below its folder, without suffixes -> file; one file alone stands
            under None, and serves the one image that there is.
        roots: what was given.
    """

    files: Mapping[str, Mapping[str | None, Path]] = field(default_factory=dict)
    roots: tuple[Path, ...] = ()

    @classmethod
    def of(cls, given: Mapping[str, Path]) -> Guides:
        """Look for them.

        Raises:
            BadInputError: if a path holds no file.
        """
        files = {name: _files(name, path) for name, path in given.items()}
        return cls(files, tuple(path.resolve() for path in given.values()))

    def paths(self, place: str) -> dict[str, Path]:
        """Name -> file, of the guides of an image at a place below the input."""
        found = {n: files.get(place, files.get(None)) for n, files in self.files.items()}
        return {name: path for name, path in found.items() if path is not None}

    def read(self, place: str, read: Callable[[Path], Item]) -> dict[str, Item]:
        """The guides of an image.

        Args:
            place: of the image below the input.
            read: of a file.

        Raises:
            BadInputError: if one cannot be read; without its name, which is the image's.
        """
        guides = {}
        for name, path in self.paths(place).items():
            try:
                guides[name] = read(path)
            except BadInputError as error:
                reason = str(error).removeprefix(f"{path}: ")
                raise BadInputError(f"its guide '{name}': {reason}") from error
        return guides

    def digests(self, place: str) -> dict[str, str]:
        """Name -> sha256 of the file, of the guides of an image."""
        return {name: file_digest(path) for name, path in self.paths(place).items()}

    def holds(self, path: Path) -> bool:
        """Whether a file of the input is a guide, and so no image."""
        resolved = path.resolve()
        return any(resolved == root or root in resolved.parents for root in self.roots)

    def require(self, places: Sequence[str], on_event: EventHandler) -> None:
        """Say how many images go without a guide.

        Raises:
            BadInputError: if all of them do, or one file is given for several.
        """
        for name, files in self.files.items():
            if None in files and len(places) > 1:
                raise BadInputError(
                    f"{files[None]}: one guide '{name}' for {len(places)} images; give a folder "
                    "that holds one for each, of its name"
                )
            lacking = sum(name not in self.paths(place) for place in places)
            if lacking == len(places):
                root = self.roots[list(self.files).index(name)]
                raise BadInputError(
                    f"{root}: no file there has the name of an image; name the guides '{name}' "
                    "as the images are named, in the same subfolders"
                )
            if lacking:
                words = f"{lacking} of {len(places)} images have no guide '{name}': they go without"
                on_event(Event("warning", 0, 0, words))


def _files(name: str, path: Path) -> dict[str | None, Path]:
    if path.is_file():
        return {None: path}
    if not path.is_dir():
        raise BadInputError(f"{path}: there is no such guide '{name}'; check the path")
    found: dict[str | None, Path] = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            found.setdefault(place_below(file, path), file)
    if not found:
        raise BadInputError(f"{path}: holds no guides; put one there for each image, of its name")
    return found
