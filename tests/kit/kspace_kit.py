"""Scans of which all is known, and the files that scanners and toolboxes make of them."""

from dataclasses import dataclass

import h5py
import ismrmrd
import ismrmrd.xsd
import numpy as np

from domains.mri.coils import coil_maps

SIGMA = 0.02


@dataclass(frozen=True)
class Scan:
    """A true image (h w) complex, its coils' sensitivities, and centred noisy k-space (c h w)."""

    image: np.ndarray
    maps: np.ndarray
    k: np.ndarray


def centred_fft(image):
    """The textbook transform: zero frequency and middle of the image at n // 2."""
    shifted = np.fft.ifftshift(image, axes=(-2, -1))
    return np.fft.fftshift(np.fft.fft2(shifted, norm="ortho"), axes=(-2, -1))


def head(h, w):
    """An off-centre ellipse with structure and a smooth phase: nothing is symmetric."""
    y, x = np.mgrid[:h, :w]
    v, u = (y - 0.45 * h) / (0.33 * h), (x - 0.55 * w) / (0.3 * w)
    inside = (1 + np.tanh((1 - np.hypot(v, u)) / 0.07)) / 2  # a camera's edge, not a step
    lesion = 0.8 * np.exp(-((v + 0.3) ** 2 + (u - 0.2) ** 2) / 0.06)
    body = inside * (1 + 0.3 * np.sin(6 * u) * np.cos(5 * v) + lesion)
    return body * np.exp(1j * (0.5 + 0.8 * u - 0.5 * v * u))


def scan(h=64, w=48, coils=4, sigma=SIGMA, seed=0, mixing=None):
    rng = np.random.default_rng(seed)
    image, maps = head(h, w), coil_maps(h, w, coils, rng).astype(complex)
    k = centred_fft(image * maps)
    noise = sigma * (rng.standard_normal(k.shape) + 1j * rng.standard_normal(k.shape))
    if mixing is not None:
        noise = np.einsum("ij,jhw->ihw", mixing, noise)
    return Scan(image, maps, k + noise)


def lines(w, step=2, centre=12):
    """Every `step`-th line, and the `centre` ones."""
    kept = np.zeros(w, bool)
    kept[::step] = True
    kept[w // 2 - centre // 2 : w // 2 + centre // 2] = True
    return kept


def write_bart(stem, k):
    """(coils x y) as BART lays it out: x fastest, then y, one of z, then coils."""
    coils, x, y = k.shape
    stem.with_suffix(".hdr").write_text(f"# Dimensions\n{x} {y} 1 {coils} 1 1 1 1\n# Creator\nme\n")
    k.astype(np.complex64).transpose(0, 2, 1).tofile(stem.with_suffix(".cfl"))
    return stem.with_suffix(".cfl")


def header(matrix, fov, recon_fov, name="CANARY^PATIENT"):
    """An ISMRMRD header with a patient's name in it."""
    xsd = ismrmrd.xsd

    def named(values):
        return dict(zip("xyz", values, strict=True))

    def limit(length):
        return xsd.limitType(minimum=0, maximum=length - 1, center=length // 2)

    def space(sizes, lengths):
        return xsd.encodingSpaceType(
            matrixSize=xsd.matrixSizeType(**named(sizes)),
            fieldOfView_mm=xsd.fieldOfViewMm(**named(lengths)),
        )

    limits = xsd.encodingLimitsType(
        kspace_encoding_step_1=limit(matrix[1]),
        kspace_encoding_step_2=limit(matrix[2]),
    )
    encoding = xsd.encodingType(
        encodedSpace=space(matrix, fov),
        reconSpace=space(
            [round(m * r / f) for m, r, f in zip(matrix, recon_fov, fov, strict=True)], recon_fov
        ),
        encodingLimits=limits,
        trajectory=xsd.trajectoryType("cartesian"),
    )
    experiment = xsd.experimentalConditionsType(H1resonanceFrequency_Hz=63_500_000)
    return xsd.ToXML(
        xsd.ismrmrdHeader(
            subjectInformation=xsd.subjectInformationType(patientName=name, patientID="CANARY-77"),
            experimentalConditions=experiment,
            encoding=[encoding],
        )
    )


def acquisition(samples, *, step1=0, step2=0, slice_=0, centre=None, flags=(), dwell=5.0, **idx):
    """A readout (coils n) as the reference library has it."""
    readout = ismrmrd.Acquisition.from_array(np.ascontiguousarray(samples, np.complex64))
    readout.center_sample = samples.shape[1] // 2 if centre is None else centre
    readout.idx.kspace_encode_step_1, readout.idx.kspace_encode_step_2 = step1, step2
    readout.idx.slice = slice_
    for name, value in idx.items():
        setattr(readout.idx, name, value)
    readout.sample_time_us = dwell
    readout.read_dir[:], readout.phase_dir[:], readout.slice_dir[:] = (
        (0, 1, 0),
        (1, 0, 0),
        (0, 0, 1),
    )
    readout.position[:] = (10.0, -20.0, 30.0 + 6.0 * slice_)
    for flag in flags:
        readout.set_flag(flag)
    return readout


def write_ismrmrd(path, acquisitions, xml):
    """A file by the reference library."""
    with ismrmrd.Dataset(str(path), "dataset") as dataset:
        dataset.write_xml_header(xml.encode())
        for readout in acquisitions:
            dataset.append_acquisition(readout)
    return path


def write_fastmri(path, k, xml=None):
    """(slices coils x y) as fastMRI lays it out, with its attributes."""
    with h5py.File(path, "w") as file:
        file["kspace"] = k.astype(np.complex64)
        if xml is not None:
            file["ismrmrd_header"] = xml
        file.attrs["patient_id"] = "CANARY-77"
    return path
