"""Folders of a training run that are named by a step, and appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from diffusion_core.disk import sync

_NAME = re.compile(r"step-(\d{9})")


def step_folder(folder: Path, step: int) -> Path:
    """Where the folder of a step is, or will be."""
    return folder / f"step-{step:09d}"


def staging_for(final: Path) -> Path:
    """A new, empty folder beside `final`, to be filled and published.

    What a killed writer left half-written beside it is removed: a run has one writer.
    """
    for torn in final.parent.glob(".step-*.partial"):
        shutil.rmtree(torn, ignore_errors=True)
    staging = final.with_name(f".{final.name}.{os.getpid()}.partial")
    staging.mkdir(parents=True)
    return staging


def publish(staging: Path, final: Path) -> None:
    """Sync what is in `staging` and rename it to `final`, whatever was there."""
    for path in staging.iterdir():
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)
    sync(final.parent)


def folders_by_step(folder: Path) -> list[tuple[int, Path]]:
    """(step, its folder), in order of the steps; torn ones are not among them."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)
