"""What makes a derived DICOM image of its source: identity, provenance, pixels as stored.

Private elements and what describes the old pixels (extremes, icons, signatures, times of creation)
are left out. Source: DICOM PS3.3, C.7.6.1 (general image), C.12.1 (SOP common), C.8.13 and C.8.15
(enhanced MR and CT).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domains import dicom
from domains.base import Array, BadInputError
from domains.dicom_grid import Frame

if TYPE_CHECKING:
    from pydicom import Dataset

EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
SERIES_NUMBERS_ON = 1000
"""Added to the source's SeriesNumber."""

SCHEME = "99SASHIKO"
_STALE = (
    "SmallestImagePixelValue", "LargestImagePixelValue", "SmallestPixelValueInSeries",
    "LargestPixelValueInSeries", "IconImageSequence", "InstanceCreationDate",
    "InstanceCreationTime", "MACParametersSequence", "DigitalSignaturesSequence",
    "DataSetTrailingPadding", "ReferencedImageEvidenceSequence",
)  # fmt: skip

_ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
_ENHANCED = (_ENHANCED_MR, "1.2.840.10008.5.1.4.1.1.2.1")
"""Classes whose ImageType has PRIMARY, whatever was done since."""

_OF_ORIGINALS = (
    "BulkMotionCompensationTechnique", "CoverageOfKSpace", "EchoPlanarPulseSequence",
    "EchoPulseSequence", "GeometryOfKSpaceTraversal", "MRAcquisitionType",
    "MultiPlanarExcitation", "NumberOfKSpaceTrajectories", "OversamplingPhase", "PhaseContrast",
    "PulseSequenceName", "RectilinearPhaseEncodeReordering", "SaturationRecovery",
    "SegmentedKSpaceTraversal", "SpectrallySelectedSuppression", "SteadyStatePulseSequence",
    "TimeOfFlightContrast",
)  # fmt: skip
"""What only original enhanced MR images state."""


@dataclass(frozen=True)
class Provenance:
    """Who made the pixels.

    Attributes:
        method: solver or baseline.
        version: of the product.
        model_digest: sha256; "" for classical methods.
    """

    method: str
    version: str
    model_digest: str = ""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Provenance:
        """Of the facts that a published item carries."""
        method = facts.get("method", "unknown")
        name = method.get("name", "unknown") if isinstance(method, Mapping) else method
        return cls(str(name), _version(), str(facts.get("model_digest") or ""))

    @property
    def sentence(self) -> str:
        """For DerivationDescription."""
        model = f", model sha256 {self.model_digest}" if self.model_digest else ", no model"
        return f"Restored by Sashiko {self.version}: {self.method}{model}. Estimated, not measured."


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sashiko")
    except PackageNotFoundError:
        return "unknown"


def derive(
    dataset: Dataset,
    sources: Sequence[Frame],
    series_uid: str,
    sop_uid: str,
    provenance: Provenance,
) -> None:
    """Turn a source's dataset into that of a derived image, its pixels left to be set."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID

    sop_class = dataset.SOPClassUID
    dataset.remove_private_tags()
    _delete(dataset, _STALE)
    _drop_overlays_in_pixels(dataset)
    kind = [str(v) for v in dataset.get("ImageType") or ()]
    enhanced = sop_class in _ENHANCED
    dataset.ImageType = ["DERIVED", "PRIMARY" if enhanced else "SECONDARY", *kind[2:]]
    dataset.SourceImageSequence = [_source(sop_class, frame.uid) for frame in sources]
    dataset.DerivationDescription = provenance.sentence
    before = list(dataset.get("ContributingEquipmentSequence") or ())
    dataset.ContributingEquipmentSequence = [*before, _equipment(provenance)]
    dataset.SOPInstanceUID, dataset.SeriesInstanceUID = sop_uid, series_uid
    dataset.SeriesNumber = int(dataset.get("SeriesNumber") or 0) + SERIES_NUMBERS_ON
    described = str(dataset.get("SeriesDescription") or "")
    dataset.SeriesDescription = f"{described[:53]} (restored)".strip()
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, UID(sop_uid)
    meta.TransferSyntaxUID = UID(EXPLICIT_LITTLE_ENDIAN)
    dataset.file_meta, dataset.preamble = meta, bytes(128)


def _delete(dataset: Dataset, names: Sequence[str]) -> None:
    for name in names:
        if name in dataset:
            del dataset[name]


def _drop_overlays_in_pixels(dataset: Dataset) -> None:
    """Overlays that lay in unused bits of the pixels are gone with these."""
    groups = {tag.group for tag in dataset.keys() if (tag.group & 0xFF01) == 0x6000}  # noqa: SIM118
    for group in groups:
        if (group, 0x3000) not in dataset:
            for element in dataset.group_dataset(group):
                del dataset[element.tag]


def _source(sop_class: str, uid: str) -> Dataset:
    from pydicom import Dataset as New

    source = New()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = sop_class, uid
    source.PurposeOfReferenceCodeSequence = [
        _code("121322", "DCM", "Source image for image processing operation")
    ]
    return source


def _equipment(provenance: Provenance) -> Dataset:
    from pydicom import Dataset as New

    equipment = New()
    equipment.PurposeOfReferenceCodeSequence = [_code("109103", "DCM", "Modifying Equipment")]
    equipment.Manufacturer = "Sashiko"
    equipment.ManufacturerModelName = "Sashiko"
    versions = [provenance.version, provenance.model_digest]
    equipment.SoftwareVersions = [v for v in versions if v]
    equipment.ContributionDescription = provenance.sentence
    return equipment


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    from pydicom import Dataset as New

    code = New()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def as_stored(values: Array, frame: Frame, dataset: Dataset, before: Array | None) -> Array:
    """Values as the source stores them, within its bits; what was padding stays padding.

    Args:
        values: (rows columns) restored.
        frame: whose rescale it is.
        dataset: of the source.
        before: the source's stored values on the same pixels, if they are.
    """
    limits = dicom.stored_of(frame.path, dataset)
    stored = np.rint((values.astype(np.float64) - frame.intercept) / frame.slope)
    stored = np.clip(stored, limits.low, limits.high).astype(np.int64)
    padding = dataset.get("PixelPaddingValue")
    if padding is None or before is None:
        return stored
    far = dataset.get("PixelPaddingRangeLimit", padding)
    low, high = sorted(_as_signed(int(value), limits) for value in (padding, far))
    padded = (before >= low) & (before <= high)
    beside = high + 1 if high < limits.high else low - 1
    stored = np.where(
        (stored >= low) & (stored <= high), beside, stored
    )  # no padding where none was
    return np.where(padded, before, stored)


def _as_signed(padding: int, limits: dicom.Stored) -> int:
    """A padding value as the pixels hold it: some scanners state signed ones without their sign."""
    if limits.signed and padding > limits.high:
        return padding - 2**limits.bits_allocated
    return padding


def set_pixels(dataset: Dataset, stored: Array) -> None:
    """Uncompressed pixels (frames rows columns) in the bits that the dataset states."""
    sign = "i" if int(dataset.get("PixelRepresentation") or 0) else "u"
    dtype = np.dtype(f"<{sign}{int(dataset.BitsAllocated) // 8}")
    data = stored.astype(dtype).tobytes()
    dataset.Rows, dataset.Columns = stored.shape[1:]
    dataset.HighBit = int(dataset.BitsStored) - 1
    if "PixelData" in dataset:
        del dataset["PixelData"]
    dataset.add_new(
        "PixelData", "OB" if dtype.itemsize == 1 else "OW", data + b"\0" * (len(data) % 2)
    )


def save(dataset: Dataset, target: Path) -> None:
    """Write a dataset, explicit VR little endian, its preamble zeros.

    Raises:
        BadInputError: if the source's own values cannot be written.
    """
    from pydicom import dcmwrite

    try:
        _to_little_endian(dataset)
        dcmwrite(target, dataset, enforce_file_format=True)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, NotImplementedError):
        raise BadInputError(
            f"{target.name}: the source's header holds values that DICOM cannot write; repair it"
        ) from None


def _to_little_endian(dataset: Dataset) -> None:
    """Turn round the words that pydicom keeps as bytes; it does so itself with all others."""
    swap = dataset.original_encoding[1] is False
    implicit, little, charset = False, True, dataset.original_character_set
    dataset.set_original_encoding(implicit, little, charset)
    for element in dataset.iterall():  # decoding each, for raw ones would be written as they were
        if swap and element.VR == "OW" and element.keyword != "PixelData" and element.value:
            element.value = np.frombuffer(element.value, ">u2").astype("<u2").tobytes()


def derive_groups(dataset: Dataset, series: str, provenance: Provenance) -> None:
    """Say in the functional groups, too, that frames are derived, and of what."""
    from pydicom import Dataset as New

    if dataset.SOPClassUID == _ENHANCED_MR:
        _delete(dataset, _OF_ORIGINALS)
    derivation = New()
    derivation.DerivationDescription = provenance.sentence
    derivation.DerivationCodeSequence = [_code("RESTORED", SCHEME, "Restored image")]
    derivation.SourceImageSequence = list(dataset.SourceImageSequence)
    if "SharedFunctionalGroupsSequence" not in dataset:
        return
    shared = dataset.SharedFunctionalGroupsSequence[0]
    shared.DerivationImageSequence = [derivation]
    dataset.SourceImageEvidenceSequence = [_evidence(dataset, series)]
    for group in (shared, *dataset.PerFrameFunctionalGroupsSequence):
        if group is not shared and "DerivationImageSequence" in group:
            del group.DerivationImageSequence
        for name in ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence"):
            for kind in group.get(name) or ():
                kind.FrameType = ["DERIVED", *list(kind.get("FrameType") or [""])[1:]]


def _evidence(dataset: Dataset, series: str) -> Dataset:
    """The source image by study and series, as enhanced images want it."""
    from pydicom import Dataset as New

    source, of_series, study = New(), New(), New()
    first = dataset.SourceImageSequence[0]
    source.ReferencedSOPClassUID = first.ReferencedSOPClassUID
    source.ReferencedSOPInstanceUID = first.ReferencedSOPInstanceUID
    of_series.SeriesInstanceUID, of_series.ReferencedSOPSequence = series, [source]
    study.StudyInstanceUID, study.ReferencedSeriesSequence = dataset.StudyInstanceUID, [of_series]
    return study
