"""Reads MRI magnitude volumes: NIfTI and NRRD, in the scanner's arbitrary intensity units."""

from __future__ import annotations

from pathlib import Path

from domains import medical
from domains.base import Item

SUFFIXES = medical.SUFFIXES


def read(path: Path) -> Item:
    """Read one MRI volume; pixels (1 z h w), integers as stored, everything else float32.

    Raises:
        BadInputError: if the file cannot be used.
    """
    return medical.read_volume(path, "mri", "intensity")
