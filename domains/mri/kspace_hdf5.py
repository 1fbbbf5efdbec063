"""Raw k-space in HDF5: fastMRI's arrays here, ISMRMRD's acquisitions next door.

Headers name patients; nothing of them is kept but geometry.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

from domains.base import BadInputError
from domains.files import file_digest
from domains.hdf5 import MAX_HEADER_BYTES, own_dataset, require_lengths, require_stored
from domains.mri.kspace import RawScan, require_scan, transform_of_centred


@dataclass(frozen=True)
class Encoding:
    """What an ISMRMRD header says of the first encoding; (x, y, z) = readout, phase 1, phase 2.

    Attributes:
        trajectory: "cartesian" or another.
        matrix: samples of the encoded space.
        fov_mm: of the encoded space.
        recon_fov_mm: of the image that is wanted of it.
        centres: counters of the lines through the zero frequency (phase 1, phase 2).
        noise_bandwidth: relative receiver noise bandwidth.
    """

    trajectory: str
    matrix: tuple[int, int, int]
    fov_mm: tuple[float, float, float]
    recon_fov_mm: tuple[float, float, float]
    centres: tuple[int, int]
    noise_bandwidth: float = 1.0

    def rows(self, samples: int) -> int | None:
        """Rows of the image of a readout of so many samples, if it is oversampled."""
        share = self.recon_fov_mm[0] / self.fov_mm[0] if self.fov_mm[0] > 0 else 1.0
        rows = round(samples * share)
        return rows if 0 < rows < samples else None


def read_hdf5(path: Path) -> RawScan:
    """Read a fastMRI or ISMRMRD file.

    Raises:
        BadInputError: if it is neither, or cannot be used.
    """
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        kspace = own_dataset(path, file, "kspace")
        if kspace is not None:
            return _read_fastmri(path, file, kspace)
        for name in file:
            if isinstance(file.get(name, getlink=True), h5py.HardLink):
                group = file[name]
                if isinstance(group, h5py.Group) and {"xml", "data"} <= set(group):
                    from domains.mri.ismrmrd import read_ismrmrd

                    return read_ismrmrd(path, group)
    raise BadInputError(
        f"{path}: HDF5, but neither fastMRI (a data set 'kspace') nor ISMRMRD (a group with 'xml' "
        "and 'data'); convert it to one of these"
    )


def _read_fastmri(path: Path, file: Any, kspace: Any) -> RawScan:
    """(slices coils readout phase), or (slices readout phase) of one coil.

    Source: Zbontar et al. 2018 (arXiv:1811.08839), section 4; fastmri.med.nyu.edu.
    """
    if kspace.dtype.kind != "c" or kspace.ndim not in (3, 4):
        size = " x ".join(str(n) for n in kspace.shape)
        raise BadInputError(
            f"{path}: its 'kspace' has {kspace.dtype} numbers of {size}; fastMRI has complex ones "
            "of slices x coils x rows x columns"
        )
    z, *coils, h, w = kspace.shape
    require_scan(path, (z, *(coils or [1]), h, w))
    require_stored(path, kspace, kspace.nbytes)
    k = np.asarray(kspace[()]).reshape(z, -1, h, w).astype(np.complex64)
    xml = own_dataset(path, file, "ismrmrd_header")
    encoding = None if xml is None else read_encoding(path, xml)
    rows = spacing = None
    if encoding is not None:
        rows = encoding.rows(h)
        spacing = (encoding.fov_mm[2], encoding.fov_mm[0] / h, encoding.fov_mm[1] / w)
    return RawScan(
        transform_of_centred(k),
        "fastmri",
        file_digest(path),
        spacing_mm=spacing if spacing and min(spacing) > 0 else None,
        rows=rows,
    )


def read_encoding(path: Path, xml: Any) -> Encoding:
    """The first encoding of an ISMRMRD header, a data set of one text.

    Raises:
        BadInputError: if it is no such header.
    """
    if xml.size != 1 or max(xml.dtype.itemsize, xml.id.get_storage_size()) > MAX_HEADER_BYTES:
        raise BadInputError(f"{path}: its header is not one text; export it again")
    if xml.dtype.kind == "O":
        require_lengths(path, xml, {0: 1})
    value = np.asarray(xml[()]).ravel()[0]
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    if len(text) > MAX_HEADER_BYTES or "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise BadInputError(f"{path}: its header holds more than ISMRMRD has; export it again")
    try:
        return _encoding(ET.fromstring(text.split("?>", 1)[-1]))
    except (ET.ParseError, AttributeError, TypeError, ValueError) as error:
        raise BadInputError(
            f"{path}: its ISMRMRD header cannot be read; export it again"
        ) from error


def _encoding(root: ET.Element) -> Encoding:
    """Raises ValueError, TypeError or AttributeError where something is missing."""
    space = {"": root.tag[1:].split("}")[0]} if root.tag.startswith("{") else {}

    def text(where: str, default: str | None = None) -> str:
        found = root.findtext(where, default, space)
        if found is None:
            raise ValueError(where)
        return found

    def triple(where: str) -> tuple[float, float, float]:
        x, y, z = (float(text(f"encoding/{where}/{axis}")) for axis in "xyz")
        return x, y, z

    x, y, z = (int(n) for n in triple("encodedSpace/matrixSize"))

    def centre(step: int, length: int) -> int:
        where = f"encoding/encodingLimits/kspace_encoding_step_{step}/center"
        return int(text(where, str(length // 2)))

    bandwidth = "acquisitionSystemInformation/relativeReceiverNoiseBandwidth"
    return Encoding(
        trajectory=text("encoding/trajectory", "cartesian").strip().lower(),
        matrix=(x, y, z),
        fov_mm=triple("encodedSpace/fieldOfView_mm"),
        recon_fov_mm=triple("reconSpace/fieldOfView_mm"),
        centres=(centre(1, y), centre(2, z)),
        noise_bandwidth=float(text(bandwidth, "1")) or 1.0,
    )
