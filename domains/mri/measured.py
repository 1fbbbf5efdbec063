"""A user's raw k-space as the measurement that it is: pre-whitened, its sampling found, scaled.

Nothing is assumed of the sampling but that it is Cartesian: lines along either axis, single points,
half a k-space (partial Fourier), or all of it. What is 0 in every coil was not measured.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from domains.base import Array, BadInputError, ItemRecord, Measurement
from domains.files import keyed_id
from domains.mri.degradations import scale_of
from domains.mri.kspace import RawScan, read_scan
from domains.mri.prewhitening import compressed, prewhiten

CHANNELS = ("magnitude", "phase")
"""Of the image: in the source's units, and in radians."""
LEAST_CENTRE = 5
"""Lines about the centre of k-space, in either direction, that sensitivities are estimated from."""


def measured(path: Path) -> Measurement:
    """Read raw k-space as a measurement of a complex image.

    Returns:
        y (z coils h w) complex64, pre-whitened, in the source's units; arrays["mask"] (z 1 h w);
        the record of an image of two channels, magnitude and phase. params["acceleration"] is
        the number of samples over that of measured ones.

    Raises:
        BadInputError: if the file cannot be used.
    """
    return measurement_of(read_scan(path), path)


def measurement_of(scan: RawScan, path: Path) -> Measurement:
    """The measurement of a scan; `path` is for messages.

    Raises:
        BadInputError: if the centre of k-space was not measured, or holds no signal.
    """
    k = scan.k if scan.rows is None else cropped_readout(path, scan.k, scan.rows)
    noise = None if scan.noise is None else scan.noise * scan.noise_gain
    white = compressed(prewhiten(k, noise))
    mask = (white.k != 0).any(axis=1, keepdims=True)
    z, coils, h, w = white.k.shape
    if coils > 1:
        _require_centre(path, mask)
    params = {
        "phase": "measured",
        "num_coils": coils,
        "num_source_coils": scan.k.shape[1],
        "acceleration": round(float(mask.size / mask.sum()), 2),
        "scale_q": scale_of(white.k),
    }
    return Measurement(
        record=_record(scan, (z, h, w)),
        task="given",
        operator="multi-coil" if coils > 1 else "fourier",
        params=params,
        noise={"kind": "gaussian", "sigma_y": white.sigma_y},
        y=white.k,
        arrays={"mask": mask},
    )


def cropped_readout(path: Path, k: Array, rows: int) -> Array:
    """The middle `rows` of an oversampled readout (along h), as a k-space of as many.

    A unitary transform, so that white noise stays white and as strong.

    Raises:
        BadInputError: if the readout was not measured in full wherever anything was.
    """
    sampled = (k != 0).any(axis=1)
    if (sampled.any(axis=1) != sampled.all(axis=1)).any():
        raise BadInputError(
            f"{path}: its oversampled readout was not measured in full; export it with all samples "
            "of the readout"
        )
    h = k.shape[-2]
    image = np.fft.ifft(k, axis=-2, norm="ortho")
    top = h // 2 - rows // 2
    kept = image[..., top : top + rows, :]
    cropped: Array = np.fft.fft(kept, axis=-2, norm="ortho").astype(np.complex64)
    return cropped * sampled.any(axis=1)[:, None, None, :]


def _record(scan: RawScan, size: tuple[int, int, int]) -> ItemRecord:
    return ItemRecord(
        item_id=keyed_id("mri", scan.digest, b""),
        domain="mri",
        shape=(len(CHANNELS), *size),
        dtype="float32",
        units="intensity",
        source_digest=scan.digest,
        source_format=scan.source_format,
        spacing_mm=scan.spacing_mm,
        affine=scan.affine,
        meta={"channels": list(CHANNELS), **_orientation(scan)},
    )


def _orientation(scan: RawScan) -> dict[str, str]:
    """The axes of the image as they lie: raw data have no orientation that is to be kept."""
    if scan.affine is None:
        return {}
    import nibabel

    return {"orientation": "".join(nibabel.aff2axcodes(np.array(scan.affine)))}


def _require_centre(path: Path, mask: Array) -> None:
    """Refuse scans of several coils whose sensitivities cannot be estimated from themselves."""
    from domains.mri.coils import centre_box

    for plane in mask[:, 0]:
        rows, columns = centre_box(plane)
        if min(rows, columns) < LEAST_CENTRE:
            raise BadInputError(
                f"{path}: only {rows} x {columns} samples about the centre of k-space were "
                f"measured without a gap; sensitivities need {LEAST_CENTRE} x {LEAST_CENTRE} or "
                "more: add the calibration lines to it"
            )
