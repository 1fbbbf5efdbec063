"""One person in two contrasts, split by position: what guidance is trained and measured on.

T1 and T2 of the head of one person lie on one grid of 1 mm (ingest refuses others). Slices are
counted from the feet: 0 to 92 to learn from, every second of 96 to 106 to choose by and to measure
covariances on, six of 112 to 127 for the figures; what lies between the parts is used for nothing.
So all is said of one person, and of other slices of the same head. The shipped starter has seen T2
of the first part, and all of T1, though never as a guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from flows.api_data import ingest
from flows.config import IngestSettings

PARTS: dict[str, Sequence[int]] = {
    "train": range(93),
    "validation": range(96, 107, 2),
    "test": range(112, 128, 3),
}


def datasets(source: Path, folder: Path, *, guided: bool) -> dict[str, Path]:
    """Datasets of T2, with T1 as its guide or without, by part; made once.

    Args:
        source: folder of stroke_t1.nii.gz and stroke_t2.nii.gz.
        folder: to write into.
        guided: whether the items have their guide.
    """
    made = {}
    for part, slices in PARTS.items():
        for contrast in ("t1", "t2"):
            target = folder / "files" / part / contrast / "head.nii.gz"
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                cut(source / f"stroke_{contrast}.nii.gz", slices, target)
        made[part] = folder / f"{part}{'-guided' if guided else ''}.zarr"
        if not made[part].exists():
            files = folder / "files" / part
            ingest(
                IngestSettings(
                    source=files / "t2",
                    domain="mri",
                    output=made[part],
                    split=part,  # type: ignore[arg-type]  # the parts are named as splits are
                    guides={"t1": files / "t1"} if guided else {},
                )
            )
    return made


def cut(source: Path, slices: Sequence[int], target: Path) -> None:
    """Write evenly spaced slices of a NIfTI volume, where they lie."""
    image = nibabel.load(source)
    first, step = slices[0], slices[1] - slices[0]
    window = np.diag([1.0, 1.0, step, 1.0])
    window[2, 3] = first
    voxels = np.asarray(image.dataobj)[:, :, list(slices)]
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), image.affine @ window), target)
