"""A patient, planted in every header that has room, is found nowhere once all has been run."""

import gzip
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
import yaml
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy import ndimage

pytestmark = pytest.mark.prefect

NAME, NUMBER, BORN, ACCESSION = "Kanarienvogel^Zwitscher", "PID7781zw", "19310417", "ACC55zwit"
CANARIES = (NAME, "Kanarienvogel", "Zwitscher", NUMBER, BORN, ACCESSION)
FOLDER = "Distelfink_Paula"
"""A patient's name as a folder's: the person at the terminal may see it, no file of ours may."""

SIZE = (40, 36)


def slices(seed: int, depth: int = 3) -> np.ndarray:
    """(z h w) whole HU: a body with something in it, in air."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : SIZE[0] * 1j, -1 : 1 : SIZE[1] * 1j]
    texture = ndimage.gaussian_filter(rng.standard_normal((depth, *SIZE)), (0, 2, 2)) * 900
    return np.rint(np.where(np.hypot(y, x) < 0.8, texture + 40, -1000)).astype(np.int16)


def write_nifti(path: Path, seed: int) -> Path:
    image = nibabel.Nifti1Image(slices(seed).transpose(2, 1, 0), np.diag([-1.0, -1, 4, 1]))
    planted = {"descrip": NAME, "db_name": NUMBER, "aux_file": ACCESSION, "intent_name": BORN}
    for field, value in planted.items():
        image.header[field] = value.encode()
    comment = nibabel.nifti1.Nifti1Extension("comment", " ".join(CANARIES).encode())
    image.header.extensions.append(comment)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def write_nrrd(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "space": "left-posterior-superior",
        "space directions": np.diag([1.0, 1, 4]),
        "space origin": [0.0, 0, 0],
        "content": NAME,
        "PatientID": NUMBER,
        "born": BORN,
        "AccessionNumber": ACCESSION,
    }
    nrrd.write(str(path), slices(seed).transpose(2, 1, 0), header)
    return path


def write_dicom(folder: Path, seed: int) -> None:
    """One CT series, the patient in every element that commonly names one, and in a private one."""
    folder.mkdir(parents=True, exist_ok=True)
    series, study, frame = (generate_uid(entropy_srcs=[str(seed), part]) for part in "abc")
    for number, plane in enumerate(slices(seed)):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(number)])
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image = FileDataset(None, {}, file_meta=meta, preamble=NAME.ljust(128).encode())
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        image.SeriesInstanceUID, image.StudyInstanceUID = series, study
        image.FrameOfReferenceUID, image.Modality, image.InstanceNumber = frame, "CT", number + 1
        image.PatientName, image.PatientID, image.PatientBirthDate = NAME, NUMBER, BORN
        image.AccessionNumber, image.ReferringPhysicianName = ACCESSION, NAME
        image.StudyDescription = image.SeriesDescription = image.ImageComments = f"of {NAME}"
        image.StudyID, image.OtherPatientIDs, image.InstitutionName = NUMBER[:16], NUMBER, NAME
        image.add_new((0x0009, 0x0010), "LO", "PRIVATE")
        image.add_new((0x0009, 0x1001), "LO", NAME)
        image.ImagePositionPatient = [0, 0, 4.0 * number]
        image.ImageOrientationPatient, image.PixelSpacing = [1, 0, 0, 0, 1, 0], [1, 1]
        image.SliceThickness, image.RescaleSlope, image.RescaleIntercept = 4, 1, 0
        image.Rows, image.Columns, image.SamplesPerPixel = *SIZE, 1
        image.PhotometricInterpretation, image.PixelRepresentation = "MONOCHROME2", 1
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit, image.PixelData = 15, plane.tobytes()
        image.StudyDate = image.StudyTime = ""
        image.save_as(folder / f"{number}.dcm", enforce_file_format=True)


def plant(root: Path) -> None:
    """Scans of several patients to learn from, to restore, and broken ones that name theirs."""
    for seed in range(3):
        write_nifti(root / "train" / f"{FOLDER}_{seed}" / "scan.nii.gz", seed)
    write_dicom(root / "train" / f"{FOLDER}_d", 11)
    write_nrrd(root / "validation" / FOLDER / "scan.nrrd", 4)
    write_nifti(root / "broken" / "good.nii.gz", 5)
    write_dicom(root / "broken" / "series", 12)
    cut = write_nifti(root / "broken" / "cut.nii", 6)
    cut.write_bytes(cut.read_bytes()[:1500])
    bent = write_nrrd(root / "broken" / "bent.nrrd", 7)
    bent.write_bytes(bent.read_bytes().replace(b"encoding: gzip", b"encoding: " + NUMBER.encode()))
    (root / "broken" / "letter.nrrd").write_text(f"Dear {NAME}, born {BORN}")
    write_dicom(root / "broken" / "torn", 13)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in (root / "broken" / "torn").glob("*.dcm"):
            image = pydicom.dcmread(path)
            image.Rows, image.PatientBirthDate = 30000, f"{BORN}x{NAME}"
            image.save_as(path)


CODE = """
import json, sys
from flows import cli
codes = [cli.run(line) for line in json.loads(sys.argv[1])]
print(json.dumps(codes), file=sys.stderr)
"""

TRAINING = {
    "name": "own", "conditions": {"ct": 1.0}, "patch_size": 16, "batch_size": 4, "num_steps": 4,
    "network": {"widths": [8, 8], "depths": [1, 1], "num_features": 8}, "warmup_steps": 1,
    "dtype": "float32", "num_threads": 1, "compute": {"executor": "inline"},
    "register_as": ["sashiko-ct"], "picture_every_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """(folder that holds all that was made, what was printed)."""
    root = tmp_path_factory.mktemp("canary")
    sources, made = root / "sources", root / "made"
    plant(sources)
    made.mkdir()
    stores = [str(made / f"{split}.zarr") for split in ("train", "validation")]
    config = root / "train.yaml"
    config.write_text(yaml.safe_dump({**TRAINING, "data": stores, "output": str(made / "runs")}))
    ct, here = ["--domain", "ct"], ["--executor", "inline"]
    model = ["--model", made / "runs/own/model"]
    meas, page = made / "meas.zarr", made / "report"
    lines = [
        ["ingest", sources / "train", *ct, "--split", "train", "--to", stores[0]],
        ["ingest", sources / "validation", *ct, "--split", "validation", "--to", stores[1]],
        ["ingest", sources / "broken", *ct, "--to", made / "broken.zarr"],
        ["simulate", stores[1], "--task", "ct-sparse20", "--to", meas],
        ["train", config],
        ["promote", "sashiko-ct", "1"],
        ["restore", "--input", meas, "--output", made / "a", "--method", "kriging", *here],
        ["restore", "--input", sources / "broken", *ct, "--sigma-y", "0.1", "--output", made / "b",
         "--levels", "2", *model, *here],
        ["evaluate", "--input", sources / "validation", *ct, "--task", "ct-sparse20", "--method",
         "covprox", "--method", "fbp", *model, "--output", made / "c", "--report", page, *here],
        ["quarantine", "list", made / "b", "--json"],
        ["verify", made / "b"],
        ["inspect", sources / "broken", *ct, "--preview", made / "look.png"],
        ["inspect", meas, "--json"],
        ["view", made / "b"],
    ]  # fmt: skip
    env = {**os.environ, "SASHIKO_HOME": str(made / "home"), "SASHIKO_CACHE": str(made / "cache")}
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "SASHIKO_MLFLOW_URI"):
        env.pop(name, None)
    arguments = json.dumps([[str(word) for word in line] for line in lines])
    done = subprocess.run(
        [sys.executable, "-c", CODE, arguments],
        env=env, cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    codes = json.loads(done.stderr.splitlines()[-1])
    assert codes == [0, 0, 3, 0, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0], done.stderr
    return made, done.stdout + done.stderr


def texts(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file that was made, unpacked if it is packed; DICOM files are the patient's own."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if data[128:132] == b"DICM":
            continue
        yield path, gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def test_everything_has_run_and_left_its_databases(run):
    made, _ = run
    names = {path.name for path in made.rglob("*")}
    assert {"mlflow.db", "prefect.db", "index.html", "results.json", "zarr.json"} <= names
    assert list(made.glob("b/files/*.json"))
    assert list(made.glob("b/quarantine/*.json"))


def test_nothing_that_was_made_holds_the_patient(run):
    made, _ = run
    found = [
        f"{path.relative_to(made)}: {canary}"
        for path, data in texts(made)
        for canary in (*CANARIES, FOLDER)
        if canary.encode() in data or canary.encode("utf-16-le") in data
    ]
    assert not found


def test_no_file_is_named_after_the_patient(run):
    made, _ = run
    words = (*CANARIES, FOLDER)
    assert not [p for p in made.rglob("*") if any(w in str(p.relative_to(made)) for w in words)]


def test_nothing_that_was_printed_tells_of_what_headers_hold(run):
    assert not [canary for canary in CANARIES if canary in run[1]]


def test_the_search_finds_what_is_there(run, tmp_path):
    """The canary is not looked for in vain: packed or not, in a database or not."""
    import sqlite3

    (tmp_path / "a.gz").write_bytes(gzip.compress(f"x {NAME}".encode()))
    with sqlite3.connect(tmp_path / "b.db") as database:
        database.execute("create table runs (tag text)")
        database.execute("insert into runs values (?)", (NUMBER,))
    database.close()
    write_dicom(tmp_path / "series", 1)
    hits = {path.name for path, data in texts(tmp_path) for c in CANARIES if c.encode() in data}
    assert hits == {"a.gz", "b.db"}
