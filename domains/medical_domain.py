"""What the medical domains share as domains: DICOM beside NIfTI and NRRD, in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domains import dicom
from domains.base import Array, Domain, Item, ItemRecord, ReadBox


class MedicalDomain(Domain):
    """A domain whose volumes are NIfTI or NRRD files, or DICOM series.

    A DICOM file stands for the series that it and its neighbours in its folder make.
    """

    restores_slices = True

    def accepts(self, path: Path) -> bool:
        """By its suffix, or as DICOM whatever its name."""
        return super().accepts(path) or dicom.is_dicom(path)

    def gather(self, files: Sequence[Path]) -> list[Path]:
        """One file of each series."""
        from domains.dicom_series import leads

        return leads(files)

    def companions(self, path: Path) -> Sequence[Path]:
        """The other files of a DICOM series, the header of a NIfTI pair."""
        from domains.dicom_series import members_of
        from domains.medical import companions

        if not dicom.is_dicom(path):
            return companions(path)
        return [file for file in members_of(path) if file != path]

    def awaited(self, path: Path) -> Sequence[Path]:
        """Of a DICOM file all of its folder: a slice that is not there yet has no header to ask."""
        if not dicom.is_dicom(path):
            return self.companions(path)
        return [file for file in path.parent.iterdir() if file.is_file() and file != path]

    def as_measured(self, item: Item, record: ItemRecord) -> Item:
        """Cut along y where slices are missing or thick."""
        from domains.between_slices import as_measured

        return as_measured(item, record)

    def guide_views(self, record: ItemRecord, guide: Array) -> Sequence[Array]:
        """Along every axis that the volume is cut along."""
        from domains.views import orientations

        return orientations(guide, record.spacing_mm)

    def write_back(
        self, record: ItemRecord, read: ReadBox, stem: Path, source: Path, facts: Mapping[str, Any]
    ) -> Path | None:
        """Write what came from DICOM as a derived series."""
        from domains.dicom_derived import Provenance
        from domains.dicom_writer import write_series

        if record.source_format != "dicom":
            return None
        return write_series(record, read, stem, source, Provenance.of(facts))
