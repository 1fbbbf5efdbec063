"""DICOM for tests: real files of pydicom and pydicom-data, and series made after a real header."""

import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from flows.config import Home

OWN = Path(pydicom.__path__[0]) / "data" / "test_files"
CANARY = "Kanarienvogel^Hansi"
AXIAL = (1, 0, 0, 0, 1, 0)


def real_files():
    """Every file of pydicom and of pydicom-data that a DICOM reader would try."""
    data_store = pytest.importorskip("data_store", reason="pydicom-data is not installed")
    folders = (OWN, Path(data_store.__path__[0]) / "data")
    return [p for folder in folders for p in sorted(folder.rglob("*")) if p.is_file()]


@cache
def validator():
    """Path of dciodvfy, an independent validator of DICOM (Debian's dicom3tools).

    It is fetched once where Debian's packages can be had, unpacked and not installed.
    """
    own = Home().cache / "tools" / "dicom3tools"
    program = own / "usr/bin/dciodvfy"
    found = os.environ.get("DCIODVFY") or shutil.which("dciodvfy")
    if found is None and not program.is_file():
        reason = _fetch(own)
        if reason:
            pytest.skip(f"no dciodvfy: {reason}; install dicom3tools, or name it in DCIODVFY")
    return found or str(program)


def _fetch(folder):
    """Unpack Debian's package, whose hash apt checks; why that cannot be, "" if it is done."""
    if not all(map(shutil.which, ("apt-get", "dpkg"))):
        return "this system has no Debian packages"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        run = subprocess.run(
            ["apt-get", "download", "dicom3tools"],
            cwd=scratch, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        packages = list(Path(scratch).glob("*.deb"))
        if run.returncode or not packages:
            return "apt-get could not download its package"
        unpacked = Path(scratch) / "unpacked"
        subprocess.run(["dpkg", "-x", packages[0], unpacked], check=True)
        with suppress(OSError):  # another test process was first
            unpacked.rename(folder)
    return ""


def errors_of(path):
    """What the validator calls an error."""
    run = subprocess.run(
        [validator(), str(path)], capture_output=True, text=True, errors="replace", check=False
    )
    return {line for line in (run.stdout + run.stderr).splitlines() if line.startswith("Error")}


def header():
    """A real CT header, with a patient of our own."""
    dataset = pydicom.dcmread(OWN / "CT_small.dcm")
    dataset.PatientName, dataset.PatientID = CANARY, CANARY
    dataset.remove_private_tags()
    return dataset


def series(folder, values, *, step=(0.0, 0.0, 2.5), order=None, change=lambda k, ds: None):
    """Write slices (z rows columns) of stored values; names and numbers run against positions.

    Args:
        folder: to write into.
        values: stored values.
        step: from slice to slice, LPS mm.
        order: number of each slice's file and instance; default: backwards.
        change: what to alter in the dataset of slice k; False leaves the slice out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = header()
    count = len(values)
    for k, plane in enumerate(values):
        dataset = deepcopy(base)
        dataset.SOPInstanceUID = f"1.2.3.4.{k + 1}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.InstanceNumber = count - k if order is None else order[k]
        dataset.ImageOrientationPatient = list(AXIAL)
        dataset.ImagePositionPatient = [-20.0 + k * step[0], -30.0 + k * step[1], 7 + k * step[2]]
        dataset.SliceLocation = 7 + k * step[2]
        dataset.PixelSpacing = [0.8, 0.7]
        dataset.SliceThickness = 2.5
        dataset.Rows, dataset.Columns = plane.shape
        dataset.PixelData = plane.astype("<i2").tobytes()
        if "PixelPaddingValue" in dataset:
            del dataset.PixelPaddingValue
        if change(k, dataset) is not False:
            dataset.save_as(folder / f"IM{int(dataset.InstanceNumber):04d}")
    return folder


def stored_values(shape=(5, 20, 18), seed=0):
    return np.random.default_rng(seed).integers(-50, 2500, shape)
